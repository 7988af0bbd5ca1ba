"""Schur complements against dense algebra, closed forms and planted factors."""

import json
import warnings
from itertools import permutations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from llip_jax.evaluation.diagnostics.pairs import normalized
from llip_jax.evaluation.diagnostics.schur import decompose, remove_factor, schur_figures, spectral_entropy


def entropy(matrix: np.ndarray) -> float:
    """-tr S log(S / tr S), from the matrix."""
    values = np.linalg.eigvalsh(matrix)
    values = values[values > 1e-14]
    return float(-np.sum(values * np.log(values / values.sum())))


def paired(count: int) -> tuple[np.ndarray, np.ndarray]:
    """One caption an image: caption i is text i."""
    return np.arange(count)[:, None], np.ones((count, 1), bool)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("rank", [3, 6])
def test_decomposition_equals_dense_algebra(centred: bool, rank: int) -> None:
    rng = np.random.default_rng(rank)
    texts = rng.normal(size=(200, rank)) @ rng.normal(size=(rank, 6)) + centred
    images = texts @ rng.normal(size=(6, 5)) + rng.normal(size=(200, 5)) + 1
    parts = decompose(zip(np.split(images, [50, 51]), np.split(texts, [50, 51]), strict=True), centred=centred)
    assert parts is not None and parts.rank == rank
    if centred:
        images, texts = images - images.mean(axis=0), texts - texts.mean(axis=0)
    c_ii, c_it, c_tt = images.T @ images / 200, images.T @ texts / 200, texts.T @ texts / 200
    explained = c_it @ np.linalg.pinv(c_tt, rcond=1e-9) @ c_it.T
    for found, matrix in ((parts.image, c_ii), (parts.explained, explained), (parts.residual, c_ii - explained)):
        np.testing.assert_allclose(found[:5], np.linalg.eigvalsh(matrix)[::-1][: len(found)], atol=1e-10)
        assert spectral_entropy(found) == pytest.approx(entropy(matrix))
    np.testing.assert_allclose(texts @ parts.coefficients, texts @ np.linalg.pinv(texts) @ images, atol=1e-9)


@pytest.mark.parametrize("centred", [False, True])
def test_chance_is_the_mean_over_all_pairings(centred: bool) -> None:
    rng = np.random.default_rng(3)
    images, texts = rng.normal(size=(6, 4)) + 0.5, rng.normal(size=(6, 2)) + 0.7
    shares = [decompose([(images, texts[list(order)])], centred=centred) for order in permutations(range(6))]
    parts = decompose([(images, texts)], centred=centred)
    assert parts is not None
    assert parts.chance == pytest.approx(np.mean([other.share for other in shares if other is not None]))


def test_images_that_the_text_determines_have_entropy_zero() -> None:
    rng = np.random.default_rng(4)
    texts = normalized(rng.normal(size=(300, 8)))
    rotation = np.linalg.qr(rng.normal(size=(8, 8)))[0]  # keeps lengths, so that normalising changes nothing
    figures = schur_figures(texts @ rotation, None, texts, *paired(300))["unconditioned"]
    assert figures["entropy"] == pytest.approx(0, abs=1e-12)
    assert figures["text_share"] == pytest.approx(1)
    assert figures["text_entropy"] == pytest.approx(figures["image_entropy"])
    assert figures["text_rank"] == 8


def test_images_that_texts_say_nothing_of_keep_all_their_entropy() -> None:
    # Every one of 4 images with every one of 6 texts; all mean zero.
    images = np.repeat(np.vstack([np.eye(2, 5), -np.eye(2, 5)]), 6, axis=0)
    texts = np.tile(np.vstack([np.eye(3, 5), -np.eye(3, 5)]), (4, 1))
    figures = schur_figures(images, None, texts, *paired(24))["unconditioned"]
    assert figures["text_share"] == pytest.approx(0, abs=1e-12)
    assert figures["entropy"] == pytest.approx(np.log(2))
    assert figures["image_entropy"] == pytest.approx(np.log(2))


def test_unrelated_texts_explain_as_much_as_chance_says() -> None:
    rng = np.random.default_rng(5)
    cone = np.eye(1, 16)
    images, texts = 0.3 * rng.normal(size=(400, 16)) + cone, 0.3 * rng.normal(size=(400, 16)) + cone
    figures = schur_figures(images, None, texts, *paired(400))["unconditioned"]
    assert figures["text_share"] == pytest.approx(figures["text_share_chance"], abs=0.02)
    assert figures["text_share"] > 0.3  # of it the mean of all images


def test_mixed_images_are_reported_beside() -> None:
    rng = np.random.default_rng(6)
    texts, images = rng.normal(size=(50, 4)), rng.normal(size=(60, 4))
    text, mask = rng.integers(50, size=(60, 3)), rng.random((60, 3)) < 0.7
    mixed = images[:, None] + 2 * texts[text]
    figures = schur_figures(images, mixed, texts, text, mask)
    assert figures["pairs"] == mask.sum()
    assert figures["mixed"]["text_share"] > figures["unconditioned"]["text_share"]
    parts = decompose([(normalized(mixed[mask]), normalized(texts[text[mask]]))])
    assert parts is not None and figures["mixed"]["entropy"] == pytest.approx(spectral_entropy(parts.residual))
    assert json.loads(json.dumps(figures)) == figures


@pytest.mark.parametrize("known", [True, False])
def test_a_planted_factor_is_removed_and_another_kept(known: bool) -> None:
    rng = np.random.default_rng(7)
    basis = np.linalg.qr(rng.normal(size=(24, 24)))[0]
    colour, shape = rng.integers(4, size=1200), rng.integers(5, size=1200)
    colours, shapes = basis[:4], basis[4:9]
    noise = 0.15 * rng.normal(size=(1200, 15)) @ basis[9:]
    images = colours[colour] + shapes[shape] + noise + 0.05 * rng.normal(size=(1200, 24))
    words = colours + 0.3 * basis[10]  # a modality's own direction
    removal = remove_factor(images, words[colour] if known else normalized(images) @ words.T)
    assert removal is not None

    def accuracy(x: np.ndarray, labels: np.ndarray) -> float:
        return float(LogisticRegression(C=100, max_iter=500).fit(x[:800], labels[:800]).score(x[800:], labels[800:]))

    for labels, before, after in ((colour, 0.99, None), (shape, 0.99, 0.99)):
        assert accuracy(images, labels) > before
        remaining = accuracy(removal.images, labels)
        if after is None:
            assert remaining < 0.35  # chance is 0.25
        else:
            assert remaining > after
    whole = normalized(images)
    variances = [np.sum(np.var(x, axis=0)) for x in (removal.images, whole)]
    assert removal.share == pytest.approx(1 - variances[0] / variances[1])
    assert removal.share > 0.3 > 10 * removal.chance
    np.testing.assert_allclose(removal.images.mean(axis=0), whole.mean(axis=0), atol=1e-12)


def test_named_factors_report_their_shares() -> None:
    rng = np.random.default_rng(8)
    images, words = rng.normal(size=(90, 6)), rng.normal(size=(3, 6))
    value = rng.integers(3, size=90)
    factors = {"colour": words[value], "constant": np.ones((90, 6))}
    figures = schur_figures(images, None, images, *paired(90), factors)["factors"]
    of_values = normalized(images)
    between = sum(
        np.sum((of_values[value == v].mean(0) - of_values.mean(0)) ** 2) * np.mean(value == v) for v in range(3)
    )
    assert figures["colour"]["variance_share"] == pytest.approx(between / np.sum(np.var(of_values, axis=0)))
    assert figures["colour"]["variance_share_chance"] == pytest.approx(2 / 89)
    assert figures["constant"]["variance_share"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_pairs_say_nothing(count: int) -> None:
    rng = np.random.default_rng(count)
    images, texts = rng.normal(size=(count, 4)), rng.normal(size=(count, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = schur_figures(images, images[:, None], texts, *paired(count), {"colour": texts})
    assert figures == {"pairs": count, "unconditioned": None, "mixed": None, "factors": {"colour": None}}


def test_equal_vectors_have_defined_figures() -> None:
    equal = np.full((9, 4), 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = schur_figures(equal, None, equal, *paired(9), {"colour": equal})
    assert figures["unconditioned"]["entropy"] == pytest.approx(0, abs=1e-12)
    assert figures["unconditioned"]["text_share_chance"] == pytest.approx(1)
    assert figures["factors"] == {"colour": None}
