"""Image-caption choice: is an image's true caption scored above its distractors (ARO, SugarCrepe and their like)?"""

import numpy as np
from jaxtyping import Bool, Float

from llip_jax.evaluation.figures import Outcome


def choice_outcomes(scores: Float[np.ndarray, "N C"], mask: Bool[np.ndarray, "N C"]) -> dict[str, Outcome]:
    """Accuracy of choosing the true caption, the first, among those of an image. Every image with choices is a query.

    It is ``text_acc`` (and ``acc``) of CLIP_benchmark's ``image_caption_selection`` for sets with one image a choice,
    except for ties: the true caption wins its share of them, where CLIP_benchmark lets the first, the true one, win
    them all. Sets that also choose between images (Winoground) are not covered.

    Args:
        scores: score of the image with each of its own captions.
        mask: which of them there are; images have different numbers, or none.

    Returns:
        ``accuracy``; its chance level is one over the number of choices.

    Raises:
        ValueError: shapes differ, no image has a choice, an image has choices but no first, or a score is NaN.
    """
    if scores.ndim != 2 or scores.shape != mask.shape:
        raise ValueError(f"expected scores and mask of one shape [N, C], got {scores.shape} and {mask.shape}")
    image = np.flatnonzero(mask.any(axis=1))
    if not len(image):
        raise ValueError(f"none of the {len(scores)} images has a choice")
    scores, mask = scores[image], mask[image]
    if not mask[:, 0].all():
        raise ValueError(f"images without a true caption: rows {image[~mask[:, 0]].tolist()}")
    if np.isnan(scores[mask]).any():
        raise ValueError("scores contain NaN")

    beaten = np.any(mask & (scores > scores[:, :1]), axis=1)
    level = np.count_nonzero(mask & (scores == scores[:, :1]), axis=1)
    right = np.where(beaten, 0.0, 1 / level)
    return {"accuracy": Outcome(right, image, np.ones(len(image)), 1 / np.count_nonzero(mask, axis=1))}
