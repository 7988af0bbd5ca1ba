"""Folders of Hugging Face transformers: CLIPModel, and SiglipModel (SigLIP 2 of fixed resolution too).

Source: transformers 5.23 (models/clip and models/siglip: configuration, modeling, image_processing).
"""

import json
from pathlib import Path

import numpy as np

from llip_jax.config import Config, ConfigError
from llip_jax.interop import common, files
from llip_jax.interop.huggingface_config import CONFIG, PREPROCESSOR, config_json, preprocessor_json, sections
from llip_jax.interop.maps import (
    BATCHED,
    CONVOLUTION,
    FLAT,
    Rule,
    class_token,
    concatenate,
    dense,
    linear,
    norm,
    stack,
    tie,
    to_ours,
    to_theirs,
)
from llip_jax.interop.weights import Weights

NAME = "huggingface"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TORCH_WEIGHTS = "pytorch_model.bin"
FILES = frozenset({WEIGHTS, CONFIG, PREPROCESSOR}) | common.TOKENIZER_FILES
"""All that :func:`write` may write."""

NOT_WEIGHTS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
"""Buffers in files of older releases."""


def read(path: str | Path) -> Weights:
    """Weights of a folder that ``save_pretrained`` wrote.

    Raises:
        ConfigError: files that are missing or unfit, an architecture that is not ours, weights that do not fit it.
    """
    folder = Path(path)
    raw, tokenizer, notes = sections(files.read_json(folder / CONFIG), folder)
    config, (file, arrays) = common.checked_config(raw, folder / CONFIG), _arrays(folder)
    params = to_ours(rules(config), arrays, config, source=file, ignored=NOT_WEIGHTS)
    return Weights(raw, params, tokenizer, NAME, notes=notes)


def write(weights: Weights, folder: str | Path) -> None:
    """Writes what ``CLIPModel`` or ``SiglipModel.from_pretrained`` loads: float32, with the settings of its pictures.

    A tokenizer's files are copied where the weights have one; CLIP's own are those of openai/clip-vit-base-patch32.

    Raises:
        ConfigError: a model that transformers has no class for.
    """
    folder, config = Path(folder), common.config_of(weights)
    contents = config_json(config, weights)
    arrays = to_theirs(rules(config), weights.params)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_safetensors(folder / WEIGHTS, arrays, {"format": "pt"})
    files.write_text(folder / CONFIG, json.dumps(contents, indent=2) + "\n")
    files.write_text(folder / PREPROCESSOR, json.dumps(preprocessor_json(config), indent=2) + "\n")
    if weights.tokenizer is not None:
        common.copy_tokenizer(weights.tokenizer, folder)


def rules(config: Config) -> list[Rule]:
    """Names of CLIPModel or SiglipModel."""
    family = _clip_rules if config.model.vision.pooling == "tokens" else _siglip_rules
    return [
        *family(),
        tie("vision_model.embeddings.patch_embedding.weight", "vision/patch_kernel", CONVOLUTION),
        *_blocks("vision_model.encoder.layers.{}", "vision/transformer/blocks"),
        *norm("vision_model.post_layernorm", "vision/norm_post"),
        tie("text_model.embeddings.token_embedding.weight", "text/embedding"),
        tie("text_model.embeddings.position_embedding.weight", "text/positions"),
        *_blocks("text_model.encoder.layers.{}", "text/transformer/blocks"),
        *norm("text_model.final_layer_norm", "text/norm_final"),
    ]


def _clip_rules() -> list[Rule]:
    embeddings = "vision_model.embeddings"
    return [
        class_token(f"{embeddings}.class_embedding", f"{embeddings}.position_embedding.weight"),
        *norm("vision_model.pre_layrnorm", "vision/norm_pre"),  # sic
        tie("visual_projection.weight", "pooler/image", linear()),
        tie("text_projection.weight", "pooler/text", linear()),
        tie("logit_scale", "log_scale"),
    ]


def _siglip_rules() -> list[Rule]:
    theirs, ours = "vision_model.head", "vision/attention_pool"
    fused = [f"{ours}/query", f"{ours}/key_value"]
    return [
        tie("vision_model.embeddings.patch_embedding.bias", "vision/patch_bias"),
        tie("vision_model.embeddings.position_embedding.weight", "vision/positions"),
        tie(f"{theirs}.probe", "vision/tokens", BATCHED),
        concatenate(f"{theirs}.attention.in_proj_weight", fused, linear()),
        concatenate(f"{theirs}.attention.in_proj_bias", [f"{name}_bias" for name in fused], FLAT),
        *dense(f"{theirs}.attention.out_proj", f"{ours}/out", inputs=2),
        *norm(f"{theirs}.layernorm", f"{ours}/norm"),
        *dense(f"{theirs}.mlp.fc1", f"{ours}/up"),
        *dense(f"{theirs}.mlp.fc2", f"{ours}/down"),
        *dense("text_model.head", "pooler/text"),
        tie("logit_scale", "log_scale", FLAT),
        tie("logit_bias", "bias", FLAT),
    ]


def _blocks(theirs: str, ours: str) -> list[Rule]:
    parts = [f"{theirs}.self_attn.{part}_proj" for part in ("q", "k", "v")]
    return [
        *norm(f"{theirs}.layer_norm1", f"{ours}/norm1"),
        stack([f"{part}.weight" for part in parts], f"{ours}/qkv", axis=1, view=linear()),
        stack([f"{part}.bias" for part in parts], f"{ours}/qkv_bias", axis=0, view=FLAT),
        *dense(f"{theirs}.self_attn.out_proj", f"{ours}/out", inputs=2),
        *norm(f"{theirs}.layer_norm2", f"{ours}/norm2"),
        *dense(f"{theirs}.mlp.fc1", f"{ours}/up"),
        *dense(f"{theirs}.mlp.fc2", f"{ours}/down"),
    ]


def _arrays(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """The file of weights, or the index of several, and what is in it."""
    if (folder / WEIGHTS).exists():
        return folder / WEIGHTS, files.read_safetensors(folder / WEIGHTS)
    if (folder / INDEX).exists():
        return folder / INDEX, files.read_sharded_safetensors(folder / INDEX)
    if (folder / TORCH_WEIGHTS).exists():
        return folder / TORCH_WEIGHTS, files.read_torch(folder / TORCH_WEIGHTS)
    raise ConfigError(f"{folder}: no weights; expected {WEIGHTS}, {INDEX} or {TORCH_WEIGHTS}")
