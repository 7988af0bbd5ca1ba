"""Towers with their attention written out: the same outputs, and weights whose gradients can be asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from run_helpers import tiny_config

from llip_jax.models.dual_encoder import DualEncoder

TOWERS = {
    "clip": {"patch_dropout": 0.0},
    "weighted": {"patch_dropout": 0.0, "vision.token_weight": 0.25},
    "siglip": {"patch_dropout": 0.0, "vision.pooling": "attention", "text.causal": False, "text.pooling": "last"},
}


def model_of(tower: str) -> DualEncoder:
    smooth = {"activation": "gelu"}  # Finite differences would stumble over kinks.
    changes = {"vision.layers": 2, "text.layers": 2} | smooth | TOWERS[tower]
    graph, params = nnx.split(DualEncoder(tiny_config(model=changes), rngs=nnx.Rngs(0)), nnx.Param)
    noised = jax.tree.map(lambda x: x + 0.1 * np.random.default_rng().standard_normal(x.shape, np.float32), params)
    return nnx.merge(graph, noised)


@pytest.mark.parametrize("tower", [pytest.param("weighted", marks=pytest.mark.slow), "siglip"])
def test_observed_towers_give_the_same_outputs_and_weights_that_sum_to_one(tower):
    rng, model = np.random.default_rng(), model_of(tower)
    images = rng.integers(0, 256, (3, 16, 16, 3), np.uint8)
    output, weights = model.vision.observed(images, model.vision.no_offsets(3))
    expected = model.vision(images)
    np.testing.assert_allclose(output.mixture, expected.mixture, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(output.patches, expected.patches, rtol=1e-4, atol=1e-5)
    for each in (x for x in weights if x is not None):
        np.testing.assert_allclose(each.sum(-1), 1, rtol=1e-5)

    tokens = rng.integers(1, 300, (4, 12), np.int32)
    mask = (np.arange(12) < rng.integers(2, 13, (4, 1))).astype(np.int32)
    layers, heads = model.text.transformer.layers, 2
    pooled, weights = model.text.observed(model.text.embed(tokens), mask, jnp.zeros((layers, 4, heads, 12, 12)))
    np.testing.assert_allclose(pooled, model.text(tokens, mask), rtol=1e-4, atol=1e-5)
    above = np.triu(np.asarray(weights).max((0, 1, 2)), 1)
    assert (above == 0).all() == (tower != "siglip")  # causal towers see nothing that comes later


def test_the_gradient_by_the_offsets_is_that_by_the_attention_weights():
    """Against finite differences of one weight."""
    model = model_of("clip")
    images = np.random.default_rng().integers(0, 256, (1, 16, 16, 3), np.uint8)
    direction = np.random.default_rng().standard_normal(32).astype(np.float32)
    none = model.vision.no_offsets(1)

    def along(layers):
        return model.vision.observed(images, none._replace(layers=layers))[0].mixture[0, 1] @ direction

    gradient = jax.grad(along)(none.layers)
    at, step = (1, 0, 1, 1, 9), 1e-2
    up, down = (along(none.layers.at[at].set(sign * step)) for sign in (1, -1))
    np.testing.assert_allclose((up - down) / (2 * step), gradient[at], rtol=0.02, atol=1e-4)
