"""In which blocks, and over which devices, the pairs of a batch are gone through."""

import math

import jax

from llip_jax.config import ConfigError, PairScoresConfig
from llip_jax.ops.pair_blocks import Prepared
from llip_jax.ops.sweep import BlockSizes, Plan, rows
from llip_jax.parallel.sharding import ACTIVATIONS

_TEXTS = 256
"""Texts of a block where there are as many: enough to keep matrix units busy, few enough to leave room for images."""

_BLOCK_BYTES = {"cpu": 16 * 2**20, "tpu": 32 * 2**20}
_BLOCK_BYTES_ACCELERATOR = 256 * 2**20
"""Temporaries of one block, about. On a CPU they had better stay near the caches."""


def make_plan(prepared: Prepared, settings: PairScoresConfig, ring: tuple[int, ...] | None = None) -> Plan:
    """Blocks that fit memory, over the devices of the mesh in use.

    Images and texts are divided over the batch axes of the mesh, and over ``tensor`` too where that divides both: pair
    scores have no use for tensor parallelism, and would be computed again on each of its devices. ``ring`` is the order
    of all the mesh's devices (parallel.mesh.neighbour_ring).

    Raises:
        ConfigError: a block of the settings is larger than what a device has.
    """
    images, texts = rows(prepared.images), rows(prepared.texts)
    axes, devices = _axes(images, texts)
    own_images, own_texts = images // devices, texts // devices
    at_hand = own_texts if settings.exchange == "ring" else texts
    for name, block, available, what in (
        ("image_block", settings.image_block, own_images, "images"),
        ("text_block", settings.text_block, at_hand, "texts"),
    ):
        if block is not None and block > available:
            raise ConfigError(
                f"pair_scores.{name}={block} is more than the {available} {what} that a device has at hand; "
                f"expected 1 to {available}, or None to have it chosen"
            )
    width = settings.text_block or even(at_hand, _TEXTS)
    height = settings.image_block or even(
        own_images, block_bytes() // (prepared.scorer.bytes_of_a_pair(prepared.images) * width)
    )
    whole_mesh = ring is not None and len(ring) == devices
    return Plan(BlockSizes(height, width), axes, settings.exchange, ring if whole_mesh else None)


def even(total: int, most: int) -> int:
    """The size of the fewest blocks of about equal size, none above ``most``, that hold so many rows."""
    most = max(1, min(total, most))
    return -(-total // -(-total // most))


def block_bytes() -> int:
    """Temporaries that one block may take on the devices in use."""
    # What is compiled ahead of time for another machine has that machine's devices in its mesh.
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return _BLOCK_BYTES.get(platform, _BLOCK_BYTES_ACCELERATOR)


def _axes(images: int, texts: int) -> tuple[tuple[str, ...], int]:
    """The mesh axes that divide images and texts, and how many devices they are together."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return (), 1
    batch = ACTIVATIONS["batch"]
    assert isinstance(batch, tuple)
    for axes in ((*batch, "tensor"), batch):
        devices = math.prod(mesh.shape[axis] for axis in axes)
        if images % devices == 0 and texts % devices == 0:
            return axes, devices
    raise ConfigError(f"a batch of {images} images and {texts} texts does not divide over {devices} devices")
