"""Image-caption choice against CLIP_benchmark's function and against the definition, ties and padding included."""

import numpy as np
import pytest

from llip_jax.evaluation.choice import choice_outcomes
from llip_jax.evaluation.figures import figures_of


def test_ragged_choices_with_ties_equal_the_definition() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 6, size=200)
    mask = np.arange(5) < counts[:, None]
    padding = rng.choice([9.0, 1.0, np.nan], size=(200, 5))  # which is not looked at
    scores = np.where(mask, rng.integers(3, size=(200, 5)), padding)
    outcome = choice_outcomes(scores, mask)["accuracy"]
    expected = []
    for row, count in zip(scores, counts, strict=True):
        if count:
            best = np.flatnonzero(row[:count] == row[:count].max())
            expected.append(1 / len(best) if 0 in best else 0.0)
    np.testing.assert_allclose(outcome.values, expected)
    np.testing.assert_array_equal(outcome.unit, np.flatnonzero(counts))
    np.testing.assert_allclose(outcome.chance, 1 / counts[counts > 0])


def test_equal_scores_reach_chance() -> None:
    mask = np.arange(4) < np.array([[2], [4], [3]])
    figures = figures_of(choice_outcomes(np.zeros((3, 4)), mask))
    assert figures["accuracy"] == pytest.approx(np.mean([1 / 2, 1 / 4, 1 / 3]))
    assert figures["accuracy_chance"] == pytest.approx(figures["accuracy"])


def test_one_image_with_one_choice_is_always_right() -> None:
    assert figures_of(choice_outcomes(np.zeros((1, 1)), np.ones((1, 1), bool))) == {
        "accuracy": 1.0,
        "accuracy_chance": 1.0,
    }


@pytest.mark.parametrize("tied", [False, True])
def test_accuracy_equals_clip_benchmark_but_for_ties_which_it_gives_to_the_true_caption(tied: bool) -> None:
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("clip_benchmark.metrics.image_caption_selection")
    rng = np.random.default_rng(1)
    images, captions = rng.normal(size=(60, 8)), rng.normal(size=(60, 3, 8))
    if tied:
        captions[::2, 2] = captions[::2, 0]
    images /= np.linalg.norm(images, axis=-1, keepdims=True)
    captions /= np.linalg.norm(captions, axis=-1, keepdims=True)

    class Model:
        def encode_image(self, pixels):
            return pixels.flatten(1)

        def encode_text(self, tokens):
            return torch.tensor(captions).reshape(-1, 8)[tokens]

    batches = [
        (torch.tensor(images[rows]).reshape(-1, 1, 1, 8), [[str(3 * n + c) for c in range(3)] for n in rows])
        for rows in np.split(np.arange(60), 4)
    ]
    theirs = peer.evaluate(Model(), batches, lambda texts: torch.tensor([int(t) for t in texts]), "cpu", amp=False)
    assert theirs["acc"] == theirs["text_acc"]  # with one image, the best image is always right

    scores = np.einsum("nd,ncd->nc", images, captions)
    if tied:
        scores[::2, 2] = scores[::2, 0]
    values = choice_outcomes(scores, np.ones((60, 3), bool))["accuracy"].values
    if not tied:
        assert set(values) == {0.0, 1.0}
    else:
        assert np.any(values == 0.5)
    assert theirs["text_acc"] == pytest.approx(np.mean(np.ceil(values)))


def test_bad_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        choice_outcomes(np.zeros((2, 3)), np.ones((2, 2), bool))
    for empty in (np.zeros((2, 3), bool), np.zeros((0, 3), bool), np.zeros((2, 0), bool)):
        with pytest.raises(ValueError, match="has a choice"):
            choice_outcomes(np.zeros(empty.shape), empty)
    with pytest.raises(ValueError, match=r"without a true caption: rows \[1\]"):
        choice_outcomes(np.zeros((2, 2)), np.array([[True, True], [False, True]]))
    with pytest.raises(ValueError, match="NaN"):
        choice_outcomes(np.array([[0.0, np.nan]]), np.ones((1, 2), bool))
