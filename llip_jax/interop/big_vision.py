"""SigLIP and SigLIP 2 as big_vision keeps them: an .npz of ``proj.image_text.two_towers``, a ``vit`` and a text tower.

Its arrays lie as ours do, but layers, and queries, keys and values, are arrays of their own. The model is read off
their shapes; what these leave open is as in the released ones: text read at the last token, pixels from -1 to 1.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llip_jax.config import Config, ConfigError, resolve
from llip_jax.interop import common
from llip_jax.interop.files import read_npz, write_npz
from llip_jax.interop.maps import BATCHED, FLAT, SAME, Array, Rule, View, stack, tie, to_ours, to_theirs
from llip_jax.interop.weights import Weights
from llip_jax.models.sizes import model_shape

NAME = "big_vision"

_COLLECTIONS = ("params/", "opt/target/")
"""Where checkpoints keep parameters beside the state of an optimizer; files with neither are parameters alone. The
first that a file has counts, as in big_vision's ``utils.load_params``."""

_NO_PLACE = {
    "img/head/": "a projection of the image embedding with a bias (out_dim[0]; SigLIP has None)",
    "img/cls": "a class token in the image tower (pool_type 'tok'; SigLIP has 'map')",
    "img/pre_logits/": "a hidden layer before the image head (rep_size)",
    "txt/MAPHead_0/": "attention pooling of texts (pool_type 'map'; SigLIP has 'last')",
}

_HALF = (0.5, 0.5, 0.5)

_REQUIRED = {
    "pooler": "class_token",
    "image_mean": _HALF,
    "image_std": _HALF,
    "layer_norm_epsilon": 1e-6,
    "vision.patch_bias": True,
    "vision.norm_pre": False,
    "vision.pooling": "attention",
    "vision.projection": False,
    "text.causal": False,
    "text.pooling": "last",
    "text.projection_bias": True,
}
"""What a model has to be, below ``model``, for its modules."""


def read(path: Path) -> Weights:
    """Reads a checkpoint, its blocks scanned or not.

    Raises:
        ConfigError: no such file, another model (a class token, NaFlex, BERT), or arrays missing or left over.
    """
    arrays = _layers_apart(_parameters(read_npz(path)))
    for prefix, what in _NO_PLACE.items():
        if found := [name for name in arrays if name.startswith(prefix)]:
            raise ConfigError(f"{path}: {found[0]}: {what} has no place in our model")
    arrays |= {name: arrays[name].reshape(-1) for name in ("t", "b") if name in arrays}  # some keep them as scalars
    raw = _raw_config(arrays, path)
    tokenizer = _tokenizer(path.parent, raw["data"]["tokenizer"]["vocabulary_size"])
    raw["data"]["tokenizer"]["name"] = "" if tokenizer is None else str(tokenizer)
    config = common.checked_config(raw, path)
    params = to_ours(rules(config), arrays, config, source=path)
    return Weights(raw, params, tokenizer, NAME, notes=common.resize_note("squash", "bilinear"))


def write(weights: Weights, path: Path) -> None:
    """Writes what big_vision's ``two_towers.load`` takes: ``params/...``, blocks one by one, as in SigLIP's release.

    Its text tower loads them with ``scan=False`` only, its image tower with either.

    Raises:
        ConfigError: a model that its modules cannot compute (all differences are listed), or another suffix.
    """
    if path.suffix != ".npz":
        raise ConfigError(f"{path}: expected a name that ends in .npz, by which big_vision knows its format")
    config = resolve(weights.config)
    common.require(config, "big_vision's two_towers", _REQUIRED | _activations(config))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_npz(path, {f"params/{name}": x for name, x in to_theirs(rules(config), weights.params).items()})


def rules(config: Config) -> list[Rule]:
    """How a SigLIP's arrays are ours."""
    patch = model_shape(config.model).patch
    pool, attention = "img/MAPHead_0", "img/MAPHead_0/MultiHeadDotProductAttention_0"
    return [
        tie("img/embedding/kernel", "vision/patch_kernel", View(lambda x: x.reshape(patch, patch, 3, -1), SAME.read)),
        tie("img/embedding/bias", "vision/patch_bias"),
        tie("img/pos_embedding", "vision/positions", BATCHED),
        *_encoder("img/Transformer", "vision"),
        *_norm("img/Transformer/encoder_norm", "vision/norm_post"),
        tie(f"{pool}/probe", "vision/tokens", BATCHED),
        tie(f"{attention}/query/kernel", "vision/attention_pool/query"),
        tie(f"{attention}/query/bias", "vision/attention_pool/query_bias"),
        *_heads(attention, ("key", "value"), "vision/attention_pool/key_value"),
        *_linear(f"{attention}/out", "vision/attention_pool/out"),
        *_norm(f"{pool}/LayerNorm_0", "vision/attention_pool/norm"),
        *_mlp(pool, "vision/attention_pool"),
        tie("txt/Embed_0/embedding", "text/embedding"),
        tie("txt/pos_embedding", "text/positions", BATCHED),
        *_encoder("txt/Encoder_0", "text"),
        *_norm("txt/Encoder_0/encoder_norm", "text/norm_final"),
        *_linear("txt/head", "pooler/text"),
        tie("t", "log_scale", FLAT),
        *([] if config.model.logit_bias is None else [tie("b", "bias", FLAT)]),
    ]


def _encoder(theirs: str, ours: str) -> list[Rule]:
    block, blocks = f"{theirs}/encoderblock_{{}}", f"{ours}/transformer/blocks"
    attention = f"{block}/MultiHeadDotProductAttention_0"
    return [
        *_norm(f"{block}/LayerNorm_0", f"{blocks}/norm1"),
        *_heads(attention, ("query", "key", "value"), f"{blocks}/qkv"),
        *_linear(f"{attention}/out", f"{blocks}/out"),
        *_norm(f"{block}/LayerNorm_1", f"{blocks}/norm2"),
        *_mlp(block, blocks),
    ]


def _heads(attention: str, names: tuple[str, ...], ours: str) -> list[Rule]:
    return [
        stack([f"{attention}/{name}/kernel" for name in names], ours, axis=1),
        stack([f"{attention}/{name}/bias" for name in names], f"{ours}_bias", axis=0),
    ]


def _mlp(theirs: str, ours: str) -> list[Rule]:
    up, down = (f"{theirs}/MlpBlock_0/Dense_{i}" for i in range(2))
    return [*_linear(up, f"{ours}/up"), *_linear(down, f"{ours}/down")]


def _linear(theirs: str, ours: str) -> list[Rule]:
    return [tie(f"{theirs}/kernel", ours), tie(f"{theirs}/bias", f"{ours}_bias")]


def _norm(theirs: str, ours: str) -> list[Rule]:
    return [tie(f"{theirs}/{name}", f"{ours}/{name}") for name in ("scale", "bias")]


def _parameters(arrays: Mapping[str, Array]) -> dict[str, Array]:
    for prefix in _COLLECTIONS:
        if found := {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}:
            return found
    return dict(arrays)


def _layers_apart(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Scanned blocks, stacked under ``encoderblock``, by the names of blocks on their own."""
    apart: dict[str, Array] = {}
    for name, x in arrays.items():
        tower, scanned, leaf = name.partition("/encoderblock/")
        apart |= {f"{tower}/encoderblock_{i}/{leaf}": layer for i, layer in enumerate(x)} if scanned else {name: x}
    return apart


def _tokenizer(folder: Path, vocabulary: int) -> Path | None:
    """A SentencePiece model that lies there alone; for SigLIP 2, which leaves out the start token of Gemma's, the
    tokenizer.json that says so."""
    found = list(folder.glob("tokenizer.json" if vocabulary >= common.GEMMA_VOCABULARY_SIZE else "*.model"))
    return found[0] if len(found) == 1 else None


def _raw_config(arrays: Mapping[str, Array], path: Path) -> dict[str, Any]:
    """Our sections for a checkpoint: shapes, and what all of SigLIP has in common."""

    def shape(name: str, axes: int) -> tuple[int, ...]:
        found = list(arrays[name].shape) if name in arrays else "none"
        if found == "none" or len(found) != axes:
            raise ConfigError(f"{path}: {name}: expected an array of {axes} axes (big_vision's SigLIP), got {found}")
        return arrays[name].shape

    def tower(name: str) -> dict[str, int]:
        width, mlp = shape(f"{name}/encoderblock_0/MlpBlock_0/Dense_0/kernel", 2)
        heads = shape(f"{name}/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel", 3)[1]
        layers = len({key.split("/")[2] for key in arrays if key.startswith(f"{name}/encoderblock_")})
        return {"layers": layers, "width": width, "mlp": mlp, "heads": heads}

    patch, positions = shape("img/embedding/kernel", 4)[0], shape("img/pos_embedding", 3)[1]
    grid = math.isqrt(positions)
    if grid**2 != positions:
        raise ConfigError(f"{path}: img/pos_embedding: expected positions of a square grid, got {positions}")
    vocabulary = shape("txt/Embed_0/embedding", 2)[0]
    return {
        "model": {
            "size": "B/16",
            "pooler": "class_token",
            "mixture_tokens": 1,
            "embed_dim": shape("txt/head/kernel", 2)[1],
            "image_size": grid * patch,
            "image_mean": _HALF,
            "image_std": _HALF,
            "vision": {
                **tower("img/Transformer"),
                "patch": patch,
                "patch_bias": True,
                "norm_pre": False,
                "pooling": "attention",
                "projection": False,
            },
            "text": {
                **tower("txt/Encoder_0"),
                "length": shape("txt/pos_embedding", 3)[1],
                "causal": False,
                "pooling": "last",
                "projection_bias": True,
            },
            "activation": "gelu_tanh",
            "layer_norm_epsilon": 1e-6,
            "logit_bias": -10.0 if "b" in arrays else None,
        },
        # Its LiT and CLIP models have no bias and were trained with the softmax loss.
        "objective": {} if "b" in arrays else {"sigmoid": None, "softmax": {}},
        "data": {
            "tokenizer": {
                "vocabulary_size": vocabulary,
                # SigLIP_demo.ipynb there: tokenize(eos="sticky", pad_value=1) with its default lower=True; and
                # SigLIP2_demo.ipynb: lower, then tok(model="gemma", bos="no", eos="sticky"), which pads with 0.
                "clean": "lower",
                "pad": common.padding(path.parent, vocabulary),
            }
        },
    }


def _activations(config: Config) -> dict[str, str]:
    """The fields that decide a tower's activation, and what they have to be."""
    named = {"vision": config.model.vision.activation, "text": config.model.text.activation}
    return {f"{tower}.activation" if own else "activation": "gelu_tanh" for tower, own in named.items()}
