"""Classification figures from class scores, ties counted fairly (see llip_jax/evaluation/retrieval.py)."""

import numpy as np
from jaxtyping import Bool, Float, Int

from llip_jax.evaluation.figures import Outcome, figures_of


def accuracy(scores: Float[np.ndarray, "N C"], labels: Int[np.ndarray, "N"]) -> dict[str, float]:
    """Figures of ``accuracy_outcomes``, and with ``_chance`` at the end of the name what random scores reach.

    Raises:
        ValueError: see there.
    """
    return figures_of(accuracy_outcomes(scores, labels))


def accuracy_outcomes(scores: Float[np.ndarray, "N C"], labels: Int[np.ndarray, "N"]) -> dict[str, Outcome]:
    """Top-1 and top-5 accuracy and mean per-class recall of images with one label each. Every image is a query.

    They are scikit-learn's ``top_k_accuracy_score`` and ``balanced_accuracy_score`` and CLIP_benchmark's figures
    except where the right class ties with others: ``top_k_accuracy_score`` then ranks the last class first, ``argmax``,
    which the recall of both is taken from, the first, and CLIP_benchmark's accuracies follow ``torch.topk``. With fewer
    than five classes top-5 is 1, where CLIP_benchmark has NaN.

    Args:
        scores: score of each (image, class) pair, higher for a better match.
        labels: right class of each image.

    Returns:
        ``top_1_accuracy``, ``top_5_accuracy`` and ``mean_per_class_recall`` (top-1, averaged over the classes that
        occur in ``labels``), in [0, 1], expected over random orders of equal scores.

    Raises:
        ValueError: shapes do not fit or are empty, a label is not in [0, C), or a score is NaN.
    """
    if scores.ndim != 2 or scores.size == 0 or labels.shape != scores.shape[:1]:
        raise ValueError(f"expected scores [N, C] and labels [N], got {scores.shape} and {labels.shape}")
    images, classes = scores.shape
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"expected labels in [0, {classes}), got {labels.min()} to {labels.max()}")
    if np.isnan(scores).any():
        raise ValueError("scores contain NaN")

    right = np.take_along_axis(scores, labels[:, None], axis=1)
    above = np.count_nonzero(scores > right, axis=1)
    level = np.count_nonzero(scores == right, axis=1)
    # The right class takes each of the places above + 1 ... above + level with equal probability.
    top_1, top_5 = (np.clip((k - above) / level, 0.0, 1.0) for k in (1, 5))
    image, alike = np.arange(images), np.ones(images)
    by_class = 1 / np.bincount(labels, minlength=classes)[labels]
    return {
        "top_1_accuracy": Outcome(top_1, image, alike, np.full(images, 1 / classes)),
        "top_5_accuracy": Outcome(top_5, image, alike, np.full(images, min(5, classes) / classes)),
        "mean_per_class_recall": Outcome(top_1, image, by_class, np.full(images, 1 / classes)),
    }


def mean_average_precision_outcomes(
    scores: Float[np.ndarray, "N C"], targets: Bool[np.ndarray, "N C"]
) -> dict[str, Outcome]:
    """Mean over classes of the average precision with which a class ranks the images; images may have several labels.

    Every (image, class) that belongs together is a query, and what it gets is the precision among the images that the
    class ranks as high. A class's average precision is the mean of these, so that a query weighs 1 / (images of the
    class). Classes without an image are left out; CLIP_benchmark counts them as 0. Images without a label are wrong
    answers to all classes. The bootstrap draws images with the precisions they have here: images are not ranked anew.

    Without ties it is scikit-learn's ``average_precision_score`` (and CLIP_benchmark's). With ties, it is the
    expectation over random orders of equal scores; scikit-learn gives all of them the precision behind the last one,
    which may be more or less, and CLIP_benchmark takes the order that a sort leaves them in. Chance is the expectation
    of random scores: somewhat more than the share of images that belong to the class, which it nears as images become
    many.

    Args:
        scores: score of each (image, class) pair, higher for a better match.
        targets: which classes each image belongs to.

    Returns:
        ``mean_average_precision``.

    Raises:
        ValueError: shapes differ or are empty, no image belongs to a class, or a score is NaN.
    """
    if scores.ndim != 2 or scores.size == 0 or scores.shape != targets.shape:
        raise ValueError(f"expected scores and targets of one shape [N, C], got {scores.shape} and {targets.shape}")
    if not targets.any():
        raise ValueError(f"none of the {len(targets)} images belongs to a class")
    if np.isnan(scores).any():
        raise ValueError("scores contain NaN")

    images_of_class = np.count_nonzero(targets, axis=0)
    every = np.full_like(images_of_class, len(targets))
    none = np.zeros_like(images_of_class)
    chance = _expected_precision(none, none, every, images_of_class)
    # Class after class, as the values below.
    label, image = np.nonzero(targets.T)
    values = [_precisions(scores[:, c], targets[:, c]) for c in range(scores.shape[1])]
    outcome = Outcome(np.concatenate(values), image, 1 / images_of_class[label], chance[label])
    return {"mean_average_precision": outcome}


def _precisions(scores: Float[np.ndarray, "N"], targets: Bool[np.ndarray, "N"]) -> Float[np.ndarray, "P"]:
    """Expected precision at each positive of one class."""
    _, level, items = np.unique(-scores, return_inverse=True, return_counts=True)
    positives = np.bincount(level[targets], minlength=len(items))
    above, positives_above = (np.cumsum(count) - count for count in (items, positives))
    return _expected_precision(above, positives_above, items, positives)[level[targets]]


def _expected_precision(
    above: Int[np.ndarray, "L"],
    positives_above: Int[np.ndarray, "L"],
    items: Int[np.ndarray, "L"],
    positives: Int[np.ndarray, "L"],
) -> Float[np.ndarray, "L"]:
    """Precision at a positive among ``items`` of equal score, ``positives`` of them, in random order.

    At place r of them it is (positives_above + 1 + (r - 1) s) / (above + r), where s = (positives - 1) / (items - 1) is
    the chance that another of them is positive; this is the mean over r = 1 ... items.
    """
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, (above + items).max() + 1))])
    inverses = harmonic[above + items] - harmonic[above]
    share = (positives - 1) / np.maximum(items - 1, 1)
    return ((positives_above + 1) * inverses + share * (items - (above + 1) * inverses)) / items
