"""In which blocks, and over which devices, the pairs of a batch are gone through."""

import math
from collections.abc import Mapping

import jax

from llip_jax.config import ConfigError, PairScoresConfig
from llip_jax.ops.pair_blocks import Prepared
from llip_jax.ops.sweep import BlockSizes, Plan, rows
from llip_jax.parallel.sharding import row_axes

BLOCK_TEXTS = 256
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
    mesh = jax.sharding.get_abstract_mesh()
    axes, images, texts = at_hand(settings, images, texts, mesh.shape)
    width = settings.text_block or even(texts, BLOCK_TEXTS)
    bytes_of_an_image = prepared.scorer.bytes_of_a_pair(prepared.images) * width
    height = settings.image_block or even(images, block_bytes() // bytes_of_an_image)
    whole_mesh = ring is not None and len(ring) == math.prod(mesh.shape[axis] for axis in axes)
    return Plan(BlockSizes(height, width), axes, settings.exchange, ring if whole_mesh else None)


def at_hand(
    settings: PairScoresConfig, images: int, texts: int, mesh_shape: Mapping[str, int]
) -> tuple[tuple[str, ...], int, int]:
    """The mesh axes that divide images and texts, and how many of both a device has at hand at a time.

    Raises:
        ConfigError: the batch does not divide over the mesh, or a block of the settings is larger than it can be.
    """
    axes = row_axes(mesh_shape, images, texts)
    if mesh_shape and not axes:
        raise ConfigError(f"{images} images and {texts} texts do not divide over a mesh of {dict(mesh_shape)}")
    devices = math.prod(mesh_shape[axis] for axis in axes)
    images, texts = images // devices, texts // devices if settings.exchange == "ring" else texts
    for name, block, available, what in (
        ("image_block", settings.image_block, images, "images"),
        ("text_block", settings.text_block, texts, "texts"),
    ):
        if block is not None and block > available:
            raise ConfigError(
                f"pair_scores.{name}={block} is more than the {available} {what} that a device has at hand; "
                f"expected 1 to {available}, or None to have it chosen"
            )
    return axes, images, texts


def even(total: int, most: int) -> int:
    """The size of the fewest blocks of about equal size, none above ``most``, that hold so many rows."""
    most = max(1, min(total, most))
    return -(-total // -(-total // most))


def block_bytes() -> int:
    """Temporaries that one block may take on the devices in use."""
    return _BLOCK_BYTES.get(platform(), _BLOCK_BYTES_ACCELERATOR)


def platform() -> str:
    """Kind of the devices in use: cpu, gpu or tpu."""
    # What is compiled ahead of time for another machine has that machine's devices in its mesh.
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
