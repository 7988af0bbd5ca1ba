"""From configuration to sources: one format, or several in a mixture, and what is held out for evaluation."""

import dataclasses
import os
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Literal

from llip_jax.config import CaptionRules, ConfigError, DataConfig, FieldsConfig, SourceConfig, nearest
from llip_jax.data.fields import RowsSource
from llip_jax.data.files import StoredFile, find_files
from llip_jax.data.formats.array_records import ArrayRecordRows, ArrayRecordSource
from llip_jax.data.formats.clip_benchmark import ClipBenchmarkRows
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
    "clip_benchmark": FieldsConfig(image=("webp", "png", "jpg", "jpeg"), captions=("txt",)),
    "tfds": FieldsConfig(image=("image",), captions=("caption", "captions.text", "captions", "text")),
}
"""Columns where ``data.fields`` names none: the habits of img2dataset, Hugging Face, CLIP_benchmark and TensorFlow
Datasets."""


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

    def summary(self) -> str:
        """What there is, for people: "1,000 samples (a: 900, drawn with 0.75; b: 100, with 0.25)"."""
        total, text = sum(part.weight for part in self.parts), f"{len(self):,} samples"
        if len(self.parts) == 1:
            return text
        shares = [f"{part.name}: {len(part.source):,}, drawn with {part.weight / total:.3g}" for part in self.parts]
        return f"{text} ({'; '.join(shares)})"


@dataclass(frozen=True)
class HeldOut:
    """About ``samples`` evenly spread samples of a source ("eval"), every tenth at most, or the others ("train").

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
        """That of the whole source, and which samples of it."""
        return {**self.source.identity(), "held out": f"every {self.every}-th, {self.split} split"}


def build_source(config: DataConfig, split: Split, image_size: int) -> Mixture:
    """The source or mixture that ``config`` names.

    Evaluation goes through the evaluation samples of all parts.

    Raises:
        ConfigError: data that is missing or not as expected.
    """
    if not config.mixture:
        source = build_one_source(config, config, split, image_size, "data")
        _check_kinds(config.captions, [source], "data.captions")
        return Mixture((Part("", source, 1.0, config.captions),))
    parts = []
    for name, part in sorted(config.mixture.items()):
        field = f"data.mixture.{name}"
        if not part.weight:
            continue
        if not part.path and part.source != "toyworld":
            others = [other for other in config.mixture if other != name]
            raise ConfigError(f"{field}: has no path. Is the name misspelled?{nearest(name, others)}")
        source = build_one_source(part, config, split, image_size, field)
        if part.captions is not None:
            _check_kinds(part.captions, [source], f"{field}.captions")
        parts.append(Part(name, source, part.weight, part.captions or config.captions))
    common = [part.source for part in parts if part.rules is config.captions]
    _check_kinds(config.captions, common, "data.captions")
    return Mixture(tuple(parts))


def _check_kinds(rules: CaptionRules, sources: Sequence[Source], field: str) -> None:
    """Raises ConfigError where ``rules`` name a kind of captions that none of the sources under them can have."""
    known: list[str] = []
    for source in sources:
        inner = source.source if isinstance(source, HeldOut) else source
        if isinstance(inner, ToyWorld):
            known.append("captions")
        elif isinstance(inner, RowsSource):
            known += inner.fields.captions
        else:
            return  # Lists and shards may have any.
    for setting, kinds in (
        ("weights", rules.weights),
        ("sentences", rules.sentences),
        ("first", [] if rules.first is None else [rules.first]),
    ):
        for kind in kinds:
            if known and kind not in known:
                raise ConfigError(f"{field}.{setting}: no captions come from a column {kind!r}.{nearest(kind, known)}")


def build_one_source(
    config: SourceConfig, data: DataConfig, split: Split, image_size: int, field: str, *, whole: bool = False
) -> Source:
    """The source that ``config`` names.

    Args:
        config: the source.
        data: limits, and where indices of tar shards are kept.
        split: which samples.
        image_size: of generated pictures.
        field: what the configuration calls the source.
        whole: for evaluation sets: none of the samples at ``path`` is held out, and samples may lack captions unless
            ``config.fields`` says where they are. Formats with splits of their own still give that of ``split``.

    Raises:
        ConfigError: data that is missing or not as expected.
    """
    if config.source == "toyworld":
        return ToyWorld(config.toyworld, split, image_size)
    own_files = split == "eval" and config.eval_path != "" and not whole
    hold_out = not config.eval_path and not whole
    captionless = whole and not config.fields.captions
    path, path_field = (config.eval_path, f"{field}.eval_path") if own_files else (config.path, f"{field}.path")
    if not path:
        raise ConfigError(f"{path_field}: is empty, expected {_EXPECTED[config.source]}")
    if config.source == "folder":
        return FolderSource(
            path,
            config.folder,
            split,
            config.fields,
            data.limits,
            field=path_field,
            hold_out=hold_out,
            captionless=captionless,
        )
    if config.source == "array_record":
        files = _shards(path, path_field, "array_record")
        source: Source = ArrayRecordSource(ArrayRecordRows(files, path_field))
    else:
        rows = _rows(config, data, path, path_field, split)
        usual = USUAL_FIELDS[config.source]
        fields = dataclasses.replace(
            config.fields, image=config.fields.image or usual.image, captions=config.fields.captions or usual.captions
        )
        if isinstance(rows, ClipBenchmarkRows):
            if rows.kind != "retrieval" and not whole:
                raise ConfigError(
                    f"{path_field}: {path!r} is a {rows.kind} set, which has no captions to train on; name it in "
                    "eval.sets, or a retrieval set here"
                )
            captionless = rows.kind != "retrieval"
        source = RowsSource(rows, fields, data.limits, captionless)
        source.check(field)
    if config.source not in ("tfds", "clip_benchmark") and hold_out:
        source = HeldOut(source, config.eval_samples, split)
    if not len(source):
        raise ConfigError(f"{path_field}: {path!r} has no sample for the {split} split")
    return source


_SUFFIX = {"webdataset": "tar", "parquet": "parquet"}
_OTHER_SUFFIXES = (".json", ".jsonl", ".parquet", ".array_record", ".tar", ".txt", ".csv", ".tsv", ".md", ".html")
_SPLIT_NAME = re.compile(r"(train|valid|validation|val|dev|test|eval)[-_.]")
_EXPECTED = {
    "folder": "the folder that holds captions.jsonl, or a .jsonl, .csv or .tsv file",
    "webdataset": "tar shards, such as 'shards/{00000..00099}.tar'",
    "parquet": "Parquet files, such as 'data/train-*.parquet'",
    "array_record": "ArrayRecord shards, such as 'data/train-*.array_record'",
    "tfds": "the name of a data set, such as 'coco_captions'",
    "clip_benchmark": "the folder of a data set that clip_benchmark_export_wds wrote",
}


def _rows(config: SourceConfig, data: DataConfig, path: str, field: str, split: Split) -> Rows:
    if config.source == "tfds":
        name = config.tfds.train_split if split == "train" else config.tfds.eval_split
        return TfdsRows(path, name, config.tfds.data_dir, config.fields.image or USUAL_FIELDS["tfds"].image, field)
    index_dir = Path(data.index_dir) if data.index_dir else _cache_folder() / "tars"
    if config.source == "clip_benchmark":
        return ClipBenchmarkRows(path, "train" if split == "train" else "test", index_dir, field)
    files = _shards(path, field, _SUFFIX[config.source])
    return ParquetRows(files, field) if config.source == "parquet" else TarRows(files, index_dir)


def _shards(path: str, field: str, suffix: str) -> tuple[StoredFile, ...]:
    """The files of a format; others that a pattern catches (img2dataset's statistics) are passed over.

    Raises:
        ConfigError: no such file, or files of several splits, which are hardly meant to be one.
    """
    found = find_files(path, field, f"*.{suffix}")
    files = tuple(file for file in found if not file.name.endswith(_OTHER_SUFFIXES) or file.name.endswith(suffix))
    if not files:
        raise ConfigError(
            f"{field}: {path!r} names no .{suffix} file but {found[0].name!r}; expected another data.source?"
        )
    splits = {match[1]: file.name for file in files if (match := _SPLIT_NAME.match(file.name))}
    if len(splits) > 1:
        names = ", ".join(sorted(splits.values()))
        raise ConfigError(
            f"{field}: {path!r} names files of several splits ({names}); name those to train on, and the others in "
            f"{field.removesuffix('.eval_path').removesuffix('.path')}.eval_path"
        )
    return files


def _cache_folder() -> Path:
    """llip_jax in the user's cache folder, by the XDG convention."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llip_jax"
