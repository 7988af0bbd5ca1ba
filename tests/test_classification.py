"""Class specifications; accuracy against scikit-learn and against every possible order of ties."""

from itertools import permutations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from llip_jax.config import ConfigError, EvalConfig
from llip_jax.evaluation.classes import ClassSpec
from llip_jax.evaluation.classification import accuracy


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
    assert figures["top_1_accuracy_chance"] == 1 / classes
    assert figures["top_5_accuracy_chance"] == min(5, classes) / classes


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


def test_class_spec_from_names() -> None:
    spec = ClassSpec.from_names(["cat", "dog {x}"], ["a {}.", "{} and {}, {y}"])
    assert spec.names == ("cat", "dog {x}")
    assert spec.texts == (("a cat.", "cat and cat, {y}"), ("a dog {x}.", "dog {x} and dog {x}, {y}"))
    default = ClassSpec.from_names(["cat"], EvalConfig().templates)
    assert len(default.texts[0]) == len(EvalConfig().templates)
    assert all("cat" in text for text in default.texts[0])


def test_class_spec_keeps_the_texts_of_each_class() -> None:
    spec = ClassSpec(("cat", "dog"), (("a cat", "a kitten"), ("a dog",)))
    assert [len(texts) for texts in spec.texts] == [2, 1]


@pytest.mark.parametrize(
    ("names", "texts", "message"),
    [
        ((), (), "at least one class"),
        (("cat", "dog"), (("a cat",),), "2 classes, got 1"),
        (("cat", "dog", "cat"), (("a",), ("b",), ("c",)), "more than once: 'cat'"),
        (("cat", " "), (("a",), ("b",)), "class 1 has a blank name"),
        (("cat", "dog"), (("a",), ()), "class 'dog' needs at least one text"),
        (("cat",), (("a", ""),), "no blank ones"),
    ],
)
def test_bad_class_specs_are_refused(names: tuple[str, ...], texts: tuple[tuple[str, ...], ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClassSpec(names, texts)


def test_templates_without_a_place_for_the_name_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"missing in \['a picture'\]"):
        ClassSpec.from_names(["cat"], ["a {}", "a picture"])
    with pytest.raises(ConfigError, match="class 'cat' needs at least one text"):
        ClassSpec.from_names(["cat"], [])
