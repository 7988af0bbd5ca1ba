"""A model as programs that run without this package: StableHLO by jax.export, parameters beside it as a NumPy archive.

The serving process needs jax, with flatbuffers, and numpy. Numbers of pictures and texts are left open, and one program
serves CPUs, NVIDIA GPUs and TPUs: it holds XLA's own operations alone (and jax's checks of shapes), no kernels.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import ShapeDtypeStruct
from jax import export as jax_export
from jaxtyping import Array, Float, Int

from llip_jax.config import ConfigError
from llip_jax.data.tokenizers import Tokenizer
from llip_jax.inference import Model, functions
from llip_jax.interop.files import write_npz, write_text
from llip_jax.interop.folders import replacing_folder
from llip_jax.models.dual_encoder import compute_dtype
from llip_jax.ops.pair_scores import TextSide, cosines

PLATFORMS = ("cpu", "cuda", "tpu")
DESCRIPTION = "serving.json"
WEIGHTS = "weights.npz"
FORMAT_VERSION = 1

_RESIZING = (
    "upright, RGB, transparency on white; the shorter side to image_size by antialiased bicubic (Pillow), the longer "
    "side in proportion and rounded down; then the central square"
)

_README = """\
# Programs of an image-text model

Written by llip_jax. They run without it (`pip install jax flatbuffers numpy`) on {platforms}, with any number of
pictures and texts, and compute in {dtype}. jax {jax} wrote them; versions of the six months after it read them.
`serving.json` says what goes in and comes out.

```python
import jax
import numpy as np
from jax import export

weights = jax.device_put(dict(np.load("weights.npz")))
image, text, score = (
    jax.jit(export.deserialize(open(f"{{name}}.jax_export", "rb").read()).call) for name in ("image", "text", "score")
)
pictures = np.zeros((2, {size}, {size}, 3), np.uint8)  # RGB, resized and cropped as serving.json says
tokens, mask = np.zeros((3, {length}), np.int32), np.ones((3, {length}), np.int32)  # as the tokenizer gives them
mixture, unconditioned = image(weights, pictures)
cosines = np.asarray(score(weights, mixture, *text(weights, tokens, mask)))  # [2, 3]
logits = {scale:.9g} * cosines + {bias:.9g}
probabilities = {probabilities}
```

Each new number of pictures or texts is compiled when it first comes: fill batches up to powers of two. `score` holds
all pairs at once, about {pair_bytes:,} bytes for a picture with a text; give it so many at a time.
{unconditioned}
"""

_PROBABILITIES = {
    True: "1 / (1 + np.exp(-logits))  # that a picture and a text match",
    False: "np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)  # of each text among these",
}
"""By whether the model was trained with the sigmoid loss."""

_UNCONDITIONED = {
    True: "Pairs are scored by `score` alone. `unconditioned` knows no text: it is good for a shortlist, and to be "
    "named where results are obtained from it.",
    False: "`unconditioned` is the embedding of a picture, which `score` compares with the texts'.",
}


def export(model: Model, folder: str | Path) -> None:
    """Writes the programs ``image``, ``text`` and ``score``, their weights, a description and how to run them.

    The folder appears whole or not at all.

    Args:
        model: its compute type is that of the programs.
        folder: to be made; one that is not empty is refused.

    Raises:
        ConfigError: flatbuffers is not installed, the folder is in the way, or the weights came without a tokenizer.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise ConfigError(
            "export: jax writes programs with flatbuffers, which is not installed; pip install flatbuffers"
        )
    programs = _programs(model)
    weights = {path: np.asarray(x) for path, x in _flat(model).items()}
    with replacing_folder(Path(folder)) as temporary:
        temporary.mkdir()
        for name, program in programs.items():
            (temporary / f"{name}.jax_export").write_bytes(program.serialize())
        write_npz(temporary / WEIGHTS, weights)
        if model.tokenizer.file is not None:
            name, definition = model.tokenizer.file
            (temporary / name).write_bytes(definition)
        write_text(temporary / DESCRIPTION, json.dumps(_description(model, programs), indent=2) + "\n")
        write_text(temporary / "README.md", _readme(model))


def _flat(model: Model) -> dict[str, Array]:
    return traverse_util.flatten_dict(model.params, sep="/")


def _programs(model: Model) -> dict[str, jax_export.Exported]:
    config = model.computing.model
    of_model, dtype = functions(model.computing), compute_dtype(config.dtype)

    def image(weights: Any, images: Array) -> tuple[Array, Array]:
        return of_model.image(_nested(weights), images)

    def text(weights: Any, tokens: Int[Array, "j L"], mask: Int[Array, "j L"]) -> tuple[Array, ...]:
        return tuple(x for x in of_model.text(_nested(weights), tokens, mask) if x is not None)

    def score(
        weights: Any, mixture: Float[Array, "n K Dv"], embedding: Float[Array, "j d"], *queries: Float[Array, "j M dh"]
    ) -> Float[Array, "n j"]:
        texts = TextSide(embedding, *(x.astype(dtype) for x in queries))
        return cosines(of_model.side(_nested(weights), mixture), texts)

    n, j = jax_export.symbolic_shape("n, j")
    weights = {path: ShapeDtypeStruct(x.shape, x.dtype) for path, x in _flat(model).items()}
    pixels = ShapeDtypeStruct((n, config.image_size, config.image_size, 3), jnp.uint8)
    tokens = ShapeDtypeStruct((j, config.text.length), jnp.int32)

    def program(function: Any, *inputs: Any) -> jax_export.Exported:
        return jax_export.export(jax.jit(function), platforms=PLATFORMS)(weights, *inputs)

    of_images, of_texts = program(image, pixels), program(text, tokens, tokens)
    mixture, _ = of_images.out_avals
    return {"image": of_images, "text": of_texts, "score": program(score, mixture, *of_texts.out_avals)}


def _nested(weights: dict[str, Array]) -> Any:
    return traverse_util.unflatten_dict(weights, sep="/")


_NAMES = {
    "image": (("images",), ("mixture", "unconditioned")),
    "text": (("tokens", "mask"), ("embedding", "queries")),
    "score": (("mixture", "embedding", "queries"), ("cosines",)),
}
"""Inputs, behind the weights, and outputs of the programs; models that do not mix have no queries."""


def _description(model: Model, programs: dict[str, jax_export.Exported]) -> dict[str, Any]:
    config, count = model.computing, len(_flat(model))
    return {
        "format": "llip_jax serving",
        "format_version": FORMAT_VERSION,
        "jax": jax.__version__,
        "platforms": PLATFORMS,
        "compute_dtype": _dtype_name(model),
        "weights": WEIGHTS,
        "programs": {
            name: {
                "file": f"{name}.jax_export",
                "inputs": _shapes(_NAMES[name][0], program.in_avals[count:]),
                "outputs": _shapes(_NAMES[name][1], program.out_avals),
            }
            for name, program in programs.items()
        },
        "pictures": {"image_size": config.model.image_size, "dtype": "uint8", "resizing": _RESIZING},
        "texts": _text_rules(model.tokenizer, config.model.text.length) | {"clean": config.data.tokenizer.clean},
        "logit_scale": model.logit_scale,
        "logit_bias": model.logit_bias,
    }


def _shapes(names: tuple[str, ...], arrays: Any) -> dict[str, str]:
    return {name: f"{x.dtype}[{', '.join(map(str, x.shape))}]" for name, x in zip(names, arrays, strict=False)}


def _text_rules(tokenizer: Tokenizer, length: int) -> dict[str, Any]:
    """How tokens are laid out, learned from an empty text."""
    (row,), (mask,) = tokenizer.encode([""], length)
    *start, end = row[mask == 1].tolist()
    return {
        "tokenizer": "CLIP's byte-pair encoding" if tokenizer.file is None else tokenizer.file[0],
        "length": length,
        "start": start,
        "end": end,
        "pad": int(row[-1]),
        "rule": "start, text, end, padding; longer texts are cut before the end; mask is 1 up to and with the end",
    }


def _dtype_name(model: Model) -> str:
    return jnp.dtype(compute_dtype(model.computing.model.dtype)).name


def _readme(model: Model) -> str:
    config, mixed = model.computing.model, model.config.model.pooler == "mixer"
    width = model.params["pooler"]["text"].shape[1]
    return _README.format(
        jax=jax.__version__,
        platforms=", ".join(PLATFORMS),
        dtype=_dtype_name(model),
        size=config.image_size,
        length=config.text.length,
        probabilities=_PROBABILITIES[model.config.objective.sigmoid is not None],
        scale=model.logit_scale,
        bias=model.logit_bias,
        # Mixing weights and mixed values, and what each of them is made of.
        pair_bytes=4 * 2 * (config.mixer_heads * config.mixture_tokens + width) if mixed else 4,
        unconditioned=_UNCONDITIONED[mixed],
    )
