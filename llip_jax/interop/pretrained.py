"""Our own folder of weights: a safetensors file, what of the configuration goes with it, a tokenizer, a model card."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from llip_jax.config import Config, ConfigError, to_dict
from llip_jax.interop.common import TOKENIZER_FILES, TOKENIZERS, checked_config, copy_tokenizer
from llip_jax.interop.files import Arrays, check_finite, read_json, read_safetensors, write_safetensors, write_text
from llip_jax.interop.folders import replacing_folder
from llip_jax.interop.maps import parameter_shapes, tie, to_ours
from llip_jax.interop.weights import Weights, sections
from llip_jax.models.sizes import TowerShape, model_shape

NAME = "llip_jax"
CONFIG = "llip_jax_config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
FILES = frozenset({CONFIG, WEIGHTS, CARD}) | TOKENIZER_FILES
"""All that :func:`write` may write."""
FORMAT_VERSION = 1

_SECTIONS = {"model", "objective", "data.tokenizer"}

_WITHOUT_FILE = ("clip", "")
"""Names of tokenizers: built in, and none known."""

_POOLERS = {
    "mixer": "mixed by the text that the image is compared with",
    "average": "averaged by learned weights",
    "registers": "a class token and registers",
    "class_token": "a class token",
}

_UNCONDITIONED = {
    True: """The text decides how an image's tokens are mixed, so an image has another embedding for every text.
`model.encode_image(images).unconditioned` has one vector an image that no text has conditioned, the mean of its tokens
through the same projections. It is *not* what pairs are scored with: good for a shortlist, to be named where results
are obtained from it.""",
    False: """An image has one embedding, whatever the text, with which pairs are scored:
`model.encode_image(images).unconditioned`.""",
}

_CARD = """\
---
library_name: llip_jax
pipeline_tag: zero-shot-image-classification
# license: (to be chosen by whoever publishes these weights)
---

# {title}

An image-text model for llip_jax: it scores how well texts describe images.

| | |
|---|---|
{rows}

## Use

```python
import llip_jax

model = llip_jax.load("path/of/this/folder")
scores = model.score(["photo.jpg"], ["a dog on grass", "a street at night"])  # [images, texts], cosines
probabilities = model.classify(["photo.jpg"], ["dog", "cat"])  # [images, classes]
```

{unconditioned}

## Intended use and limits

(To be filled in by whoever publishes these weights: training data, intended uses, known failures, figures.)

## Origin

{history}
"""


def write(weights: Weights, folder: str | Path, *, overwrite: bool = False) -> None:
    """Writes a folder that :func:`read` takes, whole or not at all. The tokenizer goes with it.

    Args:
        weights: of any model of ours.
        folder: to be made. One that is not empty is refused.
        overwrite: replace a folder that holds nothing but files of this format.

    Raises:
        ConfigError: a folder that is in the way, a tokenizer that cannot be read, weights that are not finite or not
            those of their configuration.
    """
    folder = Path(folder)
    config = checked_config(weights.config, folder)
    arrays = {path: np.asarray(x) for path, x in _flat(weights.params).items()}
    arrays = _flat(_checked(arrays, config, folder))
    check_finite(arrays, folder)
    history = list(weights.history + weights.notes)
    contents = {"format_version": FORMAT_VERSION, "history": history, **sections(to_dict(config))}
    name = config.data.tokenizer.name
    with replacing_folder(folder, overwrite, FILES) as temporary:
        temporary.mkdir()
        if name not in _WITHOUT_FILE:
            contents["data"]["tokenizer"]["name"] = copy_tokenizer(weights.tokenizer or Path(name), temporary)
        # One entry, as safetensors writes several in random order.
        write_safetensors(temporary / WEIGHTS, arrays, {"format": NAME})
        write_text(temporary / CARD, _card(weights, config))
        write_text(temporary / CONFIG, json.dumps(contents, indent=2) + "\n")


def read(folder: str | Path) -> Weights:
    """Weights of a folder that :func:`write` wrote.

    Raises:
        ConfigError: files that are missing, broken, of a later version or lead out of the folder; parameters that do
            not fit the configuration, all of them listed.
    """
    folder = Path(folder)
    path = _within(folder, CONFIG)
    contents = read_json(path)
    if (version := contents.pop("format_version", None)) != FORMAT_VERSION:
        raise ConfigError(
            f"{path}: format_version: {version!r} is not known, expected {FORMAT_VERSION}; update llip_jax"
        )
    history = contents.pop("history", [])
    if not isinstance(history, list) or not all(isinstance(line, str) for line in history):
        raise ConfigError(f"{path}: history: {history!r} is not valid: expected a list of sentences")
    # A run may start from these weights; they have no say in the rest of its configuration.
    data = contents.get("data")
    given = (contents.keys() - {"data"}) | {f"data.{name}" for name in (data if isinstance(data, dict) else {})}
    if given != _SECTIONS:
        raise ConfigError(f"{path}: expected the sections {sorted(_SECTIONS)}, got {sorted(given)}")
    config = checked_config(contents, path)
    raw = sections(to_dict(config))
    tokenizer = None
    if (name := config.data.tokenizer.name) not in _WITHOUT_FILE:
        if name not in TOKENIZERS:
            expected = " or ".join(map(repr, ("clip", *TOKENIZERS)))
            raise ConfigError(f"{path}: data.tokenizer.name: {name!r} is no file of this folder, expected {expected}")
        for other in sorted(TOKENIZER_FILES):  # which are copied wherever the tokenizer is
            if (folder / other).is_symlink():
                _within(folder, other)
        tokenizer = _within(folder, name).absolute()
        raw["data"]["tokenizer"]["name"] = str(tokenizer)
    path = _within(folder, WEIGHTS)
    params = _checked(read_safetensors(path), config, path)
    return Weights(raw, params, tokenizer, NAME, history=tuple(history))


def _checked(arrays: Arrays, config: Config, source: Path) -> dict[str, Any]:
    """Parameters by path, nested; refused where they are not those of the model that ``config`` describes."""
    return to_ours([tie(path, path) for path in parameter_shapes(config)], arrays, config, source=source)


def _flat(params: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.flatten_dict(dict(params), sep="/")


def _within(folder: Path, name: str) -> Path:
    """A file of the folder that does not lead out of it by a link."""
    path, root = folder / name, folder.resolve()
    places = [root]
    if root.parent.name == "snapshots":  # of Hugging Face's cache, where files are links to ../../blobs
        places.append(root.parents[1] / "blobs")
    if (real := path.resolve()).parent not in places:
        raise ConfigError(f"{path}: leads out of the folder, to {real}")
    if not real.is_file():
        raise ConfigError(f"{path}: there is no such file")
    return path


def _card(weights: Weights, config: Config) -> str:
    model, shape, tokenizer = config.model, model_shape(config.model), config.data.tokenizer
    mixed = model.pooler == "mixer"
    count = sum(np.size(x) for x in _flat(weights.params).values())
    texts = "CLIP's" if tokenizer.name == "clip" else "in this folder" if tokenizer.name else "not known"
    rows = {
        "image tower": f"{_tower(shape.vision)}, patches of {shape.patch} pixels",
        "images": f"{model.image_size} x {model.image_size} pixels",
        "text tower": f"{_tower(shape.text)}, texts of {model.text.length} tokens",
        "image tokens": f"{1 if model.pooler == 'class_token' else model.mixture_tokens}, {_POOLERS[model.pooler]}",
        "joint width": f"{shape.embed_dim}" + (f", {model.mixer_heads} mixing heads" if mixed else ""),
        "parameters": f"{count:,}",
        "tokenizer": f"{texts}, {tokenizer.vocabulary_size:,} tokens",
        "objective": ", ".join(f"{name} (weight {term.weight:g})" for name, term in config.objective.terms().items()),
    }
    return _CARD.format(
        title=("Llip" if mixed else "Dual encoder") + f", {shape.vision.layers} layers, {model.image_size} pixels",
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        unconditioned=_UNCONDITIONED[mixed],
        history="\n".join(f"- {line}" for line in weights.history + weights.notes) or "Not known.",
    )


def _tower(shape: TowerShape) -> str:
    return f"{shape.layers} layers of width {shape.width}, {shape.heads} heads, MLP of {shape.mlp}"
