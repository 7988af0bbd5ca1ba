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

Params = dict[str, Any]
"""Nested dict of float32 arrays."""


class TrainState(NamedTuple):
    """Everything that a step changes. Randomness is not stored: it derives from the seed and ``step``."""

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState


@dataclass(frozen=True)
class StateSpec:
    """Shape of a run's state before any array exists.

    graph: rebuilds the model around parameters, ``nnx.merge(graph, params)``.
    abstract: the state as ShapeDtypeStructs that carry their shardings.
    """

    graph: nnx.GraphDef[Any]
    abstract: TrainState

    @property
    def shardings(self) -> TrainState:
        """Where each array of the state lives."""
        return jax.tree.map(lambda x: x.sharding, self.abstract)


def state_spec(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> StateSpec:
    """Shapes and shardings of the state; allocates nothing."""
    graph, variables = nnx.split(abstract_model(config), nnx.Param)
    specs = parameter_specs(variables, mesh)

    def placed(x: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    whole = PartitionSpec()
    params = jax.tree.map(placed, nnx.to_pure_dict(variables), specs)
    # Moments live beside their parameters; counters are whole everywhere.
    opt_state = optax.tree_map_params(
        optimizer,
        placed,
        jax.eval_shape(optimizer.init, params),
        specs,
        transform_non_params=lambda x: placed(x, whole),
    )
    step: Any = placed(jax.ShapeDtypeStruct((), jnp.int32), whole)
    return StateSpec(graph, TrainState(step, params, opt_state))


def init_state(config: Config, optimizer: optax.GradientTransformation, spec: StateSpec) -> TrainState:
    """The state of step 0. Every device creates its own piece; the values do not depend on the mesh."""

    def init() -> TrainState:
        model = DualEncoder(config, rngs=nnx.Rngs(config.seed))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    # Runs once: on a CPU, optimising the random generators takes seconds and saves nothing.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(init, out_shardings=spec.shardings, compiler_options=options)()
