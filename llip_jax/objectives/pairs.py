"""Which image-text pairs match: target, weight and mask of every pair of a batch.

Built inside the step from vectors of B and B*C numbers, so that any block of the pairs can build its own piece.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class PairTargets(NamedTuple):
    """For image i and text j: target (1: they match), weight of the text, mask (0: the pair does not count)."""

    target: Float[Array, "N J"]
    weight: Float[Array, "N J"]
    mask: Float[Array, "N J"]


def pair_targets(
    image_group: Int[Array, "N"],
    text_group: Int[Array, "N C"],
    caption_weight: Float[Array, "N C"],
    duplicates: Literal["ignore", "positive", "negative"],
) -> PairTargets:
    """Targets for N images against their J = N*C caption slots, image by image.

    A caption matches its own image. With another image it is a duplicate when the two images are the same picture
    (equal image_group) or that image has the same caption (equal text_group in a filled slot); ``duplicates`` says
    what becomes of those pairs. Empty slots (caption_weight 0) count nowhere.
    """
    n, slots = text_group.shape
    filled = caption_weight > 0
    owner = jnp.repeat(jnp.arange(n), slots)
    own = owner[None, :] == jnp.arange(n)[:, None]
    duplicate = ~own & (
        (image_group[:, None] == image_group[owner][None, :]) | _has_caption(text_group, filled, text_group.reshape(-1))
    )
    counts = jnp.broadcast_to(filled.reshape(1, -1), own.shape)
    if duplicates == "ignore":
        counts = counts & ~duplicate
    matches = own | duplicate if duplicates == "positive" else own
    weight = jnp.broadcast_to(caption_weight.reshape(1, -1), own.shape)
    return PairTargets(matches.astype(jnp.float32), weight.astype(jnp.float32), counts.astype(jnp.float32))


def _has_caption(
    text_group: Int[Array, "N C"], filled: Bool[Array, "N C"], wanted: Int[Array, "J"]
) -> Bool[Array, "N J"]:
    """Whether one of the image's filled slots holds the wanted caption; one slot at a time, never N x J x C."""
    found = jnp.zeros((text_group.shape[0], wanted.shape[0]), bool)
    for slot in range(text_group.shape[1]):
        found |= (text_group[:, slot, None] == wanted[None, :]) & filled[:, slot, None]
    return found
