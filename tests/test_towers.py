"""Both towers, end to end: embeddings, logits and the gradient of every parameter, however they are computed.

(Against OpenCLIP and transformers: test_open_clip_weights.py, test_huggingface_weights.py.) Errors are the largest
difference as a fraction of a tensor's largest magnitude.
"""

from functools import cache
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array, Float, Int
from oracles import (
    Params,
    above,
    fast_to_compile,
    random_params,
    tree_errors,
)

from llip_jax.config import Config, resolve
from llip_jax.config_files import with_variant
from llip_jax.models.dual_encoder import abstract_model
from llip_jax.objectives.objective import Forward, objective

TOLERANCE = 1e-5

# Odd sizes, all different, so that no two axes can be mixed up unseen.
IMAGE, PATCH, VOCABULARY, LENGTH, EMBED = 20, 4, 311, 13, 24
VISION = {"layers": 3, "width": 48, "heads": 3, "mlp": 120}
TEXT = {"layers": 2, "width": 40, "heads": 5, "mlp": 100}


class Run(NamedTuple):
    """One forward and backward pass of a CLIP model; ``images`` and ``texts`` are embeddings before normalisation."""

    images: Float[Array, "N d"]
    texts: Float[Array, "N d"]
    logits: Float[Array, "N N"]
    loss: Float[Array, ""]
    gradients: Params


def make_config(variant: str, **model: Any) -> Config:
    """A configuration at the sizes above."""
    base = {
        "size": "Ti/4",
        "image_size": IMAGE,
        "embed_dim": EMBED,
        "vision": VISION | {"patch": PATCH},
        "text": TEXT | {"length": LENGTH},
        "mixture_tokens": 7,
        "mixer_heads": 3,
        "dtype": "float32",
        "scan_layers": False,
    }
    data = {"tokenizer": {"vocabulary_size": VOCABULARY}}
    return resolve(with_variant({"model": base | model, "data": data}, variant).to_dict())


def random_batch(seed: int) -> dict[str, np.ndarray]:
    """Six images with one caption each: start, words, end of text (the highest id), padding; some without padding."""
    rng = np.random.default_rng(seed)
    words = np.array([LENGTH - 2, 0, 1, 5, 8, LENGTH - 2])
    n, column = len(words), np.arange(LENGTH)
    tokens = rng.integers(1, VOCABULARY - 2, size=(n, LENGTH))
    tokens[:, 0] = VOCABULARY - 2
    tokens[column == words[:, None] + 1] = VOCABULARY - 1
    mask = column < words[:, None] + 2
    return {
        "image": rng.integers(256, size=(n, IMAGE, IMAGE, 3), dtype=np.uint8),
        "text": (tokens * mask)[:, None].astype(np.int32),
        "text_mask": mask[:, None].astype(np.int32),
        "caption_weight": np.ones((n, 1), np.float32),
        "image_group": np.arange(n),
        "text_group": np.arange(n)[:, None],
    }


def run_ours(config: Config, params: Params, batch: dict[str, np.ndarray]) -> Run:
    """Our model and objective, compiled."""
    graph, _ = nnx.split(abstract_model(config), nnx.Param)

    @fast_to_compile
    def run(params: Params, batch: dict[str, Array]) -> Run:
        def loss_fn(params: Params) -> tuple[Array, tuple[Array, Array, Array]]:
            forward = Forward(nnx.merge(graph, params), batch)
            loss, _ = objective(config.objective, forward)
            images = forward.model.unconditioned_embedding(forward.images)
            return loss, (images, forward.texts.embedding, forward.logits)

        (loss, outputs), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return Run(*outputs, loss, gradients)

    return run(params, batch)


def assert_equal_runs(actual: Run, expected: Run) -> None:
    errors = tree_errors(actual._asdict(), expected._asdict())
    assert above(errors, TOLERANCE) == {}


@cache
def unrolled_llip() -> tuple[Params, Run]:
    """Random parameters of a Llip model, and its run with unrolled layers and nothing recomputed."""
    config = make_config("")
    params = random_params(config, seed=7)
    return params, run_ours(config, params, random_batch(seed=9))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", ["none", pytest.param("dots", marks=pytest.mark.slow), "layer"])
def test_scan_and_rematerialisation_change_nothing(scan: bool, remat: Literal["none", "dots", "layer"]) -> None:
    params, expected = unrolled_llip()
    if (scan, remat) != (False, "none"):
        config = make_config("", scan_layers=scan, remat=remat)
        assert_equal_runs(run_ours(config, params, random_batch(seed=9)), expected)


def test_nothing_behind_the_last_real_token_matters() -> None:
    """Other padding, no padding, another end of text: the mask alone says where a text is read."""
    graph, _ = nnx.split(abstract_model(make_config("")), nnx.Param)
    params, _ = unrolled_llip()
    batch = random_batch(seed=10)
    tokens, mask = batch["text"][:, 0], batch["text_mask"][:, 0]

    @jax.jit
    def encode(tokens: Int[Array, "J L"], mask: Int[Array, "J L"]) -> Float[Array, "J Dt"]:
        return nnx.merge(graph, params).text(tokens, mask)

    expected = encode(tokens, mask)
    noise = np.random.default_rng(11).integers(VOCABULARY, size=tokens.shape)
    np.testing.assert_array_equal(encode(np.where(mask, tokens, noise), mask), expected)
    # Without any token, as in an empty caption slot, the first position is read.
    first = (np.arange(LENGTH) == 0) * np.ones_like(mask)
    np.testing.assert_array_equal(encode(tokens, np.zeros_like(mask)), encode(tokens, first))
    assert np.abs(encode(tokens, first) - expected).min(axis=1).max() > 0


@pytest.mark.parametrize("images", [np.zeros((1, IMAGE, IMAGE, 3), np.float32), np.zeros((1, 16, IMAGE, 3), np.uint8)])
def test_images_of_another_type_or_size_are_refused(images: np.ndarray) -> None:
    model = abstract_model(make_config("clip"))
    with pytest.raises(ValueError, match=r"expected uint8 \[N, 20, 20, 3\], got"):
        model.encode_images(jnp.asarray(images))
