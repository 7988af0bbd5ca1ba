"""Accuracy and average precision against scikit-learn, CLIP_benchmark and every possible order of ties."""

from itertools import permutations
from typing import Any

import numpy as np
import pytest
from jaxtyping import Bool, Float, Int
from sklearn.metrics import average_precision_score, balanced_accuracy_score, top_k_accuracy_score

from llip_jax.evaluation.classification import accuracy, accuracy_outcomes, mean_average_precision_outcomes
from llip_jax.evaluation.figures import figure, figures_of


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """CLIP_benchmark's metrics of classification."""
    pytest.importorskip("torch")
    metrics = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    # Its accuracy() calls float() on an array of one number, which NumPy no longer takes.
    monkeypatch.setattr(metrics, "float", lambda x: np.asarray(x).item(), raising=False)
    return metrics


def average_precision(scores: Float[np.ndarray, "N C"], targets: Bool[np.ndarray, "N C"]) -> float:
    return figure(mean_average_precision_outcomes(scores, targets)["mean_average_precision"])


def test_accuracy_equals_scikit_learn_without_ties() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(200, 12))
    labels = np.minimum(rng.geometric(0.2, size=200) - 1, 10)  # uneven, and class 11 never occurs
    scores[np.arange(200), labels] += 1
    figures = accuracy(scores, labels)
    for k in (1, 5):
        expected = top_k_accuracy_score(labels, scores, k=k, labels=np.arange(12))
        assert figures[f"top_{k}_accuracy"] == pytest.approx(expected)
    predictions = scores[:, :11].argmax(axis=1)  # scikit-learn warns of predicted classes that never occur
    figures = accuracy(scores[:, :11], labels)
    assert figures["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(labels, predictions))


def test_accuracy_equals_brute_force_over_all_tie_orders() -> None:
    rng = np.random.default_rng(1)
    scores, labels = rng.integers(2, size=(8, 6)).astype(np.float32), np.array([0, 0, 0, 1, 1, 3, 5, 5])
    ranks = np.array(
        [
            [sorted(order, key=lambda c: -row[c]).index(label) for order in permutations(range(6))]
            for row, label in zip(scores, labels, strict=True)
        ]
    )
    figures = accuracy(scores, labels)
    assert figures["top_1_accuracy"] == pytest.approx(np.mean(ranks < 1))
    assert figures["top_5_accuracy"] == pytest.approx(np.mean(ranks < 5))
    recalls = [np.mean(ranks[labels == label] < 1) for label in (0, 1, 3, 5)]
    assert figures["mean_per_class_recall"] == pytest.approx(np.mean(recalls))


@pytest.mark.parametrize("classes", [1, 3, 5, 20])
def test_equal_scores_reach_chance(classes: int) -> None:
    figures = accuracy(np.zeros((7, classes)), np.arange(7) % classes)
    for name in ("top_1_accuracy", "top_5_accuracy", "mean_per_class_recall"):
        assert figures[name] == pytest.approx(figures[f"{name}_chance"])
    assert figures["top_1_accuracy_chance"] == pytest.approx(1 / classes)
    assert figures["top_5_accuracy_chance"] == pytest.approx(min(5, classes) / classes)


def test_bad_scores_and_labels_are_refused() -> None:
    for label in (-1, 3):
        with pytest.raises(ValueError, match=r"\[0, 3\)"):
            accuracy(np.zeros((2, 3)), np.array([0, label]))
    with pytest.raises(ValueError, match="NaN"):
        accuracy(np.array([[0.0, np.nan]]), np.array([0]))
    with pytest.raises(ValueError, match="expected scores"):
        accuracy(np.zeros((2, 3)), np.zeros(3, dtype=int))
    with pytest.raises(ValueError, match="expected scores"):
        accuracy(np.zeros((0, 3)), np.zeros(0, dtype=int))


def clip_benchmark_accuracy(peer: Any, scores: Float[np.ndarray, "N C"], labels: Int[np.ndarray, "N"]) -> list[float]:
    torch = pytest.importorskip("torch")
    return peer.accuracy(torch.tensor(scores), torch.tensor(labels), topk=(1, 5))


def test_accuracy_equals_clip_benchmark_without_ties(peer: Any) -> None:
    rng = np.random.default_rng(2)
    scores, labels = rng.normal(size=(300, 9)), rng.integers(9, size=300)
    figures = accuracy(scores, labels)
    theirs = clip_benchmark_accuracy(peer, scores, labels)
    assert [figures["top_1_accuracy"], figures["top_5_accuracy"]] == pytest.approx(theirs)


def test_with_ties_clip_benchmark_takes_one_order_and_ours_is_between_the_best_and_the_worst(peer: Any) -> None:
    rng = np.random.default_rng(2)
    scores, labels = rng.integers(4, size=(300, 9)).astype(float), rng.integers(9, size=300)
    figures = accuracy(scores, labels)
    nudge = 0.5 * (np.arange(9) == labels[:, None])
    low, theirs, high = (clip_benchmark_accuracy(peer, x, labels) for x in (scores - nudge, scores, scores + nudge))
    for own, at_worst, one, at_best in zip(
        (figures["top_1_accuracy"], figures["top_5_accuracy"]), low, theirs, high, strict=True
    ):
        assert at_worst < own < at_best
        assert at_worst <= one <= at_best


def test_scikit_learn_takes_the_last_of_equal_classes_and_argmax_the_first() -> None:
    rng = np.random.default_rng(3)
    scores, labels = rng.integers(6, size=(400, 5)).astype(float), rng.integers(5, size=400)
    nudge = 1e-6 * np.arange(5)
    theirs = top_k_accuracy_score(labels, scores, k=1)
    assert accuracy(scores + nudge, labels)["top_1_accuracy"] == pytest.approx(theirs)
    theirs = balanced_accuracy_score(labels, scores.argmax(axis=1))
    assert accuracy(scores - nudge, labels)["mean_per_class_recall"] == pytest.approx(theirs)


def test_only_images_whose_right_class_ties_at_the_top_are_neither_right_nor_wrong() -> None:
    rng = np.random.default_rng(3)
    scores, labels = rng.integers(6, size=(400, 5)), rng.integers(5, size=400)
    right = np.take_along_axis(scores, labels[:, None], axis=1)[:, 0]
    tied = (right == scores.max(axis=1)) & (np.count_nonzero(scores == right[:, None], axis=1) > 1)
    assert 0 < tied.sum() < 400
    got = accuracy_outcomes(scores, labels)["top_1_accuracy"].values
    np.testing.assert_array_equal(got[~tied], (scores.argmax(axis=1) == labels)[~tied])
    assert np.all((got[tied] > 0) & (got[tied] < 1))


def test_outcomes_are_image_by_image() -> None:
    rng = np.random.default_rng(4)
    scores, labels = rng.normal(size=(30, 4)), rng.integers(4, size=30)
    outcomes = accuracy_outcomes(scores, labels)
    assert figures_of(outcomes) == accuracy(scores, labels)
    for outcome in outcomes.values():
        np.testing.assert_array_equal(outcome.unit, np.arange(30))
    np.testing.assert_array_equal(outcomes["top_1_accuracy"].values, scores.argmax(axis=1) == labels)


def test_one_image_and_one_class() -> None:
    assert set(accuracy(np.zeros((1, 1)), np.array([0])).values()) == {1.0}
    figures = accuracy(np.array([[1.0, 2.0, 3.0]]), np.array([1]))
    assert (figures["top_1_accuracy"], figures["top_5_accuracy"], figures["mean_per_class_recall"]) == (0.0, 1.0, 0.0)
    outcomes = mean_average_precision_outcomes(np.zeros((1, 1)), np.ones((1, 1), bool))
    assert figures_of(outcomes) == {"mean_average_precision": 1.0, "mean_average_precision_chance": 1.0}


def test_average_precision_of_each_class_equals_scikit_learn_and_clip_benchmark_without_ties(peer: Any) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(5)
    targets = rng.random((150, 7)) < np.linspace(0.02, 0.9, 7)
    targets[0] = True
    scores = rng.normal(size=(150, 7)) + targets
    own = [average_precision(scores[:, [c]], targets[:, [c]]) for c in range(7)]
    np.testing.assert_allclose(own, [average_precision_score(targets[:, c], scores[:, c]) for c in range(7)])
    theirs = peer.average_precision_per_class(torch.tensor(scores), torch.tensor(targets))
    np.testing.assert_allclose(own, theirs, rtol=1e-5)  # float32
    assert average_precision(scores, targets) == pytest.approx(np.mean(own))
    assert average_precision(scores, targets) == pytest.approx(average_precision_score(targets, scores))


def test_classes_without_an_image_are_left_out_where_clip_benchmark_counts_0(peer: Any) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(6)
    scores, targets = rng.normal(size=(40, 4)), rng.random((40, 4)) < 0.3
    targets[:, 2] = False
    theirs = peer.average_precision_per_class(torch.tensor(scores), torch.tensor(targets))
    assert theirs[2] == 0
    assert average_precision(scores, targets) == pytest.approx(float(theirs[[0, 1, 3]].mean()), rel=1e-5)


def test_average_precision_equals_brute_force_over_all_tie_orders() -> None:
    rng = np.random.default_rng(7)
    for _ in range(5):
        scores, targets = rng.integers(3, size=7).astype(float), rng.random(7) < 0.5
        targets[0] = True
        orders = (sorted(order, key=lambda n: -scores[n]) for order in permutations(range(7)))
        ranked = (targets[order] for order in orders)
        places = np.arange(1, 8)
        every = [np.mean((np.cumsum(hits) / places)[hits]) for hits in ranked]
        assert average_precision(scores[:, None], targets[:, None]) == pytest.approx(np.mean(every))


@pytest.mark.parametrize(
    ("scores", "targets"), [([0, 0], [1, 0]), ([1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1, 1])]
)
def test_scikit_learn_gives_ties_the_precision_behind_the_last(scores: list[int], targets: list[int]) -> None:
    own = average_precision(np.array(scores, float)[:, None], np.array(targets, bool)[:, None])
    theirs = average_precision_score(targets, scores)
    assert (own > theirs) if scores[0] == 0 else (own < theirs)


def test_average_precision_of_equal_and_of_random_scores_is_chance() -> None:
    rng = np.random.default_rng(8)
    targets = rng.random((25, 3)) < [0.1, 0.3, 0.7]
    targets[0] = True
    figures = figures_of(mean_average_precision_outcomes(np.zeros((25, 3)), targets))
    assert figures["mean_average_precision"] == pytest.approx(figures["mean_average_precision_chance"])
    drawn = [average_precision(rng.random((25, 3)), targets) for _ in range(2000)]
    error = np.std(drawn) / np.sqrt(len(drawn))
    assert abs(np.mean(drawn) - figures["mean_average_precision_chance"]) < 4 * error
    share = np.mean(targets.mean(axis=0))
    assert share < figures["mean_average_precision_chance"]
    many = figures_of(mean_average_precision_outcomes(np.zeros((25000, 3)), np.tile(targets, (1000, 1))))
    assert many["mean_average_precision_chance"] == pytest.approx(share, abs=1e-3)


def test_queries_of_average_precision_are_the_labels_of_the_images() -> None:
    scores = np.array([[0.9, 0.1], [0.8, 0.7], [0.1, 0.3]])
    targets = np.array([[True, False], [True, True], [False, True]])
    outcome = mean_average_precision_outcomes(scores, targets)["mean_average_precision"]
    assert sorted(outcome.unit) == [0, 1, 1, 2]
    np.testing.assert_array_equal(outcome.values, 1)
    # The third image has no label: a wrong answer above the right ones of the first class.
    targets[2], scores[2] = False, 2.0
    outcome = mean_average_precision_outcomes(scores, targets)["mean_average_precision"]
    assert sorted(outcome.unit) == [0, 1, 1]
    np.testing.assert_allclose(outcome.values[outcome.unit == 0], 1 / 2)


def test_bad_multi_label_input_is_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        mean_average_precision_outcomes(np.zeros((2, 3)), np.zeros((3, 2), bool))
    with pytest.raises(ValueError, match="none of the 2 images"):
        mean_average_precision_outcomes(np.zeros((2, 3)), np.zeros((2, 3), bool))
    with pytest.raises(ValueError, match="NaN"):
        mean_average_precision_outcomes(np.full((2, 3), np.nan), np.ones((2, 3), bool))
