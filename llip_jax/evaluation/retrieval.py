"""Retrieval between images and texts: recall at k and median rank, each pair being scored.

Ties are counted fairly: every figure is the expectation over all orders of equal scores, so a model that gives all
pairs the same score gets the chance level and no more.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from llip_jax.evaluation.figures import Outcome, Result, figures_of

_BLOCK_PAIRS = 2**20
"""Pairs looked at together: bounds the temporaries to a few MiB whatever the size of the score matrix."""


def positives_from_owners(owners: Int[np.ndarray, "J"], images: int) -> Bool[np.ndarray, "N J"]:
    """Positives where text j describes image ``owners[j]`` alone, an index below ``images``.

    Raises:
        ValueError: an owner is not in [0, images).
    """
    if np.any((owners < 0) | (owners >= images)):
        raise ValueError(f"expected owners in [0, {images}), got {owners.min()} to {owners.max()}")
    positives = np.zeros((images, len(owners)), dtype=bool)
    positives[owners, np.arange(len(owners))] = True
    return positives


def recall_at_k(
    scores: Float[np.ndarray, "N J"], positives: Bool[np.ndarray, "N J"], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """The figures of ``retrieve``."""
    return retrieve(scores, positives, ks).figures


def retrieve(
    scores: Float[np.ndarray, "N J"], positives: Bool[np.ndarray, "N J"], ks: Sequence[int] = (1, 5, 10)
) -> Result:
    """Recall at k and median rank in both directions.

    CLIP_benchmark's recalls are the same where no scores tie. Where some do, theirs come of the order that
    ``torch.topk`` happens to put them in, and these are the mean over all orders.

    Args:
        scores: score of each (image, text) pair, higher for a better match. Minus infinity stands for pairs that were
            not scored: where a query has others, a positive there is never among the k best; for the median rank they
            follow all others in random order.
        positives: pairs that match; a query may have several.
        ks: list lengths, each at least 1.

    Returns:
        For each direction D (``image_to_text``, ``text_to_image``): ``D_recall_at_k``, the share of queries with at
        least one positive among the k best, in [0, 1]; ``D_recall_at_k_chance``, what random scores reach given the
        positives of these queries; and ``D_median_rank``, the median over queries of the best positive's rank (1 is
        best). The recalls are outcomes too: an image belongs to itself, a text to the first image that it matches.

    Raises:
        ValueError: shapes differ or are empty, a k is below 1, a score is NaN, or a query has no positive.
    """
    if scores.ndim != 2 or scores.size == 0 or scores.shape != positives.shape:
        raise ValueError(f"expected scores and positives of one shape [N, J], got {scores.shape}, {positives.shape}")
    if any(k < 1 for k in ks):
        raise ValueError(f"expected every k to be at least 1, got {tuple(ks)}")
    for axis, queries, answers in ((1, "images", "texts"), (0, "texts", "images")):
        if missing := np.count_nonzero(~positives.any(axis=axis)):
            raise ValueError(f"{missing} of {scores.shape[1 - axis]} {queries} have no positive among the {answers}")
    figures: dict[str, float] = {}
    outcomes: dict[str, Outcome] = {}
    owner = np.empty(scores.shape[1], np.int64)
    step = max(1, _BLOCK_PAIRS // len(scores))
    for start in range(0, len(owner), step):  # argmax along columns copies what it is given
        owner[start : start + step] = positives[:, start : start + step].argmax(axis=0)
    for name, s, p, unit in (
        ("image_to_text", scores, positives, np.arange(len(scores))),
        ("text_to_image", scores.T, positives.T, owner),
    ):
        recalls, ranks = _one_direction(s, p, unit, ks)
        own = {f"{name}_recall_at_{k}": recall for k, recall in recalls.items()}
        outcomes |= own
        figures |= figures_of(own) | {f"{name}_median_rank": float(np.median(ranks))}
    return Result(figures, outcomes)


def _one_direction(
    scores: Float[np.ndarray, "Q A"],
    positives: Bool[np.ndarray, "Q A"],
    unit: Int[np.ndarray, "Q"],
    ks: Sequence[int],
) -> tuple[dict[int, Outcome], Float[np.ndarray, "Q"]]:
    """Recall at each k, and the best positive's rank; queries are rows and each has a positive."""
    queries, answers = scores.shape
    # For each query: answers above its best positive, answers level with it, and how many of those are positives.
    above, level, level_positives = (np.empty(queries, dtype=np.int64) for _ in range(3))
    scored = np.empty(queries, dtype=bool)
    step = max(1, _BLOCK_PAIRS // answers)
    for start in range(0, queries, step):
        rows = slice(start, start + step)
        block, positive = scores[rows], positives[rows]
        if np.isnan(block).any():
            raise ValueError("scores contain NaN")
        best = np.max(block, axis=1, keepdims=True, where=positive, initial=-np.inf)
        is_level = block == best
        above[rows] = np.count_nonzero(block > best, axis=1)
        scored[rows] = (best[:, 0] > -np.inf) | (above[rows] == 0)
        level[rows] = np.count_nonzero(is_level, axis=1)
        level_positives[rows] = np.count_nonzero(is_level & positive, axis=1)

    all_positives = np.count_nonzero(positives, axis=1)
    recalls = {
        k: Outcome(
            values=scored * _hit_probability(level, level_positives, k - above),
            unit=unit,
            weight=np.ones(queries),
            chance=_hit_probability(np.full(queries, answers), all_positives, np.full(queries, k)),
        )
        for k in ks
    }
    # The first of p positives among n answers in random order is expected at rank (n + 1) / (p + 1).
    return recalls, above + (level + 1) / (level_positives + 1)


def _hit_probability(
    items: Int[np.ndarray, "Q"], positives: Int[np.ndarray, "Q"], draws: Int[np.ndarray, "Q"]
) -> Float[np.ndarray, "Q"]:
    """Chance that drawing without replacement (``draws`` below 0 count as 0) finds at least one positive."""
    draws = np.minimum(draws, items)
    miss = np.ones(len(items))
    for drawn in range(max(0, draws.max())):
        negatives = np.maximum(items - positives - drawn, 0)
        miss *= np.where(drawn < draws, negatives / np.maximum(items - drawn, 1), 1.0)
    return 1.0 - miss
