"""Scorers against float64 NumPy: which average comes before mixing, weights, groups, and evidence."""

from typing import get_args

import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest
from jaxtyping import Float

from llip_jax.config import Scorer as ScorerName
from llip_jax.evaluation.classes import ClassSpec
from llip_jax.evaluation.scorers import SCORERS, attributes, max_score, mean_score, mean_text
from llip_jax.evaluation.scoring import score
from llip_jax.ops.pair_scores import FixedSide, MixtureSide, TextSide

N, K, M, DH, TEMPERATURE = 11, 5, 2, 4, 2.5
SPEC = ClassSpec(
    ("cat", "dog", "hen"),
    (("a", "b", "c", "d"), ("e",), ("f", "g", "h")),
    ((1.0, 2.0, 0.5, 1.0), (3.0,), (1.0, 1.0, 4.0)),
    (("part", "colour", "part", "place"), ("colour",), ("part", "place", "part")),
)
OWN = {0: [0, 1, 2, 3], 1: [4], 2: [5, 6, 7]}
WEIGHTS = np.concatenate(SPEC.weights)


def mixture(rng: np.random.Generator) -> tuple[list[Float[np.ndarray, "..."]], MixtureSide, TextSide]:
    """queries, keys, values, output and embeddings in float64, and as sides."""
    shapes = [(8, M, DH), (N, K, M, DH), (N, K, M, DH), (M * DH, M * DH), (8, M * DH)]
    arrays = [1.5 * rng.normal(size=shape) for shape in shapes]
    q, k, v, w, t = (x.astype(np.float32) for x in arrays)
    return arrays, MixtureSide(k, v, w, TEMPERATURE), TextSide(t, q)


def class_mean(x: Float[np.ndarray, "8 *d"]) -> Float[np.ndarray, "3 *d"]:
    return np.stack([np.average(x[own], axis=0, weights=WEIGHTS[own]) for own in OWN.values()])


def unit(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_scorers_are_those_that_can_be_configured() -> None:
    assert set(SCORERS) == set(get_args(ScorerName))


def test_mean_text_averages_before_mixing_and_mean_score_after() -> None:
    (q, k, v, w, t), images, texts = mixture(np.random.default_rng(0))
    before = reference.contextual_cosines(class_mean(q), k, v, w, class_mean(unit(t)), TEMPERATURE)
    after = class_mean(reference.contextual_cosines(q, k, v, w, t, TEMPERATURE).T).T
    columns = mean_text(texts, SPEC.layout.owner, 3, SPEC.layout.weight)
    got = {
        "mean_text": SCORERS["mean_text"].class_scores(score(images, columns), SPEC.layout),
        "mean_score": SCORERS["mean_score"].class_scores(score(images, texts), SPEC.layout),
    }
    np.testing.assert_allclose(got["mean_text"], before, atol=1e-5)
    np.testing.assert_allclose(got["mean_score"], after, atol=1e-5)
    several = [0, 2]
    assert np.abs(got["mean_text"] - got["mean_score"])[:, several].max() > 0.1
    np.testing.assert_allclose(got["mean_text"][:, 1], got["mean_score"][:, 1], atol=1e-5)  # a class with one text


def test_mean_score_of_fixed_images_is_the_product_with_the_mean_of_unit_texts() -> None:
    rng = np.random.default_rng(1)
    images, texts = rng.normal(size=(N, 6)), rng.normal(size=(8, 6))
    scores = score(FixedSide(images.astype(np.float32)), TextSide(texts.astype(np.float32)))
    expected = unit(images) @ class_mean(unit(texts)).T
    np.testing.assert_allclose(mean_score(scores, SPEC.layout), expected, atol=1e-6)


def test_max_score_is_the_best_text_of_a_class() -> None:
    scores = np.random.default_rng(2).normal(size=(N, 8)).astype(np.float32)
    expected = np.stack([scores[:, own].max(axis=1) for own in OWN.values()], axis=1)
    np.testing.assert_array_equal(max_score(scores, SPEC.layout), expected)


def test_attributes_average_within_groups_and_then_over_them() -> None:
    scores = np.random.default_rng(3).normal(size=(N, 8)).astype(np.float32)
    evidence = attributes(scores, SPEC.layout)
    exact = scores.astype(np.float64)
    groups = [[0, 2], [1], [3], [4], [5, 7], [6]]  # by class, in the order in which they are named
    means = np.stack([np.average(exact[:, own], axis=1, weights=WEIGHTS[own]) for own in groups], axis=1)
    np.testing.assert_array_equal(evidence.texts, scores)
    np.testing.assert_allclose(evidence.groups, means, rtol=1e-5)
    classes = np.stack([means[:, :3].mean(axis=1), means[:, 3], means[:, 4:].mean(axis=1)], axis=1)
    np.testing.assert_allclose(evidence.classes, classes, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(SCORERS["attributes"].class_scores(scores, SPEC.layout), evidence.classes)


def test_attributes_without_groups_is_mean_score() -> None:
    layout = ClassSpec(SPEC.names, SPEC.texts, SPEC.weights).layout
    scores = np.random.default_rng(4).normal(size=(N, 8))
    np.testing.assert_array_equal(attributes(scores, layout).classes, mean_score(scores, layout))


def test_changing_a_descriptor_changes_only_its_class() -> None:
    scores = np.random.default_rng(5).normal(size=(N, 8))
    changed = scores.copy()
    changed[:, 6] += 1
    difference = attributes(changed, SPEC.layout).classes - attributes(scores, SPEC.layout).classes
    np.testing.assert_array_equal(difference[:, :2], 0)
    np.testing.assert_allclose(difference[:, 2], 1 / 2)


@pytest.mark.parametrize("name", [name for name, scorer in SCORERS.items() if scorer.columns == "texts"])
def test_blocks_of_images_are_scored_as_all_at_once_and_equal_classes_tie_exactly(name: str) -> None:
    spec = ClassSpec(("missile 1", "crane", "missile 2"), (("a", "b", "c"), ("d", "e"), ("a", "b", "c")))
    rng = np.random.default_rng(6)
    columns = rng.normal(size=(50, 5)).astype(np.float32)[:, [0, 1, 2, 3, 4, 0, 1, 2]]
    scorer = SCORERS[name].class_scores
    whole = scorer(columns, spec.layout)
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(np.concatenate([scorer(block, spec.layout) for block in np.split(columns, 5)]), whole)
    np.testing.assert_array_equal(whole[:, 0], whole[:, 2])


def test_mean_text_without_weights_counts_texts_alike_and_keeps_the_type_of_queries() -> None:
    _, _, texts = mixture(np.random.default_rng(7))
    texts = TextSide(jnp.asarray(texts.embedding), jnp.asarray(texts.queries, jnp.bfloat16))
    owner = jnp.asarray(SPEC.layout.owner)
    alike, weighted = mean_text(texts, owner, 3), mean_text(texts, owner, 3, jnp.full(8, 0.3))
    assert alike.queries is not None and weighted.queries is not None
    assert weighted.queries.dtype == jnp.bfloat16
    np.testing.assert_allclose(alike.embedding, weighted.embedding, atol=1e-6)
    np.testing.assert_allclose(*(np.asarray(x.queries, np.float32) for x in (alike, weighted)), atol=1e-2)
