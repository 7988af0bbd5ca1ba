"""A compiled training step, random batches for it, and the gradients it took."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from oracles import random_params

from llip_jax.config import Config
from llip_jax.parallel.mesh import make_mesh
from llip_jax.training.optimizer import make_optimizer
from llip_jax.training.paths import by_path
from llip_jax.training.state import TrainState, state_from, state_spec
from llip_jax.training.step import Metrics, make_train_step, steering, step_inputs

Columns = dict[str, np.ndarray]
FAST = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
"""Compiles in a quarter of the time."""


def random_batch(config: Config, seed: int) -> Columns:
    """Noise images, texts of any length, some equal pictures and captions, some empty caption slots."""
    rng = np.random.default_rng(seed)
    n, slots, length = config.train.batch_size, config.data.captions.slots, config.model.text.length
    side = config.model.image_size
    lengths = rng.integers(1, length + 1, (n, slots, 1))
    mask = np.arange(length) < lengths
    weight = rng.uniform(0.2, 1, (n, slots)) * (rng.random((n, slots)) < 0.8)
    weight[:, 0] = 1
    return {
        "image": rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8),
        "text": (rng.integers(3, 300, mask.shape) * mask).astype(np.int32),
        "text_mask": mask.astype(np.int32),
        "caption_weight": (weight / weight.sum(1, keepdims=True)).astype(np.float32),
        "image_group": rng.integers(0, 4 * n, n, np.int32),
        "text_group": rng.integers(0, 4 * n, (n, slots), np.int32),
        "replaced": np.zeros(n, np.int32),
    }


class Stepper:
    """The compiled step of a configuration, on the first ``devices``."""

    def __init__(self, config: Config, devices: int = 1, compiler_options: Mapping[str, Any] = FAST):
        self.config, self.mesh = config, make_mesh(config.mesh, jax.devices()[:devices])
        self._optimizer = make_optimizer(config.optimizer, config.train.steps)
        self.spec, self._inputs = state_spec(config, self._optimizer, self.mesh), step_inputs(config, self.mesh)
        train_step = make_train_step(config, self.spec, self._optimizer)
        with jax.set_mesh(self.mesh):
            jitted = jax.jit(train_step, out_shardings=(self.spec.shardings, None), compiler_options=compiler_options)
            self.compiled = jitted.lower(self.spec.abstract, self._inputs).compile()

    @functools.cached_property
    def start(self) -> TrainState:
        """A state of step 0, the same on every mesh."""
        return state_from(random_params(self.config, 1), self._optimizer, self.spec)

    def step(self, state: TrainState, batch: Columns, **steered: Any) -> tuple[TrainState, Metrics]:
        """One step; the state given stays."""
        columns = batch | steering(len(batch["image"]), **steered)
        return self.compiled(
            state, {name: jax.device_put(x, self._inputs[name].sharding) for name, x in columns.items()}
        )


def gradients(state: TrainState, config: Config) -> dict[str, np.ndarray]:
    """Those of the first step, by path: Adam's first moment is a share of them where nothing is clipped."""
    assert config.optimizer.clip_norm is None
    share = jnp.float32(1 - config.optimizer.beta1)
    return {path: np.asarray(x / share) for path, x in by_path(optax.tree.get(state.opt_state, "mu")).items()}
