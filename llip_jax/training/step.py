"""One training step: a pure function of state and batch."""

import zlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Key

from llip_jax.config import Config
from llip_jax.data.records import REASONS, batch_shapes
from llip_jax.objectives.microbatches import value_and_grad
from llip_jax.objectives.objective import Encoded, Forward, objective
from llip_jax.parallel.mesh import batch_shards, neighbour_ring
from llip_jax.parallel.sharding import batch_sharding, whole
from llip_jax.training.digest import digest
from llip_jax.training.optimizer import clamp_logit_scale, learning_rate_schedule, moving_average
from llip_jax.training.paths import Params, merged, part
from llip_jax.training.state import StateSpec, TrainState

Metrics = dict[str, Array]
Batch = Mapping[str, Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

DEVICE_COLUMNS = ("image", "text", "text_mask", "caption_weight", "image_group", "text_group", "replaced")
"""What a step reads of data.records.Batch. The rest of its inputs is from :func:`steering`."""

NOTICE_STOP, NOTICE_SAVE = 1, 2
"""Bits of what a process tells the others with its rows of a batch: it was told to stop; it is time to save."""


def steering(
    rows: int, notice: int = 0, loss_ceiling: float = np.inf, sample_id: Int[np.ndarray, "B"] | None = None
) -> dict[str, np.ndarray]:
    """Inputs of a step beside the data.

    Args:
        rows: of this process.
        notice: what it tells all others.
        loss_ceiling: above which there is a spike; the same in all processes.
        sample_id: which samples the rows are, for the record.
    """
    samples = np.zeros(rows) if sample_id is None else sample_id
    return {
        "notice": np.full(rows, notice, np.int32),
        "sample": samples.astype(np.uint32),
        "loss_ceiling": np.asarray(loss_ceiling, np.float32),
    }


def step_inputs(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of a step's batch: data and steering."""
    shapes = batch_shapes(
        config.train.batch_size, config.data.captions.slots, config.model.image_size, config.model.text.length
    )
    rows = batch_sharding(mesh)
    return {
        **{name: jax.ShapeDtypeStruct(*shapes[name], sharding=rows) for name in DEVICE_COLUMNS},
        "notice": jax.ShapeDtypeStruct((config.train.batch_size,), jnp.int32, sharding=rows),
        "sample": jax.ShapeDtypeStruct((config.train.batch_size,), jnp.uint32, sharding=rows),
        "loss_ceiling": jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec())),
    }


def stream_key(seed: int, stream: str, step: Int[Array, ""]) -> Key[Array, ""]:
    """Random key of one named stream in one step; nothing to store, nothing to replay on resume."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(stream.encode())), step)


def make_train_step(config: Config, spec: StateSpec, optimizer: optax.GradientTransformation) -> TrainStep:
    """``train_step(state, batch) -> (state, metrics)``, not yet compiled.

    Metrics are those of the parameters before the update; ``grad_norm`` is that of the trained ones.

    - ``finite`` is 0 once loss, gradient or the new parameters are not finite.
    - ``spike``: the loss, finite like the rest, is above ``loss_ceiling``.
    - ``skipped``: for one of these reasons the update was left out, as ``faults`` asks for. But for ``step`` the state
      is the one before, bit for bit; ``finite`` is then about that state. Learning rate and decay of the moving average
      follow the optimizer's count of updates: after n skipped ones the schedule is n steps late, and the run ends n
      steps before it would reach zero.
    - ``stop``, ``save``: in how many rows the notice has that bit.
    - ``sample_hash``: of which samples there were, and in which order.
    - ``replaced`` counts the replaced samples for each of data.records.REASONS.
    """
    schedule = learning_rate_schedule(config.optimizer, config.train.steps)
    skip_not_finite, skip_spike = config.faults.not_finite == "skip", config.faults.spike == "skip"

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        before = part(state.params, spec.trained)
        updates_made = optax.tree.get(state.opt_state, "ScaleByAdamState").count
        (loss, terms), gradients = _value_and_gradients(config, spec, state, batch)
        updates, opt_state = optimizer.update(gradients, state.opt_state, before)
        if spec.rate_factors is not None:
            updates = jax.tree.map(jnp.multiply, updates, spec.rate_factors)
        trained = clamp_logit_scale(optax.apply_updates(before, updates), before)
        ema = state.ema
        if ema is not None and config.train.ema_decay is not None:
            ema = moving_average(ema, trained, config.train.ema_decay, updates_made)
        after = TrainState(state.step + 1, merged(state.params, trained), opt_state, ema)

        grad_norm = optax.global_norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.global_norm(trained))
        spike = finite & (loss > batch["loss_ceiling"])
        skipped = (~finite & skip_not_finite) | (spike & skip_spike)
        if skip_not_finite or skip_spike:
            unchanged = state._replace(step=after.step)
            after = jax.tree.map(lambda old, new: jnp.where(skipped, old, new), unchanged, after)
            finite = jnp.where(skipped, jnp.isfinite(optax.global_norm(before)), finite)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "finite": finite,
            "spike": spike,
            "skipped": skipped,
            "stop": (batch["notice"] & NOTICE_STOP > 0).sum(),
            "save": (batch["notice"] & NOTICE_SAVE > 0).sum(),
            "sample_hash": digest(batch["sample"]),
            "learning_rate": schedule(updates_made),
            "logit_scale": jnp.exp(state.params["log_scale"]),
            "replaced": (batch["replaced"][:, None] == jnp.arange(1, 1 + len(REASONS))).sum(0),
            **terms,
        }
        if "bias" in state.params:
            metrics["logit_bias"] = state.params["bias"]
        return after, whole(metrics)

    return train_step


def _value_and_gradients(
    config: Config, spec: StateSpec, state: TrainState, batch: Batch
) -> tuple[tuple[Array, Metrics], Params]:
    """The loss and its terms by name, and the gradients of the trained parameters."""
    mesh = jax.tree.leaves(spec.shardings)[0].mesh
    ring = neighbour_ring(mesh)
    key = stream_key(config.seed, "patch_dropout", state.step)
    dropout = nnx.merge(spec.graph, state.params).draw_dropout(len(batch["image"]), key)

    def forward(trained: Params, batch: Batch, dropout: Array | None, encoded: Encoded | None = None) -> Forward:
        # Frozen parameters are constants here: no backward pass is traced through what only they decide.
        model = nnx.merge(spec.graph, merged(state.params, trained))
        return Forward(model, batch, dropout, config.pair_scores, ring, encoded)

    def loss(trained: Params, encoded: Encoded | None = None) -> tuple[Array, Metrics]:
        return objective(config.objective, forward(trained, batch, dropout, encoded))

    def encode(trained: Params, rows: tuple[Batch, Array | None]) -> Encoded:
        piece = forward(trained, *rows)
        # No pooler reads the patches, and those of a whole batch would be most of what the pieces save.
        return Encoded(piece.images._replace(patches=piece.images.patches[:, :0]), piece.texts)

    trained = part(state.params, spec.trained)
    if config.train.microbatches == 1:
        return jax.value_and_grad(loss, has_aux=True)(trained)
    return value_and_grad(
        loss,
        encode,
        trained,
        ({name: batch[name] for name in ("image", "text", "text_mask")}, dropout),
        pieces=config.train.microbatches,
        shards=batch_shards(mesh),
        shardings=part(spec.shardings.params, spec.trained),
    )
