"""The training state, born divided over the mesh."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from llip_jax.config import Config
from llip_jax.models.dual_encoder import DualEncoder, abstract_model
from llip_jax.parallel.sharding import parameter_specs
from llip_jax.training.optimizer import rate_factors, trained_paths
from llip_jax.training.paths import Params, merged, part


class _Parts(NamedTuple):
    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState
    ema: Params | None = None


class TrainState(_Parts):
    """Everything that a step changes. Randomness is not stored: it derives from the seed and ``step``.

    params: all parameters, frozen ones too.
    opt_state: of the trained parameters.
    ema: moving average of the trained parameters, where ``train.ema_decay`` asks for one.
    """

    __slots__ = ()

    def _asdict(self) -> dict[str, Any]:
        """The parts that there are by name, as they are saved."""
        return {name: tree for name, tree in super()._asdict().items() if tree is not None}

    @property
    def evaluated_params(self) -> Params:
        """The parameters that evaluation and export use: averaged ones where there are."""
        return self.params if self.ema is None else merged(self.params, self.ema)


@dataclass(frozen=True)
class StateSpec:
    """Shape of a run's state before any array exists, and what a step changes of it.

    graph: rebuilds the model around parameters, ``nnx.merge(graph, params)``.
    abstract: the state as ShapeDtypeStructs that carry their shardings.
    trained: paths of the parameters that are not frozen.
    rate_factors: factors of their learning rates; None: all 1.
    """

    graph: nnx.GraphDef[Any]
    abstract: TrainState
    trained: frozenset[str]
    rate_factors: Params | None

    @property
    def shardings(self) -> TrainState:
        """Where each array of the state lives."""
        return jax.tree.map(lambda x: x.sharding, self.abstract)


def state_spec(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> StateSpec:
    """Shapes and shardings of the state; allocates nothing.

    Raises:
        ConfigError: patterns of ``train.frozen`` or ``optimizer.rates`` that do not fit the parameters.
    """
    graph, variables = nnx.split(abstract_model(config), nnx.Param)
    specs = parameter_specs(variables, mesh)

    def placed(x: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    whole = PartitionSpec()
    params = jax.tree.map(placed, nnx.to_pure_dict(variables), specs)
    paths = trained_paths(config.train.frozen, params)
    trained = part(params, paths)
    # Moments live beside their parameters; counters are whole everywhere.
    opt_state = optax.tree_map_params(
        optimizer,
        placed,
        jax.eval_shape(optimizer.init, trained),
        part(specs, paths),
        transform_non_params=lambda x: placed(x, whole),
    )
    step: Any = placed(jax.ShapeDtypeStruct((), jnp.int32), whole)
    ema = None if config.train.ema_decay is None else trained
    return StateSpec(graph, TrainState(step, params, opt_state, ema), paths, rate_factors(config, params, paths))


def init_state(config: Config, optimizer: optax.GradientTransformation, spec: StateSpec) -> TrainState:
    """The state of step 0. Every device creates its own piece; the values do not depend on the mesh."""

    def init() -> TrainState:
        model = DualEncoder(config, rngs=nnx.Rngs(config.seed))
        return _first_state(nnx.to_pure_dict(nnx.state(model, nnx.Param)), optimizer, spec)

    # Runs once: on a CPU, optimising the random generators takes seconds and saves nothing.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(init, out_shardings=spec.shardings, compiler_options=options)()


def state_from(params: Params, optimizer: optax.GradientTransformation, spec: StateSpec) -> TrainState:
    """The state of step 0 around given parameters (of NumPy or JAX), put where ``spec`` wants them."""
    placed = jax.device_put(params, spec.shardings.params)
    return jax.jit(lambda params: _first_state(params, optimizer, spec), out_shardings=spec.shardings)(placed)


def _first_state(params: Params, optimizer: optax.GradientTransformation, spec: StateSpec) -> TrainState:
    trained = part(params, spec.trained)
    # A copy: a step takes over the memory of all parts of the state, which none may share.
    ema = None if spec.abstract.ema is None else jax.tree.map(jnp.copy, trained)
    return TrainState(jnp.int32(0), params, optimizer.init(trained), ema)
