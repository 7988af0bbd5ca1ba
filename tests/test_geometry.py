"""Alignment, uniformity and gap against closed forms and plain loops."""

import json
import warnings
from itertools import combinations

import numpy as np
import pytest

from llip_jax.evaluation.diagnostics import geometry, pairs
from llip_jax.evaluation.diagnostics.geometry import geometry_figures, uniformity
from llip_jax.evaluation.diagnostics.pairs import normalized


def own_captions(rng: np.random.Generator, images: int, captions: int, texts: int) -> tuple[np.ndarray, np.ndarray]:
    mask = rng.random((images, captions)) < 0.6
    mask[0] = False
    return rng.integers(texts, size=(images, captions)), mask


def test_uniformity_of_a_simplex() -> None:
    corners = normalized(np.eye(7) - 1 / 7)  # inner products -1/6
    assert uniformity(corners) == pytest.approx(-2 * (2 + 2 / 6))


def test_uniformity_of_equal_vectors_is_zero() -> None:
    assert uniformity(np.full((9, 5), 0.2)) == pytest.approx(0, abs=1e-12)


def test_uniformity_of_a_uniform_sphere() -> None:
    # In three dimensions cosines are uniform on [-1, 1], so the mean of exp(4 c - 4) is (1 - exp(-8)) / 8.
    x = np.random.default_rng(0).normal(size=(6000, 3))
    assert uniformity(x) == pytest.approx(np.log((1 - np.exp(-8)) / 8), abs=0.01)


@pytest.mark.parametrize("block", [1, 7, 64])
def test_uniformity_equals_a_loop_over_pairs(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "_PAIR_BLOCK", block)
    x = np.random.default_rng(block).normal(size=(50, 6)).astype(np.float32)
    potentials = [np.exp(-2 * np.sum((a - b) ** 2)) for a, b in combinations(normalized(x), 2)]
    assert uniformity(x) == pytest.approx(np.log(np.mean(potentials)))


def test_uniformity_of_many_vectors_is_that_of_a_random_subset() -> None:
    x = np.random.default_rng(1).normal(size=(4000, 8))
    assert uniformity(x, rows=1500) == pytest.approx(uniformity(x), abs=0.02)
    assert uniformity(x, rows=1500) == uniformity(x, rows=1500)


def test_figures_equal_loops_over_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "BLOCK_ROWS", 11)
    rng = np.random.default_rng(2)
    unconditioned, texts = rng.normal(size=(30, 5)), rng.normal(size=(40, 5)) + 1
    mixed = rng.normal(size=(30, 4, 5))
    text, mask = own_captions(rng, 30, 4, 40)
    mixed[~mask] = np.nan  # what is not there is not looked at
    figures = geometry_figures(unconditioned, mixed, texts, text, mask)

    where = np.argwhere(mask)
    captions = normalized(np.array([texts[text[n, c]] for n, c in where]))
    first = np.array([mixed[n, c] for n, c in where if not mask[n, :c].any()])
    for prefix, images, single in (
        ("", np.array([mixed[n, c] for n, c in where]), first),
        ("unconditioned_", np.array([unconditioned[n] for n, _ in where]), unconditioned[mask.any(axis=1)]),
    ):
        images = normalized(images)
        assert figures[f"{prefix}alignment"] == pytest.approx(np.mean(np.sum((images - captions) ** 2, axis=1)))
        means = images.mean(axis=0), captions.mean(axis=0)
        assert figures[f"{prefix}modality_gap"] == pytest.approx(np.linalg.norm(means[0] - means[1]))
        own = [
            np.linalg.norm(x - means[side]) < np.linalg.norm(x - means[1 - side])
            for side, vectors in enumerate((images, captions))
            for x in vectors
        ]
        assert figures[f"{prefix}modality_separability"] == pytest.approx(np.mean(own))
        assert figures[f"{prefix}uniformity_image"] == pytest.approx(uniformity(single))
    assert figures["uniformity_text"] == pytest.approx(uniformity(texts[np.unique(text[mask])]))
    assert figures["pairs"] == len(where)
    assert json.loads(json.dumps(figures)) == figures


def test_modalities_in_two_cones_are_told_apart() -> None:
    rng = np.random.default_rng(3)
    images, texts = rng.normal(size=(60, 8)) * 0.1, rng.normal(size=(60, 8)) * 0.1
    images[:, 0] += 1
    texts[:, 1] += 1
    figures = geometry_figures(images, None, texts, np.arange(60)[:, None], np.ones((60, 1), bool))
    assert figures["modality_separability"] == 1
    assert figures["modality_gap"] == pytest.approx(np.sqrt(2), abs=0.1)
    assert not any(name.startswith("unconditioned") for name in figures)


def test_perfectly_aligned_pairs_have_no_gap() -> None:
    x = np.random.default_rng(4).normal(size=(20, 6))
    figures = geometry_figures(x, None, 2 * x, np.arange(20)[:, None], np.ones((20, 1), bool))
    assert figures["alignment"] == pytest.approx(0, abs=1e-12)
    assert figures["modality_gap"] == pytest.approx(0, abs=1e-12)
    assert figures["modality_separability"] is None


@pytest.mark.parametrize("captions", [0, 1])
def test_one_image_has_defined_figures(captions: int) -> None:
    mask = np.ones((1, captions), bool)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = geometry_figures(
            np.eye(1, 4), np.ones((1, captions, 4)), np.eye(4), np.ones(mask.shape, np.int64), mask
        )
    assert figures["uniformity_image"] is None and figures["uniformity_text"] is None
    assert (figures["alignment"] is None) == (captions == 0)
