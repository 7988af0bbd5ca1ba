"""The same small data in every format that the framework reads."""

import csv
import functools
import io
import json
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from run_helpers import temporary_folder
from tiny_captions.tiny_captions_dataset_builder import Builder

from llip_jax.config import DataConfig, FieldsConfig, FolderConfig, PartConfig, TfdsConfig, ToyWorldConfig
from llip_jax.data.formats.array_records import encode_record
from llip_jax.data.records import Record

SIZE = 45
"""Samples of each."""


@dataclass(frozen=True)
class Sample:
    """A picture with captions, and a label."""

    key: str
    image: bytes
    captions: tuple[str, ...]
    label: int


@functools.cache
def samples(size: int = SIZE) -> tuple[Sample, ...]:
    """JPEGs of several sizes, each with one to three captions."""
    rng = np.random.default_rng(99)
    result = []
    for index in range(size):
        height, width = (int(side) for side in rng.integers(20, 70, 2))
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
        buffer = io.BytesIO()
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        captions = tuple(f"Picture {index} of {height} by {width}, number {i}" for i in range(1 + index % 3))
        result.append(Sample(f"{index:09d}", buffer.getvalue(), captions, index % 5))
    return tuple(result)


def write_tars(folder: Path, chosen: tuple[Sample, ...] = samples(), each: int = 16) -> str:
    """Shards in img2dataset's layout with all captions in the JSON; the pattern that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = range(0, len(chosen), each)
    for shard, start in enumerate(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for sample in chosen[start : start + each]:
                metadata = {"caption": sample.captions, "label": sample.label, "url": "http://example.org/a.jpg"}
                members = {
                    "jpg": sample.image,
                    "txt": sample.captions[0].encode(),
                    "json": json.dumps(metadata).encode(),
                }
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{sample.key}.{extension}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return f"{folder}/{{00000..{len(shards) - 1:05d}}}.tar"


def write_list(folder: Path, name: str) -> str:
    """Pictures in a folder and captions.jsonl, or OpenCLIP's table of the first captions; the list's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for sample in samples():
        (folder / f"{sample.key}.jpg").write_bytes(sample.image)
    if name.endswith(".jsonl"):
        lines = [
            json.dumps({"image": f"{s.key}.jpg", "captions": s.captions, "split": "train", "label": s.label}) + "\n"
            for s in samples()
        ]
        (folder / name).write_text("".join(lines))
        return str(folder)
    with (folder / name).open("w", newline="") as stream:
        table = csv.writer(stream, delimiter="\t" if name.endswith(".tsv") else ",")
        table.writerow(["filepath", "title", "split"])
        table.writerows([f"{s.key}.jpg", s.captions[0], "train"] for s in samples())
    return str(folder / name)


def write_parquet(folder: Path, layout: str) -> str:
    """Two files in Hugging Face's or img2dataset's layout; the pattern that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate((samples()[:20], samples()[20:])):
        captions = [list(s.captions) for s in part]
        if layout == "huggingface":
            images = [{"bytes": s.image, "path": f"{s.key}.jpg"} for s in part]
            table = pa.table({"image": images, "captions": captions, "label": [s.label for s in part]})
        else:
            table = pa.table({"jpg": [s.image for s in part], "caption": captions, "key": [s.key for s in part]})
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=6)
    return f"{folder}/*.parquet"


def write_array_records(folder: Path) -> str:
    """Two shards; the pattern that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate((samples()[:30], samples()[30:])):
        writer = ArrayRecordWriter(str(folder / f"train-{number:05d}-of-00002.array_record"), "group_size:1")
        for s in part:
            kinds = ("captions",) * len(s.captions)
            record = Record(s.image, s.captions, kinds, len(s.captions), f"content:{s.key}", s.key, {"label": s.label})
            writer.write(encode_record(record))
        writer.close()
    return f"{folder}/*.array_record"


@functools.cache
def data_configs() -> dict[str, DataConfig]:
    """The data written once in every format, and what names it in a configuration."""
    root = temporary_folder()
    Builder(data_dir=str(root / "tfds"), file_format="array_record", rows=tuple(samples())).download_and_prepare()
    configs = {
        "toyworld": DataConfig(source="toyworld", toyworld=ToyWorldConfig(train_size=SIZE, eval_size=7)),
        "folder": DataConfig(source="folder", path=write_list(root / "folder", "captions.jsonl")),
        "csv": DataConfig(source="folder", path=write_list(root / "csv", "list.csv")),
        "tsv": DataConfig(source="folder", path=write_list(root / "tsv", "list.tsv")),
        "webdataset": DataConfig(
            source="webdataset",
            path=write_tars(root / "tars"),
            fields=FieldsConfig(captions=("json.caption",)),
            index_dir=str(root / "index"),
        ),
        "huggingface": DataConfig(source="parquet", path=write_parquet(root / "huggingface", "huggingface")),
        "img2dataset": DataConfig(source="parquet", path=write_parquet(root / "img2dataset", "img2dataset")),
        "array_record": DataConfig(source="array_record", path=write_array_records(root / "array_record")),
        "tfds": DataConfig(source="tfds", path="tiny_captions", tfds=TfdsConfig(data_dir=str(root / "tfds"))),
    }
    for name in configs:
        configs[name] = replace(configs[name], folder=FolderConfig(eval_split="train"))
    parts = {
        "tars": PartConfig(weight=3.0, **_source_fields(configs["webdataset"])),
        "table": PartConfig(weight=1.5, **_source_fields(configs["huggingface"])),
        "toys": PartConfig(weight=0.5, **_source_fields(configs["toyworld"])),
    }
    configs["mixture"] = DataConfig(mixture=parts, index_dir=str(root / "index"))
    return configs


def _source_fields(config: DataConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("source", "path", "fields", "toyworld")}
