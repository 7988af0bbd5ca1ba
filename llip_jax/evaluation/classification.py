"""Classification figures from class scores, ties counted fairly (see llip_jax/evaluation/retrieval.py)."""

import numpy as np
from jaxtyping import Float, Int


def accuracy(scores: Float[np.ndarray, "N C"], labels: Int[np.ndarray, "N"]) -> dict[str, float]:
    """Top-1 and top-5 accuracy and mean per-class recall, in [0, 1].

    Args:
        scores: score of each (image, class) pair, higher for a better match.
        labels: right class of each image.

    Returns:
        ``top_1_accuracy``, ``top_5_accuracy`` and ``mean_per_class_recall`` (top-1, averaged over the classes that
        occur in ``labels``), expected over random orders of equal scores; and with ``_chance`` at the end of the name,
        what random scores reach.

    Raises:
        ValueError: shapes do not fit or are empty, a label is not in [0, C), or a score is NaN.
    """
    if scores.ndim != 2 or scores.size == 0 or labels.shape != scores.shape[:1]:
        raise ValueError(f"expected scores [N, C] and labels [N], got {scores.shape} and {labels.shape}")
    classes = scores.shape[1]
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"expected labels in [0, {classes}), got {labels.min()} to {labels.max()}")
    if np.isnan(scores).any():
        raise ValueError("scores contain NaN")

    right = np.take_along_axis(scores, labels[:, None], axis=1)
    above = np.count_nonzero(scores > right, axis=1)
    level = np.count_nonzero(scores == right, axis=1)
    # The right class takes each of the places above + 1 ... above + level with equal probability.
    top_1, top_5 = (np.clip((k - above) / level, 0.0, 1.0) for k in (1, 5))
    images_of_class = np.bincount(labels, minlength=classes)
    hits_of_class = np.bincount(labels, weights=top_1, minlength=classes)
    present = images_of_class > 0
    return {
        "top_1_accuracy": float(np.mean(top_1)),
        "top_1_accuracy_chance": 1 / classes,
        "top_5_accuracy": float(np.mean(top_5)),
        "top_5_accuracy_chance": min(5, classes) / classes,
        "mean_per_class_recall": float(np.mean(hits_of_class[present] / images_of_class[present])),
        "mean_per_class_recall_chance": 1 / classes,
    }
