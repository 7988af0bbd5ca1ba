"""Fine-tuning: frozen parameters, rates of parts and layers, the moving average; each against plain arithmetic."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from run_helpers import call_on_devices, tiny_config

from llip_jax.config import CheckpointConfig, Config, ConfigError, MeshConfig
from llip_jax.objectives.objective import Forward, objective
from llip_jax.parallel.mesh import make_mesh
from llip_jax.training.checkpoints import Checkpoints
from llip_jax.training.optimizer import decayed, make_optimizer, rate_factors
from llip_jax.training.paths import by_path, nested
from llip_jax.training.progress import Progress
from llip_jax.training.state import StateSpec, TrainState, state_from, state_spec
from llip_jax.training.step import make_train_step, steering, step_inputs, stream_key

FAST = {"xla_backend_optimization_level": 0}
"""Compiles in half the time."""

Leaves = dict[str, np.ndarray]


def config_of(train: Mapping[str, Any], optimizer: Mapping[str, Any] | None = None) -> Config:
    """Two vision layers, one text layer, six steps."""
    return tiny_config(model={"vision.layers": 2}, train={"steps": 6, **train}, optimizer=optimizer or {})


def spec_of(config: Config) -> StateSpec:
    return state_spec(config, make_optimizer(config.optimizer, config.train.steps), make_mesh(config.mesh))


def random_params(spec: StateSpec, seed: int) -> Leaves:
    rng = np.random.default_rng(seed)
    return {
        path: rng.normal(path.endswith("scale"), 0.1, x.shape).astype(np.float32)
        for path, x in by_path(spec.abstract.params).items()
    }


def random_batches(config: Config, seed: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    n, side, length = config.train.batch_size, config.model.image_size, config.model.text.length
    return [
        {
            "image": rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8),
            "text": rng.integers(3, 300, (n, 1, length), dtype=np.int32),
            "text_mask": np.ones((n, 1, length), np.int32),
            "caption_weight": np.ones((n, 1), np.float32),
            "image_group": np.arange(n, dtype=np.int32),
            "text_group": np.arange(n, dtype=np.int32)[:, None],
            "replaced": np.zeros(n, np.int32),
        }
        for _ in range(config.train.steps)
    ]


class Trainer:
    """The compiled step of a configuration and a state to start from."""

    def __init__(self, config: Config, params: Leaves | None = None, devices: int = 1):
        self.mesh = make_mesh(config.mesh, jax.devices()[:devices])
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        self.spec = state_spec(config, optimizer, self.mesh)
        step = make_train_step(config, self.spec, optimizer)
        out = (self.spec.shardings, None)
        self.inputs = step_inputs(config, self.mesh)
        with jax.set_mesh(self.mesh):
            jitted = jax.jit(step, donate_argnums=0, out_shardings=out, compiler_options=FAST)
            self.compiled = jitted.lower(self.spec.abstract, self.inputs).compile()
            start = random_params(self.spec, 1) if params is None else params
            self.start = state_from(nested(start), optimizer, self.spec)

    def state(self) -> TrainState:
        """A copy of the first state, which a step may take over."""
        return jax.tree.map(jnp.copy, self.start)

    def step(self, state: TrainState, batch: Mapping[str, np.ndarray]) -> tuple[TrainState, dict[str, Any]]:
        columns = {**batch, **steering(len(batch["image"]))}
        return self.compiled(
            state, {name: jax.device_put(x, self.inputs[name].sharding) for name, x in columns.items()}
        )


def leaves(tree: Any) -> Leaves:
    return {path: np.asarray(x) for path, x in by_path(tree).items()}


@functools.cache
def gradient() -> Callable[[Leaves, Mapping[str, np.ndarray], int], Leaves]:
    """Gradient of the objective itself by every parameter."""
    config = config_of({})
    graph = spec_of(config).graph

    @functools.partial(jax.jit, compiler_options=FAST)
    @jax.grad
    def compiled(params: Any, batch: Any, step: Any) -> jax.Array:
        key = stream_key(config.seed, "patch_dropout", step)
        model = nnx.merge(graph, params)
        dropout = model.draw_dropout(config.train.batch_size, key)
        return objective(config.objective, Forward(model, batch, dropout, config.pair_scores, None))[0]

    def call(params: Leaves, batch: Mapping[str, np.ndarray], step: int) -> Leaves:
        return leaves(compiled(nested({path: x.astype(np.float32) for path, x in params.items()}), batch, step))

    return call


# Everything at once, against a plain loop.

PLAN = {"frozen": ("text/embedding", "vision/norm_*/bias"), "ema_decay": 0.3}
SETTINGS = {
    "learning_rate": 0.02,
    "warmup_steps": 2,
    "weight_decay": 0.3,
    "epsilon": 1e-3,
    "clip_norm": 1.0,
    "rates": {"pooler/query": 3.0, "pooler/*": 0.5, "bias": 2.0, "vision/transformer/*": 1.5},
    "layer_decay": 0.7,
}


def factor_by_hand(path: str, dimensions: int) -> Any:
    rates = {"pooler/query": 3.0, "bias": 2.0}
    if path in rates or path.startswith("pooler/"):
        return rates.get(path, 0.5)
    if path.startswith("vision/transformer/"):
        return 1.5 * np.array([0.49, 0.7]).reshape(-1, *[1] * (dimensions - 1))
    if path.startswith("text/transformer/"):
        return 0.7
    if path in ("vision/patch_kernel", "vision/tokens", "vision/positions", "vision/norm_pre/scale"):
        return 0.7**3
    if path == "text/positions":
        return 0.7**2
    assert path in ("log_scale", "vision/norm_post/scale", "text/norm_final/scale", "text/norm_final/bias"), path
    return 1.0


def plain_loop(start: Leaves, batches: list[Any]) -> tuple[Leaves, Leaves, list[float]]:
    """AdamW in float64: parameters, averages of the trained ones, and gradient norms."""
    params = {path: x.astype(np.float64) for path, x in start.items()}
    frozen = {"text/embedding", "vision/norm_pre/bias", "vision/norm_post/bias"}
    trained = params.keys() - frozen
    m, v = ({path: np.zeros_like(params[path]) for path in trained} for _ in range(2))
    average = {path: params[path] for path in trained}
    norms = []
    for t, batch in enumerate(batches):
        gradients = {path: g.astype(np.float64) for path, g in gradient()(params, batch, t).items() if path in trained}
        norms.append(math.sqrt(sum(np.sum(g**2) for g in gradients.values())))
        rate = 0.02 * (t / 2 if t < 2 else 0.5 * (1 + math.cos(math.pi * (t - 2) / 4)))
        for path, g in gradients.items():
            g = g * min(1, 1 / norms[-1])
            m[path] = 0.9 * m[path] + 0.1 * g
            v[path] = 0.95 * v[path] + 0.05 * g**2
            change = m[path] / (1 - 0.9 ** (t + 1)) / (np.sqrt(v[path] / (1 - 0.95 ** (t + 1))) + 1e-3)
            if not path.endswith(("bias", "scale")):
                change = change + 0.3 * params[path]
            params[path] = params[path] - rate * factor_by_hand(path, g.ndim) * change
        params["log_scale"] = np.minimum(params["log_scale"], math.log(100))
        decay = min(0.3, (1 + t) / (10 + t))
        average = {path: decay * average[path] + (1 - decay) * params[path] for path in trained}
    return params, average, norms


@functools.cache
def planned() -> Trainer:
    return Trainer(config_of(PLAN, SETTINGS))


def test_step_agrees_with_a_plain_loop() -> None:
    trainer = planned()
    start, batches = leaves(trainer.start.params), random_batches(config_of({}), 2)
    params, average, norms = plain_loop(start, batches)
    state = trainer.state()
    for batch, norm in zip(batches, norms, strict=True):
        rate = 0.02 * (s / 2 if (s := int(state.step)) < 2 else 0.5 * (1 + math.cos(math.pi * (s - 2) / 4)))
        state, metrics = trainer.step(state, batch)
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-4)
        assert float(metrics["learning_rate"]) == pytest.approx(rate, rel=1e-5, abs=1e-9)
    assert state.ema is not None
    assert leaves(state.ema).keys() == average.keys()
    assert max(norms) > 1, "the clipping must be seen"
    for got, wanted in ((leaves(state.params), params), (leaves(state.ema), average)):
        for path, x in wanted.items():
            change = np.abs(x - start[path]).max()
            np.testing.assert_allclose(got[path], x, rtol=0, atol=3e-4 * change + 1e-7, err_msg=path)
    evaluated = leaves(state.evaluated_params)
    for path in params:
        source = state.ema if path in average else state.params
        np.testing.assert_array_equal(evaluated[path], leaves(source)[path])


# Frozen.


@functools.cache
def locked() -> Trainer:
    config = config_of({"frozen": ("vision/*", "log_scale")}, {"warmup_steps": 0, "clip_norm": None})
    return Trainer(config, random_params(spec_of(config), 3) | {"log_scale": np.float32(math.log(120))})


def is_locked(path: str) -> bool:
    return path.startswith("vision/") or path == "log_scale"


def test_frozen_parameters_keep_every_bit_and_the_others_get_the_same_gradients() -> None:
    start, batches = leaves(locked().start.params), random_batches(config_of({}), 4)
    wanted = {path: g for path, g in gradient()(start, batches[0], 0).items() if not is_locked(path)}
    state, metrics = locked().step(locked().state(), batches[0])
    assert float(metrics["grad_norm"]) == pytest.approx(math.sqrt(sum(np.sum(g**2) for g in wanted.values())), rel=1e-4)
    # The first moment after one step is a tenth of the gradient.
    for path, g in wanted.items():
        moment = leaves(optax.tree.get(state.opt_state, "mu"))[path]
        np.testing.assert_allclose(moment, g / 10, rtol=1e-4, atol=1e-5 * np.abs(g).max())
    for batch in batches[1:]:
        state, metrics = locked().step(state, batch)
    assert float(metrics["logit_scale"]) == pytest.approx(120), "a frozen scale is not clamped"
    for path, x in leaves(state.params).items():
        assert np.array_equal(x, start[path]) == is_locked(path), path


def test_frozen_parameters_have_no_optimizer_state() -> None:
    for name in ("mu", "nu"):
        moments = by_path(optax.tree.get(locked().start.opt_state, name))
        assert moments.keys() == {path for path in leaves(locked().start.params) if not is_locked(path)}


def test_a_locked_tower_takes_no_backward_pass() -> None:
    """Training costs the forward pass three times; a locked tower's only once."""
    spec = planned().spec

    def tower(params: Any, images: Any, key: Any) -> jax.Array:
        vision = nnx.merge(spec.graph, params).vision
        return vision(images, vision.draw_dropout(len(images), key)).mixture

    images = random_batches(config_of({}), 0)[0]["image"]
    forward = jax.jit(tower, compiler_options=FAST).lower(spec.abstract.params, images, jax.random.key(0)).compile()
    flops = [compiled.cost_analysis()["flops"] for compiled in (planned().compiled, locked().compiled, forward)]
    assert flops[0] - flops[1] == pytest.approx(2 * flops[2], rel=0.2)


@pytest.mark.parametrize(
    ("train", "optimizer", "said"),
    [
        (
            {"frozen": ("text/*", "vison/*")},
            {},
            "train.frozen: 'vison/*' matches no parameter. Did you mean 'vision/*'",
        ),
        ({"frozen": ("text/embeding",)}, {}, "Did you mean 'text/embedding'?"),
        ({"frozen": ("*/transformer/*", "*")}, {}, "matches every parameter"),
        ({}, {"rates": {"poler/query": 2.0}}, "optimizer.rates: 'poler/query' matches no parameter. Did you mean"),
        ({"frozen": ("text/*",)}, {"rates": {"text/positions": 2.0}}, "optimizer.rates: 'text/positions' matches no"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(train: Any, optimizer: Any, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        spec_of(config_of(train, optimizer))
    assert said in str(error.value)


# Rates.


def test_the_longest_pattern_counts_in_whatever_order() -> None:
    rates = [("vision/*", 2.0), ("*", 3.0), ("vision/tokens", 5.0)]
    for some in (rates, rates[::-1]):
        factors = spec_of(config_of({}, {"rates": dict(some)})).rate_factors
        assert factors is not None
        for path, x in by_path(factors).items():
            assert np.all(x == (5 if path == "vision/tokens" else 2 if path.startswith("vision/") else 3)), path


def test_queries_of_attention_pooling_are_above_the_blocks() -> None:
    tower = {"tokens": np.zeros((1, 4)), "patch_kernel": np.zeros((3, 4))}
    tower |= {"transformer": {"blocks": {"qkv": np.zeros((2, 4, 3, 2, 2))}}}
    config = config_of({}, {"layer_decay": 0.5})
    for pool, expected in ({}, 0.125), ({"attention_pool": {"query": np.zeros((4, 2, 2))}}, 1):
        params = {"vision": tower | pool}
        factors = rate_factors(config, params, by_path(params).keys())
        assert factors is not None
        assert factors["vision"]["tokens"] == expected
        assert factors["vision"]["patch_kernel"] == 0.125
        np.testing.assert_array_equal(factors["vision"]["transformer"]["blocks"]["qkv"].ravel(), [0.25, 0.5])


# Checkpoints.


def test_without_these_settings_the_state_is_adamws_alone() -> None:
    abstract = spec_of(config_of({})).abstract
    assert list(abstract._asdict()) == ["step", "params", "opt_state"]
    adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1.0), mask=decayed))
    paths = [
        [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
        for tree in (abstract.opt_state, jax.eval_shape(adamw.init, abstract.params))
    ]
    assert paths[0] == paths[1]
    # A run may change its rates on the way.
    rated = spec_of(config_of({}, {"rates": {"*": 2.0}, "layer_decay": 0.5})).abstract
    assert jax.tree.structure(rated) == jax.tree.structure(abstract)


def test_a_restored_run_goes_on_bit_by_bit(tmp_path: Path) -> None:
    trainer, batches = planned(), random_batches(config_of({}), 5)
    state, checkpoints = trainer.state(), Checkpoints(tmp_path, CheckpointConfig())
    for batch in batches[:3]:
        state, _ = trainer.step(state, batch)
    checkpoints.save(state, Progress(48, 1.0, {}, "data"))
    checkpoints.wait()
    evaluated = leaves(state.evaluated_params)
    params = leaves(checkpoints.restore_params(3, trainer.spec.abstract.params))
    for path, x in leaves(state.params).items():
        assert np.array_equal(params[path], evaluated[path]), path
        assert np.array_equal(params[path], x) == (path not in trainer.spec.trained), path
    ends = []
    for continued in (state, checkpoints.restore(3, trainer.spec.abstract)[0]):
        for batch in batches[3:]:
            continued, _ = trainer.step(continued, batch)
        ends.append(dict(jax.tree_util.tree_leaves_with_path(continued)))
    assert ends[0].keys() == ends[1].keys()
    for path, x in ends[0].items():
        assert np.array_equal(x, ends[1][path]), jax.tree_util.keystr(path)
    with pytest.raises(ConfigError, match=r"only in the checkpoint: +ema/"):
        checkpoints.restore(3, spec_of(config_of({"frozen": PLAN["frozen"]})).abstract)
    with pytest.raises(ConfigError, match=r"only in the configuration: +ema/text/embedding"):
        checkpoints.restore(3, spec_of(config_of({"ema_decay": 0.9})).abstract)
    checkpoints.close()


def test_checkpoints_without_averages_give_their_parameters(tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path, CheckpointConfig()), locked().start
    checkpoints.save(state._replace(step=jnp.int32(1)), Progress(16, 1.0, {}, "data"))
    checkpoints.wait()
    params = leaves(checkpoints.restore_params(1, locked().spec.abstract.params))
    for path, x in leaves(state.params).items():
        np.testing.assert_array_equal(params[path], x)
    averaged = config_of({"frozen": ("vision/*", "log_scale"), "ema_decay": 0.9}, {"clip_norm": None})
    with pytest.raises(ConfigError, match=r"only in the configuration: +ema/"):
        checkpoints.restore(1, spec_of(averaged).abstract)
    checkpoints.close()


# Eight devices.


def train_on_eight() -> dict[str, Any]:
    """Where the state lies before and after some steps."""
    config = config_of({"frozen": ("text/*",), "ema_decay": 0.9}, {"layer_decay": 0.5})
    trainer = Trainer(dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=2, tensor=2)), devices=8)
    state = trainer.state()
    for batch in random_batches(config, 7)[:2]:
        state, _ = trainer.step(state, batch)
    params = random_params(trainer.spec, 1)
    return {
        "placed_as_specified": [_placed_alike(tree, trainer.spec.abstract) for tree in (trainer.start, state)],
        "born_equal": all(np.array_equal(x, params[path]) for path, x in leaves(trainer.start.params).items()),
        "shares": {
            jax.tree_util.keystr(path, simple=True, separator="/"): x.addressable_shards[0].data.nbytes / x.nbytes
            for path, x in jax.tree_util.tree_leaves_with_path(state)
            if getattr(path[-1], "key", "") in ("qkv", "up", "down")
        },
    }


def _placed_alike(tree: Any, abstract: Any) -> bool:
    return all(
        jax.tree.leaves(jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), tree, abstract))
    )


@pytest.mark.slow
def test_averages_and_moments_are_divided_like_their_parameters() -> None:
    results = call_on_devices(train_on_eight, devices=8)
    assert results["placed_as_specified"] == [True, True] and results["born_equal"]
    assert {name.split("/")[0] for name in results["shares"]} == {"params", "opt_state", "ema"}
    assert set(results["shares"].values()) == {0.25}, "fsdp x tensor"
