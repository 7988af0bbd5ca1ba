"""One training step: a pure function of state and batch."""

import zlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int, Key

from llip_jax.config import Config
from llip_jax.data.records import REASONS
from llip_jax.objectives.objective import Forward, objective
from llip_jax.parallel.mesh import neighbour_ring
from llip_jax.training.optimizer import clamp_logit_scale, learning_rate_schedule, moving_average
from llip_jax.training.paths import Params, merged, part
from llip_jax.training.state import StateSpec, TrainState

Metrics = dict[str, Array]
Batch = Mapping[str, Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

DEVICE_COLUMNS = ("image", "text", "text_mask", "caption_weight", "image_group", "text_group", "replaced")
"""What a step reads of data.records.Batch."""


def stream_key(seed: int, stream: str, step: Int[Array, ""]) -> Key[Array, ""]:
    """Random key of one named stream in one step; nothing to store, nothing to replay on resume."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(stream.encode())), step)


def make_train_step(config: Config, spec: StateSpec, optimizer: optax.GradientTransformation) -> TrainStep:
    """``train_step(state, batch) -> (state, metrics)``, not yet compiled.

    Metrics are those of the parameters before the update; ``grad_norm`` is that of the trained ones. ``finite``
    is 0 once loss, gradient or the new parameters are not finite. ``replaced`` counts the replaced samples for each of
    data.records.REASONS.
    """
    schedule = learning_rate_schedule(config.optimizer, config.train.steps)
    ring = neighbour_ring(jax.tree.leaves(spec.shardings)[0].mesh)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        dropout_key = stream_key(config.seed, "patch_dropout", state.step)

        before = part(state.params, spec.trained)

        def loss_fn(trained: Params) -> tuple[Array, dict[str, Array]]:
            # Frozen parameters are constants here: no backward pass is traced through what only they decide.
            model = nnx.merge(spec.graph, merged(state.params, trained))
            return objective(config.objective, Forward(model, batch, dropout_key, config.pair_scores, ring))

        (loss, terms), gradients = jax.value_and_grad(loss_fn, has_aux=True)(before)
        updates, opt_state = optimizer.update(gradients, state.opt_state, before)
        if spec.rate_factors is not None:
            updates = jax.tree.map(jnp.multiply, updates, spec.rate_factors)
        trained = clamp_logit_scale(optax.apply_updates(before, updates), before)
        ema = state.ema
        if ema is not None and config.train.ema_decay is not None:
            ema = moving_average(ema, trained, config.train.ema_decay, state.step)
        grad_norm = optax.global_norm(gradients)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "finite": jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.global_norm(trained)),
            "learning_rate": schedule(state.step),
            "logit_scale": jnp.exp(state.params["log_scale"]),
            "replaced": (batch["replaced"][:, None] == jnp.arange(1, 1 + len(REASONS))).sum(0),
            **terms,
        }
        if "bias" in state.params:
            metrics["logit_bias"] = state.params["bias"]
        params = merged(state.params, trained)
        return TrainState(state.step + 1, params, opt_state, ema), metrics

    return train_step
