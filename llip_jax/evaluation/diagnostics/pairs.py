"""Positive pairs of an evaluation, a block at a time: every image with each of its own captions."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int

BLOCK_ROWS = 4096
"""Rows looked at together: bounds the float64 copies to a few MiB."""


def normalized(rows: Float[np.ndarray, "*n d"]) -> Float[np.ndarray, "*n d"]:
    """L2-normalised in float64; a zero vector stays zero."""
    rows = np.asarray(rows, np.float64)
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(length > 0, length, 1)


def pair_blocks(
    images: Float[np.ndarray, "N d"] | Float[np.ndarray, "N C d"],
    texts: Float[np.ndarray, "T d"],
    text: Int[np.ndarray, "N C"],
    mask: Bool[np.ndarray, "N C"],
) -> Iterator[tuple[Float[np.ndarray, "b d"], Float[np.ndarray, "b d"]]]:
    """Image and text vectors of the pairs, L2-normalised.

    Args:
        images: one vector an image, or one for each of its captions (the image mixed by it).
        texts: text embeddings.
        text: which of them are each image's captions.
        mask: which captions there are.
    """
    image, slot = np.nonzero(mask)
    for start in range(0, len(image), BLOCK_ROWS):
        i, c = image[start : start + BLOCK_ROWS], slot[start : start + BLOCK_ROWS]
        yield normalized(images[i] if images.ndim == 2 else images[i, c]), normalized(texts[text[i, c]])
