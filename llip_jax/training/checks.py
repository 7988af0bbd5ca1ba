"""What a configuration asks of the devices, judged before anything is allocated."""

import math

import jax
from jax.sharding import Mesh

from llip_jax.config import Config, ConfigError
from llip_jax.models.sizes import model_shape
from llip_jax.objectives.microbatches import check_microbatches
from llip_jax.ops.plan import at_hand
from llip_jax.parallel.mesh import batch_shards
from llip_jax.training.state import TrainState

REPLICATED_SHARE = 0.02
"""Most of a model's parameters that may lie whole on every device where the mesh is there to divide them."""
_FEW = 2**20
"""So many parameters may always: a megabyte or four on each device. (Biases and norms of small models.)"""


def check_batch(config: Config, mesh: Mesh) -> None:
    """Raises ConfigError unless batches, microbatches and pair scores divide over the mesh."""
    shards = batch_shards(mesh)
    for name, batch in (("train", config.train.batch_size), ("eval", config.eval.batch_size)):
        if batch % shards:
            raise ConfigError(
                f"{name}.batch_size={batch} does not divide over the {shards} devices of mesh.data x mesh.fsdp "
                f"({batch} = {batch // shards} x {shards} + {batch % shards}); nearest: "
                f"{batch - batch % shards or shards}"
            )
    check_microbatches(config, shards)
    _check_pair_scores(config, mesh)


def check_divided(config: Config, state: TrainState, mesh: Mesh) -> None:
    """Raises ConfigError where parameters that ``mesh.fsdp`` should divide stay whole on every device.

    That happens where a width is no multiple of it, and would only show as memory that is not there.
    """
    devices = mesh.shape["fsdp"]
    if devices == 1:
        return
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    whole = [(path, x) for path, x in leaves if x.sharding.shard_shape(x.shape) == x.shape]
    total, replicated = (sum(x.size for _, x in some) for some in (leaves, whole))
    if replicated <= max(REPLICATED_SHARE * total, _FEW):
        return
    path, largest = max(whole, key=lambda leaf: leaf[1].size)
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    share = f"{replicated / total:.0%} of the parameters would lie whole on every device, the largest {name} "
    share += f"{list(largest.shape)}"
    shape = model_shape(config.model)
    widths = (shape.vision.width, shape.text.width)
    if (fits := math.gcd(devices, *widths)) == devices:
        raise ConfigError(f"mesh.fsdp={devices}: {share}, which no rule divides. Expected mesh.data in its place")
    raise ConfigError(
        f"mesh.fsdp={devices} does not divide the towers' widths, {widths[0]} and {widths[1]}, so that {share}. "
        f"Expected mesh.fsdp={fits} and mesh.data={mesh.shape['data'] * devices // fits}"
    )


def _check_pair_scores(config: Config, mesh: Mesh) -> None:
    settings, batch = config.pair_scores, config.train.batch_size
    at_hand(settings, batch, batch * config.data.captions.slots, mesh.shape)
    if settings.implementation == "dense" and (settings.image_block or settings.text_block):
        raise ConfigError("pair_scores.implementation='dense' has no blocks: expected image_block and text_block None")
    if settings.implementation == "kernel":
        if config.model.pooler != "mixer":
            raise ConfigError(
                "pair_scores.implementation='kernel' is for images mixed by texts (model.pooler='mixer'), not for "
                f"model.pooler={config.model.pooler!r}; expected 'streamed'"
            )
        platform = mesh.devices.flat[0].platform
        if platform != "tpu":
            raise ConfigError(f"pair_scores.implementation='kernel' needs TPUs, the devices are {platform}")
