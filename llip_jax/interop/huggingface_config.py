"""The configuration of a transformers model (``config.json`` and that of its pictures) as ours, and ours as that.

Source: configuration_clip.py, configuration_siglip.py and image_processing_*.py in transformers 5.23.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llip_jax.config import Config, ConfigError
from llip_jax.interop import common, files
from llip_jax.interop.weights import Weights
from llip_jax.models.sizes import TowerShape, model_shape

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
"""Where transformers 5 puts the former, under "image_processor", beside the tokenizer's settings."""

DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "clip": {
        "text_config": {
            "vocab_size": 49408,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "max_position_embeddings": 77,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "eos_token_id": 49407,
        },
        "vision_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_channels": 3,
            "image_size": 224,
            "patch_size": 32,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        },
    },
    "siglip": {
        "text_config": {
            "vocab_size": 32000,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 64,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "projection_size": None,
        },
        "vision_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_channels": 3,
            "image_size": 224,
            "patch_size": 16,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "vision_use_head": True,
        },
    },
}
"""What a configuration means where it leaves a field out, by ``model_type``."""

PROJECTION_DIM = 512
"""The same for ``projection_dim`` of CLIP."""

ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}
RESAMPLE = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers."""

LEGACY_END = 2
"""As ``eos_token_id`` it means the largest token of a text: CLIP's first configurations had this wrong number."""

FAMILIES: dict[str, dict[str, Any]] = {
    "clip": {
        "pooler": "class_token",
        "vision.patch_bias": False,
        "vision.norm_pre": True,
        "vision.pooling": "tokens",
        "vision.projection": True,
        "text.causal": True,
        "text.pooling": "end",
        "text.projection_bias": False,
        "logit_bias": None,
    },
    "siglip": {
        "pooler": "class_token",
        "vision.patch_bias": True,
        "vision.norm_pre": False,
        "vision.pooling": "attention",
        "vision.projection": False,
        "text.causal": False,
        "text.pooling": "last",
        "text.projection_bias": True,
    },
}
"""Fields below ``model`` that make a model one of transformers' two."""


def sections(contents: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], Path | None, tuple[str, ...]]:
    """Our sections, the tokenizer's file and notes, for the ``config.json`` of a folder.

    Raises:
        ConfigError: another model, or one with what our towers do not compute.
    """
    where, family = folder / CONFIG, contents.get("model_type")
    if family is None:
        raise ConfigError(
            f"{where}: no model_type, so no model of Hugging Face; is this a run directory without checkpoints?"
        )
    if family == "siglip2":
        raise ConfigError(
            f"{where}: model_type='siglip2' is NaFlex, whose pictures keep their aspect; expected SigLIP 2 of a fixed "
            "resolution (model_type 'siglip')"
        )
    family = common.one_of({name: name for name in DEFAULTS}, family, f"{where}: model_type")
    text_config, vision_config = (_tower_config(contents, name, family, where) for name in ("text", "vision"))
    epsilon, text_epsilon = vision_config["layer_norm_eps"], text_config["layer_norm_eps"]
    if text_epsilon != epsilon:
        raise ConfigError(
            f"{where}: layer_norm_eps is {epsilon} in vision_config and {text_epsilon} in text_config; "
            "expected one for both"
        )
    patch = common.square(vision_config["patch_size"], f"{where}: vision_config.patch_size")
    field = f"{where}: vision_config.image_size"
    image_size = common.square(vision_config["image_size"], field)
    seen, notes = common.whole_patches(image_size, patch, field)
    if family == "clip":
        embed_dim = contents.get("projection_dim", PROJECTION_DIM)
    else:
        embed_dim = text_config["projection_size"] or text_config["hidden_size"]
    mean_std, picture_notes = _pictures(folder, family, image_size)
    fixed = {name: value for name, value in FAMILIES[family].items() if "." not in name}
    model = {
        "size": "B/16",
        "mixture_tokens": 1,
        "embed_dim": embed_dim,
        "image_size": seen,
        "vision": _tower(vision_config, "vision", family, where) | {"patch": patch},
        "text": _tower(text_config, "text", family, where) | {"length": text_config["max_position_embeddings"]},
        "layer_norm_epsilon": epsilon,
        "logit_bias": -10.0,
        **fixed,
        **mean_std,
    }
    vocabulary = text_config["vocab_size"]
    clean = None if family == "clip" else "lower" if vocabulary >= common.GEMMA_VOCABULARY_SIZE else "canonicalize"
    tokenizer, file = common.text_sections(folder, vocabulary, clean)
    raw = {"model": model, "data": {"tokenizer": tokenizer}, "objective": {}}
    if family == "clip":
        raw["objective"] = {"sigmoid": None, "softmax": {}}
        _check_end(text_config["eos_token_id"], Weights(raw, {}, file), where)
    return raw, file, notes + picture_notes


def _tower_config(contents: Mapping[str, Any], name: str, family: str, where: Path) -> dict[str, Any]:
    """``text_config`` or ``vision_config`` with its defaults."""
    # CLIP's older configurations have it twice, and this one counts, its defaults too.
    given = contents.get(f"{name}_config_dict") if family == "clip" else None
    given = (contents.get(f"{name}_config") or {}) if given is None else given
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: {name}_config: {given!r} is not valid: expected an object")
    defaults = DEFAULTS[family][f"{name}_config"]
    config = defaults | given
    for field, default in defaults.items():
        if not common.like(config[field], default) and field not in ("image_size", "patch_size"):
            raise ConfigError(
                f"{where}: {name}_config.{field}={config[field]!r} is not valid; the default is {default!r}"
            )
    for field, only in {"num_channels": 3, "vision_use_head": True}.items():
        if config.get(field, only) != only:
            raise ConfigError(f"{where}: {name}_config.{field}={config[field]!r} is not supported; expected {only!r}")
    return config


def _tower(config: Mapping[str, Any], name: str, family: str, where: Path) -> dict[str, Any]:
    """Our section of a tower."""
    fixed = {field.partition(".")[2]: x for field, x in FAMILIES[family].items() if field.startswith(f"{name}.")}
    return fixed | {
        "layers": config["num_hidden_layers"],
        "width": config["hidden_size"],
        "mlp": config["intermediate_size"],
        "heads": config["num_attention_heads"],
        "activation": common.one_of(ACTIVATIONS, config["hidden_act"], f"{where}: {name}_config.hidden_act"),
    }


def _check_end(token: Any, weights: Weights, where: Path) -> None:
    """Refuses a text tower that is read elsewhere than at the end of the text."""
    end = common.end_token(weights, common.checked_config(weights.config, where))
    if token not in (LEGACY_END, end):
        raise ConfigError(
            f"{where}: text_config.eos_token_id={token!r} is not supported: texts end with {end}, or with the largest "
            f"token where it is {LEGACY_END}"
        )


def _pictures(folder: Path, family: str, side: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Mean and standard deviation of pixels, and notes where pictures are prepared otherwise than by us."""
    where, ours = folder / PREPROCESSOR, _preparation(side)
    given = files.read_json(where) if where.exists() else {}
    if (folder / PROCESSOR).exists() and (nested := files.read_json(folder / PROCESSOR).get("image_processor")):
        where, given = folder / PROCESSOR, nested
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: image_processor: {given!r} is not valid: expected an object")
    settings = ours if family == "clip" else ours | {"size": ours["crop_size"], "do_center_crop": False}
    settings = settings | {name: x for name, x in given.items() if x is not None}
    settings |= {name: _sides(name, settings[name]) for name in ("size", "crop_size")}
    for name, default in ours.items():
        if not isinstance(settings[name], int | float if isinstance(default, float) else type(default)):
            raise ConfigError(f"{where}: {name}: {settings[name]!r} is not valid: expected a value like {default!r}")

    mode = "squash" if "height" in settings["size"] else "shortest"
    notes = common.resize_note(mode, RESAMPLE.get(settings["resample"], "another filter"))
    if mode == "squash":  # which is noted; nothing is left to crop then
        ours |= {"size": ours["crop_size"], "do_center_crop": settings["do_center_crop"]}
    if not settings["do_center_crop"]:
        settings["crop_size"] = ours["crop_size"]
    told = ("resample", "do_normalize")  # by the note above, by mean and standard deviation
    others = {name: x for name, x in ours.items() if name not in told and settings[name] != x}
    if others:
        differences = (f"{name}={settings[name]!r} (here {x!r})" for name, x in others.items())
        notes += (f"the source prepares pictures with {', '.join(differences)}",)
    if not settings["do_normalize"]:
        return {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}, notes
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if family == "siglip" else {}
    return half | {name: settings[name] for name in ("image_mean", "image_std") if name in settings}, notes


def _sides(name: str, value: Any) -> Any:
    """A size as transformers names its sides, where it is one or two numbers."""
    if isinstance(value, int):
        return {"shortest_edge": value} if name == "size" else {"height": value, "width": value}
    return {"height": value[0], "width": value[1]} if isinstance(value, list) and len(value) == 2 else value


def _preparation(side: int) -> dict[str, Any]:
    """What our evaluation does with pictures, in fields of transformers: all but mean and standard deviation."""
    return {
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
    }


def config_json(config: Config, weights: Weights) -> dict[str, Any]:
    """``config.json`` for weights.

    Raises:
        ConfigError: a model that transformers has no class for.
    """
    model, shape = config.model, model_shape(config.model)
    family = "clip" if model.vision.pooling == "tokens" else "siglip"
    common.require(config, f"transformers' {family} model", FAMILIES[family] | {"vision.token_weight": 1.0})
    if family == "siglip" and model.logit_bias is None:
        raise ConfigError("transformers' siglip model has no place for model.logit_bias=None; expected a number")
    vision_config = _tower_json(config, "vision", shape.vision) | {
        "model_type": f"{family}_vision_model",
        "image_size": model.image_size,
        "patch_size": shape.patch,
    }
    text_config = _tower_json(config, "text", shape.text) | {
        "model_type": f"{family}_text_model",
        "vocab_size": config.data.tokenizer.vocabulary_size,
        "max_position_embeddings": model.text.length,
    }
    if family == "clip":
        end = common.end_token(weights, config)
        if end == LEGACY_END:
            raise ConfigError(
                f"transformers has no place for {weights.tokenizer}, whose end-of-text token is {end}: CLIPModel takes "
                "that number to mean the largest token"
            )
        text_config |= {"eos_token_id": end, "bos_token_id": None, "pad_token_id": None}
    else:
        text_config |= {"projection_size": shape.embed_dim, "bos_token_id": None, "eos_token_id": None}
        text_config |= {"pad_token_id": config.data.tokenizer.pad}
    return {
        "architectures": ["CLIPModel" if family == "clip" else "SiglipModel"],
        "model_type": family,
        "torch_dtype": "float32",
        **({"projection_dim": shape.embed_dim} if family == "clip" else {}),
        "text_config": text_config,
        "vision_config": vision_config,
    }


def _tower_json(config: Config, name: str, shape: TowerShape) -> dict[str, Any]:
    activation = getattr(config.model, name).activation or config.model.activation
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    if activation not in names:
        raise ConfigError(
            f"transformers has no place for model.{name}.activation={activation!r}; expected {', '.join(names)}"
        )
    return {
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "hidden_act": names[activation],
        "layer_norm_eps": config.model.layer_norm_epsilon,
    }


def preprocessor_json(config: Config) -> dict[str, Any]:
    """``preprocessor_config.json``: what our evaluation does with pictures."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        **_preparation(config.model.image_size),
        "image_mean": config.model.image_mean,
        "image_std": config.model.image_std,
    }
