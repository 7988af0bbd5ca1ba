"""OpenCLIP's weights: CLIP (also OpenAI's and MetaCLIP's files) and SigLIP with a vision tower of timm.

Source: open_clip 3.3 (model.py, transformer.py, timm_model.py, factory.py) and timm 1.0 (vision_transformer.py).
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llip_jax.config import Config, ConfigError
from llip_jax.interop import common, files
from llip_jax.interop.maps import (
    BATCHED,
    CONVOLUTION,
    FLAT,
    Rule,
    class_token,
    dense,
    linear,
    norm,
    tie,
    to_ours,
    to_theirs,
)
from llip_jax.interop.open_clip_config import mlp_ratio, model_cfg_of, sections
from llip_jax.interop.weights import Weights

NAME = "open_clip"
CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
FILES = frozenset({WEIGHTS[0], CONFIG}) | common.TOKENIZER_FILES
"""All that :func:`write` may write."""

NOT_WEIGHTS = ("attn_mask", "input_resolution", "context_length", "vocab_size")
"""Buffers in files of older releases."""

HEAD_WIDTH = 64
"""Of all CLIP towers whose files come without a configuration."""

_TEXT_TOWER = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
"""Beginnings of its names, before which ``custom_text`` puts "text."."""


def read(path: str | Path, activation: str | None = None) -> Weights:
    """Weights of a folder as OpenCLIP writes it for the Hugging Face hub, or of a single file.

    Args:
        path: the folder, or a file in .safetensors or of torch.save; ``open_clip_config.json`` is looked for beside it.
        activation: of both towers, for a file without that configuration; only there.

    Raises:
        ConfigError: files that are missing or unfit, an architecture that is not ours, weights that do not fit it.
    """
    path = Path(path)
    file = path
    if path.is_dir():
        file = next((path / name for name in WEIGHTS if (path / name).exists()), path / WEIGHTS[0])
    where = file.parent / CONFIG
    arrays = files.read_safetensors(file) if file.suffix == ".safetensors" else files.read_torch(file)
    if not any(name.startswith(_TEXT_TOWER) for name in arrays):
        arrays = {name.removeprefix("text."): x for name, x in arrays.items()}
    if not where.exists():
        source, where = {"model_cfg": _inferred(arrays, activation, file)}, file
    elif activation is None:
        source = files.read_json(where)
    else:
        raise ConfigError(f"activation: {activation!r} is for weights without a configuration, but there is {where}")

    raw, tokenizer, notes = sections(source, where)
    config = common.checked_config(raw, where)
    for name in arrays.keys() & {"logit_scale", "logit_bias"}:  # numbers, or vectors of one
        arrays[name] = arrays[name].reshape(()) if arrays[name].size == 1 else arrays[name]
    params = to_ours(rules(config), arrays, config, source=file, ignored=NOT_WEIGHTS)
    return Weights(raw, params, tokenizer, NAME, notes=notes)


def write(weights: Weights, folder: str | Path) -> None:
    """Writes what ``open_clip.create_model_and_transforms("local-dir:FOLDER")`` loads: float32, with configuration.

    Raises:
        ConfigError: a model that OpenCLIP cannot express.
    """
    folder, config = Path(folder), common.config_of(weights)
    model_cfg = model_cfg_of(config, weights)
    arrays = to_theirs(rules(config), weights.params)
    if model_cfg["custom_text"]:
        arrays = {f"text.{name}" if name.startswith(_TEXT_TOWER) else name: x for name, x in arrays.items()}
    preprocess_cfg = {
        "mean": config.model.image_mean,
        "std": config.model.image_std,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    contents = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    folder.mkdir(parents=True, exist_ok=True)
    files.write_safetensors(folder / WEIGHTS[0], arrays, {"format": "pt"})
    files.write_text(folder / CONFIG, json.dumps(contents, indent=2) + "\n")
    if weights.tokenizer is not None:
        common.copy_tokenizer(weights.tokenizer, folder)


def rules(config: Config) -> list[Rule]:
    """Names of OpenCLIP's CLIP; with ``custom_text`` those of the text tower have "text." before them."""
    model, biased = config.model, config.model.text.projection_bias
    scalars = [tie("logit_scale", "log_scale"), *([] if model.logit_bias is None else [tie("logit_bias", "bias")])]
    text = [
        tie("token_embedding.weight", "text/embedding"),
        tie("positional_embedding", "text/positions"),
        *_blocks("transformer.resblocks.{}", "text/transformer/blocks"),
        *norm("ln_final", "text/norm_final"),
    ]
    # A plain parameter, [in, out], or a torch.nn.Linear.
    text += dense("text_projection", "pooler/text") if biased else [tie("text_projection", "pooler/text")]
    return [*(_vision() if model.vision.pooling == "tokens" else _timm_vision()), *text, *scalars]


def _vision() -> list[Rule]:
    return [
        tie("visual.conv1.weight", "vision/patch_kernel", CONVOLUTION),
        class_token("visual.class_embedding", "visual.positional_embedding"),
        *norm("visual.ln_pre", "vision/norm_pre"),
        *_blocks("visual.transformer.resblocks.{}", "vision/transformer/blocks"),
        *norm("visual.ln_post", "vision/norm_post"),
        tie("visual.proj", "pooler/image"),
    ]


def _blocks(theirs: str, ours: str) -> list[Rule]:
    return [
        *norm(f"{theirs}.ln_1", f"{ours}/norm1"),
        tie(f"{theirs}.attn.in_proj_weight", f"{ours}/qkv", linear()),
        tie(f"{theirs}.attn.in_proj_bias", f"{ours}/qkv_bias", FLAT),
        *dense(f"{theirs}.attn.out_proj", f"{ours}/out", inputs=2),
        *norm(f"{theirs}.ln_2", f"{ours}/norm2"),
        *dense(f"{theirs}.mlp.c_fc", f"{ours}/up"),
        *dense(f"{theirs}.mlp.c_proj", f"{ours}/down"),
    ]


def _timm_vision() -> list[Rule]:
    theirs, ours = "visual.trunk.blocks.{}", "vision/transformer/blocks"
    pool, our_pool = "visual.trunk.attn_pool", "vision/attention_pool"
    return [
        tie("visual.trunk.patch_embed.proj.weight", "vision/patch_kernel", CONVOLUTION),
        tie("visual.trunk.patch_embed.proj.bias", "vision/patch_bias"),
        tie("visual.trunk.pos_embed", "vision/positions", BATCHED),
        *norm(f"{theirs}.norm1", f"{ours}/norm1"),
        *dense(f"{theirs}.attn.qkv", f"{ours}/qkv"),
        *dense(f"{theirs}.attn.proj", f"{ours}/out", inputs=2),
        *norm(f"{theirs}.norm2", f"{ours}/norm2"),
        *dense(f"{theirs}.mlp.fc1", f"{ours}/up"),
        *dense(f"{theirs}.mlp.fc2", f"{ours}/down"),
        *norm("visual.trunk.norm", "vision/norm_post"),
        tie(f"{pool}.latent", "vision/tokens", BATCHED),
        *dense(f"{pool}.q", f"{our_pool}/query"),
        *dense(f"{pool}.kv", f"{our_pool}/key_value"),
        *dense(f"{pool}.proj", f"{our_pool}/out", inputs=2),
        *norm(f"{pool}.norm", f"{our_pool}/norm"),
        *dense(f"{pool}.mlp.fc1", f"{our_pool}/up"),
        *dense(f"{pool}.mlp.fc2", f"{our_pool}/down"),
    ]


def _inferred(arrays: Mapping[str, np.ndarray], activation: str | None, file: Path) -> dict[str, Any]:
    """OpenCLIP's configuration of a CLIP by its shapes; names are without "text."."""
    if any(name.startswith("visual.trunk.") for name in arrays):
        raise ConfigError(
            f"{file}: the shapes of a timm tower do not tell what it computes; expected {CONFIG} beside it"
        )
    if any(name.startswith("visual.layer1.") for name in arrays):
        raise ConfigError(f"{file}: the vision tower is a ResNet; only vision transformers are supported")
    activations: dict[str | None, dict[str, Any]] = {"gelu": {}, "quick_gelu": {"quick_gelu": True}}
    if activation not in activations:
        raise ConfigError(
            f"{file}: without {CONFIG} beside it nothing tells the activation, got activation={activation!r}; expected "
            "'quick_gelu' for OpenAI's and MetaCLIP's weights, 'gelu' for OpenCLIP's"
        )
    try:
        width, _, _, patch = arrays["visual.conv1.weight"].shape
        positions, _ = arrays["visual.positional_embedding"].shape
        _, embed_dim = arrays["text_projection"].shape
        vocabulary, text_width = arrays["token_embedding.weight"].shape
        length, _ = arrays["positional_embedding"].shape
        vision_cfg = {
            "patch_size": patch,
            "image_size": patch * round((positions - 1) ** 0.5),
            "head_width": HEAD_WIDTH,
        }
        text_cfg = {"vocab_size": vocabulary, "context_length": length, "heads": text_width // HEAD_WIDTH}
        return {
            "embed_dim": embed_dim,
            "vision_cfg": vision_cfg | _tower(arrays, "visual.transformer", width),
            "text_cfg": text_cfg | _tower(arrays, "transformer", text_width),
            **activations[activation],
            **({"init_logit_bias": -10.0} if "logit_bias" in arrays else {}),
        }
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{file}: not the weights of a CLIP: {error} is missing or of another shape") from None


def _tower(arrays: Mapping[str, np.ndarray], name: str, width: int) -> dict[str, Any]:
    block = re.compile(rf"{re.escape(name)}\.resblocks\.(\d+)\.")
    layers = len({match[1] for match in map(block.match, arrays) if match})
    mlp, _ = arrays[f"{name}.resblocks.0.mlp.c_fc.weight"].shape
    return {"layers": layers, "width": width, "mlp_ratio": mlp_ratio(width, mlp)}
