"""Textual inversion: known texts are found again, and retrieval figures are scikit-learn's."""

import itertools

import jax
import numpy as np
import pytest
from flax import nnx
from run_helpers import tiny_config
from sklearn.metrics import average_precision_score

from llip_jax.config import ConfigError
from llip_jax.evaluation.diagnostics.inversion import (
    average_precision,
    inversion_figures,
    invert,
    prompt_with_places,
)
from llip_jax.models.dual_encoder import DualEncoder
from llip_jax.ops.pair_scores import normalize


class Letters:
    """A token a letter, between 1 and 2."""

    def encode(self, texts, length):
        rows = [[1, *(3 + ord(letter) % 97 for letter in text[: length - 2]), 2] for text in texts]
        mask = np.array([[position < len(row) for position in range(length)] for row in rows], np.int32)
        return np.array([row + [0] * (length - len(row)) for row in rows], np.int32), mask


def model_of(**changes):
    """Graph and noised parameters of a tiny model."""
    graph, params = nnx.split(DualEncoder(tiny_config(model=changes), rngs=nnx.Rngs(0)), nnx.Param)
    rng = np.random.default_rng()
    return graph, jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), params)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"text.causal": False, "text.pooling": "last", "text.layers": 2}, marks=pytest.mark.slow),
    ],
)
def test_texts_with_a_known_word_in_the_place_are_found_again(changes):
    (graph, params), rng = model_of(**changes), np.random.default_rng()
    prompt = prompt_with_places(Letters(), 12, prompt="photo")
    tokens = np.repeat(prompt.tokens, 5, axis=0)
    tokens[:, prompt.places] = rng.integers(3, 300, (5, 1))
    text_side = jax.jit(lambda params, *text: nnx.merge(graph, params).text_side(*text))
    known = text_side(params, tokens, np.repeat(prompt.mask, 5, axis=0)).embedding
    start = invert(graph, params, 3 * known, prompt, steps=0)
    found = invert(graph, params, 3 * known, prompt)
    assert (found.cosines > 0.95).all(), found.cosines
    assert (found.cosines > start.cosines).all()
    np.testing.assert_allclose(np.sum(found.embedding * normalize(known), axis=1), found.cosines, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.embedding, axis=1), 1, atol=1e-5)


def test_an_image_does_not_depend_on_the_others_and_gives_the_same_again():
    (graph, params), rng = model_of(), np.random.default_rng()
    targets, prompt = rng.standard_normal((5, 32)).astype(np.float32), prompt_with_places(Letters(), 12, words=2)
    together = invert(graph, params, targets, prompt, steps=10)
    again = invert(graph, params, targets, prompt, steps=10)
    np.testing.assert_array_equal(together.embedding, again.embedding)
    others = np.concatenate([rng.standard_normal((2, 32)), targets[3:], targets[:1]]).astype(np.float32)
    np.testing.assert_allclose(
        invert(graph, params, others, prompt, steps=10).embedding[2], together.embedding[3], atol=1e-4
    )


def test_the_places_are_before_the_end_of_the_prompt():
    for words, prompt in itertools.product((1, 3), ("", "abc", "a long prompt")):
        tokens, mask, places = prompt_with_places(Letters(), 10, words, prompt)
        letters = min(len(prompt), 8 - words)
        assert tokens.shape == mask.shape == (1, 10) and mask.sum() == letters + words + 2
        assert places.tolist() == list(range(1 + letters, 1 + letters + words))
        assert tokens[0, 0] == 1 and tokens[0, places[-1] + 1] == 2
        expected = Letters().encode([prompt], 10 - words)[0][0]
        np.testing.assert_array_equal(np.delete(tokens[0], places), expected)
    for words in (0, 9):
        with pytest.raises(ValueError, match="pseudo-words"):
            prompt_with_places(Letters(), 10, words)


def labels_with_partners(rng, count, kinds):
    return rng.permutation(
        np.concatenate([np.repeat(np.arange(kinds), 2), rng.integers(kinds, size=count - 2 * kinds)])
    )


def test_average_precision_is_that_of_scikit_learn_without_ties(monkeypatch):
    """In blocks that do not divide the queries, and without the query itself."""
    rng = np.random.default_rng()
    labels, gallery = labels_with_partners(rng, 60, 7), rng.normal(size=(60, 3))
    rows = rng.permutation(60)[:23]
    queries = rng.normal(size=(23, 3))
    monkeypatch.setattr("llip_jax.evaluation.diagnostics.inversion._BLOCK_PAIRS", 300)
    expected = []
    for query, row in zip(queries, rows, strict=True):
        answers = np.delete(np.arange(60), row)
        expected.append(average_precision_score(labels[answers] == labels[row], gallery[answers] @ query))
    np.testing.assert_allclose(average_precision(queries, rows, gallery, labels)[0], np.mean(expected), rtol=1e-6)


def test_equal_scores_get_the_chance_level_which_is_the_mean_over_all_orders():
    for labels in ([0, 0, 1, 1, 1], [0, 0, 0], [0, 0, 1, 1, 0, 1, 1]):
        labels = np.array(labels)
        rows, right = np.arange(len(labels)), [np.delete(labels == labels[row], row) for row in range(len(labels))]
        found, chance = average_precision(np.ones((len(labels), 2)), rows, np.ones((len(labels), 2)), labels)
        scores = np.arange(len(labels) - 1)
        expected = [
            np.mean([average_precision_score(np.array(t), scores) for t in set(itertools.permutations(own.tolist()))])
            for own in right
        ]
        np.testing.assert_allclose([found, chance], np.mean(expected))


def test_figures_of_planted_classes():
    """Embeddings of one class lie close together: both ways find them; without structure both are at chance."""
    (graph, params), rng = model_of(), np.random.default_rng()
    labels, centres = labels_with_partners(rng, 50, 6), rng.standard_normal((6, 32))
    noise = rng.standard_normal((50, 32))
    calls: list[int] = []
    options = {"images": 20, "batch_size": 8, "steps": 60, "words": 2}
    arguments = graph, params, centres[labels] + 0.2 * noise, labels, Letters(), 12
    figures = inversion_figures(*arguments, **options, progress=calls.append)
    assert calls == [8, 8, 4]
    assert (figures["images"], figures["gallery"], figures["steps"], figures["pseudo_words"]) == (20, 49, 60, 2)
    assert figures["intra_modal_map"] > 0.95
    assert figures["map_chance"] < 0.4 and figures["inter_modal_map"] > figures["map_chance"] + 0.1
    assert figures == inversion_figures(*arguments, **options)
    longer = inversion_figures(graph, params, 7 * arguments[2], *arguments[3:], **options)
    np.testing.assert_allclose(longer["intra_modal_map"], figures["intra_modal_map"])


def test_images_of_different_labels_are_refused():
    graph, params = model_of()
    with pytest.raises(ConfigError, match="share a label"):
        inversion_figures(graph, params, np.eye(3, 32), np.arange(3), Letters(), 12)
