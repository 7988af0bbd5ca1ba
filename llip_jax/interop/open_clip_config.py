"""OpenCLIP's configuration (``open_clip_config.json``) as ours, and ours as OpenCLIP's.

Source: CLIPVisionCfg and CLIPTextCfg in open_clip 3.3 (model.py); timm 1.0 (vision_transformer.py).
"""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from llip_jax.config import Config, ConfigError, nearest
from llip_jax.data.tokenizers import load_tokenizer
from llip_jax.interop import common
from llip_jax.interop.weights import Weights
from llip_jax.models.sizes import TowerShape, model_shape

_VARIANTS = {
    "ls_init_value": None,
    "final_ln_after_pool": False,
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}
_BLOCK = _VARIANTS | {"output_tokens": False, "act_kwargs": None, "norm_kwargs": None}
DEFAULTS: dict[str, dict[str, Any]] = {
    "model_cfg": {
        "embed_dim": None,
        "vision_cfg": None,
        "text_cfg": None,
        "custom_text": False,
        "quick_gelu": False,
        "init_logit_scale": None,
        "init_logit_bias": None,
        "nonscalar_logit_scale": False,
    },
    "vision_cfg": _BLOCK
    | {
        "layers": 12,
        "width": 768,
        "head_width": 64,
        "mlp_ratio": 4.0,
        "patch_size": 16,
        "image_size": 224,
        "patch_dropout": 0.0,
        "attentional_pool": False,
        "attn_pooler_queries": 256,
        "attn_pooler_heads": 8,
        "no_ln_pre": False,
        "pos_embed_type": "learnable",
        "pool_type": "tok",
        "timm_model_name": None,
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "timm_proj_bias": False,
        "timm_drop": 0.0,
        "timm_drop_path": None,
    },
    "text_cfg": _BLOCK
    | {
        "context_length": 77,
        "vocab_size": 49408,
        "hf_tokenizer_name": None,
        "tokenizer_mode": None,
        "tokenizer_kwargs": None,
        "width": 512,
        "heads": 8,
        "layers": 12,
        "mlp_ratio": 4.0,
        "embed_cls": False,
        "pad_id": 0,
        "eos_id": 2,
        "no_causal_mask": False,
        "pool_type": "argmax",
        "proj_bias": False,
        "proj_type": "linear",
        "hf_model_name": None,
        "hf_model_pretrained": True,
        "hf_proj_type": "mlp",
        "hf_pooler_type": "mean_pooler",
    },
}
"""All fields, and what they are where a configuration leaves them out."""

ONLY_DEFAULT = {
    "model_cfg": set[str](),
    "vision_cfg": {*_VARIANTS, "attentional_pool", "no_ln_pre", "pos_embed_type", "pool_type"},
    "text_cfg": {*_VARIANTS, "embed_cls", "tokenizer_mode", "proj_type", "hf_model_name"},
}
"""Fields with which a tower computes something that ours do not, unless they have their default."""

POOLING = {"argmax": "end", "last": "last"}
CLEANING = {"canonicalize": "canonicalize", "lower": "lower", "whitespace": "none"}
EPSILON = 1e-5


class TimmTower(NamedTuple):
    """What timm computes under a name."""

    shape: TowerShape
    patch: int
    image_size: int
    activation: str


_SIZES = {
    "base": TowerShape(12, 768, 3072, 12),
    "large": TowerShape(24, 1024, 4096, 16),
    "so400m": TowerShape(27, 1152, 4304, 16),
    "giantopt": TowerShape(40, 1536, 6144, 16),
}
TIMM_TOWERS = {
    f"vit_{size}_patch{patch}_siglip_{image}": TimmTower(_SIZES[size], patch, image, activation)
    for size, patch, images, activation in [
        ("base", 32, (256,), "gelu_tanh"),
        ("base", 16, (224, 256, 384, 512), "gelu"),
        ("large", 16, (256, 384), "gelu"),
        ("large", 16, (512,), "gelu_tanh"),
        ("so400m", 14, (224, 378, 384), "gelu"),
        ("so400m", 16, (256, 384, 512), "gelu_tanh"),
        ("giantopt", 16, (256, 384), "gelu_tanh"),
    ]
    for image in images
}
TIMM_EPSILON = 1e-6
TIMM_HEAD = {"timm_pool": "map", "timm_proj": "none"}


def sections(source: Mapping[str, Any], where: Path) -> tuple[dict[str, Any], Path | None, tuple[str, ...]]:
    """Our sections, the tokenizer's file and notes for an ``open_clip_config.json``; ``where`` it is.

    Raises:
        ConfigError: a field that is unknown, or set to what our towers do not compute.
    """
    model_cfg = _filled(source.get("model_cfg", source), "model_cfg", where)
    vision_cfg, text_cfg = (_filled(model_cfg[name], name, where) for name in ("vision_cfg", "text_cfg"))
    quick, bias = model_cfg["quick_gelu"], model_cfg["init_logit_bias"]
    if model_cfg["embed_dim"] is None:
        raise ConfigError(f"{where}: model_cfg.embed_dim is missing")
    if vision_cfg["timm_model_name"]:
        vision, image_size, epsilon = _timm_tower(vision_cfg, where)
    else:
        vision, image_size, epsilon = _vision_tower(vision_cfg, quick, where)
    if (text_epsilon := _epsilon(text_cfg, "text_cfg", where)) != epsilon:
        raise ConfigError(
            f"{where}: norm_kwargs: eps is {epsilon} in the vision tower and {text_epsilon} in the text tower; "
            "expected one for both"
        )
    text = {
        "layers": text_cfg["layers"],
        "width": text_cfg["width"],
        "mlp": int(text_cfg["width"] * text_cfg["mlp_ratio"]),
        "heads": text_cfg["heads"],
        "length": text_cfg["context_length"],
        "activation": _activation(text_cfg, quick, "text_cfg", where),
        "causal": not text_cfg["no_causal_mask"],
        "pooling": common.one_of(POOLING, text_cfg["pool_type"], f"{where}: text_cfg.pool_type"),
        "projection_bias": text_cfg["proj_bias"],
    }
    seen, notes = common.whole_patches(image_size, vision["patch"], f"{where}: vision_cfg.image_size")
    preprocess = source.get("preprocess_cfg", {})
    if not isinstance(preprocess, dict):
        raise ConfigError(f"{where}: preprocess_cfg: {reprlib.repr(preprocess)} is not valid: expected an object")
    model = {
        "size": "B/16",
        "pooler": "class_token",
        "mixture_tokens": 1,
        "embed_dim": model_cfg["embed_dim"],
        "image_size": seen,
        "vision": vision,
        "text": text,
        "layer_norm_epsilon": epsilon,
        "patch_dropout": vision_cfg["patch_dropout"],
        "logit_bias": bias,
        **{f"image_{name}": preprocess[name] for name in ("mean", "std") if preprocess.get(name) is not None},
    }
    notes += common.resize_note(preprocess.get("resize_mode", "shortest"), preprocess.get("interpolation", "bicubic"))
    tokenizer, file = common.text_sections(where.parent, text_cfg["vocab_size"], _cleaning(text_cfg, where))
    objective: dict[str, Any] = {"sigmoid": None, "softmax": {}} if bias is None else {}
    return {"model": model, "data": {"tokenizer": tokenizer}, "objective": objective}, file, notes


def model_cfg_of(config: Config, weights: Weights) -> dict[str, Any]:
    """Section ``model_cfg`` for weights of a configuration.

    Raises:
        ConfigError: a model that OpenCLIP cannot express.
    """
    model, shape = config.model, model_shape(config.model)
    timm = model.vision.pooling == "attention"
    common.require(
        config,
        "open_clip",
        {
            "pooler": "class_token",
            "vision.token_weight": 1.0,
            "vision.patch_bias": timm,
            "vision.norm_pre": not timm,
            "vision.projection": not timm,
        }
        | ({"layer_norm_epsilon": TIMM_EPSILON} if timm else {}),
    )
    activations = {tower: getattr(model, tower).activation or model.activation for tower in ("vision", "text")}
    quick = activations["text"] == "quick_gelu"
    if "relu" in activations.values() or (not timm and quick != (activations["vision"] == "quick_gelu")):
        raise ConfigError(
            f"open_clip has no place for model.vision.activation={activations['vision']!r} with "
            f"model.text.activation={activations['text']!r}; expected 'quick_gelu' in both towers, or 'gelu' or "
            "'gelu_tanh' in each"
        )
    if model.text.pooling == "end" and weights.tokenizer is not None:
        end, largest = common.end_token(weights, config), load_tokenizer(weights.tokenizer).vocabulary_size - 1
        if end != largest:
            raise ConfigError(
                f"open_clip has no place for model.text.pooling='end' with {weights.tokenizer}: it reads a text at its "
                f"largest token, which is {largest}, but the end of a text is {end}"
            )
    vision_cfg: dict[str, Any] = {"patch_dropout": model.patch_dropout}
    if timm:
        tower = _timm_name(config, activations["vision"])
        vision_cfg |= {"timm_model_name": tower, "image_size": TIMM_TOWERS[tower].image_size} | TIMM_HEAD
    else:
        vision_cfg |= {
            "image_size": model.image_size,
            "patch_size": shape.patch,
            "layers": shape.vision.layers,
            "width": shape.vision.width,
            "head_width": shape.vision.width // shape.vision.heads,
            "mlp_ratio": mlp_ratio(shape.vision.width, shape.vision.mlp),
            **_layer_kwargs(activations["vision"], model.layer_norm_epsilon),
        }
    text_cfg = {
        "context_length": model.text.length,
        "vocab_size": config.data.tokenizer.vocabulary_size,
        "layers": shape.text.layers,
        "width": shape.text.width,
        "heads": shape.text.heads,
        "mlp_ratio": mlp_ratio(shape.text.width, shape.text.mlp),
        "no_causal_mask": not model.text.causal,
        "pool_type": next(theirs for theirs, ours in POOLING.items() if ours == model.text.pooling),
        "proj_bias": model.text.projection_bias,
        **_layer_kwargs(activations["text"], model.layer_norm_epsilon),
    }
    if weights.tokenizer is not None:
        clean = next(theirs for theirs, ours in CLEANING.items() if ours == config.data.tokenizer.clean)
        # Any name will do for a local folder, whose own tokenizer OpenCLIP then takes.
        text_cfg |= {"hf_tokenizer_name": weights.tokenizer.name, "tokenizer_kwargs": {"clean": clean}}
    return {
        "embed_dim": shape.embed_dim,
        "quick_gelu": quick,
        "custom_text": timm,
        "init_logit_bias": -10.0 if model.logit_bias == "prior" else model.logit_bias,
        "vision_cfg": vision_cfg,
        "text_cfg": text_cfg,
    }


def mlp_ratio(width: int, mlp: int) -> float:
    """The ratio with which OpenCLIP, that truncates width * ratio, comes to ``mlp``."""
    ratio = mlp / width
    return ratio if int(width * ratio) == mlp else math.nextafter(ratio, math.inf)


def _filled(cfg: Any, section: str, where: Path) -> dict[str, Any]:
    """A section with its defaults; all fields are known, supported and of the right type."""
    defaults = DEFAULTS[section]
    if not isinstance(cfg, dict):
        raise ConfigError(f"{where}: {section}: {reprlib.repr(cfg)} is not valid: expected an object")
    for name, value in cfg.items():
        field = f"{where}: {section}.{name}={reprlib.repr(value)}"
        if name not in defaults:
            raise ConfigError(f"{field} is not supported: no such field.{nearest(name, list(defaults))}")
        if name in ONLY_DEFAULT[section] and value != defaults[name]:
            raise ConfigError(f"{field} is not supported; expected {defaults[name]!r}")
        if name.endswith("_kwargs"):
            valid = isinstance(value, dict | None)
        else:
            valid = common.like(value, defaults[name]) or name in ("image_size", "patch_size")
        if not valid:
            raise ConfigError(f"{field} is not valid; expected a value like {defaults[name]!r}")
    return defaults | cfg


def _vision_tower(cfg: Mapping[str, Any], quick: bool, where: Path) -> tuple[dict[str, Any], int, float]:
    """Our section of the tower, the size of its pictures, epsilon of its norms."""
    tower = {
        "layers": cfg["layers"],
        "width": cfg["width"],
        "mlp": int(cfg["width"] * cfg["mlp_ratio"]),
        "heads": cfg["width"] // cfg["head_width"],
        "patch": common.square(cfg["patch_size"], f"{where}: vision_cfg.patch_size"),
        "activation": _activation(cfg, quick, "vision_cfg", where),
    }
    image_size = common.square(cfg["image_size"], f"{where}: vision_cfg.image_size")
    return tower, image_size, _epsilon(cfg, "vision_cfg", where)


def _timm_tower(cfg: Mapping[str, Any], where: Path) -> tuple[dict[str, Any], int, float]:
    """As :func:`_vision_tower`. timm has the sizes, activation and epsilon by the name (and not by ``quick_gelu``)."""
    name = cfg["timm_model_name"]
    common.one_of(TIMM_TOWERS, name, f"{where}: vision_cfg.timm_model_name")
    for field, value in TIMM_HEAD.items():
        common.one_of({value: None}, cfg[field], f"{where}: vision_cfg.{field}")
    shape, patch, image_size, activation = TIMM_TOWERS[name]
    if common.square(cfg["image_size"], f"{where}: vision_cfg.image_size") != image_size:
        raise ConfigError(f"{where}: vision_cfg.image_size={cfg['image_size']}, but {name} takes {image_size}")
    tower = asdict(shape) | {"patch": patch, "activation": activation, "patch_bias": True, "norm_pre": False}
    return tower | {"pooling": "attention", "projection": False}, image_size, TIMM_EPSILON


def _timm_name(config: Config, activation: str) -> str:
    shape = model_shape(config.model)
    wanted = TimmTower(shape.vision, shape.patch, config.model.image_size, activation)
    name = next((name for name, tower in TIMM_TOWERS.items() if tower == wanted), None)
    if name is None:
        alike = [
            name for name, tower in TIMM_TOWERS.items() if tower.shape == wanted.shape and tower.patch == wanted.patch
        ]
        known = ", ".join(f"{name} ({TIMM_TOWERS[name].activation})" for name in alike) or ", ".join(TIMM_TOWERS)
        raise ConfigError(f"open_clip has no place for {wanted}: it builds SigLIP's towers by timm's name: {known}")
    return name


def _layer_kwargs(activation: str, epsilon: float) -> dict[str, Any]:
    act = {"act_kwargs": {"approximate": "tanh"}} if activation == "gelu_tanh" else {}
    return act | ({"norm_kwargs": {"eps": epsilon}} if epsilon != EPSILON else {})


def _activation(cfg: Mapping[str, Any], quick: bool, section: str, where: Path) -> str:
    kwargs = cfg["act_kwargs"] or {}
    if kwargs and (quick or kwargs.keys() != {"approximate"}):
        raise ConfigError(f"{where}: {section}.act_kwargs={kwargs} with quick_gelu={quick} is not supported")
    activations = {"none": "quick_gelu" if quick else "gelu", "tanh": "gelu_tanh"}
    return common.one_of(activations, kwargs.get("approximate", "none"), f"{where}: {section}.act_kwargs.approximate")


def _epsilon(cfg: Mapping[str, Any], section: str, where: Path) -> float:
    kwargs = cfg["norm_kwargs"] or {"eps": EPSILON}
    if kwargs.keys() != {"eps"}:
        raise ConfigError(f"{where}: {section}.norm_kwargs={kwargs} is not supported; expected eps alone")
    return kwargs["eps"]


def _cleaning(cfg: Mapping[str, Any], where: Path) -> str | None:
    """What happens to texts before a tokenizer of a file; None: CLIP's own tokenizer."""
    if not cfg["hf_tokenizer_name"]:
        return None
    kwargs = cfg["tokenizer_kwargs"] or {}
    if kwargs.keys() - {"clean"}:
        raise ConfigError(f"{where}: text_cfg.tokenizer_kwargs={kwargs} is not supported; expected clean alone")
    return common.one_of(CLEANING, kwargs.get("clean", "whitespace"), f"{where}: text_cfg.tokenizer_kwargs.clean")
