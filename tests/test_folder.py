"""FolderSource: what it yields, and every way to refuse a folder."""

import json
import os
import pickle
import re
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llip_jax.config import ConfigError, DataConfig, FieldsConfig, FolderConfig
from llip_jax.data.formats.folder import FolderSource
from llip_jax.data.images import open_picture
from llip_jax.data.records import BadSample, fingerprint
from llip_jax.data.sources import build_source

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def write(root, lines):
    """captions.jsonl from entries (dictionaries) and raw lines, with the images that the entries name."""
    rng = np.random.default_rng(len(lines))
    for entry in lines:
        if isinstance(entry, dict) and isinstance(entry.get("image"), str):
            file = root / entry["image"]
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8)).save(file)
    text = "".join((entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in lines)
    (root / "captions.jsonl").write_text(text, encoding="utf-8")
    return root


def entry(number, **fields):
    return {"image": f"images/{number}.png", "captions": [f"caption {number}", "weak"], "split": "train"} | fields


def test_records(tmp_path):
    lines = [
        entry(0, n_names=1, pixel_id="x", colour="red"),
        entry(1, split="val"),
        entry(2, pixel_id="x"),
        entry(3, captions=["größer 🎈\u2028 ok"], pixel_id=None),
    ]
    write(tmp_path, lines)
    source = FolderSource(tmp_path, FolderConfig(), "train")
    records = [source[i] for i in range(len(source))]
    assert [record.name for record in records] == ["images/0.png", "images/2.png", "images/3.png"]
    assert [record.captions for record in records] == [tuple(lines[i]["captions"]) for i in (0, 2, 3)]
    assert [record.specific for record in records] == [1, 2, 1]
    assert records[0].image_group == records[1].image_group != records[2].image_group
    assert records[0].fields == {"split": "train", "n_names": 1, "pixel_id": "x", "colour": "red"}
    assert records[0].image == (tmp_path / "images/0.png").read_bytes()
    (held_out,) = (record for record in FolderSource(tmp_path, FolderConfig(), "eval"))
    assert held_out.name == "images/1.png"
    assert pickle.loads(pickle.dumps(source))[1] == records[1]


def test_other_field_names(tmp_path):
    write(tmp_path, [entry(0, part="a", names=1, same=7), entry(1, part="b", names=2), entry(2, part="a", same=7)])
    config = FolderConfig(
        split_field="part", train_split="a", eval_split="b", specific_field="names", duplicate_field="same"
    )
    source = FolderSource(tmp_path, config, "train")
    assert [record.specific for record in source] == [1, 2]
    assert source[0].image_group == source[1].image_group
    no_fields = FolderSource(tmp_path, FolderConfig(specific_field=None, duplicate_field=None), "train")
    assert [record.specific for record in no_fields] == [2, 2, 2]
    assert len({record.image_group for record in no_fields}) == 3


def test_held_out_by_hash(tmp_path):
    lines = [{key: value for key, value in entry(i).items() if key != "split"} for i in range(400)]
    write(tmp_path, lines)
    config = FolderConfig(eval_fraction=0.25)
    train, held_out = ([r.name for r in FolderSource(tmp_path, config, split)] for split in ("train", "eval"))
    assert sorted(train + held_out) == sorted(line["image"] for line in lines)
    assert abs(len(held_out) - 100) < 4 * np.sqrt(400 * 0.25 * 0.75)
    write(tmp_path, lines[::-1][:200])
    assert {r.name for r in FolderSource(tmp_path, config, "eval")} <= set(held_out)


def test_evaluation_data_of_its_own_is_taken_whole(tmp_path):
    lines = [{key: value for key, value in entry(i).items() if key != "split"} for i in range(60)]
    write(tmp_path, lines)
    (tmp_path / "captions.jsonl").rename(tmp_path / "other.jsonl")
    write(tmp_path, lines)
    for split, size in (("train", 60), ("eval", 60)):
        config = DataConfig(path=str(tmp_path), eval_path=str(tmp_path / "other.jsonl"))
        assert len(build_source(config, split, 16)) == size
    with pytest.raises(ConfigError, match=r"data.eval_path: .*nowhere"):
        build_source(DataConfig(path=str(tmp_path), eval_path=str(tmp_path / "nowhere")), "eval", 16)


@pytest.mark.parametrize("columns", [("image", "captions"), ("filepath", "title"), ("image", "caption")])
def test_tables(tmp_path, columns):
    write(tmp_path, [entry(0), entry(1)])
    (tmp_path / "list.csv").write_text(f'{",".join(columns)}\nimages/0.png,"a dog, running"\nimages/1.png,b\n')
    source = FolderSource(tmp_path / "list.csv", FolderConfig(eval_fraction=1e-9), "train")
    assert [record.captions for record in source] == [("a dog, running",), ("b",)]
    (tmp_path / "list.csv").write_text(f"{','.join(columns)}\nimages/0.png,a,b\n")
    with pytest.raises(ConfigError, match=r"list.csv, line 2: expected 2 cells, as in the first line"):
        FolderSource(tmp_path / "list.csv", FolderConfig(), "train")
    (tmp_path / "list.csv").write_text("picture,words\nimages/0.png,a\n")
    columns = FieldsConfig(image=("picture",), captions=("word",))
    with pytest.raises(ConfigError, match=r"line 2: no field 'word'; there are: picture, words"):
        FolderSource(tmp_path / "list.csv", FolderConfig(), "train", columns)


@pytest.mark.parametrize(("split", "other"), [("train", "eval"), ("eval", "train")])
def test_records_of_named_kinds_are_left_out_of_one_split_only(tmp_path, caplog, split, other):
    kinds = [(name, kind) for name in ("train", "val") for kind in ("flag", "animal", "food")]
    write(tmp_path, [entry(i, split=name, kind=kind) for i, (name, kind) in enumerate(kinds)])
    config = FolderConfig(**{f"{split}_exclude": {"kind": ("flag", "food")}})
    [left] = FolderSource(tmp_path, config, split)
    assert left.fields["kind"] == "animal"
    assert len(FolderSource(tmp_path, config, other)) == 3
    assert len(FolderSource(tmp_path, FolderConfig(**{f"{split}_exclude": {"kinds": ("flag",)}}), split)) == 3
    assert f"{split}_exclude: no record of" in caplog.text
    assert "has a field 'kinds', nothing is excluded" in caplog.text
    with pytest.raises(ConfigError, match=rf"{split}_exclude leaves out all of the {split} split"):
        FolderSource(tmp_path, FolderConfig(**{f"{split}_exclude": {"kind": ("flag", "food", "animal")}}), split)


def test_eval_exclude(tmp_path, caplog):
    write(
        tmp_path,
        [
            entry(i, split=split, kind=kind)
            for i, (split, kind) in enumerate([("train", "flag"), ("val", "flag"), ("val", "animal"), ("val", "food")])
        ],
    )
    config = FolderConfig(eval_exclude={"kind": ("flag", "food")})
    assert [r.name for r in FolderSource(tmp_path, config, "eval")] == ["images/2.png"]
    assert len(FolderSource(tmp_path, config, "train")) == 1
    assert len(FolderSource(tmp_path, FolderConfig(eval_exclude={"kinds": ("flag",)}), "eval")) == 3
    assert "has a field 'kinds', nothing is excluded" in caplog.text
    with pytest.raises(
        ConfigError, match=r"eval_exclude leaves out all of the eval split 'val'; splits are 'train' .1 re"
    ):
        FolderSource(tmp_path, FolderConfig(eval_exclude={"kind": ("flag", "food", "animal")}), "eval")


def test_fingerprint(tmp_path):
    lines = [entry(0), entry(1), entry(2, split="val")]
    write(tmp_path, lines)

    def now():
        return fingerprint(FolderSource(tmp_path, FolderConfig(), "train").identity())

    first = now()
    assert now() == first
    write(tmp_path, [entry(0), entry(1), entry(2, split="val", captions=["other"])])
    assert now() == first
    with (tmp_path / "images/1.png").open("ab") as stream:
        stream.write(b"x")
    grown = now()
    write(tmp_path, [entry(0), entry(1, captions=["other"]), entry(2, split="val")])
    assert len({first, grown, now()}) == 3


def test_blank_lines_and_line_ends(tmp_path):
    write(tmp_path, [entry(0), entry(1)])
    file = tmp_path / "captions.jsonl"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n") + b"\n  \n\n")
    assert len(FolderSource(tmp_path, FolderConfig(), "train")) == 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"image": "images/0.png", ', "not valid JSON (Expecting property name"),
        ("[" * 100_000, "not valid JSON ("),
        ("3", "expected a JSON object, got 3"),
        ({"captions": ["a"]}, "field 'image' is missing."),
        ({"image": "images/0.png", "capture": ["a"]}, "field 'captions' is missing. Did you mean 'capture'?"),
        (entry(0, captions="a cat"), "captions is 'a cat', expected a list of strings"),
        (entry(0, captions={"a": 1}), "captions is {'a': 1}, expected a list of strings"),
        (entry(0, captions=[]), "captions is an empty list, expected at least one caption"),
        (entry(0, captions=["a", " \t"]), r"captions[1] is ' \t', expected text"),
        (entry(0, captions=["a", "b", 7]), "captions[2] is 7, expected a string"),
        (entry(0, captions=["a \ud800"]), "captions[0] has half of a surrogate pair"),
        (entry(0) | {"image": 5}, "image is 5, expected a path as a string"),
        (json.dumps(entry(0) | {"image": "images/no.png"}), "image 'images/no.png' is not a file in "),
        (json.dumps(entry(0) | {"image": "no/0.png"}), "image 'no/0.png' is not a file in "),
        (json.dumps(entry(0) | {"image": "images"}), "image 'images' is not a file in "),
        (json.dumps(entry(0) | {"image": ""}), "image '' is not a file in "),
        (json.dumps(entry(0) | {"image": "a\0b/c"}), r"image 'a\x00b/c' is not a file in "),
        (json.dumps(entry(0) | {"image": "/etc/hostname"}), "image '/etc/hostname' must be a path inside the folder"),
        (json.dumps(entry(0) | {"image": "images/../../x"}), "image 'images/../../x' must be a path inside the folder"),
        (entry(0, n_names=0), "n_names is 0, expected a whole number from 1 to 2, the number of captions"),
        (entry(0, n_names=3), "n_names is 3, expected a whole number from 1 to 2"),
        (entry(0, n_names=1.0), "n_names is 1.0, expected a whole number from 1 to 2"),
        (entry(0, n_names=True), "n_names is True, expected a whole number from 1 to 2"),
        (entry(0, n_names=None), "n_names is None, expected a whole number from 1 to 2"),
        (entry(0, split=None), "split is None, expected a string"),
        (
            {"image": "images/0.png", "captions": ["a"]},
            "no field 'split' while the lines before have one; expected all or none",
        ),
    ],
)
def test_bad_line(tmp_path, bad, message):
    write(tmp_path, [entry(0), entry(1), bad, entry(2)])
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'captions.jsonl'}, line 3: {message}")):
        FolderSource(tmp_path, FolderConfig(), "train")


def test_other_bad_files(tmp_path):
    def refused(message):
        return pytest.raises(ConfigError, match=message)

    with refused("data.path: '.*nowhere' is neither a folder nor a file that ends in .jsonl, .csv, .tsv"):
        FolderSource(tmp_path / "nowhere", FolderConfig(), "train")
    with refused("data.path: .*captions.jsonl does not exist; expected a list of images"):
        FolderSource(tmp_path, FolderConfig(), "train")
    file = tmp_path / "captions.jsonl"
    for text in ("", "\n \n"):
        file.write_text(text)
        with refused("captions.jsonl is empty; expected one record a line"):
            FolderSource(tmp_path, FolderConfig(), "train")
    file.write_bytes(b'{"image": "\xff"}\n')
    with refused("line 1: not UTF-8 .*0xff"):
        FolderSource(tmp_path, FolderConfig(), "train")
    write(tmp_path, [entry(0), "", entry(1)])
    with refused("line 2: blank line between records"):
        FolderSource(tmp_path, FolderConfig(), "train")
    write(tmp_path, [{"image": "images/0.png", "captions": ["a"]}, entry(1)])
    with refused("line 2: a field 'split' while the lines before have none; expected all or none"):
        FolderSource(tmp_path, FolderConfig(), "train")
    write(tmp_path, [entry(0), entry(1), entry(2, split="test")])
    with refused(r"no record is in the eval split 'val'; splits are 'test' \(1 records\), 'train' \(2 records\)"):
        FolderSource(tmp_path, FolderConfig(), "eval")


def test_symbolic_links(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    outside.mkdir()
    write(outside, [entry(0)])
    root.mkdir()
    write(root, [entry(0)])
    lines = {
        "images/inside.png": root / "images/0.png",
        "images/file.png": outside / "images/0.png",
        "directory/0.png": None,
        "images/nothing.png": root / "gone.png",
        "images/loop.png": root / "images/loop.png",
    }
    for name, target in lines.items():
        if target is not None:
            (root / name).symlink_to(target)
    (root / "directory").symlink_to(outside / "images")
    (tmp_path / "link").symlink_to(root)

    def load(image):
        (root / "captions.jsonl").write_text(json.dumps(entry(0) | {"image": image}))
        return FolderSource(tmp_path / "link", FolderConfig(), "train")

    assert load("images/inside.png")[0].image == (root / "images/0.png").read_bytes()
    for image in ("images/file.png", "directory/0.png"):
        with pytest.raises(
            ConfigError, match=f"line 1: image '{image}' leads out of the folder through a symbolic link"
        ):
            load(image)
    for image in ("images/nothing.png", "images/loop.png"):
        with pytest.raises(ConfigError, match=f"line 1: image '{image}' is not a file in "):
            load(image)


def test_reading_is_bounded(tmp_path):
    write(tmp_path, [entry(0), entry(1)])
    source = FolderSource(tmp_path, FolderConfig(), "train")
    os.truncate(tmp_path / "images/0.png", 64 * 2**20 + 1)
    with pytest.raises(BadSample, match=r"images/0.png: file of 67108865 bytes is larger than 67108864"):
        source[0]
    (tmp_path / "images/1.png").unlink()
    with pytest.raises(FileNotFoundError):
        source[1]
    with pytest.raises(IndexError):
        source[2]


def test_emoji():
    path = SHARED / "emoji"
    if not path.is_dir():
        pytest.skip(f"no data in {path}")
    started = time.process_time()
    train = FolderSource(path, FolderConfig(), "train")
    assert time.process_time() - started < 2
    held_out = FolderSource(path, FolderConfig(eval_exclude={"category": ("Flags",)}), "eval")
    assert len(train) == 6867
    lines = [json.loads(line) for line in (path / "captions.jsonl").open(encoding="utf-8")]
    kept = [line for line in lines if line["split"] == "val" and line["category"] != "Flags"]
    assert [held_out[i].name for i in range(len(held_out))] == [line["image"] for line in kept]
    record = held_out[len(kept) // 2]
    assert record.specific == kept[len(kept) // 2]["n_names"] and record.fields["vendor"] == "openmoji"
    assert open_picture(record.image).decode(1.0).shape == (64, 64, 3)
    assert any(line["category"] == "Flags" for line in lines)


def test_coco_photos():
    path = SHARED / "coco_photos"
    if not path.is_dir():
        pytest.skip(f"no data in {path}")
    source = FolderSource(path, FolderConfig(eval_split="test"), "eval")
    assert len(source) == 125
    for record in (source[i] for i in range(0, 125, 25)):
        assert record.specific == len(record.captions) == 5
        with Image.open(path / record.name) as image:
            np.testing.assert_array_equal(open_picture(record.image).decode(1.0), np.asarray(image.convert("RGB")))
