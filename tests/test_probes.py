"""Nearest neighbours and linear probes against scikit-learn and brute force."""

import sys
from collections.abc import Callable

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from llip_jax.config import ConfigError
from llip_jax.evaluation import probes
from llip_jax.evaluation.figures import Result
from llip_jax.evaluation.probes import INVERSE_REGULARIZATIONS, knn, linear_probe

Data = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def clusters(seed: int, classes: int = 6, noise: float = 1.5, train: int = 240, test: int = 120) -> Data:
    """Embeddings of uneven norm around a centre for each class, far from the origin as a model's are."""
    rng = np.random.default_rng(seed)
    centres = 3 + rng.normal(size=(classes, 16))

    def images(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.minimum(rng.geometric(0.3, size=count) - 1, classes - 1)
        x = centres[labels] + noise * rng.normal(size=(count, 16))
        return (x * rng.uniform(0.5, 2, size=(count, 1))).astype(np.float32), labels

    return *images(train), *images(test)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 1e-4), (1000, 0.5)])
def test_knn_equals_scikit_learn(k: int, temperature: float) -> None:
    train, train_labels, test, test_labels = clusters(0)
    result = knn(train, train_labels, test, test_labels, 6, k=k, temperature=temperature)
    nearest = KNeighborsClassifier(
        min(k, len(train)),
        metric="cosine",
        weights=lambda distance: np.exp((distance.min(axis=1, keepdims=True) - distance) / temperature),
        algorithm="brute",
    ).fit(train.astype(np.float64), train_labels)
    predictions = nearest.predict(test.astype(np.float64))
    assert 0.3 < np.mean(predictions == test_labels) < 0.95
    np.testing.assert_array_equal(result.outcomes["top_1_accuracy"].values, predictions == test_labels)
    assert result.figures["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(test_labels, predictions))
    assert result.figures["top_1_accuracy_chance"] == pytest.approx(1 / 6)
    assert (result.figures["k"], result.figures["training_images"]) == (min(k, 240), 240)


def test_neighbours_level_at_the_end_of_the_list_share_its_places() -> None:
    """One neighbour, and three that are equally near: two of class 1, one of class 2. Neither order may decide."""
    train = np.array([[0.0, 1], [1, 0], [2, 0], [1, 0]])
    for order in (np.arange(4), np.arange(4)[::-1]):
        labels = np.array([0, 1, 1, 2])[order]
        result = knn(train[order], labels, np.array([[3.0, 0]] * 3), np.arange(3), 3, k=1)
        np.testing.assert_array_equal(result.outcomes["top_1_accuracy"].values, [0, 1, 0])
    twins = knn(train[[1, 3]], np.array([1, 2]), np.array([[3.0, 0]] * 2), np.array([1, 2]), 3, k=1)
    np.testing.assert_array_equal(twins.outcomes["top_1_accuracy"].values, [0.5, 0.5])


def test_knn_block_by_block_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    data, done = clusters(1), []
    whole = knn(*data, 6)
    monkeypatch.setattr(probes, "_BLOCK_PAIRS", 240 * 50)
    assert knn(*data, 6, progress=done.append).figures == pytest.approx(whole.figures)
    assert done == [50, 50, 20]


def test_the_probe_is_the_regression_chosen_on_training_images() -> None:
    train, train_labels, test, test_labels = clusters(2)
    calls: list[int] = []
    result = linear_probe(train, train_labels, test, test_labels, 6, progress=calls.append)
    assert calls == [1] * (len(INVERSE_REGULARIZATIONS) + 1)

    mean, deviation = train.mean(axis=0), train.std(axis=0)
    model = LogisticRegression(C=result.figures["inverse_regularization"], max_iter=5000, tol=1e-6)
    model.fit((train - mean) / deviation, train_labels)
    predictions = model.predict((test - mean) / deviation)
    assert np.mean(predictions == test_labels) > 0.6
    assert np.mean(result.outcomes["top_1_accuracy"].values == (predictions == test_labels)) > 0.98
    assert result.figures["top_1_accuracy"] == pytest.approx(np.mean(predictions == test_labels), abs=0.02)
    assert result.figures["mean_per_class_recall_chance"] == pytest.approx(1 / 6)
    assert result.figures["converged"]


def test_test_labels_choose_nothing() -> None:
    train, train_labels, test, test_labels = clusters(3)
    shuffled = np.random.default_rng(0).permutation(test_labels)
    first, second = (linear_probe(train, train_labels, test, own, 6).figures for own in (test_labels, shuffled))
    assert first["inverse_regularization"] == second["inverse_regularization"]
    assert first["top_1_accuracy"] > second["top_1_accuracy"] + 0.2


def test_noise_is_regularized_more_than_signal() -> None:
    """Few images and many dimensions that mean little; then hardly any noise and many images."""
    rng = np.random.default_rng(4)
    labels = np.tile([0, 1], 40)
    noisy = rng.normal(size=(80, 200))
    noisy[:, :3] += 1.2 * labels[:, None]
    chosen = linear_probe(noisy, labels, noisy, labels, 2).figures["inverse_regularization"]
    assert chosen < INVERSE_REGULARIZATIONS[-1]
    # A class in a thin slice between the two others' needs large weights.
    x = rng.uniform(-1, 1, size=(3000, 1))
    thin = np.searchsorted([0.0, 0.02], x[:, 0])
    x = np.concatenate([x, x**2], axis=1)
    assert linear_probe(x, thin, x, thin, 3).figures["inverse_regularization"] > chosen


@pytest.mark.parametrize("probe", [knn, linear_probe])
@pytest.mark.parametrize("classes", [2, 6])
def test_probes_see_planted_classes_and_are_repeatable(probe: Callable[..., Result], classes: int) -> None:
    train, train_labels, test, test_labels = clusters(5, classes, noise=0.1)
    result = probe(train, train_labels, test, test_labels, classes)
    assert result.figures["top_1_accuracy"] == 1
    assert result.figures == probe(train, train_labels, test, test_labels, classes).figures
    shuffled = np.random.default_rng(6).permutation(train_labels)
    assert probe(train, shuffled, test, test_labels, classes).figures["top_1_accuracy"] < 0.8


@pytest.mark.parametrize("probe", [knn, linear_probe])
def test_classes_without_training_images_count_as_wrong(probe: Callable[..., Result]) -> None:
    train, train_labels, test, test_labels = clusters(7, noise=0.1)
    kept = train_labels != 1
    result = probe(train[kept], train_labels[kept], test, test_labels, 6)
    np.testing.assert_array_equal(result.outcomes["top_1_accuracy"].values, test_labels != 1)
    np.testing.assert_array_equal(result.outcomes["top_5_accuracy"].values, test_labels != 1)
    assert result.figures["unseen_images"] == np.sum(test_labels == 1) > 0


def test_one_training_image_a_class_is_enough() -> None:
    x, labels = np.eye(3), np.arange(3)
    for probe in (knn, linear_probe):
        assert probe(x, labels, x, labels, 3).figures["top_1_accuracy"] == 1


def test_zero_vectors_have_cosine_zero() -> None:
    train = np.array([[0.0, 0], [1, 0], [-1, 0]])
    assert knn(train, np.arange(3), np.array([[-2.0, 0]]), np.array([2]), 3, k=1).figures["top_1_accuracy"] == 1


def test_bad_arguments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    train, train_labels, test, test_labels = clusters(8)
    for probe in (knn, linear_probe):
        with pytest.raises(ValueError, match=r"test images: expected \[n, d\]"):
            probe(train, train_labels, test[:, :3], test_labels, 6)
        with pytest.raises(ValueError, match=r"training images: expected \[n, d\]"):
            probe(train[:0], train_labels[:0], test, test_labels, 6)
        with pytest.raises(ValueError, match=r"expected \[0, 3\)"):
            probe(train, train_labels, test, test_labels, 3)
        with pytest.raises(ValueError, match="not finite"):
            probe(train, train_labels, np.full_like(test, np.nan), test_labels, 6)
    with pytest.raises(ValueError, match="k of at least 1"):
        knn(train, train_labels, test, test_labels, 6, k=0)
    with pytest.raises(ConfigError, match="two classes or more, all 240 are of one"):
        linear_probe(train, np.zeros_like(train_labels), test, test_labels, 6)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ConfigError, match=r"llip_jax\[report\]"):
        linear_probe(train, train_labels, test, test_labels, 6)
