"""Our folder of weights: what comes back is what went in, and nothing but that is read."""

import dataclasses
import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from flax import traverse_util
from oracles import random_params
from run_helpers import temporary_folder, tiny_config
from safetensors import safe_open

from llip_jax.config import ConfigError, resolve, to_dict
from llip_jax.data.tokenizers import load_tokenizer, train_tokenizer
from llip_jax.interop import formats, pretrained
from llip_jax.interop.weights import Weights, sections

SIGLIP = {
    "pooler": "class_token",
    "vision.pooling": "attention",
    "vision.patch_bias": True,
    "vision.norm_pre": False,
    "vision.projection": False,
    "text.projection_bias": True,
}
"""What makes other parameters than a Llip's."""


@functools.cache
def tokenizer_file() -> Path:
    """A small tokenizer.json."""
    path = temporary_folder() / "some-name.json"
    train_tokenizer([f"a {kind} on grass, number {n}" for n in range(20) for kind in ("dog", "cat")], 300, path)
    return path


def tiny_weights(seed: int = 0, tokenizer: str | None = None, **model: Any) -> Weights:
    """A small model with noise for parameters; its tokenizer is a file unless named."""
    raw = sections(to_dict(tiny_config(model={"mixer_temperature": 0.3, **model})))
    name = str(tokenizer_file()) if tokenizer is None else tokenizer
    raw["data"]["tokenizer"] = {"name": name, "vocabulary_size": 49_408 if name == "clip" else 300, "clean": "none"}
    raw["data"]["tokenizer"] |= {"clean": "lower", "pad": 1} if tokenizer is None else {}
    params = jax.tree.map(np.asarray, random_params(resolve(raw), seed))
    return Weights(raw, params, tokenizer_file() if tokenizer is None else None)


def flat(params: Any) -> dict[str, np.ndarray]:
    return traverse_util.flatten_dict(params, sep="/")


def change_config(folder: Path, change: Any) -> None:
    contents = json.loads((folder / pretrained.CONFIG).read_text())
    change(contents)
    (folder / pretrained.CONFIG).write_text(json.dumps(contents))


@pytest.mark.parametrize("tokenizer", ["clip", None])
@pytest.mark.parametrize("model", [{}, SIGLIP, {"pooler": "average"}, {"mixer_key_bias": True, "logit_bias": None}])
def test_weights_come_back_bit_by_bit(tmp_path: Path, model: dict[str, Any], tokenizer: str | None) -> None:
    weights = tiny_weights(tokenizer=tokenizer, **model)
    pretrained.write(weights, tmp_path / "new" / "folder")
    back = formats.read(tmp_path / "new" / "folder")
    assert flat(back.params).keys() == flat(weights.params).keys()
    assert all(x.tobytes() == flat(weights.params)[path].tobytes() for path, x in flat(back.params).items())
    assert all(x.dtype == np.float32 for x in flat(back.params).values())
    expected = sections(to_dict(resolve(weights.config)))
    if tokenizer is None:
        expected["data"]["tokenizer"]["name"] = str(tmp_path / "new" / "folder" / "tokenizer.json")
        assert back.tokenizer is not None and back.tokenizer.read_bytes() == tokenizer_file().read_bytes()
        kept, written = (load_tokenizer(path, "lower", 1) for path in (tokenizer_file(), back.tokenizer))
        assert kept.fingerprint == written.fingerprint
    assert back.config == expected
    assert back.format == "llip_jax"
    pretrained.write(back, tmp_path / "again")  # from its own folder
    for file in (tmp_path / "again").iterdir():
        if file.name != pretrained.CARD:
            assert file.read_bytes() == (tmp_path / "new" / "folder" / file.name).read_bytes()


def test_safetensors_reads_the_parameters_by_path(tmp_path: Path) -> None:
    weights = tiny_weights()
    pretrained.write(weights, tmp_path / "folder")
    with safe_open(tmp_path / "folder" / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "llip_jax"}
        assert set(file.keys()) == flat(weights.params).keys()
        for path, x in flat(weights.params).items():
            np.testing.assert_array_equal(file.get_tensor(path), x)


def test_the_model_card_has_front_matter_and_the_model_in_a_table(tmp_path: Path) -> None:
    pretrained.write(tiny_weights(), tmp_path / "folder")
    card = (tmp_path / "folder" / "README.md").read_text()
    _, front_matter, body = card.split("---\n", 2)
    assert yaml.safe_load(front_matter) == {
        "library_name": "llip_jax",
        "pipeline_tag": "zero-shot-image-classification",
    }
    rows = dict(re.findall(r"^\| ([a-z ]+) \| (.+) \|$", body, re.M))
    assert rows["parameters"] == f"{sum(x.size for x in flat(tiny_weights().params).values()):,}"
    assert rows["image tokens"].startswith("4,") and rows["tokenizer"] == "in this folder, 300 tokens"
    assert "not* what pairs are scored with" in body
    pretrained.write(tiny_weights(**SIGLIP), tmp_path / "other")
    assert "not* what pairs" not in (tmp_path / "other" / "README.md").read_text()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=re.escape(str(tmp_path))):
            pretrained.write(tiny_weights(), tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_weights_are_replaced_only_when_asked_and_only_by_complete_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    pretrained.write(tiny_weights(0), folder)
    with pytest.raises(ConfigError, match="overwrite"):
        pretrained.write(tiny_weights(1), folder)
    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "write_text", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(ConfigError, match="No space left"):
            pretrained.write(tiny_weights(1), folder, overwrite=True)
    old = pretrained.read(folder).params["vision"]["positions"]
    np.testing.assert_array_equal(old, tiny_weights(0).params["vision"]["positions"])
    pretrained.write(tiny_weights(1), folder, overwrite=True)
    new = pretrained.read(folder).params["vision"]["positions"]
    np.testing.assert_array_equal(new, tiny_weights(1).params["vision"]["positions"])
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    (folder / "figure.png").write_bytes(b"of the user")
    with pytest.raises(ConfigError, match=r"figure\.png"):
        pretrained.write(tiny_weights(0), folder, overwrite=True)


def test_weights_that_do_not_fit_or_are_not_finite_are_not_written(tmp_path: Path) -> None:
    weights = tiny_weights()
    weights.params["vision"]["positions"] = np.full((16, 32), np.nan, np.float32)
    with pytest.raises(ConfigError, match=r"NaN.*vision/positions"):
        pretrained.write(weights, tmp_path / "folder")
    weights.params["vision"]["positions"] = np.zeros((9, 32), np.float32)
    with pytest.raises(ConfigError, match=r"vision/positions \[9, 32\], expected \[16, 32\]"):
        pretrained.write(weights, tmp_path / "folder")
    gone = Weights(tiny_weights(tokenizer=str(tmp_path / "gone.json")).config, tiny_weights().params)
    with pytest.raises(ConfigError, match=r"gone\.json"):
        pretrained.write(gone, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_all_parameters_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    pretrained.write(tiny_weights(), tmp_path / "folder")

    def other_model(contents: dict[str, Any]) -> None:
        contents["model"]["image_size"] = 20
        contents["model"]["mixer_key_bias"] = True
        contents["model"]["logit_bias"] = None

    change_config(tmp_path / "folder", other_model)
    with pytest.raises(ConfigError) as caught:
        pretrained.read(tmp_path / "folder")
    assert re.search(r"missing: pooler/key_bias \[4, 4, 8\]", str(caught.value))
    assert re.search(r"left over: bias", str(caught.value))
    assert re.search(r"of another shape: vision/positions \[16, 32\], expected \[25, 32\]", str(caught.value))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: c.update(format_version=2), r"format_version: 2 is not known, expected 1"),
        (lambda c: c.pop("format_version"), r"format_version: None"),
        (lambda c: c.update(init={"from": "elsewhere"}), r"got \['data.tokenizer', 'init', 'model', 'objective'\]"),
        (lambda c: c["data"].update(path="elsewhere"), r"'data\.path'"),
        (lambda c: c.update(data=["tokenizer"]), r"expected the sections"),
        (lambda c: c["model"].update(image_std=[0.5, 0, 0.5]), r"model\.image_std: 0 is not valid: .* greater than 0"),
        (lambda c: c["model"].update(poller="mixer"), r"model\.poller.*pooler"),
        (lambda c: c["data"]["tokenizer"].update(name="../secret.json"), r"secret\.json' is no file of this folder"),
        (lambda c: c["data"]["tokenizer"].update(name="/etc/passwd"), r"passwd' is no file of this folder"),
        (lambda c: c["data"]["tokenizer"].update(name="tokenizer.model"), r"tokenizer\.model: there is no such file"),
    ],
)
def test_a_configuration_that_is_not_of_this_format_is_refused(tmp_path: Path, change: Any, problem: str) -> None:
    pretrained.write(tiny_weights(), tmp_path / "folder")
    (tmp_path / "secret.json").write_bytes(tokenizer_file().read_bytes())
    change_config(tmp_path / "folder", change)
    with pytest.raises(ConfigError, match=problem):
        pretrained.read(tmp_path / "folder")


@pytest.mark.parametrize(
    ("section", "field", "told"),
    [
        ("vision", "layers", r"model\.vision=TowerShape\(layers=1000000000"),
        ("text", "layers", r"model\.text=TowerShape\(layers=1000000000"),
        ("text", "length", r"model\.text\.length=1000000000"),
        ("", "image_size", r"model\.image_size=1000000000"),
        ("", "mixture_tokens", r"model\.mixture_tokens=1000000000"),
        ("", "embed_dim", r"model\.embed_dim=1000000000"),
    ],
)
def test_sizes_beyond_what_the_weights_hold_are_refused(tmp_path: Path, section: str, field: str, told: str) -> None:
    pretrained.write(tiny_weights(), tmp_path / "folder")
    change_config(
        tmp_path / "folder", lambda c: (c["model"][section] if section else c["model"]).update({field: 10**9})
    )
    with pytest.raises(ConfigError, match=f"model.safetensors: .* more than its .* hold: .*{told}"):
        pretrained.read(tmp_path / "folder")


def with_settings(folder: Path) -> Weights:
    """Weights whose tokenizer lies in a folder as Hugging Face's do."""
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(tokenizer_file().read_bytes())
    (folder / "tokenizer_config.json").write_text('{"pad_token": "<end>"}')
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<end>"}')
    (folder / "figure.png").write_bytes(b"no part of a tokenizer")
    return dataclasses.replace(tiny_weights(), tokenizer=folder / "tokenizer.json")


def test_a_tokenizers_settings_go_with_it(tmp_path: Path) -> None:
    pretrained.write(with_settings(tmp_path / "source"), tmp_path / "folder")
    pretrained.write(pretrained.read(tmp_path / "folder"), tmp_path / "again")
    for folder in ("folder", "again"):
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            assert (tmp_path / folder / name).read_bytes() == (tmp_path / "source" / name).read_bytes()
        assert {path.name for path in (tmp_path / folder).iterdir()} == pretrained.FILES - {
            "spiece.model",
            "tokenizer.model",
        }


@pytest.mark.parametrize("target", ["/etc/hostname", "/dev/zero", "/nowhere"])
def test_settings_that_are_no_files_are_not_taken_along(tmp_path: Path, target: str) -> None:
    weights = with_settings(tmp_path / "source")
    pretrained.write(weights, tmp_path / "folder")
    (tmp_path / "folder" / "tokenizer_config.json").unlink()
    os.symlink(target, tmp_path / "folder" / "tokenizer_config.json")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: leads out of the folder"):
        pretrained.read(tmp_path / "folder")
    if not Path(target).is_file():
        (tmp_path / "source" / "tokenizer_config.json").unlink()
        os.symlink(target, tmp_path / "source" / "tokenizer_config.json")
        pretrained.write(weights, tmp_path / "other")
        assert not (tmp_path / "other" / "tokenizer_config.json").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "llip_jax_config.json"])
def test_links_out_of_the_folder_are_refused_but_those_of_hugging_faces_cache(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    pretrained.write(tiny_weights(), folder)
    os.rename(folder / name, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", folder / name)
    with pytest.raises(ConfigError, match="leads out of the folder"):
        pretrained.read(folder)

    repository = tmp_path / "models--someone--llip"
    for part in ("blobs", "snapshots/0123abcd"):
        (repository / part).mkdir(parents=True)
    for file in folder.iterdir():
        (repository / "blobs" / f"hash-of-{file.name}").write_bytes(file.read_bytes())
        os.symlink(f"../../blobs/hash-of-{file.name}", repository / "snapshots/0123abcd" / file.name)
    assert pretrained.read(repository / "snapshots/0123abcd").tokenizer is not None
