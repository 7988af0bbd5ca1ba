"""Cosines between every image and every text, the image mixed by the text it is compared with.

Dense: all pairs at once, meant to be read and compared with; its peak memory is several arrays of N x J x d and
N x J x M x K. ops/pair_blocks.py computes the same block by block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class MixtureSide(NamedTuple):
    """Images that a text will mix: keys and values of K mixture tokens in M heads, and the output projection."""

    keys: Float[Array, "N K M dh"]
    values: Float[Array, "N K M dh"]
    output: Float[Array, "d d"]
    temperature: float


class FixedSide(NamedTuple):
    """Images with one vector whatever the text (class token, learned average)."""

    embedding: Float[Array, "N d"]


class TextSide(NamedTuple):
    """Texts: the vector an image is compared with, and the queries that mix it (None for fixed images)."""

    embedding: Float[Array, "J d"]
    queries: Float[Array, "J M dh"] | None = None


ImageSide = MixtureSide | FixedSide


class Affine(NamedTuple):
    """From cosines to logits: scale * cosine + bias."""

    scale: Float[Array, ""]
    bias: Float[Array, ""]


SMALLEST_SQUARE = 1e-24
"""A vector with a squared norm below this counts as zero."""


def normalize(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """L2-normalised along the last axis in float32; the zero vector stays zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    # Clamping the squared norm (not the norm) keeps the gradient of sqrt finite at zero.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), SMALLEST_SQUARE))


def mixing_weights(images: MixtureSide, queries: Float[Array, "J M dh"]) -> Float[Array, "N J M K"]:
    """How much of each mixture token every text takes, head by head, in float32 (arXiv 2405.00740, section 3)."""
    products = jnp.einsum("jmh,nkmh->njmk", queries, images.keys, preferred_element_type=jnp.float32)
    return jax.nn.softmax(products / images.temperature, axis=-1)


def mix(images: MixtureSide, queries: Float[Array, "J M dh"]) -> Float[Array, "N J d"]:
    """Every image mixed by every text, not yet normalised."""
    weights = mixing_weights(images, queries).astype(images.values.dtype)
    mixed = jnp.einsum("njmk,nkmh->njmh", weights, images.values)
    return mixed.reshape(*mixed.shape[:2], -1) @ images.output


def cosines(images: ImageSide, texts: TextSide) -> Float[Array, "N J"]:
    """Cosine of image i (mixed by text j, where images are mixed) with text j.

    The pair (i, j) is always scored with text j's own mixture, positives and negatives alike: mixing by another text
    would let the model read the answer off the mixing text.
    """
    t = normalize(texts.embedding)
    # Full precision: the logit scale multiplies what accelerators' default for float32 would round away.
    if isinstance(images, FixedSide):
        return jnp.einsum("nd,jd->nj", normalize(images.embedding), t, precision=jax.lax.Precision.HIGHEST)
    if texts.queries is None:
        raise ValueError("mixture images need texts with queries")
    mixed = normalize(mix(images, texts.queries))
    return jnp.einsum("njd,jd->nj", mixed, t, precision=jax.lax.Precision.HIGHEST)
