"""Losses and pair targets against NumPy in float64 and OpenCLIP; values and gradients.

Errors are the largest difference as a fraction of a tensor's largest magnitude.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest
from jaxtyping import Array, Float, Int
from numpy_reference import DuplicateRule
from oracles import import_open_clip, relative_error

from llip_jax.config import ObjectiveConfig, PairLossConfig, PairScoresConfig
from llip_jax.objectives.losses import SigmoidLoss, SoftmaxLoss, Targets
from llip_jax.objectives.objective import Forward, objective
from llip_jax.objectives.pairs import PairTargets, pair_ids, pair_targets
from llip_jax.ops.pair_loss import PairLoss
from llip_jax.ops.pair_scores import Affine, FixedSide, ImageSide, TextSide, cosines, normalize

TOLERANCE = 1e-5

Loss = Callable[[Float[Array, "N J"], PairTargets], Float[Array, ""]]


def of_matrix(loss: Callable[[Targets], PairLoss]) -> Loss:
    """A loss as a function of all logits at once and of what the pairs are."""

    def value(logits: Float[Array, "N J"], pairs: PairTargets) -> Float[Array, ""]:
        terms = loss(lambda image_ids, text_ids: pairs)
        return terms.value(terms.statistics(logits, None, None, jnp.ones(logits.shape, bool)))

    return value


LOSSES = {
    "sigmoid": (of_matrix(SigmoidLoss), reference.sigmoid_loss, reference.sigmoid_loss_gradient),
    "softmax": (of_matrix(SoftmaxLoss), reference.softmax_loss, reference.softmax_loss_gradient),
}
DUPLICATES = get_args(DuplicateRule)


class Groups(NamedTuple):
    """Arguments of pair_ids."""

    image: Int[np.ndarray, "N"]
    text: Int[np.ndarray, "N C"]
    weight: Float[np.ndarray, "N C"]


def random_groups(seed: int, n: int, slots: int) -> Groups:
    """Some equal pictures, some equal captions, some empty slots (never an image's first)."""
    rng = np.random.default_rng(seed)
    weight = rng.uniform(0.2, 1, size=(n, slots)) * (rng.random((n, slots)) < 0.7)
    weight[:, 0] = 1
    weight /= weight.sum(axis=1, keepdims=True)
    return Groups(rng.integers(n, size=n), rng.integers(2 * n, size=(n, slots)), weight.astype(np.float32))


def random_pairs(seed: int, n: int, slots: int, duplicates: DuplicateRule) -> PairTargets:
    return targets_of(random_groups(seed, n, slots), duplicates)


def targets_of(groups: Groups, duplicates: DuplicateRule) -> PairTargets:
    return pair_targets(*pair_ids(*map(jnp.asarray, groups)), duplicates)


def random_logits(seed: int, n: int, slots: int) -> Float[np.ndarray, "N J"]:
    return (3 * np.random.default_rng(seed).normal(size=(n, n * slots))).astype(np.float32)


def no_duplicates(n: int) -> PairTargets:
    """The identity: one caption an image, all different."""
    groups = Groups(np.arange(n), np.arange(n)[:, None], np.ones((n, 1), np.float32))
    return targets_of(groups, "ignore")


@pytest.mark.parametrize("duplicates", DUPLICATES)
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_pair_targets_equal_the_reference(slots: int, duplicates: DuplicateRule) -> None:
    collisions = 0
    for seed in range(5):
        groups = random_groups(seed, 6, slots)
        expected = reference.pair_targets(*groups, duplicates)
        for ours, array in zip(targets_of(groups, duplicates), expected, strict=True):
            np.testing.assert_array_equal(ours, array)
        plain = reference.pair_targets(*groups, "negative")
        collisions += np.sum((expected[0] != plain[0]) | (expected[2] != plain[2]))
    # The rule matters in these batches.
    assert (collisions > 0) == (duplicates != "negative")


@pytest.mark.parametrize(
    ("duplicates", "target", "mask"),
    [
        ("negative", [[1, 1, 0, 0], [0, 0, 1, 0]], [[1, 1, 1, 0], [1, 1, 1, 0]]),
        ("positive", [[1, 1, 1, 0], [1, 0, 1, 0]], [[1, 1, 1, 0], [1, 1, 1, 0]]),
        ("ignore", [[1, 1, 0, 0], [0, 0, 1, 0]], [[1, 1, 0, 0], [0, 1, 1, 0]]),
    ],
)
def test_pair_targets_by_hand(duplicates: DuplicateRule, target: list[list[int]], mask: list[list[int]]) -> None:
    """Two pictures share caption 5; caption 6 is in an empty slot of the second, so it is not that image's caption."""
    groups = Groups(np.array([0, 1]), np.array([[5, 6], [5, 6]]), np.array([[0.5, 0.5], [1, 0]]))
    pairs = targets_of(groups, duplicates)
    np.testing.assert_array_equal(pairs.target * pairs.mask, target)
    np.testing.assert_array_equal(pairs.mask, mask)
    np.testing.assert_array_equal(pairs.weight, [[0.5, 0.5, 1, 0]] * 2)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("duplicates", DUPLICATES)
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_losses_equal_the_reference(name: str, duplicates: DuplicateRule, slots: int) -> None:
    loss, expected_loss, expected_gradient = LOSSES[name]
    for seed in range(3):
        pairs, logits = random_pairs(seed, 6, slots, duplicates), random_logits(seed + 10, 6, slots)
        exact = [np.asarray(x, np.float64) for x in (logits, *pairs)]
        value, gradient = jax.value_and_grad(loss)(logits, pairs)
        assert relative_error(value, expected_loss(*exact)) < TOLERANCE
        assert relative_error(gradient, expected_gradient(*exact)) < TOLERANCE


@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_open_clip(name: str) -> None:
    """From features: the gradients of both sides, of the scale and of the bias."""
    open_clip = import_open_clip()
    import torch

    n, d = 6, 8
    loss = LOSSES[name][0]
    features = np.random.default_rng(1).normal(size=(2, n, d)).astype(np.float32)
    scalars = np.array([np.log(7.0), -2.0], np.float32)

    def ours(features: Float[Array, "2 N d"], scalars: Float[Array, "2"]) -> Float[Array, ""]:
        images, texts = normalize(features)
        return loss(jnp.exp(scalars[0]) * images @ texts.T + scalars[1], no_duplicates(n))

    torch_features, torch_scalars = (torch.tensor(x).double().requires_grad_() for x in (features, scalars))
    images, texts = torch.nn.functional.normalize(torch_features, dim=-1)
    oracle = open_clip.loss.SigLipLoss() if name == "sigmoid" else open_clip.loss.ClipLoss()
    expected = oracle(images, texts, torch_scalars[0].exp(), torch_scalars[1])
    expected.backward()
    value, gradients = jax.value_and_grad(ours, argnums=(0, 1))(jnp.asarray(features), jnp.asarray(scalars))
    assert relative_error(value, expected.detach().numpy()) < TOLERANCE
    assert relative_error(gradients[0], torch_features.grad.numpy()) < TOLERANCE
    assert relative_error(gradients[1], torch_scalars.grad.numpy()) < TOLERANCE


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("duplicates", DUPLICATES)
def test_masked_pairs_have_no_gradient_and_no_influence(name: str, duplicates: DuplicateRule) -> None:
    loss = LOSSES[name][0]
    pairs, logits = random_pairs(2, 6, 3, duplicates), random_logits(3, 6, 3)
    masked = np.asarray(pairs.mask) == 0
    assert masked.any()
    value, gradient = jax.value_and_grad(loss)(logits, pairs)
    np.testing.assert_array_equal(gradient[masked], 0)
    assert np.all(gradient[~masked] != 0)
    assert loss(np.where(masked, 77.0, logits), pairs) == value


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [500.0, 1e4])
def test_gradients_are_finite_at_extreme_logits(name: str, size: float) -> None:
    loss, expected_loss, expected_gradient = LOSSES[name]
    pairs = random_pairs(4, 6, 3, "ignore")
    logits = size * np.sign(random_logits(5, 6, 3))
    exact = [np.asarray(x, np.float64) for x in (logits, *pairs)]
    value, gradient = jax.value_and_grad(loss)(logits, pairs)
    assert relative_error(value, expected_loss(*exact)) < TOLERANCE
    assert relative_error(gradient, expected_gradient(*exact)) < TOLERANCE


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_at_logits_of_zero(name: str) -> None:
    """Where a form by absolute values has a corner."""
    loss, _, expected_gradient = LOSSES[name]
    pairs, logits = random_pairs(14, 6, 3, "ignore"), np.zeros((6, 18), np.float32)
    exact = [np.asarray(x, np.float64) for x in (logits, *pairs)]
    assert relative_error(jax.grad(loss)(logits, pairs), expected_gradient(*exact)) < TOLERANCE


@pytest.mark.parametrize("name", LOSSES)
def test_rows_and_columns_that_are_masked_throughout(name: str) -> None:
    """An image without any countable pair: neither NaN nor gradient; nor in a batch where nothing counts."""
    loss = LOSSES[name][0]
    logits = random_logits(6, 4, 2)
    pairs = random_pairs(7, 4, 2, "ignore")
    for mask in (pairs.mask.at[1].set(0), jnp.zeros_like(pairs.mask)):
        value, gradient = jax.value_and_grad(loss)(logits, pairs._replace(mask=mask))
        assert np.isfinite(value)
        np.testing.assert_array_equal(gradient[1], 0)
        assert np.isfinite(gradient).all()
    assert value == 0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("duplicates", DUPLICATES)
def test_the_order_of_samples_and_slots_does_not_matter(name: str, duplicates: DuplicateRule) -> None:
    n, slots = 6, 3
    loss, rng = LOSSES[name][0], np.random.default_rng(8)
    groups, logits = random_groups(9, n, slots), random_logits(10, n, slots)
    samples, order = rng.permutation(n), rng.permutation(slots)
    permuted_groups = Groups(groups.image[samples], *(x[samples][:, order] for x in groups[1:]))
    permuted = logits.reshape(n, n, slots)[samples][:, samples][:, :, order].reshape(n, -1)
    before = loss(logits, targets_of(groups, duplicates))
    after = loss(permuted, targets_of(permuted_groups, duplicates))
    assert relative_error(after, before) < 1e-6


@pytest.mark.parametrize("name", LOSSES)
def test_repeating_every_caption_at_half_weight_changes_nothing(name: str) -> None:
    """Weights that sum to 1 over an image's captions: the sigmoid loss does not grow with their number.

    In the softmax loss every image sees twice as many texts, which adds log 2 to that direction.
    """
    loss = LOSSES[name][0]
    n = 5
    logits = random_logits(11, n, 1)
    groups = Groups(np.arange(n), np.repeat(np.arange(n)[:, None], 2, axis=1), np.full((n, 2), 0.5, np.float32))
    twice = loss(np.repeat(logits, 2, axis=1), targets_of(groups, "ignore"))
    expected = loss(logits, no_duplicates(n)) + (0.5 * np.log(2) if name == "softmax" else 0)
    assert relative_error(twice, expected) < 1e-6


class FeatureModel:
    """Stands in for the dual encoder: images and texts come as features."""

    def encode_images(self, images: Float[Array, "N d"], dropout_key: None) -> Float[Array, "N d"]:
        return images

    def image_side(self, output: Float[Array, "N d"]) -> FixedSide:
        return FixedSide(output)

    def text_side(self, tokens: Float[Array, "J d"], mask: Int[Array, "J d"]) -> TextSide:
        return TextSide(tokens * mask)

    def affine(self) -> Affine:
        return Affine(jnp.float32(3.0), jnp.float32(-1.0))

    def logits(self, images: ImageSide, texts: TextSide) -> Float[Array, "N J"]:
        return 3.0 * cosines(images, texts) - 1.0


@pytest.mark.parametrize("implementation", ["dense", "streamed"])
def test_objective_is_the_weighted_sum_of_its_terms(implementation: Literal["dense", "streamed"]) -> None:
    """Captions are laid out image by image; each term has its own rule for duplicates and is reported unweighted."""
    n, slots, d = 5, 2, 4
    rng, groups = np.random.default_rng(12), random_groups(13, n, slots)
    images, texts = rng.normal(size=(n, d)), rng.normal(size=(n, slots, d))
    mask = rng.integers(2, size=texts.shape)
    batch = {
        "image": images,
        "text": texts,
        "text_mask": mask,
        "image_group": groups.image,
        "text_group": groups.text,
        "caption_weight": groups.weight,
    }
    settings = PairScoresConfig(implementation=implementation)
    forward = Forward(FeatureModel(), jax.tree.map(jnp.asarray, batch), pair_scores=settings)  # type: ignore[arg-type]
    terms = {"sigmoid": PairLossConfig(weight=0.3), "softmax": PairLossConfig(weight=2.0, duplicates="positive")}
    unit_images, unit_texts = (
        x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12) for x in (images, texts * mask)
    )
    logits = 3 * np.einsum("id,jcd->ijc", unit_images, unit_texts).reshape(n, n * slots) - 1
    expected = {
        f"loss/{name}": LOSSES[name][1](logits, *reference.pair_targets(*groups, term.duplicates))
        for name, term in terms.items()
    }
    loss, values = objective(ObjectiveConfig(**terms), forward)
    assert values.keys() == expected.keys()
    assert all(relative_error(values[name], expected[name]) < TOLERANCE for name in expected)
    total = sum(term.weight * expected[f"loss/{name}"] for name, term in terms.items())
    assert relative_error(loss, total) < TOLERANCE
    loss, values = objective(ObjectiveConfig(sigmoid=None, softmax=terms["softmax"]), forward)
    assert relative_error(loss, 2 * expected["loss/softmax"]) < TOLERANCE
    assert values == {}
