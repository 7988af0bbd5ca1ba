"""Exported programs, run by a process that has jax and numpy alone, against the model they were made of."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from jax import export as jax_export
from oracles import relative_error
from run_helpers import run, temporary_folder
from test_inference import TEXTS, pictures
from test_pretrained import SIGLIP, tiny_weights, tokenizer_file

from llip_jax import export
from llip_jax.config import ConfigError
from llip_jax.data.images import resize_for_eval
from llip_jax.inference import Model

MODELS: dict[str, dict[str, Any]] = {"mixer": {"mixer_key_bias": True}, "siglip": SIGLIP}

_SERVING = """
import sys
sys.modules.update(dict.fromkeys(("llip_jax", "flax", "optax")))  # importing them fails
import os, re
import jax, numpy as np
from jax import export
for name in {models!r}:
    os.chdir(os.path.join({folder!r}, name))
    weights = dict(np.load("weights.npz"))
    names = ("image", "text", "score")
    image, text, score = (export.deserialize(open(f"{{x}}.jax_export", "rb").read()).call for x in names)
    inputs = np.load(os.path.join({folder!r}, "inputs.npz"))
    results = {{}}
    for n, j in ((5, 7), (1, 2)):
        mixture, unconditioned = image(weights, inputs["images"][:n])
        sides = text(weights, inputs["tokens"][:j], inputs["mask"][:j])
        outputs = mixture, unconditioned, score(weights, mixture, *sides), *sides
        names = ("mixture", "unconditioned", "cosines", "embedding", "queries")
        results |= {{f"{{n}} {{name}}": x for name, x in zip(names, outputs)}}
    np.savez("results.npz", **results)
    (program,) = re.findall("```python\\n(.*?)```", open("README.md").read(), re.S)
    names = {{}}
    exec(program, names)
    assert names["cosines"].shape == names["probabilities"].shape == (2, 3)
assert sys.modules["llip_jax"] is sys.modules["flax"] is None
"""


@functools.cache
def model_of(name: str) -> Model:
    return Model(tiny_weights(**MODELS[name]), batch_size=8)


def inputs() -> dict[str, np.ndarray]:
    model = model_of("mixer")
    tokens, mask = model.tokenizer.encode(TEXTS, model.config.model.text.length)
    size = model.config.model.image_size
    return {"images": np.stack([resize_for_eval(x, size) for x in pictures(5)]), "tokens": tokens, "mask": mask}


@functools.cache
def exported() -> Path:
    """Folders of all models, and what a process with jax and numpy alone computed with them."""
    folder = temporary_folder()
    np.savez(folder / "inputs.npz", **inputs())
    for name in MODELS:
        model_of(name).export(folder / name)
    done = run(["-c", _SERVING.format(folder=str(folder), models=list(MODELS))])
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_programs_compute_what_the_model_does_without_this_package(name: str) -> None:
    model, results = model_of(name), np.load(exported() / name / "results.npz")
    images, texts = model.encode_image(pictures(5)), model.encode_text(TEXTS)
    expected = {
        "mixture": images.mixture,
        "unconditioned": images.unconditioned,
        "embedding": texts.embedding,
        "cosines": model.score(images, texts),
    } | ({} if texts.queries is None else {"queries": texts.queries})
    assert len(results.files) == 2 * len(expected)
    for what, x in expected.items():
        assert relative_error(results[f"5 {what}"], x) < 1e-5
        j, of_text = 2, what in ("embedding", "queries")
        fewer = x[:j] if of_text else x[:1, :j] if what == "cosines" else x[:1]
        assert relative_error(results[f"1 {what}"], fewer) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_the_description_is_that_of_the_programs(name: str) -> None:
    folder = exported() / name
    description = json.loads((folder / "serving.json").read_text())
    weights = np.load(folder / description["weights"])
    for program in description["programs"].values():
        read = jax_export.deserialize(bytearray((folder / program["file"]).read_bytes()))
        assert read.platforms == tuple(description["platforms"]) == ("cpu", "cuda", "tpu")
        inputs = [str(x).replace(",", ", ") for x in read.in_avals[len(weights.files) :]]
        outputs = [str(x).replace(",", ", ") for x in read.out_avals]
        assert inputs == list(program["inputs"].values()) and outputs == list(program["outputs"].values())
        # Nothing that only some devices, or some versions, have.
        assert set(re.findall(r"custom_call @(\w+)", read.mlir_module())) <= {"shape_assertion"}
    model = model_of(name)
    assert (description["logit_scale"], description["logit_bias"]) == (model.logit_scale, model.logit_bias)
    assert description["pictures"]["image_size"] == model.config.model.image_size


def test_texts_can_be_tokenized_by_the_description_alone() -> None:
    folder = exported() / "mixer"
    rules = json.loads((folder / "serving.json").read_text())["texts"]
    assert (folder / rules["tokenizer"]).read_bytes() == tokenizer_file().read_bytes()
    assert rules["clean"] == "lower"
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / rules["tokenizer"]))
    for text, tokens, mask in zip(TEXTS, inputs()["tokens"], inputs()["mask"], strict=True):
        words = tokenizer.encode(text.lower(), add_special_tokens=False).ids
        row = [*rules["start"], *words[: rules["length"] - len(rules["start"]) - 1], rules["end"]]
        assert mask.sum() == len(row)
        assert tokens.tolist() == row + [rules["pad"]] * (rules["length"] - len(row))


def test_the_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="taken"):
        model_of("mixer").export(tmp_path / "taken")
    monkeypatch.setattr(export, "write_text", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ConfigError, match="No space left"):
        model_of("mixer").export(tmp_path / "new")
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "mine.txt"]


def test_without_flatbuffers_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install flatbuffers"):
        model_of("mixer").export(tmp_path / "new")
