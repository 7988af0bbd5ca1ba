"""Poolers: what each rung of the ladder reads of the image tokens, and that all of their parameters learn."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array, Float
from oracles import Params, fast_to_compile, random_params, relative_error

from llip_jax.config import ModelConfig, VisionConfig, resolve
from llip_jax.models.dual_encoder import abstract_model
from llip_jax.models.pooling import POOLERS, Pooler, token_count
from llip_jax.models.sizes import model_shape
from llip_jax.models.vision import TowerOutput
from llip_jax.objectives.objective import Forward, objective
from llip_jax.ops.pair_scores import FixedSide, MixtureSide

TOLERANCE = 1e-5
N, J, K, HEADS, DV, D = 3, 5, 7, 4, 20, 24


def make_pooler(name: str) -> tuple[Pooler, dict[str, Float[np.ndarray, "..."]]]:
    """A pooler with noise on every parameter, and those parameters."""
    config = ModelConfig(
        size="Ti/4", pooler=name, mixture_tokens=K, mixer_heads=HEADS, embed_dim=D, vision=VisionConfig(width=DV)
    )
    pooler = POOLERS[name](config, model_shape(config), jnp.float32, nnx.Rngs(1))
    rng = np.random.default_rng(2)
    graph, params = nnx.split(pooler)
    params = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), params)
    return nnx.merge(graph, params), jax.tree.map(np.float64, nnx.to_pure_dict(params))


def random_output(seed: int) -> TowerOutput:
    mixture, patches = np.random.default_rng(seed).normal(size=(2, N, K, DV)).astype(np.float32)
    return TowerOutput(jnp.asarray(mixture), jnp.asarray(patches))


@pytest.mark.parametrize("name", POOLERS)
def test_patches_are_not_read(name: str) -> None:
    """They reach the embedding through the tower's attention alone."""
    pooler, _ = make_pooler(name)
    output = random_output(3)
    other = output._replace(patches=random_output(4).patches)
    jax.tree.map(np.testing.assert_array_equal, pooler.images(output), pooler.images(other))


def test_class_token_is_projected_and_registers_are_dropped() -> None:
    pooler, params = make_pooler("registers")
    output = random_output(5)
    expected = np.asarray(output.mixture, np.float64)[:, 0] @ params["image"]
    assert relative_error(pooler.unconditioned(output), expected) < TOLERANCE
    registers = output.mixture.at[:, 1:].set(random_output(6).mixture[:, 1:])
    np.testing.assert_array_equal(
        pooler.unconditioned(output._replace(mixture=registers)), pooler.unconditioned(output)
    )


def weighted_values(
    tokens: Float[np.ndarray, "K Dv"], weights: Float[np.ndarray, "M K"], value: Float[np.ndarray, "Dv M dh"]
) -> Float[np.ndarray, "d"]:
    """Values of one image's tokens, averaged head by head."""
    return np.concatenate([weights[m] @ (tokens @ value[:, m]) for m in range(HEADS)])


def test_learned_average_equals_the_formula() -> None:
    pooler, params = make_pooler("average")
    output = random_output(7)
    weights = np.exp(params["logits"]) / np.exp(params["logits"]).sum(axis=1, keepdims=True)
    tokens = np.asarray(output.mixture, np.float64)
    expected = np.stack([weighted_values(x, weights, params["value"]) for x in tokens]) @ params["output"]
    assert relative_error(pooler.unconditioned(output), expected) < TOLERANCE


@pytest.mark.parametrize("name", ["class_token", "registers", "average"])
def test_without_a_mixer_the_image_embedding_is_the_same_for_every_text(name: str) -> None:
    pooler, params = make_pooler(name)
    output, pooled = random_output(8), np.random.default_rng(9).normal(size=(J, 128)).astype(np.float32)
    images, texts = pooler.images(output), pooler.texts(jnp.asarray(pooled))
    assert isinstance(images, FixedSide)
    np.testing.assert_array_equal(images.embedding, pooler.unconditioned(output))
    assert texts.queries is None
    assert relative_error(texts.embedding, pooled.astype(np.float64) @ params["text"]) < TOLERANCE


def test_mixer_sides_equal_the_formulas() -> None:
    pooler, params = make_pooler("mixer")
    output, pooled = random_output(10), np.random.default_rng(11).normal(size=(J, 128)).astype(np.float32)
    images, texts = pooler.images(output), pooler.texts(jnp.asarray(pooled))
    assert isinstance(images, MixtureSide)
    assert texts.queries is not None
    tokens, pooled = np.asarray(output.mixture, np.float64), pooled.astype(np.float64)
    for m in range(HEADS):
        assert relative_error(images.keys[:, :, m], tokens @ params["key"][:, m]) < TOLERANCE
        assert relative_error(images.values[:, :, m], tokens @ params["value"][:, m]) < TOLERANCE
        assert relative_error(texts.queries[:, m], pooled @ params["query"][:, m]) < TOLERANCE
    assert relative_error(texts.embedding, pooled @ params["text"]) < TOLERANCE
    assert images.temperature == 5.0


def test_unconditioned_embedding_of_the_mixer_averages_all_tokens_alike() -> None:
    pooler, params = make_pooler("mixer")
    output = random_output(12)
    uniform = np.full((HEADS, K), 1 / K)
    tokens = np.asarray(output.mixture, np.float64)
    expected = np.stack([weighted_values(x, uniform, params["value"]) for x in tokens]) @ params["output"]
    assert relative_error(pooler.unconditioned(output), expected) < TOLERANCE


def test_only_the_plain_class_token_stands_alone() -> None:
    counts = {name: token_count(ModelConfig(pooler=name, mixture_tokens=K)) for name in POOLERS}
    assert counts == {"class_token": 1, "registers": K, "average": K, "mixer": K}


def gradients_of(pooler: str, tokens: int) -> Params:
    """Gradient of the sigmoid loss with respect to every parameter of a small model."""
    tower = {"layers": 2, "width": 16, "heads": 2, "mlp": 24}
    model: dict[str, Any] = {
        "size": "Ti/4",
        "pooler": pooler,
        "image_size": 8,
        "embed_dim": 8,
        "mixture_tokens": tokens,
        "mixer_heads": 2,
        "vision": tower,
        "text": tower | {"length": 6},
        "scan_layers": True,
    }
    config = resolve({"model": model, "data": {"tokenizer": {"vocabulary_size": 300}}})
    rng, n = np.random.default_rng(13), 4
    batch = {
        "image": rng.integers(256, size=(n, 8, 8, 3), dtype=np.uint8),
        "text": rng.integers(300, size=(n, 1, 6)),
        "text_mask": np.ones((n, 1, 6), np.int32),
        "caption_weight": np.ones((n, 1), np.float32),
        "image_group": np.arange(n),
        "text_group": np.arange(n)[:, None],
    }

    graph, _ = nnx.split(abstract_model(config), nnx.Param)

    @fast_to_compile
    def gradients(params: Params, batch: dict[str, Array]) -> Params:
        return jax.grad(lambda p: objective(config.objective, Forward(nnx.merge(graph, p), batch))[0])(params)

    return gradients(random_params(config, seed=14), batch)


@pytest.mark.parametrize("pooler", POOLERS)
def test_every_parameter_learns(pooler: str) -> None:
    """No dead leaf, and within the stacked ones no dead layer; registers learn through the tower's attention."""
    gradients = gradients_of(pooler, tokens=3)
    dead = [jax.tree_util.keystr(path) for path, x in jax.tree.leaves_with_path(gradients) if not np.any(x)]
    assert dead == []
    for tower in ("vision", "text"):
        for name, x in gradients[tower]["transformer"]["blocks"].items():
            assert all(np.any(leaf[layer]) for leaf in jax.tree.leaves(x) for layer in range(2)), name
    assert np.any(gradients["vision"]["tokens"], axis=1).all()


def test_a_single_mixture_token_leaves_nothing_to_mix() -> None:
    """With K = 1 the softmax is constant: queries and keys are the only parameters that cannot learn."""
    gradients = gradients_of("mixer", tokens=1)
    dead = {name for name, x in gradients["pooler"].items() if not np.any(x)}
    assert dead == {"query", "key"}
