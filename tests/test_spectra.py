"""Spectra against NumPy's singular values of whole matrices, and closed forms."""

import json
import warnings

import numpy as np
import pytest

from llip_jax.evaluation.diagnostics.pairs import normalized
from llip_jax.evaluation.diagnostics.spectra import (
    Moments,
    effective_rank,
    participation_ratio,
    spectra_figures,
    spectrum,
)


def ill_conditioned(rng: np.random.Generator, rows: int, values: np.ndarray) -> np.ndarray:
    """A matrix with columns of mean zero and these singular values."""
    left = rng.normal(size=(rows, len(values)))
    left = np.linalg.qr(left - left.mean(axis=0))[0]
    right = np.linalg.qr(rng.normal(size=(len(values), len(values))))[0]
    return left * values @ right.T


def in_blocks(rows: np.ndarray, rng: np.random.Generator) -> Moments:
    """Blocks of random sizes, some of them empty, in two accumulators that are merged."""
    cuts = np.sort(rng.integers(0, len(rows) + 1, 7))
    both = Moments(rows.shape[1]), Moments(rows.shape[1])
    for number, block in enumerate(np.split(rows, cuts)):
        both[number % 2].add(block)
    both[0].merge(both[1])
    both[0].merge(Moments(rows.shape[1]))
    return both[0]


@pytest.mark.parametrize("count", [1, 3, 40, 500])
def test_any_blocks_give_the_moments_of_the_whole(count: int) -> None:
    rng = np.random.default_rng(count)
    rows = rng.normal(size=(count, 8)) + 3
    moments = in_blocks(rows, rng)
    assert moments.count == count
    np.testing.assert_allclose(moments.mean, rows.mean(axis=0), rtol=1e-12)
    covariance, second = (moments.factor(centred).T @ moments.factor(centred) for centred in (True, False))
    np.testing.assert_allclose(covariance, np.cov(rows.T, bias=True), atol=1e-12)
    np.testing.assert_allclose(second, rows.T @ rows / count, rtol=1e-12)
    assert len(moments.factor(centred=False)) <= 9


def test_keeps_small_singular_values_that_a_gram_matrix_loses() -> None:
    rng = np.random.default_rng(0)
    values = np.logspace(0, -12, 13)
    rows = ill_conditioned(rng, 2000, values)
    found = np.linalg.svd(in_blocks(rows, rng).factor(centred=True), compute_uv=False) * np.sqrt(len(rows))
    np.testing.assert_allclose(found, np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False), rtol=0, atol=3e-15)
    np.testing.assert_allclose(found, values, rtol=2e-3)
    gram = np.sqrt(np.abs(np.linalg.eigvalsh(rows.T @ rows))[::-1])
    assert np.all(np.abs(gram / values - 1)[values < 1e-9] > 0.1)  # what the docstring of Moments warns of


def test_planted_rank_is_found() -> None:
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.normal(size=(32, 32)))[0]
    signs = np.vstack([np.eye(5), -np.eye(5)])  # mean zero, equal variance in 5 directions
    figures = spectrum(np.repeat(signs, 20, axis=0) @ basis[:5])
    assert figures["effective_rank"] == pytest.approx(5)
    assert figures["participation_ratio"] == pytest.approx(5)
    assert np.sum(np.array(figures["singular_values"]) > 1e-9) == 5
    np.testing.assert_allclose(figures["singular_values"][:5], np.sqrt(1 / 5))
    assert figures["mean_length"] == pytest.approx(0, abs=1e-12)


def test_orthonormal_rows_have_a_flat_spectrum() -> None:
    rows = np.linalg.qr(np.random.default_rng(2).normal(size=(16, 16)))[0]
    figures = spectrum(rows)  # centring takes one of 16 directions
    np.testing.assert_allclose(figures["singular_values"], [0.25] * 15 + [0], atol=1e-12)
    assert figures["effective_rank"] == pytest.approx(15)
    assert figures["mean_length"] == pytest.approx(0.25)


def test_isotropic_embeddings_use_all_dimensions() -> None:
    rows = np.random.default_rng(3).normal(size=(20_000, 24)).astype(np.float32)
    figures = spectrum(rows)
    assert figures["effective_rank"] == pytest.approx(24, rel=1e-3)
    np.testing.assert_allclose(figures["singular_values"], np.sqrt(1 / 24), rtol=0.05)


def test_length_of_vectors_does_not_matter_and_figures_are_numpys() -> None:
    rng = np.random.default_rng(4)
    rows = (rng.normal(size=(300, 12)) @ rng.normal(size=(12, 12)) + 1).astype(np.float32)
    figures = spectra_figures({"patches": rows, "unconditioned": rows * rng.uniform(1, 9, (300, 1))})
    directions = normalized(rows)
    expected = np.linalg.svd(directions - directions.mean(axis=0), compute_uv=False) / np.sqrt(300)
    for one in figures.values():
        np.testing.assert_allclose(one["singular_values"], expected, atol=1e-6)
    assert json.loads(json.dumps(figures)) == figures


def test_effective_rank_of_two_values() -> None:
    values = np.array([3.0, 1.0, 0.0])
    assert effective_rank(values) == pytest.approx(np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25)))
    assert participation_ratio(values) == pytest.approx(100 / 82)


@pytest.mark.parametrize("rows", [np.ones((1, 4)), np.full((50, 4), 0.3), np.zeros((3, 4))])
def test_one_image_or_equal_ones_have_no_rank(rows: np.ndarray) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = spectrum(rows)
    assert figures["effective_rank"] is None and figures["participation_ratio"] is None
    assert not any(figures["singular_values"])


def test_embeddings_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        Moments(2).add(np.array([[1.0, np.nan]]))
