"""How embeddings lie on the sphere: alignment and uniformity (arXiv 2005.10242), modality gap (arXiv 2203.02053)."""

from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from llip_jax.evaluation.diagnostics.pairs import normalized, pair_blocks

UNIFORMITY_ROWS = 8192
"""Uniformity looks at all pairs of up to so many vectors; of more it draws so many at random."""

_PAIR_BLOCK = 1024
"""Rows of a block of pairs: 8 MiB of distances."""


def uniformity(x: Float[np.ndarray, "N d"], rows: int = UNIFORMITY_ROWS, seed: int = 0) -> float | None:
    """log of the mean of exp(-2 |x - y|^2) over pairs of distinct rows (``uniform_loss`` of SsnL/align_uniform).

    0 where all vectors are equal, about -4 for uniform ones in many dimensions. In blocks of the upper triangle.

    Args:
        x: vectors; they are normalised.
        rows: of more than this many, a random subset of so many is taken.
        seed: of that subset.

    Returns:
        None for fewer than two vectors.
    """
    if len(x) > rows:
        x = x[np.random.default_rng(seed).choice(len(x), rows, replace=False)]
    if len(x) < 2:
        return None
    x = normalized(x)
    total = 0.0
    for start in range(0, len(x), _PAIR_BLOCK):
        block = x[start : start + _PAIR_BLOCK]
        for other in range(start, len(x), _PAIR_BLOCK):
            potentials = np.exp(4 * (block @ x[other : other + _PAIR_BLOCK].T) - 4)  # |x - y|^2 = 2 - 2 x.y
            total += float(np.triu(potentials, 1).sum() if other == start else potentials.sum())
    return float(np.log(total / (len(x) * (len(x) - 1) / 2)))


def geometry_figures(
    unconditioned: Float[np.ndarray, "N d"],
    mixed: Float[np.ndarray, "N C d"] | None,
    texts: Float[np.ndarray, "T d"],
    text: Int[np.ndarray, "N C"],
    mask: Bool[np.ndarray, "N C"],
) -> dict[str, Any]:
    """Alignment, uniformity and modality gap of images with their own captions.

    The image vector of a positive pair is the image mixed by that caption, as the score of the pair sees it; figures of
    the unconditioned embedding stand beside, with ``unconditioned_`` in front. Where texts do not mix images there is
    only the one.

    Args:
        unconditioned: image embeddings that no text has conditioned.
        mixed: each image mixed by each of its captions; None where texts do not mix images.
        texts: text embeddings, those of captions among them.
        text: each image's captions, as rows of ``texts``.
        mask: which of them there are.

    Returns:
        ``alignment``: mean of |image - text|^2 over pairs (their ``align_loss``), in [0, 4].
        ``uniformity_image``: of one vector an image (mixed by its first caption); ``uniformity_text``: of the captions.
        ``modality_gap``: distance of the mean image from the mean text over the pairs (Liang et al., our
        reading), in [0, 2]. ``modality_separability``: share of all vectors that are nearer to their own modality's
        mean, ties half: 1 where this one linear classifier, fitted and tried on the same vectors, tells them apart.
        ``pairs``, and ``uniformity_rows``: the largest number of vectors that uniformity looked at all pairs of.
        None for what is not defined: anything without pairs, uniformity of one vector, separability of equal means.
    """
    figures: dict[str, Any] = {
        "pairs": int(mask.sum()),
        "uniformity_rows": UNIFORMITY_ROWS,
        "uniformity_text": uniformity(texts[np.unique(text[mask])]),
    }
    beside = _figures(unconditioned, texts, text, mask)
    if mixed is None:
        return figures | beside
    figures |= _figures(mixed, texts, text, mask)
    return figures | {f"unconditioned_{name}": value for name, value in beside.items()}


def _figures(
    images: Float[np.ndarray, "N d"] | Float[np.ndarray, "N C d"],
    texts: Float[np.ndarray, "T d"],
    text: Int[np.ndarray, "N C"],
    mask: Bool[np.ndarray, "N C"],
) -> dict[str, float | None]:
    """Those figures that depend on which image vector is taken."""
    pairs = int(mask.sum())
    if not pairs:
        return dict.fromkeys(("alignment", "uniformity_image", "modality_gap", "modality_separability"))
    captioned = mask.any(axis=1)
    single = images[captioned] if images.ndim == 2 else images[captioned, mask[captioned].argmax(axis=1)]
    blocks = partial(pair_blocks, images, texts, text, mask)
    squares, image_sum, text_sum = 0.0, np.zeros(texts.shape[1]), np.zeros(texts.shape[1])
    for image, caption in blocks():
        squares += float(np.sum((image - caption) ** 2))
        image_sum += image.sum(axis=0)
        text_sum += caption.sum(axis=0)
    gap = image_sum / pairs - text_sum / pairs
    distance = float(np.linalg.norm(gap))
    separability = None
    if distance > 1e-12:
        middle = float(gap @ (image_sum + text_sum)) / (2 * pairs)
        separability = sum((_own_side(block, gap, middle) for block in blocks()), start=0.0) / (2 * pairs)
    return {
        "alignment": squares / pairs,
        "uniformity_image": uniformity(single),
        "modality_gap": distance,
        "modality_separability": separability,
    }


def _own_side(
    block: tuple[Float[np.ndarray, "b d"], Float[np.ndarray, "b d"]], gap: Float[np.ndarray, "d"], middle: float
) -> float:
    """How many vectors of a block of pairs lie on their modality's side of the plane between the means."""
    image, caption = block
    sides = np.concatenate([image @ gap - middle, middle - caption @ gap])
    return float(np.sum(np.sign(sides) + 1) / 2)
