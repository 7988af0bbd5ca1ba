"""Scorers: how the several texts of one class become scores of images."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llip_jax.ops.pair_scores import TextSide, normalize


def mean_text(texts: TextSide, owner: Int[Array, "J"], classes: int) -> TextSide:
    """One text side a class: its texts averaged *before* the image is mixed (arXiv 2405.00740, section 4).

    Embeddings are L2-normalised before they are averaged, as CLIP does with its prompts; queries, which have no
    normalisation of their own, are averaged as they are, and keep their type. ``owner`` names each text's class, 0 to
    classes - 1; every class owns a text.
    """
    counts = jax.ops.segment_sum(jnp.ones(owner.shape[0]), owner, classes)

    def mean(x: Float[Array, "J *d"]) -> Float[Array, "C *d"]:
        total = jax.ops.segment_sum(x.astype(jnp.float32), owner, classes)
        return total / counts.reshape(-1, *[1] * (x.ndim - 1))

    queries = None if texts.queries is None else mean(texts.queries).astype(texts.queries.dtype)
    return TextSide(mean(normalize(texts.embedding)), queries)
