"""Statistics of mixing weights against planted structure and plain loops."""

import json
import warnings
from itertools import combinations

import numpy as np
import pytest

from llip_jax.evaluation.diagnostics import mixtures
from llip_jax.evaluation.diagnostics.mixtures import Mixtures, mixture_figures


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def random_case(seed: int, images: int = 12, captions: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, mask and mixed embeddings, with images of no, one and several captions."""
    rng = np.random.default_rng(seed)
    mask = rng.random((images, captions)) < 0.5
    mask[0], mask[1], mask[2:4] = False, [False, True, *[False] * (captions - 2)], True
    mixed = rng.normal(size=(images, captions, 7)) + 1
    mixed /= np.linalg.norm(mixed, axis=-1, keepdims=True)
    weights = softmax(2 * rng.normal(size=(images, captions, 3, 5)))
    return weights.astype(np.float32), mask, mixed.astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
def test_figures_equal_plain_loops(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixtures, "_BLOCK_WEIGHTS", 150)
    weights, mask, mixed = random_case(seed)
    weights[~mask], mixed[~mask] = np.nan, np.nan  # what is not there is not looked at
    figures = mixture_figures(weights, mask, mixed)

    own = [
        [(weights[n, c].astype(float), mixed[n, c].astype(float)) for c in np.flatnonzero(mask[n])] for n in range(12)
    ]
    own = [captions for captions in own if captions]
    each = np.array([w for captions in own for w, _ in captions])
    np.testing.assert_allclose(figures["entropy"], -(each * np.log(each)).sum(2).mean(0) / np.log(5))
    np.testing.assert_allclose(figures["token_use"], each.mean(0))
    np.testing.assert_allclose(figures["token_largest"], np.mean(each.argmax(2)[..., None] == np.arange(5), axis=0))
    moved, squares, cosines = [], [], []
    for captions in own:
        if len(captions) > 1:
            couples = list(combinations(captions, 2))
            moved.append(np.mean([np.abs(a - b).sum(1) / 2 for (a, _), (b, _) in couples], axis=0))
            squares.append(np.mean([((a - b) ** 2).sum() for (a, _), (b, _) in couples]))
            cosines.append(np.mean([a @ b for (_, a), (_, b) in couples]))
    np.testing.assert_allclose(figures["movement_by_head"], np.mean(moved, axis=0))
    assert figures["movement"] == pytest.approx(np.mean(moved))
    between, product = [], []
    for one, other in combinations(own, 2):
        between.append(np.mean([((a - b) ** 2).sum() for a, _ in one for b, _ in other]))
        product.append(np.mean([a @ b for _, a in one for _, b in other]))
    assert figures["caption_share"] == pytest.approx(np.mean(squares) / np.mean(between))
    assert figures["mixed_cosine"] == pytest.approx(np.mean(cosines))
    assert figures["mixed_cosine_between_images"] == pytest.approx(np.mean(product))
    assert figures["pairs"] == len(each) and figures["images_of_several_captions"] == len(moved)
    assert json.loads(json.dumps(figures)) == figures


def test_any_blocks_give_the_figures_of_the_whole() -> None:
    weights, mask, mixed = random_case(9)
    blocks = Mixtures(3, 5)
    for rows in np.split(np.arange(12), [0, 1, 5, 11]):
        blocks.add(weights[rows], mask[rows], mixed[rows])
    whole = mixture_figures(weights, mask, mixed)
    for name, value in blocks.figures().items():
        np.testing.assert_allclose(value, whole[name], rtol=1e-12)


def test_uniform_weights_have_entropy_one_and_do_not_move() -> None:
    figures = mixture_figures(np.full((6, 3, 2, 8), 1 / 8), np.ones((6, 3), bool))
    np.testing.assert_allclose(figures["entropy"], 1)
    np.testing.assert_allclose(figures["token_largest"], 1 / 8)  # ties are shared
    assert figures["movement"] == 0
    assert figures["caption_share"] is None
    assert figures["dead_tokens"] == [0, 0]


def test_one_hot_weights_have_entropy_zero_and_leave_dead_tokens() -> None:
    weights = np.zeros((6, 3, 2, 8))
    weights[:, :, 0, 3] = 1
    weights[:, :, 1, 5] = 1
    figures = mixture_figures(weights, np.ones((6, 3), bool))
    assert figures["entropy"] == [0, 0]
    assert figures["dead_tokens"] == [7, 7]
    assert figures["dead_in_all_heads"] == 6
    assert figures["token_use"][0][3] == 1 and figures["token_largest"][1][5] == 1


def test_captions_that_decide_fully_have_a_share_of_one() -> None:
    rng = np.random.default_rng(5)
    by_caption = softmax(3 * rng.normal(size=(10, 4, 6)))
    captions = rng.integers(10, size=(4000, 3))  # drawn whatever the image
    figures = mixture_figures(by_caption[captions], np.ones((4000, 3), bool))
    assert figures["caption_share"] == pytest.approx(1, abs=0.03)
    assert figures["movement"] > 0.3


def test_images_that_decide_fully_have_a_share_of_zero() -> None:
    by_image = softmax(3 * np.random.default_rng(6).normal(size=(50, 1, 4, 6)))
    figures = mixture_figures(np.repeat(by_image, 3, axis=1), np.ones((50, 3), bool))
    assert figures["caption_share"] == pytest.approx(0, abs=1e-12)
    assert figures["movement"] == 0


def test_half_of_the_variance_from_captions_is_a_share_of_a_half() -> None:
    rng = np.random.default_rng(7)
    image, caption = rng.choice([-0.2, 0.2], size=(8000, 1)), rng.choice([-0.2, 0.2], size=(8000, 4))
    first = 0.5 + image + caption
    figures = mixture_figures(np.stack([first, 1 - first], axis=-1)[:, :, None], np.ones((8000, 4), bool))
    assert figures["caption_share"] == pytest.approx(0.5, abs=0.02)
    assert figures["movement"] == pytest.approx(0.2, abs=0.01)  # 0.4 for half of the couples


@pytest.mark.parametrize(("images", "captions", "tokens"), [(0, 2, 4), (3, 0, 4), (1, 1, 4), (4, 1, 4), (2, 2, 1)])
def test_degenerate_sets_have_defined_figures(images: int, captions: int, tokens: int) -> None:
    weights = np.full((images, captions, 2, tokens), 1 / tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = mixture_figures(weights, np.ones((images, captions), bool), np.ones((images, captions, 3)))
    assert (figures["movement"] is None) == (captions < 2 or images == 0)
    assert (figures["entropy"] is None) == (images * captions == 0 or tokens == 1)
    assert figures["caption_share"] is None
    json.dumps(figures, allow_nan=False)
