"""Both towers, end to end, against OpenCLIP and transformers: embeddings, logits and the gradient of every parameter.

We compute in float32, the oracles in float64 from the same float32 weights. Errors are the largest difference as a
fraction of a tensor's largest magnitude; the largest seen was 3e-6.
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
    add_noise,
    fast_to_compile,
    import_open_clip,
    open_clip_from_hugging_face,
    params_from_open_clip,
    random_params,
    tree_errors,
    weights_and_gradients,
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
HEADS = (VISION["heads"], TEXT["heads"])


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


def torch_inputs(config: Config, batch: dict[str, np.ndarray]) -> tuple[Any, Any]:
    """Pixels, normalised and channels first, and tokens."""
    import torch

    mean, std = (np.array(x, np.float32) for x in (config.model.image_mean, config.model.image_std))
    pixels = (batch["image"].astype(np.float32) / 255 - mean) / std
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2)).double(), torch.from_numpy(batch["text"][:, 0]).long()


def assert_equal_runs(actual: Run, expected: Run) -> None:
    errors = tree_errors(actual._asdict(), expected._asdict())
    assert above(errors, TOLERANCE) == {}


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_equals_open_clip(activation: str) -> None:
    open_clip = import_open_clip()
    import torch

    torch.manual_seed(1)
    model = (
        open_clip.CLIP(
            embed_dim=EMBED,
            quick_gelu=activation == "quick_gelu",
            vision_cfg={
                "image_size": IMAGE,
                "patch_size": PATCH,
                "layers": VISION["layers"],
                "width": VISION["width"],
                "head_width": VISION["width"] // VISION["heads"],
                "mlp_ratio": VISION["mlp"] / VISION["width"],
            },
            text_cfg={
                "context_length": LENGTH,
                "vocab_size": VOCABULARY,
                "layers": TEXT["layers"],
                "width": TEXT["width"],
                "heads": TEXT["heads"],
                "mlp_ratio": TEXT["mlp"] / TEXT["width"],
            },
        )
        .eval()
        .double()
    )
    add_noise(model, seed=2)
    config, batch = make_config("clip", activation=activation), random_batch(seed=3)
    pixels, tokens = torch_inputs(config, batch)
    images, texts = model.encode_image(pixels), model.encode_text(tokens)
    logits, _ = model.get_logits(pixels, tokens)
    normalised = [torch.nn.functional.normalize(x, dim=-1) for x in (images, texts)]
    loss = open_clip.loss.ClipLoss()(*normalised, model.logit_scale.exp())
    loss.backward()
    weights, gradients = weights_and_gradients(model)
    class_token = weights["visual.class_embedding"] + weights["visual.positional_embedding"][0]
    ours = run_ours(config, params_from_open_clip(weights, HEADS, class_token), batch)
    mapped = params_from_open_clip(gradients, HEADS, gradients["visual.class_embedding"])
    outputs = (x.detach().numpy() for x in (images, texts, logits, loss))
    assert_equal_runs(ours, Run(*outputs, mapped))


def test_equals_transformers() -> None:
    pytest.importorskip("torch", reason="transformers' CLIPModel needs torch")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    import torch

    def tower(shape: dict[str, int], **more: int) -> dict[str, Any]:
        return {
            "num_hidden_layers": shape["layers"],
            "hidden_size": shape["width"],
            "intermediate_size": shape["mlp"],
            "num_attention_heads": shape["heads"],
            "hidden_act": "quick_gelu",
            **more,
        }

    special = {"bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1, "pad_token_id": 0}
    torch.manual_seed(4)
    model = (
        transformers.CLIPModel(
            transformers.CLIPConfig(
                projection_dim=EMBED,
                vision_config=tower(VISION, image_size=IMAGE, patch_size=PATCH),
                text_config=tower(TEXT, vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **special),
            )
        )
        .eval()
        .double()
    )
    add_noise(model, seed=5)
    config, batch = make_config("clip", activation="quick_gelu"), random_batch(seed=6)
    pixels, tokens = torch_inputs(config, batch)
    output = model(input_ids=tokens, pixel_values=pixels, return_loss=True)
    images = model.visual_projection(model.vision_model(pixels).pooler_output)
    texts = model.text_projection(model.text_model(tokens).pooler_output)
    output.loss.backward()
    weights, gradients = map(open_clip_from_hugging_face, weights_and_gradients(model))
    class_token = weights["visual.class_embedding"] + weights["visual.positional_embedding"][0]
    ours = run_ours(config, params_from_open_clip(weights, HEADS, class_token), batch)
    mapped = params_from_open_clip(gradients, HEADS, gradients["visual.class_embedding"])
    outputs = (x.detach().numpy() for x in (images, texts, output.logits_per_image, output.loss))
    assert_equal_runs(ours, Run(*outputs, mapped))


@cache
def unrolled_llip() -> tuple[Params, Run]:
    """Random parameters of a Llip model, and its run with unrolled layers and nothing recomputed."""
    config = make_config("")
    params = random_params(config, seed=7)
    return params, run_ours(config, params, random_batch(seed=9))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", ["none", "dots", "layer"])
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
