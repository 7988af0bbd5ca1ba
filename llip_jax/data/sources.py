"""From configuration to sources: one format, or several in a mixture, and what is held out for evaluation."""

import dataclasses
import os
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Literal

from llip_jax.config import CaptionRules, ConfigError, DataConfig, FieldsConfig, SourceConfig
from llip_jax.data.fields import RowsSource
from llip_jax.data.files import find_files
from llip_jax.data.formats.array_records import ArrayRecordRows, ArrayRecordSource
from llip_jax.data.formats.folder import FolderSource
from llip_jax.data.formats.parquet import ParquetRows
from llip_jax.data.formats.tars import TarRows
from llip_jax.data.formats.tfds import TfdsRows
from llip_jax.data.order import SampleOrder
from llip_jax.data.records import Record, Rows, Source
from llip_jax.data.toyworld import ToyWorld

Split = Literal["train", "eval"]

USUAL_FIELDS = {
    "webdataset": FieldsConfig(
        image=("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"), captions=("txt",)
    ),
    "parquet": FieldsConfig(image=("image", "jpg", "png", "webp"), captions=("caption", "captions", "text", "txt")),
    "tfds": FieldsConfig(image=("image",), captions=("caption", "captions.text", "captions", "text")),
}
"""Columns where ``data.fields`` names none: img2dataset's, Hugging Face's and TensorFlow Datasets' habits."""


@dataclass(frozen=True)
class Part:
    """A source of a mixture; ``rules`` choose among its captions."""

    name: str
    source: Source
    weight: float
    rules: CaptionRules


@dataclass(frozen=True)
class Mixture:
    """Sources one after the other as one source; training draws from them in proportion to their weights."""

    parts: tuple[Part, ...]

    def __len__(self) -> int:
        return sum(len(part.source) for part in self.parts)

    def __getitem__(self, index: int) -> Record:
        """Sample ``index``, counted through all parts."""
        part = bisect_right(self.offsets, index) - 1
        return self.parts[part].source[index - self.offsets[part]]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """How many samples stand before each part."""
        return tuple(accumulate((len(part.source) for part in self.parts[:-1]), initial=0))

    def identity(self) -> Mapping[str, str]:
        """Identities of the parts, with their names in front."""
        return {
            f"{part.name}/{name}" if part.name else name: value
            for part in self.parts
            for name, value in part.source.identity().items()
        }

    def order(self, seed: int) -> SampleOrder:
        """The training order over (part, index in it)."""
        return SampleOrder(
            names=tuple(part.name for part in self.parts),
            sizes=tuple(len(part.source) for part in self.parts),
            weights=tuple(part.weight for part in self.parts),
            seed=seed,
        )


@dataclass(frozen=True)
class HeldOut:
    """About ``samples`` evenly spread samples of a source ("eval"), at most a tenth, or the others ("train").

    Which ones is arithmetic: there is no table of them.
    """

    source: Source
    samples: int
    split: Split

    @cached_property
    def every(self) -> int:
        """Of so many samples in a row the first is held out."""
        return max(10, -(-len(self.source) // self.samples))

    def __len__(self) -> int:
        held_out = -(-len(self.source) // self.every)
        return held_out if self.split == "eval" else len(self.source) - held_out

    def __getitem__(self, index: int) -> Record:
        """See :class:`llip_jax.data.records.Source`."""
        if self.split == "eval":
            return self.source[index * self.every]
        return self.source[index + index // (self.every - 1) + 1]

    def identity(self) -> Mapping[str, str]:
        """That of the whole source."""
        return self.source.identity()


def build_source(config: DataConfig, split: Split, image_size: int) -> Mixture:
    """The source or mixture that ``config`` names.

    Evaluation goes through the evaluation samples of all parts.

    Raises:
        ConfigError: data that is missing or not as expected.
    """
    if not config.mixture:
        source = _build(config, config, split, image_size, "data")
        return Mixture((Part("", source, 1.0, config.captions),))
    return Mixture(
        tuple(
            Part(
                name,
                _build(part, config, split, image_size, f"data.mixture.{name}"),
                part.weight,
                part.captions or config.captions,
            )
            for name, part in sorted(config.mixture.items())
        )
    )


def _build(config: SourceConfig, data: DataConfig, split: Split, image_size: int, field: str) -> Source:
    """One source; ``field`` is what the configuration calls it."""
    if config.source == "toyworld":
        return ToyWorld(config.toyworld, split, image_size)
    own_files = split == "eval" and config.eval_path != ""
    path, path_field = (config.eval_path, f"{field}.eval_path") if own_files else (config.path, f"{field}.path")
    if not path:
        raise ConfigError(f"{path_field}: is empty, expected {_EXPECTED[config.source]}")
    if config.source == "folder":
        return FolderSource(path, config.folder, split, config.fields)
    if config.source == "array_record":
        source: Source = ArrayRecordSource(ArrayRecordRows(find_files(path, path_field, "*.array_record")))
    else:
        rows = _rows(config, data, path, path_field, split)
        usual = USUAL_FIELDS[config.source]
        fields = dataclasses.replace(
            config.fields, image=config.fields.image or usual.image, captions=config.fields.captions or usual.captions
        )
        source = RowsSource(rows, fields, data.limits)
        source.check(field)
    if config.source != "tfds" and not config.eval_path:
        source = HeldOut(source, config.eval_samples, split)
    if not len(source):
        raise ConfigError(f"{path_field}: {path!r} has no sample for the {split} split")
    return source


_EXPECTED = {
    "folder": "the folder that holds captions.jsonl, or a .jsonl, .csv or .tsv file",
    "webdataset": "tar shards, such as 'shards/{00000..00099}.tar'",
    "parquet": "Parquet files, such as 'data/*.parquet'",
    "array_record": "ArrayRecord shards, such as 'data/train-*.array_record'",
    "tfds": "the name of a data set, such as 'coco_captions'",
}


def _rows(config: SourceConfig, data: DataConfig, path: str, field: str, split: Split) -> Rows:
    if config.source == "tfds":
        name = config.tfds.train_split if split == "train" else config.tfds.eval_split
        return TfdsRows(path, name, config.tfds.data_dir, config.fields.image or USUAL_FIELDS["tfds"].image, field)
    if config.source == "parquet":
        return ParquetRows(find_files(path, field, "*.parquet"), field)
    index_dir = Path(data.index_dir) if data.index_dir else _cache_folder() / "tars"
    return TarRows(find_files(path, field, "*.tar"), index_dir)


def _cache_folder() -> Path:
    """llip_jax in the user's cache folder, by the XDG convention."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llip_jax"
