"""Evaluation sets: CLIP_benchmark's layout against its own writer and reader, and any other format as a whole."""

import dataclasses
import io
import json
import pickle
import random
import tarfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import fsspec
import numpy as np
import pytest
from data_formats import SIZE, data_configs, samples
from oracles import import_open_clip
from PIL import Image

from llip_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    EvalConfig,
    EvalSetConfig,
    FieldsConfig,
    FolderConfig,
    ModelConfig,
    ToyWorldConfig,
)
from llip_jax.data.evaluation_sets import EvalSet, build_eval_set, label_names
from llip_jax.data.records import BadSample, Record
from llip_jax.data.sources import build_source

CLASSES = ("red fox", "crane", "crane", "Ärmelkanal")
TEMPLATES = ("a photo of a {c}.", "{c}", "{c} and {c}")


def eval_set(index_dir: Path, **fields: Any) -> EvalSet:
    sets = {"photos": EvalSetConfig(**fields)}
    return build_eval_set(Config(data=DataConfig(index_dir=str(index_dir)), eval=EvalConfig(sets=sets)), "photos")


def picture(kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng().integers(0, 256, (random.randrange(3, 9), 5, 3), np.uint8)
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def write(
    folder: Path, members: Sequence[Mapping[str, bytes]], *, split: str = "test", each: int = 3, **texts: str
) -> str:
    """A data set by hand; ``texts`` are the files beside the shards."""
    (folder / split).mkdir(parents=True)
    starts = range(0, len(members), each)
    for number, start in enumerate(starts):
        with tarfile.open(folder / split / f"{number}.tar", "w") as archive:
            for index, sample in enumerate(members[start : start + each], start):
                for extension, data in sample.items():
                    info = tarfile.TarInfo(f"s{index:07d}.{extension}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    (folder / split / "nshards.txt").write_text(f"{len(starts)}\n")
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return str(folder)


# Against CLIP_benchmark


class Pairs(list[tuple[bytes, Any]]):
    """What CLIP_benchmark converts."""

    classes: Sequence[str] = ()
    templates: Sequence[str] = ()


def labels(kind: str) -> Any:
    rng = np.random.default_rng()
    if kind == "retrieval":
        return [f"caption {i}, {rng.integers(1000)} é\tand so on" for i in range(rng.integers(1, 6))]
    if kind == "multilabel":
        import torch

        return torch.tensor(rng.integers(0, 2, len(CLASSES)).astype(np.float32))
    return int(rng.integers(len(CLASSES)))


@pytest.fixture(scope="module")
def clip_benchmark() -> ModuleType:
    pytest.importorskip("webdataset")
    import_open_clip()  # so that torchvision can be imported, which clip_benchmark does
    module = pytest.importorskip("clip_benchmark.webdataset_builder", exc_type=ImportError)
    assert isinstance(module, ModuleType)
    return module


@pytest.mark.parametrize("image_format", ["webp", "png", "jpg"])
@pytest.mark.parametrize("kind", ["classification", "multilabel", "retrieval"])
def test_reads_what_clip_benchmark_writes_as_it_does(
    clip_benchmark: ModuleType, kind: str, image_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = clip_benchmark.torch.utils.data.DataLoader
    monkeypatch.setattr(
        clip_benchmark.torch.utils.data, "DataLoader", lambda *a, **k: loader(*a, **(k | {"num_workers": 0}))
    )
    encoding = image_format.replace("jpg", "jpeg")
    splits = {}
    for split, size in (("train", 5), ("test", 13)):
        pairs = splits[split] = Pairs((picture(encoding), labels(kind)) for _ in range(size))
        pairs.classes, pairs.templates = CLASSES, TEMPLATES
        arguments = {"image_format": image_format, "max_count": 4, "verbose": False}
        if kind == "retrieval":
            clip_benchmark.convert_retrieval_dataset(pairs, split, str(tmp_path), **arguments)
        else:
            clip_benchmark.convert_dataset(pairs, split, str(tmp_path), multilabel=kind == "multilabel", **arguments)

    found = eval_set(tmp_path / "index", source="clip_benchmark", path=str(tmp_path))
    if kind == "retrieval":
        assert found[2:] == (None, None, None, None)
        read = {"test": found.source}
    else:
        assert found.label_field == "cls" and found.train is not None
        read = {"test": found.source, "train": found.train()}

    from clip_benchmark.datasets.builder import build_wds_dataset

    for split, source in read.items():
        theirs = build_wds_dataset("photos", np.asarray, split, str(tmp_path))
        assert found.class_names == (theirs.classes and tuple(theirs.classes))
        if theirs.templates is not None:
            assert found.templates is not None
            one = [template.format(c="grey seal") for template in theirs.templates]
            assert one == [template.replace("{}", "grey seal") for template in found.templates]
        assert len(source) == len(splits[split])
        records = [source[i] for i in range(len(source))]
        for record, (image, label), (data, _) in zip(records, theirs, splits[split], strict=True):
            assert record.image == data
            with Image.open(io.BytesIO(data)) as decoded:
                np.testing.assert_array_equal(np.asarray(decoded.convert("RGB")), image)
            if kind == "retrieval":
                assert list(record.captions) == label and record.specific == len(label)
            else:
                assert record.captions == record.kinds == ()
                expected = np.flatnonzero(label).tolist() if kind == "multilabel" else [label]
                assert list(label_names(record, "cls")) == expected


# The layout, by hand


def members(number: int = 7) -> list[dict[str, bytes]]:
    return [{"png": picture(), "cls": str(random.randrange(4)).encode()} for _ in range(number)]


@pytest.mark.parametrize("number", [1, 3, 31])
def test_shards_are_read_in_order_of_their_numbers(number: int, tmp_path: Path) -> None:
    chosen = members(number)
    found = eval_set(tmp_path / "i", source="clip_benchmark", path=write(tmp_path / "a", chosen, each=2) + "/")
    assert [found.source[i].image for i in range(len(found.source))] == [sample["png"] for sample in chosen]
    assert [found.source[i].fields["cls"] for i in range(number)] == [int(sample["cls"]) for sample in chosen]
    assert (found.class_names, found.templates, found.train) == (None, None, None)
    assert found.source[0].name == "0.tar/s0000000"


def test_reads_remote_folders(tmp_path: Path) -> None:
    chosen = members()
    write(tmp_path / "a", chosen, classnames="\n".join(CLASSES) + "\n")
    storage = fsspec.filesystem("memory")
    url = f"/{random.randrange(10**9)}"
    for file in (tmp_path / "a").rglob("*.t*"):
        storage.pipe_file(f"{url}/{file.relative_to(tmp_path / 'a')}", file.read_bytes())
    found = eval_set(tmp_path / "i", source="clip_benchmark", path=f"memory:/{url}")
    assert [found.source[i].image for i in range(7)] == [sample["png"] for sample in chosen]
    assert found.class_names == CLASSES


def test_sources_of_evaluation_sets_can_be_pickled(tmp_path: Path) -> None:
    found = eval_set(tmp_path / "i", source="clip_benchmark", path=write(tmp_path / "a", members()))
    again = pickle.loads(pickle.dumps(found))
    assert [again.source[i] for i in range(7)] == [found.source[i] for i in range(7)]


def test_trains_on_one_split_of_a_retrieval_set_and_evaluates_on_the_other(tmp_path: Path) -> None:
    parts = {
        split: [{"png": picture(), "txt": f"{split} {i}\n\nsecond {i}".encode()} for i in range(size)]
        for split, size in (("train", 20), ("test", 6))
    }
    for split, part in parts.items():
        path = write(tmp_path / "a", part, split=split, dataset_type="retrieval\n")
    config = DataConfig(source="clip_benchmark", path=path, index_dir=str(tmp_path / "i"))
    for split, name in (("train", "train"), ("eval", "test")):
        source = build_source(config, split, 16)  # type: ignore[arg-type]
        assert len(source) == len(parts[name])
        assert [source[i].captions for i in range(len(source))] == [
            (f"{name} {i}", f"second {i}") for i in range(len(source))
        ]
        assert source[0].kinds == ("txt", "txt")
    own = build_eval_set(Config(data=config, eval=EvalConfig()), "")
    assert len(own.source) == 6 and own.train is not None and len(own.train()) == 20


def test_classification_sets_are_not_to_train_on(tmp_path: Path) -> None:
    path = write(tmp_path / "a", members(), split="train")
    config = DataConfig(source="clip_benchmark", path=path, index_dir=str(tmp_path / "i"))
    with pytest.raises(ConfigError, match=r"data.path: .* is a classification set, which has no captions to train on"):
        build_source(config, "train", 16)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "test" / "nshards.txt").unlink(), "there is no file '.*/test/nshards.txt'; expected"),
        (lambda folder: (folder / "test").rename(folder / "val"), "there is no file '.*/test/nshards.txt'; expected"),
        (lambda folder: (folder / "test" / "1.tar").unlink(), r"no file '.*/test/1.tar', but .* 3 shards \(1 are miss"),
        (lambda folder: (folder / "test" / "nshards.txt").write_text("three"), "says 'three', expected the number"),
        (lambda folder: (folder / "test" / "nshards.txt").write_text("0"), "says '0', expected the number"),
        (lambda folder: (folder / "test" / "nshards.txt").write_text("9" * 5000), "says '9+', expected the number"),
        (lambda folder: (folder / "classnames.txt").write_text("a\n\nb\n"), "classnames.txt, line 2 is blank"),
        (lambda folder: (folder / "classnames.txt").write_text("\n"), "classnames.txt, line 1 is blank"),
        (lambda folder: (folder / "classnames.txt").write_bytes(b"a\n\xff\n"), "classnames.txt cannot be read: 'utf-8"),
        (
            lambda folder: (folder / "zeroshot_classification_templates.txt").write_text("a {c}\na {}\n"),
            r"templates.txt, line 2: 'a \{\}' has no '\{c\}'",
        ),
        (
            lambda folder: (folder / "dataset_type.txt").write_text("retreival"),
            "says 'retreival', expected .* Did you mean 'retrieval'",
        ),
    ],
)
def test_folders_that_are_not_as_clip_benchmark_writes_them(
    spoil: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "a", members())
    spoil(tmp_path / "a")
    with pytest.raises(ConfigError, match=f"eval.sets.photos.path: .*{message}"):
        eval_set(tmp_path / "i", source="clip_benchmark", path=path)


def test_classes_that_cannot_be_are_bad_samples(tmp_path: Path) -> None:
    wrong = [b"4", b"-1", b"red fox", b"", b"1" * 5000, b"\xb2", b"1.0"]
    chosen = [{"png": picture(), "cls": b"3\n"}, *({"png": picture(), "cls": label} for label in wrong), {"png": b"0"}]
    found = eval_set(
        tmp_path / "i", source="clip_benchmark", path=write(tmp_path / "a", chosen, classnames="\n".join(CLASSES))
    )
    assert found.source[0].fields["cls"] == 3
    for index in range(1, len(chosen)):
        with pytest.raises(BadSample, match="class") as caught:
            found.source[index]
        assert caught.value.reason == "bad_metadata"


def test_arrays_of_classes_are_never_unpickled_or_believed(tmp_path: Path) -> None:
    good = npy(np.array([1.0, 0, 0, 1], np.float32))
    lie = good.replace(b"(4,)", b"(9999999999999,)")
    assert lie != good
    damaged = [good[: random.randrange(len(good))] for _ in range(20)]
    damaged += [bytes(b ^ random.randrange(256) * (random.random() < 0.1) for b in good) for _ in range(200)]
    wrong = [
        npy(np.array([1, 0, 0])), npy(np.array(3)), npy(np.array([[1, 0, 0, 1]])), npy(np.array([0.5, 0, 0, 0])),
        npy(np.array([np.nan, 0, 0, 0])), npy(np.array(["a", "b", "c", "d"])), b"", lie, npy(np.zeros(2**18)),
        npy(np.array([Exploding(), 0, 0, 0], object)), pickle.dumps(Exploding()), b"PK\x03\x04",
    ]  # fmt: skip
    chosen = [{"png": picture(), "npy": data} for data in (good, *wrong, *damaged)]
    texts = {"classnames": "\n".join(CLASSES), "dataset_type": "multilabel"}
    found = eval_set(tmp_path / "i", source="clip_benchmark", path=write(tmp_path / "a", chosen, each=500, **texts))
    assert found.source[0].fields["cls"] == [0, 3]
    for index in range(1, 1 + len(wrong)):
        with pytest.raises(BadSample, match="class") as caught:
            found.source[index]
        assert caught.value.reason == "bad_metadata"
    for index in range(1 + len(wrong), len(chosen)):
        with suppress(BadSample):
            assert set(found.source[index].fields["cls"]) <= {0, 1, 2, 3}


class Exploding:
    def __reduce__(self) -> Any:
        return pytest.fail, ("unpickled",)


def test_captions_that_are_not_utf8(tmp_path: Path) -> None:
    chosen = [{"png": picture(), "txt": text} for text in (b"one\r\ntwo", b"\xff", b" \n")] + [{"png": picture()}]
    path = write(tmp_path / "a", chosen, dataset_type="Retrieval")
    source = eval_set(tmp_path / "i", source="clip_benchmark", path=path).source
    assert source[0].captions == ("one", "two")
    for index, reason in ((1, "caption_not_utf8"), (2, "empty_caption"), (3, "missing_caption")):
        with pytest.raises(BadSample) as caught:
            source[index]
        assert caught.value.reason == reason


# Other formats


@pytest.mark.parametrize(
    "name", ["folder", "csv", "tsv", "webdataset", "huggingface", "img2dataset", "array_record", "tfds"]
)
def test_named_sets_are_all_samples_of_their_path(name: str) -> None:
    config = data_configs()[name]
    fields = {field: getattr(config, field) for field in ("source", "path", "fields", "folder", "tfds")}
    found = eval_set(Path(config.index_dir or "."), label_field="label", **fields)
    images = {sample.image: sample.captions for sample in samples()}
    records = [found.source[i] for i in range(len(found.source))]
    assert len(records) == (7 if name == "tfds" else SIZE)  # which has a split for evaluation
    assert all(record.captions[0] == images[record.image][0] for record in records)  # type: ignore[index]
    assert (found.name, found.label_field, found.train, found.class_names) == ("photos", "label", None, None)


def test_toyworld_as_a_named_set() -> None:
    found = eval_set(Path("."), source="toyworld", toyworld=ToyWorldConfig(eval_size=5, seed=9), label_field="shape")
    assert len(found.source) == 5 and found.source[0].name == "toyworld/eval/0"
    assert label_names(found.source[0], "shape") == (found.source[0].fields["shape"],)


def write_list(folder: Path, entries: Sequence[Mapping[str, Any]], name: str = "captions.jsonl") -> str:
    folder.mkdir()
    for index, entry in enumerate(entries):
        (folder / entry.get("image", f"{index}.png")).write_bytes(picture())
    (folder / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(folder)


def test_folders_with_splits_are_evaluated_on_the_evaluation_split(tmp_path: Path) -> None:
    splits = [random.choice(("train", "test")) for _ in range(20)] + ["train", "test"]
    entries = [{"image": f"{i}.png", "captions": ["x"], "split": split} for i, split in enumerate(splits)]
    found = eval_set(
        tmp_path, source="folder", path=write_list(tmp_path / "a", entries), folder=FolderConfig(eval_split="test")
    )
    assert len(found.source) == splits.count("test")


def test_records_of_folders_may_lack_captions_in_named_sets(tmp_path: Path) -> None:
    entries: list[dict[str, Any]] = [
        {"image": "0.png", "label": "a"},
        {"image": "1.png", "captions": [], "label": "b"},
        {"image": "2.png", "captions": ["a", "b"], "n_names": 1},
    ]
    path = write_list(tmp_path / "a", entries)
    found = eval_set(tmp_path, source="folder", path=path, label_field="label")
    records = [found.source[i] for i in range(3)]
    assert [record.captions for record in records] == [(), (), ("a", "b")]
    assert [record.specific for record in records] == [0, 0, 1]
    assert [label_names(record, "label") for record in records] == [("a",), ("b",), ()]
    with pytest.raises(ConfigError, match="line 1: field 'captions' is missing"):
        build_source(DataConfig(source="folder", path=path, eval_path=path), "train", 16)
    with pytest.raises(ConfigError, match="line 1: no field 'texts'"):
        eval_set(tmp_path, source="folder", path=path, fields=FieldsConfig(captions=("texts",)))

    table = tmp_path / "a" / "list.csv"
    table.write_text("filepath,label\n0.png,a\n1.png,b\n")
    found = eval_set(tmp_path, source="folder", path=str(table), label_field="label")
    assert [label_names(found.source[i], "label") for i in range(2)] == [("a",), ("b",)]


def test_shards_may_lack_captions_in_named_sets_unless_they_are_named(tmp_path: Path) -> None:
    chosen = [{"png": picture(), "json": json.dumps({"kind": f"k{i}"}).encode()} for i in range(5)]
    write(tmp_path / "a", chosen)
    fields = {"source": "webdataset", "path": f"{tmp_path}/a/test/*.tar"}
    found = eval_set(tmp_path / "i", label_field="json.kind", **fields)
    assert [found.source[i].captions for i in range(5)] == [()] * 5
    assert [label_names(found.source[i], "json.kind") for i in range(5)] == [(f"k{i}",) for i in range(5)]
    with pytest.raises(ConfigError, match=r"eval.sets.photos.fields.captions: none of the first samples has .*'txt'"):
        eval_set(tmp_path / "i", fields=FieldsConfig(captions=("txt",)), **fields)
    with pytest.raises(ConfigError, match=r"data.fields.captions: none of the first samples has a column 'txt'"):
        build_source(DataConfig(index_dir=str(tmp_path / "i"), **fields), "train", 16)


def test_the_runs_own_set(tmp_path: Path) -> None:
    data = DataConfig(source="toyworld", toyworld=ToyWorldConfig(train_size=4, eval_size=3), label_field="class_name")
    config = Config(data=data, model=ModelConfig(image_size=32))
    own = build_eval_set(config, "")
    assert own.source == dataclasses.replace(build_source(data, "eval", 32), parts=own.source.parts)  # type: ignore[attr-defined]
    assert [record.name for record in map(own.source.__getitem__, range(3))] == [f"toyworld/eval/{i}" for i in range(3)]
    assert own.train is not None and [own.train()[i].name for i in range(4)] == [
        f"toyworld/train/{i}" for i in range(4)
    ]
    assert (own.name, own.label_field, own.class_names, own.templates) == ("", "class_name", None, None)


def test_unknown_sets_are_told() -> None:
    sets = {"imagenet": EvalSetConfig(source="toyworld")}
    with pytest.raises(ConfigError, match=r"eval.sets has no 'imagnet'. Did you mean 'imagenet'"):
        build_eval_set(Config(eval=EvalConfig(sets=sets)), "imagnet")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("cat", ("cat",)),
        (b"cat\xc3\xa9", ("caté",)),
        (3, (3,)),
        (np.int64(3), (3,)),
        (np.array(3), (3,)),
        (["cat", b"dog", 5], ("cat", "dog", 5)),
        (("cat",), ("cat",)),
        (np.array([1, 2], np.int32), (1, 2)),
        (np.array([b"cat"]), ("cat",)),
        ([], ()),
        (2.5, ("2.5",)),
        (True, ("True",)),
        (None, ()),
    ],
)
def test_labels_are_names_or_numbers_one_or_several(value: Any, expected: tuple[str | int, ...]) -> None:
    record = Record(b"", (), (), 0, "", "a", {"label": value, "nested": {"label": value}})
    for field in ("label", "nested.label"):
        found = label_names(record, field)
        assert found == expected and list(map(type, found)) == list(map(type, expected))
    assert label_names(record, "other") == ()


@pytest.mark.parametrize("value", ["", " ", b"\n", ["cat", ""]])
def test_blank_labels_are_refused(value: Any) -> None:
    record = Record(b"", (), (), 0, "", "sample 7", {"label": value})
    with pytest.raises(
        ConfigError, match=r"eval.sets.a.label_field: the 'label' of sample 7 is blank, expected a class"
    ):
        label_names(record, "label", "eval.sets.a.label_field")
