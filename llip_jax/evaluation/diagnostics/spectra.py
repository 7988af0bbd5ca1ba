"""Singular values of embeddings: how many directions a model uses.

The Llip paper (arXiv 2405.00740) shows the singular values of its image embeddings, a flatter spectrum than its
baselines'. That section was not at hand; our reading is the practice of Jing et al. (arXiv 2110.09348): the spectrum of
the covariance matrix of a validation set's embeddings. So rows are L2-normalised, because scores see directions only
and a few long vectors would otherwise make the spectrum; then centred, because the mean that all embeddings share
tells no image from another, yet would be the largest value by far. Its length, ``mean_length``, is reported beside.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from llip_jax.evaluation.diagnostics.pairs import BLOCK_ROWS, normalized


class Moments:
    """Number, mean and scatter of rows that come in blocks.

    The scatter is held as the triangular factor R of a QR decomposition, R^T R = sum of (x - mean)(x - mean)^T, of at
    most d x d numbers. Products such as X^T X square the condition number: singular values below 1e-8 of the largest
    drown in rounding even in float64. Those of R are right to about 1e-15 of the largest (tests/test_spectra.py).
    """

    def __init__(self, width: int):
        self.count = 0
        self.mean = np.zeros(width)
        self._factor = np.zeros((0, width))

    def add(self, rows: Float[np.ndarray, "n d"]) -> None:
        """Takes in a block of rows.

        Raises:
            ValueError: a value is NaN or infinite.
        """
        rows = np.asarray(rows, np.float64)
        if not np.isfinite(rows).all():
            raise ValueError("embeddings contain NaN or infinity")
        if len(rows):
            mean = rows.mean(axis=0)
            self._combine(len(rows), mean, rows - mean)

    def merge(self, other: "Moments") -> None:
        """Takes in the rows that ``other`` has seen."""
        if other.count:
            self._combine(other.count, other.mean, other._factor)

    def factor(self, centred: bool) -> Float[np.ndarray, "r d"]:
        """A matrix F of at most d + 1 rows, F^T F being the covariance (``centred``) or the mean of x x^T."""
        rows = self._factor if centred else np.vstack([self._factor, np.sqrt(self.count) * self.mean])
        return rows / np.sqrt(max(1, self.count))

    def _combine(self, count: int, mean: Float[np.ndarray, "d"], centred: Float[np.ndarray, "n d"]) -> None:
        """Chan, Golub and LeVeque's update of mean and scatter (1979), with factors for scatters."""
        total = self.count + count
        gap = mean - self.mean
        between = np.sqrt(self.count / total * count) * gap
        self._factor = np.asarray(np.linalg.qr(np.vstack([self._factor, centred, between]), mode="r"))
        self.mean = self.mean + gap * (count / total)
        self.count = total


def effective_rank(singular_values: Float[np.ndarray, "r"]) -> float | None:
    """exp of the entropy of the singular values divided by their sum (Roy & Vetterli, EUSIPCO 2007, definition 2).

    From 1 (one direction) to the rank (all alike); None for the zero matrix.
    """
    total = singular_values.sum()
    if total == 0:
        return None
    share = singular_values[singular_values > 0] / total
    return float(np.exp(-np.sum(share * np.log(share))))


def participation_ratio(singular_values: Float[np.ndarray, "r"]) -> float | None:
    """(sum of variances)^2 / sum of squared variances: effective_rank's sterner sibling. None for the zero matrix."""
    variances = singular_values**2
    return float(variances.sum() ** 2 / np.sum(variances**2)) if variances.any() else None


def spectrum(embedding: Float[np.ndarray, "N d"]) -> dict[str, Any]:
    """Figures of one embedding, rows normalised and centred.

    Returns:
        ``singular_values``, of the matrix divided by sqrt(N), largest first: standard deviations along the principal
        directions, whose squares are the singular values of the covariance; ``effective_rank``,
        ``participation_ratio``, ``mean_length`` in [0, 1], ``dimensions`` d and ``images`` N. One image, or equal ones,
        span no direction: both ranks are None.
    """
    moments = Moments(embedding.shape[1])
    for start in range(0, len(embedding), BLOCK_ROWS):
        moments.add(normalized(embedding[start : start + BLOCK_ROWS]))
    values = np.linalg.svd(moments.factor(centred=True), compute_uv=False)
    values[values < 1e-12] = 0  # rounding of rows that are equal, of length 1
    return {
        "singular_values": values.tolist(),
        "effective_rank": effective_rank(values),
        "participation_ratio": participation_ratio(values),
        "mean_length": float(np.linalg.norm(moments.mean)),
        "dimensions": embedding.shape[1],
        "images": len(embedding),
    }


def spectra_figures(embeddings: Mapping[str, Float[np.ndarray, "N _"]]) -> dict[str, dict[str, Any]]:
    """``spectrum`` of each embedding by name."""
    return {name: spectrum(embedding) for name, embedding in embeddings.items()}
