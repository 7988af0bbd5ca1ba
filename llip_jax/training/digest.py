"""Check values of arrays, computed where the arrays are, and the same however they are divided."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Num, UInt32


def leaf_types(tree: Any) -> dict[str, str]:
    """'a/b/c' -> 'float32[2, 3]'. Tuples and named tuples count as the dicts that they read back from disk as."""
    return {path: f"{x.dtype}{list(x.shape)}" for path, x in _by_path(tree).items()}


def state_digest(tree: Any) -> dict[str, str]:
    """'a/b/c' -> '1f0c93ab': 32 bits of every array, which any one changed element changes for certain.

    No array leaves its device: each device adds up its own part, and only the sums are exchanged. All processes of a
    run call this together.
    """
    sums = {}
    for path, x in _by_path(tree).items():
        sums[path] = digest(x)
        if jax.default_backend() == "cpu":  # Programs on devices simulated at the same time may wait for each other.
            sums[path].block_until_ready()
    return {path: f"{value:08x}" for path, value in jax.device_get(sums).items()}


def _by_path(tree: Any) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in flat}


@jax.jit  # by array, not by tree: most shapes occur several times, as parameter and as moments
def digest(x: Num[Array, "..."]) -> UInt32[Array, ""]:
    """Sum of the elements' bits, each mixed with its position in the whole array."""
    bits = lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis, length in enumerate(x.shape):
        position = position * np.uint32(length) + lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(_mixed(bits ^ (position * np.uint32(0x9E3779B9))), dtype=jnp.uint32)


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """MurmurHash3's finalizer: one-to-one, and every bit of the result depends on all bits of ``x``."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
