"""The reference itself: gradients against finite differences, values against textbook formulas, invariances."""

from collections.abc import Callable
from typing import get_args

import numpy as np
import numpy_reference as reference
import pytest
from jaxtyping import Float

# Loss arguments after the logits: target, weight, mask.
PairMatrices = tuple[Float[np.ndarray, "N J"], Float[np.ndarray, "N J"], Float[np.ndarray, "N J"]]
MixerInputs = tuple[
    Float[np.ndarray, "J M dh"],
    Float[np.ndarray, "N K M dh"],
    Float[np.ndarray, "N K M dh"],
    Float[np.ndarray, "d d"],
    Float[np.ndarray, "J d"],
]

SHAPES = [(3, 4, 5, 2, 3), (4, 2, 1, 3, 2), (2, 3, 4, 1, 3), (1, 1, 1, 1, 2)]  # N, J, K, M, dh
LOSSES = [
    (reference.sigmoid_loss, reference.sigmoid_loss_gradient),
    (reference.softmax_loss, reference.softmax_loss_gradient),
]


def central_differences(
    function: Callable[[Float[np.ndarray, "..."]], float], x: Float[np.ndarray, "..."], step: float = 1e-5
) -> Float[np.ndarray, "..."]:
    gradient = np.empty(x.shape)
    for index in np.ndindex(x.shape):
        above, below = x.copy(), x.copy()
        above[index] += step
        below[index] -= step
        gradient[index] = (function(above) - function(below)) / (2 * step)
    return gradient


def mixer_inputs(rng: np.random.Generator, n: int, j: int, k: int, m: int, dh: int) -> MixerInputs:
    d = m * dh
    return (
        rng.normal(size=(j, m, dh)),
        rng.normal(size=(n, k, m, dh)),
        rng.normal(size=(n, k, m, dh)),
        rng.normal(size=(d, d)),
        3 * rng.normal(size=(j, d)),
    )


def pair_matrices(rng: np.random.Generator, n: int, slots: int) -> PairMatrices:
    """Soft targets, caption weights with empty slots, and masked pairs; the second image has no positive at all."""
    caption_weight = rng.uniform(0.2, 1.0, size=n * slots) * (rng.random(n * slots) > 0.2)
    target = rng.random((n, n * slots)) * (rng.random((n, n * slots)) > 0.5)
    target[1:2] = 0
    mask = (rng.random((n, n * slots)) > 0.3) * (caption_weight > 0)
    return target, np.tile(caption_weight, (n, 1)), mask.astype(float)


@pytest.mark.parametrize("shape", SHAPES)
def test_contextual_cosines_gradient(shape: tuple[int, int, int, int, int]) -> None:
    rng = np.random.default_rng(0)
    inputs = mixer_inputs(rng, *shape)
    cotangent = rng.normal(size=shape[:2])
    gradients = reference.contextual_cosines_vjp(*inputs, 0.7, cotangent)
    for position, gradient in enumerate(gradients):

        def objective(x: Float[np.ndarray, "..."], position: int = position) -> float:
            changed = list(inputs)
            changed[position] = x
            q, k, v, w_out, t = changed
            return float(np.sum(cotangent * reference.contextual_cosines(q, k, v, w_out, t, 0.7)))

        np.testing.assert_allclose(gradient, central_differences(objective, inputs[position]), rtol=1e-6, atol=1e-8)


def test_contextual_cosines_of_one_token_and_of_a_high_temperature() -> None:
    rng = np.random.default_rng(1)
    q, k, v, w_out, t = mixer_inputs(rng, 3, 4, 5, 2, 3)

    def plain_cosines(values: Float[np.ndarray, "N M dh"]) -> Float[np.ndarray, "N J"]:
        z = values.reshape(len(values), -1) @ w_out
        unit_z, unit_t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (z, t))
        cosines: Float[np.ndarray, "N J"] = unit_z @ unit_t.T
        return cosines

    one_token = reference.contextual_cosines(q, k[:, :1], v[:, :1], w_out, t, 5.0)
    np.testing.assert_allclose(one_token, plain_cosines(v[:, 0]), atol=1e-12)
    average = reference.contextual_cosines(q, k, v, w_out, t, 1e12)
    np.testing.assert_allclose(average, plain_cosines(v.mean(axis=1)), atol=1e-9)


def test_contextual_cosines_of_a_low_temperature_pick_one_token_for_each_head() -> None:
    q = np.array([[[1.0], [-1.0]]])
    k = np.array([[[[2.0], [2.0]], [[1.0], [1.0]]]])
    v = np.array([[[[3.0], [7.0]], [[5.0], [4.0]]]])
    cosines = reference.contextual_cosines(q, k, v, np.eye(2), np.array([[2.0, 0.0]]), 1e-3)
    np.testing.assert_allclose(cosines, [[3 / 5]])  # head 0 takes token 0 (3), head 1 token 1 (4)


def test_each_pair_depends_on_its_own_image_and_text_only() -> None:
    rng = np.random.default_rng(2)
    q, k, v, w_out, t = mixer_inputs(rng, 4, 4, 3, 2, 2)
    before = reference.contextual_cosines(q, k, v, w_out, t, 1.0)
    other_q = q.copy()
    other_q[1] += 1
    changed = reference.contextual_cosines(other_q, k, v, w_out, t, 1.0) != before
    np.testing.assert_array_equal(changed, np.tile(np.arange(4) == 1, (4, 1)))
    other_k = k.copy()
    other_k[2, 0] += 1
    changed = reference.contextual_cosines(q, other_k, v, w_out, t, 1.0) != before
    np.testing.assert_array_equal(changed, np.tile(np.arange(4) == 2, (4, 1)).T)


def test_contextual_cosines_follow_permutations() -> None:
    rng = np.random.default_rng(3)
    q, k, v, w_out, t = mixer_inputs(rng, 4, 5, 6, 2, 3)
    cosines = reference.contextual_cosines(q, k, v, w_out, t, 1.0)
    images, texts, tokens = rng.permutation(4), rng.permutation(5), rng.permutation(6)
    permuted = reference.contextual_cosines(q[texts], k[images][:, tokens], v[images][:, tokens], w_out, t[texts], 1.0)
    np.testing.assert_allclose(permuted, cosines[np.ix_(images, texts)], atol=1e-12)


def test_contextual_cosines_and_gradient_are_finite_for_large_scores() -> None:
    rng = np.random.default_rng(4)
    q, k, v, w_out, t = mixer_inputs(rng, 2, 3, 4, 2, 3)
    assert np.all(np.abs(reference.contextual_cosines(500 * q, k, v, w_out, t, 1.0)) <= 1 + 1e-12)
    for gradient in reference.contextual_cosines_vjp(500 * q, k, v, w_out, t, 1.0, np.ones((2, 3))):
        assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize(("loss", "gradient"), LOSSES)
@pytest.mark.parametrize(("n", "slots"), [(4, 3), (5, 1), (1, 2)])
def test_loss_gradients(loss: Callable[..., float], gradient: Callable[..., np.ndarray], n: int, slots: int) -> None:
    rng = np.random.default_rng(5)
    pairs = pair_matrices(rng, n, slots)
    logits = 2 * rng.normal(size=(n, n * slots))
    numeric = central_differences(lambda x: loss(x, *pairs), logits)
    np.testing.assert_allclose(gradient(logits, *pairs), numeric, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("loss", "gradient"), LOSSES)
def test_losses_are_finite_for_large_logits(loss: Callable[..., float], gradient: Callable[..., np.ndarray]) -> None:
    rng = np.random.default_rng(6)
    pairs = pair_matrices(rng, 4, 2)
    logits = 500 * rng.choice([-1.0, 1.0], size=(4, 8))
    assert 0 < loss(logits, *pairs) < 1e4
    assert np.all(np.isfinite(gradient(logits, *pairs)))
    # The right answers cost nothing and the wrong ones their distance.
    ones = np.ones((3, 3))
    assert loss(1000 * np.eye(3) - 500, np.eye(3), ones, ones) == pytest.approx(0, abs=1e-9)
    assert loss(500 - 1000 * np.eye(3), np.eye(3), ones, ones) >= 1000


@pytest.mark.parametrize(("loss", "gradient"), LOSSES)
def test_losses_ignore_masked_logits_and_the_order_of_samples(
    loss: Callable[..., float], gradient: Callable[..., np.ndarray]
) -> None:
    rng = np.random.default_rng(7)
    target, weight, mask = pair_matrices(rng, 4, 2)
    logits = rng.normal(size=(4, 8))
    value = loss(logits, target, weight, mask)
    assert loss(np.where(mask > 0, logits, 300.0), target, weight, mask) == pytest.approx(value, rel=1e-12)
    assert np.all(gradient(logits, target, weight, mask)[mask == 0] == 0)
    order = np.ix_(rng.permutation(4), rng.permutation(8))
    assert loss(logits[order], target[order], weight[order], mask[order]) == pytest.approx(value, rel=1e-12)


def test_losses_of_single_captions_are_siglip_and_clip() -> None:
    rng = np.random.default_rng(8)
    logits = rng.normal(size=(5, 5))
    ones, eye = np.ones((5, 5)), np.eye(5)
    siglip = np.sum(np.log1p(np.exp(-(2 * eye - 1) * logits))) / 5
    assert reference.sigmoid_loss(logits, eye, ones, ones) == pytest.approx(siglip)
    by_image, by_text = (np.exp(logits) / np.exp(logits).sum(axis=axis, keepdims=True) for axis in (1, 0))
    clip = -np.sum(np.log(np.diag(by_image)) + np.log(np.diag(by_text))) / 10
    assert reference.softmax_loss(logits, eye, ones, ones) == pytest.approx(clip)


def test_softmax_loss_by_hand() -> None:
    """Image 0 has captions of weight 1/4 and 3/4; image 1 has one caption and one empty slot."""
    logits = np.log(np.array([[1.0, 2.0, 3.0, 9.0], [4.0, 1.0, 5.0, 9.0]]))
    target = np.array([[1.0, 1, 0, 0], [0, 0, 1, 1]])
    weight = np.tile([0.25, 0.75, 1.0, 0.0], (2, 1))
    mask = np.tile([1.0, 1.0, 1.0, 0.0], (2, 1))
    image_to_text = -(0.25 * np.log(1 / 6) + 0.75 * np.log(2 / 6) + np.log(5 / 10)) / 2
    text_to_image = -(0.25 * np.log(1 / 5) + 0.75 * np.log(2 / 3) + np.log(5 / 8)) / 2
    assert reference.softmax_loss(logits, target, weight, mask) == pytest.approx((image_to_text + text_to_image) / 2)


def test_softmax_loss_without_any_positive_is_zero() -> None:
    zeros, ones = np.zeros((2, 2)), np.ones((2, 2))
    assert reference.softmax_loss(ones, zeros, ones, ones) == 0
    np.testing.assert_array_equal(reference.softmax_loss_gradient(ones, zeros, ones, ones), zeros)


def test_pair_targets_by_hand() -> None:
    """Images 0 and 2 are the same picture; images 0 and 1 share caption 7; image 1's empty slot repeats caption 9."""
    image_group = np.array([1, 2, 1])
    text_group = np.array([[7, 8], [7, 9], [9, 6]])
    caption_weight = np.array([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]])
    own = np.kron(np.eye(3), np.ones((1, 2)))
    filled = np.tile([1.0, 1, 1, 0, 1, 1], (3, 1))
    duplicate = np.array([[0, 0, 1, 0, 1, 1], [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]])

    expected: dict[reference.DuplicateRule, tuple[np.ndarray, np.ndarray]] = {
        "negative": (own, filled),
        "ignore": (own, filled * (1 - duplicate)),
        "positive": (own + duplicate, filled),
    }
    for duplicates, (expected_target, expected_mask) in expected.items():
        target, weight, mask = reference.pair_targets(image_group, text_group, caption_weight, duplicates)
        np.testing.assert_array_equal(mask, expected_mask)
        np.testing.assert_array_equal(target[mask > 0], expected_target[mask > 0])
        np.testing.assert_array_equal(weight, np.tile(caption_weight.reshape(-1), (3, 1)))


@pytest.mark.parametrize("duplicates", get_args(reference.DuplicateRule))
def test_pair_targets_of_distinct_samples_do_not_depend_on_the_rule(duplicates: reference.DuplicateRule) -> None:
    text_group = np.arange(6).reshape(3, 2)
    target, _, mask = reference.pair_targets(np.arange(3), text_group, np.full((3, 2), 0.5), duplicates)
    np.testing.assert_array_equal(target, np.kron(np.eye(3), np.ones((1, 2))))
    assert np.all(mask == 1)
