"""What captions say of images and what they leave unsaid: Dissecting CLIP (arXiv 2412.18645).

With C the second moments of paired image and text embeddings, C_II = C_IT C_TT^-1 C_TI + S: the first term is what a
linear map of the text explains of the images, the Schur complement S what it does not. Its entropy is the paper's Schur
complement entropy: -sum of l log(l / sum of l) over the eigenvalues l of S, that is trace times von Neumann entropy of
the normalised spectrum. The formula, moments that are not centred and the cosine kernel (features are the normalised
embeddings themselves) are those of the authors' code (aziksh-ospanov/scendi-score, scendi/metric/algorithm_utils.py).
Their Gaussian kernel is left out; ``decompose`` takes features of any kernel.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from llip_jax.evaluation.diagnostics.pairs import BLOCK_ROWS, normalized, pair_blocks
from llip_jax.evaluation.diagnostics.spectra import Moments

TOLERANCE = 1e-6
"""Singular values of the texts below this part of the largest are rounding of float32 embeddings and count as zero; in
C_TT it is 1e-12, which the authors add to its diagonal instead."""


class Decomposition(NamedTuple):
    """Second moments of images, split by what texts explain; eigenvalues, largest first.

    image, explained, residual: of C_II, C_IT C_TT^+ C_TI and the Schur complement.
    coefficients: the linear map from texts to the images they explain, C_TT^+ C_TI.
    rank: of the texts.
    chance: what part of the trace texts would explain on average over all ways of pairing them with the images.
    """

    image: Float[np.ndarray, "k"]
    explained: Float[np.ndarray, "k"]
    residual: Float[np.ndarray, "k"]
    coefficients: Float[np.ndarray, "f d"]
    rank: int
    chance: float

    @property
    def share(self) -> float:
        """What part of the trace of C_II the texts explain."""
        return float(self.explained.sum() / self.image.sum())


def decompose(blocks: Iterable[tuple[np.ndarray, np.ndarray]], *, centred: bool = False) -> Decomposition | None:
    """Splits the second moments of images by paired texts.

    Works on triangular factors, so that no inverse of squared numbers is taken.

    Args:
        blocks: image features [b, d] and text features [b, f], row by row a pair.
        centred: covariances instead of the paper's second moments.

    Returns:
        None where nothing can be said: no image varies (or is not zero), or texts have as many dimensions as there are
        pairs and would explain any images whatever.
    """
    moments, width = None, 0
    for images, texts in blocks:
        width = texts.shape[1]
        moments = moments or Moments(width + images.shape[1])
        moments.add(np.hstack([texts, images]))
    if moments is None:
        return None
    factor = moments.factor(centred)
    text, image = factor[:, :width], factor[:, width:]
    left, values, right = np.linalg.svd(text, full_matrices=False)
    # Centred equal rows leave rounding only, which has no largest value to be compared with.
    kept = values > max(TOLERANCE * values.max(initial=0), 1e-12)
    left, rank = left[:, kept], int(kept.sum())
    inside = left.T @ image
    total = float(np.sum(image**2))
    if total < 1e-24 or rank >= moments.count - centred:
        return None

    text_mean, image_mean = (np.zeros(width), np.zeros(image.shape[1])) if centred else np.split(moments.mean, [width])
    # P projects columns of n numbers onto those that are linear in the texts, and x = mean + rest is one of the images.
    # Over all permutations of x, the mean of x^T P x is n mean^2 a + |rest|^2 (rank - a) / (n - 1), a = 1^T P 1 / n.
    ones = float(np.sum((right[kept] @ text_mean / values[kept]) ** 2))
    mean_square = float(image_mean @ image_mean)
    chance = mean_square * ones + (total - mean_square) * (rank - ones) / (moments.count - 1)
    return Decomposition(
        image=_squares(image),
        explained=_squares(inside),
        residual=_squares(image - left @ inside),
        coefficients=(right[kept].T / values[kept]) @ inside,
        rank=rank,
        chance=chance / total,
    )


def spectral_entropy(eigenvalues: Float[np.ndarray, "k"]) -> float:
    """Trace times von Neumann entropy of the normalised spectrum; 0 for the zero matrix."""
    positive = eigenvalues[eigenvalues > 0]
    return float(np.sum(positive * np.log(positive.sum() / positive)))


class Removal(NamedTuple):
    """Images without a factor, the part of their variance it took, and the part that chance would have taken."""

    images: Float[np.ndarray, "N d"]
    share: float
    chance: float


def remove_factor(images: Float[np.ndarray, "N d"], factor: Float[np.ndarray, "N f"]) -> Removal | None:
    """Images minus what a factor explains of them, so that no linear map of it predicts anything of what is left.

    The paper's correction of an image by its prompt, x - C_IT C_TT^-1 t, here with centred moments (our choice): the
    mean of all images is no part of the factor.

    Args:
        images: embeddings; they are normalised first.
        factor: of each image. Where its value is known (the colour of the object), the text embedding of the word; if
            the words are linearly independent, images of all values then have the same mean. Where it is not, the
            cosines of the image with all words of the factor.

    Returns:
        None where nothing can be removed (see ``decompose``).
    """
    images = normalized(images)
    factor = np.asarray(factor, np.float64)
    starts = range(0, len(images), BLOCK_ROWS)
    parts = decompose(((images[s : s + BLOCK_ROWS], factor[s : s + BLOCK_ROWS]) for s in starts), centred=True)
    if parts is None:
        return None
    return Removal(images - (factor - factor.mean(axis=0)) @ parts.coefficients, parts.share, parts.chance)


def schur_figures(
    unconditioned: Float[np.ndarray, "N d"],
    mixed: Float[np.ndarray, "N C d"] | None,
    texts: Float[np.ndarray, "T d"],
    text: Int[np.ndarray, "N C"],
    mask: Bool[np.ndarray, "N C"],
    factors: Mapping[str, Float[np.ndarray, "N f"]] | None = None,
) -> dict[str, Any]:
    """Schur complement figures of images with their own captions, and variance shares of named factors.

    Args:
        unconditioned: image embeddings that no text has conditioned.
        mixed: each image mixed by each of its captions; None where texts do not mix images.
        texts: text embeddings, those of captions among them.
        text: each image's captions, as rows of ``texts``.
        mask: which of them there are.
        factors: see ``remove_factor``.

    Returns:
        By image vector, ``unconditioned`` and ``mixed`` (which has its text in it already): ``entropy`` (Schur
        complement entropy), ``image_entropy`` (of C_II), ``text_entropy`` (of the explained part), ``text_share`` (the
        explained part of the trace), ``text_share_chance`` (its mean over all ways of pairing the same images and
        texts) and ``text_rank``. Then ``pairs``, and in ``factors`` by name ``variance_share`` and
        ``variance_share_chance``. None for what is not defined (see ``decompose``).
    """
    vectors = {"unconditioned": unconditioned} | ({} if mixed is None else {"mixed": mixed})
    return {
        "pairs": int(mask.sum()),
        **{name: _figures(decompose(pair_blocks(images, texts, text, mask))) for name, images in vectors.items()},
        "factors": {name: _shares(remove_factor(unconditioned, factor)) for name, factor in (factors or {}).items()},
    }


def _figures(parts: Decomposition | None) -> dict[str, Any] | None:
    if parts is None:
        return None
    return {
        "entropy": spectral_entropy(parts.residual),
        "image_entropy": spectral_entropy(parts.image),
        "text_entropy": spectral_entropy(parts.explained),
        "text_share": parts.share,
        "text_share_chance": parts.chance,
        "text_rank": parts.rank,
    }


def _shares(removal: Removal | None) -> dict[str, float] | None:
    return removal and {"variance_share": removal.share, "variance_share_chance": removal.chance}


def _squares(factor: Float[np.ndarray, "r d"]) -> Float[np.ndarray, "k"]:
    """Eigenvalues of F^T F."""
    return np.linalg.svd(factor, compute_uv=False) ** 2
