"""Do converted weights compute what their library computes? Asked on random inputs, where the library is installed."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from llip_jax.config import Config
from llip_jax.interop import common, huggingface, open_clip
from llip_jax.interop.weights import Weights
from llip_jax.models.dual_encoder import abstract_model

TOLERANCE = 1e-4
"""Of float32 against float32, through towers of any depth: the largest difference as a share of the largest value."""


class Inputs(NamedTuple):
    """Random pictures and texts."""

    images: UInt8[np.ndarray, "N H W 3"]
    tokens: Int[np.ndarray, "N L"]
    mask: Int[np.ndarray, "N L"]


class Outputs(NamedTuple):
    """L2-normalised embeddings, and logits."""

    images: Float[np.ndarray, "N d"]
    texts: Float[np.ndarray, "N d"]
    logits: Float[np.ndarray, "N N"]


def random_inputs(weights: Weights, count: int = 4, seed: int = 0) -> Inputs:
    """Pictures of noise; texts of random tokens, the end-of-text token behind them, and padding."""
    config, rng = common.config_of(weights), np.random.default_rng(seed)
    size, length = config.model.image_size, config.model.text.length
    end, column = common.end_token(weights, config), np.arange(length)
    words = rng.integers(1, length - 1, size=(count, 1))
    tokens = rng.integers(3, min(end, config.data.tokenizer.vocabulary_size) if end > 3 else 100, size=(count, length))
    tokens = np.where(column < words, tokens, np.where(column == words, end, config.data.tokenizer.pad))
    images = rng.integers(256, size=(count, size, size, 3), dtype=np.uint8)
    return Inputs(images, tokens.astype(np.int32), (column <= words).astype(np.int32))


def ours(config: Config, params: Any, inputs: Inputs) -> Outputs:
    """What our model computes in float32, whatever it is trained in; ``images`` are the unconditioned embeddings."""
    exact = replace(config, model=replace(config.model, dtype="float32"))
    graph, _ = nnx.split(abstract_model(exact), nnx.Param)

    @jax.jit
    def run(params: Any, images: Array, tokens: Array, mask: Array) -> tuple[Array, Array, Array]:
        model: Any = nnx.merge(graph, params)
        output, texts = model.encode_images(images), model.text_side(tokens, mask)
        logits = model.logits(model.image_side(output), texts)
        return model.unconditioned_embedding(output), texts.embedding, logits

    with jax.default_matmul_precision("highest"):
        images, texts, logits = map(np.asarray, run(params, *inputs))
    return Outputs(_normalised(images), _normalised(texts), logits)


def theirs(library: str, folder: Path, config: Config, inputs: Inputs) -> Outputs | str | None:
    """What the library computes with the weights in a folder; where it cannot be asked, why; None: there is none."""
    ask = _LIBRARIES.get(library)
    if ask is None:
        return None
    if not folder.is_dir():
        return "the library reads folders"
    try:
        torch = importlib.import_module("torch")
        importlib.import_module(_PACKAGES[library])
    except (ImportError, RuntimeError) as error:  # torchvision without its operators raises the latter
        return f"{_PACKAGES[library]} cannot be imported ({error})"
    mean, std = (np.asarray(x, np.float32) for x in (config.model.image_mean, config.model.image_std))
    pixels = ((inputs.images.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
    try:
        with torch.no_grad():
            images, texts, logits = ask(folder, torch.from_numpy(pixels), torch.from_numpy(inputs.tokens).long())
    except ImportError as error:  # transformers imports the rest of itself only here
        return f"{_PACKAGES[library]} cannot be imported ({error})"
    return Outputs(_normalised(images.numpy()), _normalised(texts.numpy()), logits.numpy())


def differences(one: Outputs, other: Outputs) -> dict[str, float]:
    """Largest difference of each output as a share of its largest value."""
    return {
        name: float(np.abs(a - b).max() / max(np.abs(b).max(), np.finfo(np.float32).tiny))
        for name, a, b in zip(Outputs._fields, one, other, strict=True)
    }


def _open_clip(folder: Path, pixels: Any, tokens: Any) -> tuple[Any, Any, Any]:
    model = importlib.import_module("open_clip").create_model(f"local-dir:{folder}").eval().float()
    logits, _ = model.get_logits(pixels, tokens)
    return model.encode_image(pixels), model.encode_text(tokens), logits


def _hugging_face(folder: Path, pixels: Any, tokens: Any) -> tuple[Any, Any, Any]:
    transformers = importlib.import_module("transformers")
    # Its warnings are about generating text.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModel.from_pretrained(folder).eval().float()
    output = model(input_ids=tokens, pixel_values=pixels)
    return output.image_embeds, output.text_embeds, output.logits_per_image


_LIBRARIES: dict[str, Callable[[Path, Any, Any], tuple[Any, Any, Any]]] = {
    open_clip.NAME: _open_clip,
    huggingface.NAME: _hugging_face,
}
_PACKAGES = {open_clip.NAME: "open_clip", huggingface.NAME: "transformers"}


def _normalised(x: Float[np.ndarray, "N d"]) -> Float[np.ndarray, "N d"]:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)
