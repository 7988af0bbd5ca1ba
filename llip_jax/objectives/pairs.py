"""Which image-text pairs match: target, weight and mask of every pair of a batch.

Built inside the step from vectors of B and B*C numbers, so that any block of the pairs can build its own piece.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Duplicates = Literal["ignore", "positive", "negative"]


class PairTargets(NamedTuple):
    """For image i and text j: target (1: they match; may lie between), weight of the text, mask (0: does not count)."""

    target: Float[Array, "N J"]
    weight: Float[Array, "N J"]
    mask: Float[Array, "N J"]


class ImageIds(NamedTuple):
    """Of images: place in the batch, which picture, which captions, and which of the caption slots are filled."""

    place: Int[Array, "N"]
    picture: Int[Array, "N"]
    captions: Int[Array, "N C"]
    filled: Bool[Array, "N C"]


class TextIds(NamedTuple):
    """Of caption slots: the image's place in the batch, its picture, which caption, and its weight (0: empty slot)."""

    place: Int[Array, "J"]
    picture: Int[Array, "J"]
    caption: Int[Array, "J"]
    weight: Float[Array, "J"]


def pair_ids(
    image_group: Int[Array, "N"], text_group: Int[Array, "N C"], caption_weight: Float[Array, "N C"]
) -> tuple[ImageIds, TextIds]:
    """Of N images and their J = N*C caption slots, image by image.

    ``image_group`` is equal for the same picture, ``text_group`` for the same caption (data.records.Batch).
    """
    n, slots = text_group.shape
    place = jnp.arange(n)
    images = ImageIds(place, image_group, text_group, caption_weight > 0)
    texts = TextIds(
        jnp.repeat(place, slots), jnp.repeat(image_group, slots), text_group.reshape(-1), caption_weight.reshape(-1)
    )
    return images, texts


def pair_targets(images: ImageIds, texts: TextIds, duplicates: Duplicates) -> PairTargets:
    """Targets for some images and some caption slots of a batch.

    A caption matches its own image. With another image it is a duplicate when the two images are the same picture or
    that image has the same caption in a filled slot; ``duplicates`` says what becomes of those pairs: masked (ignore),
    taught as matches, or left as negatives. Empty slots count nowhere.
    """
    own = images.place[:, None] == texts.place
    duplicate = ~own & ((images.picture[:, None] == texts.picture) | _has_caption(images, texts.caption))
    counts = jnp.broadcast_to(texts.weight > 0, own.shape)
    if duplicates == "ignore":
        counts = counts & ~duplicate
    matches = own | duplicate if duplicates == "positive" else own
    weight = jnp.broadcast_to(texts.weight, own.shape)
    return PairTargets(matches.astype(jnp.float32), weight.astype(jnp.float32), counts.astype(jnp.float32))


def _has_caption(images: ImageIds, wanted: Int[Array, "J"]) -> Bool[Array, "N J"]:
    """Whether one of the image's filled slots holds the wanted caption; one slot at a time, never N x J x C."""
    found = jnp.zeros((len(images.place), len(wanted)), bool)
    for slot in range(images.captions.shape[1]):
        found |= (images.captions[:, slot, None] == wanted) & images.filled[:, slot, None]
    return found
