"""Any source into ArrayRecord shards, each decided by the source and the settings alone: see launch/prepare_data.py.

A folder of shards holds, beside them, ``preparation.json`` (what it is made from), ``finished/`` (for each finished
shard its statistics, and hashes of its images and captions) and, at the end, ``shards.json``, ``statistics.json`` and
``index.html``. Who writes the shards, and in which order, leaves no trace in them.
"""

import dataclasses
import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from llip_jax.config import ConfigError, DataConfig, LimitsConfig
from llip_jax.data.files import StoredFile
from llip_jax.data.formats.array_records import (
    MANIFEST,
    SUFFIX,
    WRITER_OPTIONS,
    ArrayRecordRows,
    ArrayRecordSource,
    Shard,
    dump_manifest,
    encode_png,
    encode_record,
)
from llip_jax.data.images import open_picture
from llip_jax.data.preparation.page import Page, render
from llip_jax.data.preparation.statistics import Repeat, Statistics, content_hash, find_repetition, save_hashes
from llip_jax.data.records import BadSample, Record, Source
from llip_jax.data.tokenizers import Tokenizer

_JPEG_QUALITY, _JPEG_SIDE = 90, 65_500
"""What images are shrunk to, unless a side is longer than the format allows."""
_MOST_TOKENS = 1024
"""Longer captions count as this long."""
_FREQUENT_CAPTIONS, _FREQUENT_IMAGES, _PICTURES = 20, 12, 48
_DECIDING_FIELDS = ("source", "eval_samples", "fields", "toyworld", "folder", "tfds", "mixture", "limits", "tokenizer")
"""Parts of DataConfig that decide what is written; paths in them do not, the source's identity does."""
_PATHS = ("path", "eval_path", "data_dir")
_DIFFERENCES_SHOWN = 10
_LOCK = ".lock"


@dataclass(frozen=True)
class Preparation:
    """What to prepare and where; picklable, for the processes that write shards.

    source: the samples.
    split: "train" or "eval", the first word of the shards' names.
    out: folder of the shards.
    shards: how many; each takes equally many samples in order, to within one.
    limits: what an image may be.
    short_side: images whose shorter side is larger are shrunk to this; None keeps all as they are.
    tokenizer: counts tokens of captions; None leaves that out.
    """

    source: Source
    split: str
    out: Path
    shards: int
    limits: LimitsConfig
    short_side: int | None = None
    tokenizer: Tokenizer | None = None

    def name(self, shard: int) -> str:
        """File name of a shard."""
        return f"{self.split}-{shard:05d}-of-{self.shards:05d}{SUFFIX}"

    def samples(self, shard: int) -> range:
        """The samples of the source that a shard is made from."""
        return range(shard * len(self.source) // self.shards, (shard + 1) * len(self.source) // self.shards)

    def beside(self, shard: int, kind: str) -> Path:
        """What is kept in ``finished/`` for a shard: its "json", or hashes of its "images" or "captions"."""
        suffix = ".json" if kind == "json" else f".{kind}.npy"
        return self.out / "finished" / self.name(shard).replace(SUFFIX, suffix)

    def finished(self, shard: int) -> "FinishedShard | None":
        """A shard that has been written, or None."""
        try:
            report = _FINISHED.validate_json(self.beside(shard, "json").read_bytes())
            whole = (self.out / self.name(shard)).stat().st_size == report.shard.bytes
        except (FileNotFoundError, pydantic.ValidationError):
            return None
        return report if whole else None


@pydantic.dataclasses.dataclass(frozen=True)
class FinishedShard:
    """A shard and the statistics of the samples it is made from."""

    shard: Shard
    statistics: Statistics


_FINISHED = pydantic.TypeAdapter(FinishedShard)


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keeps other runs of the program away from the folder.

    Raises:
        ConfigError: one is at work in it, or it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / _LOCK).open("w")
    except OSError as error:
        raise ConfigError(f"--out: cannot write to {out} ({error})") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"--out: another run is writing to {out}; wait for it, or stop it") from error
        except OSError:
            pass  # where locks are not supported, the user takes care
        yield


def begin(preparation: Preparation, data: DataConfig) -> list[int]:
    """Makes the folder ready, and says which shards are still to be written.

    Raises:
        ConfigError: the folder holds shards of something else, or other files.
    """
    decides = {name: value for name, value in asdict(data).items() if name in _DECIDING_FIELDS}
    settings = {
        "split": preparation.split,
        "samples": len(preparation.source),
        "shards": preparation.shards,
        "short_side": preparation.short_side,
        **_flat(decides, "data"),
        **{f"identity of {name}": value for name, value in preparation.source.identity().items()},
    }
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    path = preparation.out / "preparation.json"
    if path.exists():
        _refuse_differences(path, _read_settings(path), settings)
    elif preparation.out.exists() and any(path.name != _LOCK for path in preparation.out.iterdir()):
        raise ConfigError(f"--out: {preparation.out} is not empty and not made by this program; expected a new folder")
    (preparation.out / "finished").mkdir(parents=True, exist_ok=True)
    _write(path, (json.dumps(settings, indent=2) + "\n").encode())
    shutil.rmtree(_unfinished(preparation), ignore_errors=True)  # of a run that was killed
    _unfinished(preparation).mkdir()
    return [shard for shard in range(preparation.shards) if preparation.finished(shard) is None]


def write_shard(preparation: Preparation, shard: int, after_sample: Callable[[], None] = lambda: None) -> None:
    """Writes one shard. All that belongs to it is put in place when it is whole, its statistics last.

    Args:
        preparation: what to write.
        shard: its number.
        after_sample: called after each sample of the source; what it raises ends the shard, which is then unfinished.

    Raises:
        ConfigError: the disk is full, or the folder cannot be written to.
    """
    # A name of its own: other attempts at the same shard may be under way on a cluster.
    temporary = _unfinished(preparation) / f"{preparation.name(shard)}.{uuid.uuid4().hex}"
    statistics = Statistics()
    hashes: dict[str, list[tuple[int, int]]] = {"images": [], "captions": []}
    try:
        with _writing(temporary):
            writer = ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
        for index in preparation.samples(shard):
            try:
                sample = _checked(preparation, index)
            except BadSample as error:
                statistics.add_failure(error)
            else:
                with _writing(temporary):
                    writer.write(sample.row)
                hashes["images"].append((sample.original_hash, statistics.kept))
                hashes["captions"] += [(content_hash(text.encode()), statistics.kept) for text in sample.captions]
                statistics.add_image(sample.width, sample.height, sample.size, sample.format)
                statistics.add_captions(sample.captions, _count_tokens(sample.captions, preparation.tokenizer))
            after_sample()
        with _writing(temporary):
            writer.close()
            _put_in_place(preparation, shard, temporary, statistics, hashes)
    finally:
        temporary.unlink(missing_ok=True)


def finish(preparation: Preparation) -> Statistics:
    """Writes manifest, statistics and their page, once all shards are there; returns the statistics."""
    numbers = range(preparation.shards)
    finished = [shard for number in numbers if (shard := preparation.finished(number))]
    statistics = Statistics()
    for shard in finished:
        statistics.merge(shard.statistics)
    if len(finished) != preparation.shards or statistics.samples != len(preparation.source):
        raise RuntimeError(f"{len(finished)} shards account for {statistics.samples} samples")
    manifest = {preparation.name(number): shard.shard for number, shard in zip(numbers, finished, strict=True)}
    _write(preparation.out / MANIFEST, dump_manifest(manifest))

    images = find_repetition([preparation.beside(number, "images") for number in numbers], _FREQUENT_IMAGES)
    captions = find_repetition([preparation.beside(number, "captions") for number in numbers], _FREQUENT_CAPTIONS)
    read = _Reader(preparation.out, manifest)
    chosen = np.random.default_rng(0).choice(statistics.kept, min(_PICTURES, statistics.kept), replace=False)
    page = Page(
        title=f"{preparation.out.resolve().name}: {preparation.split} split",
        shards=preparation.shards,
        stored_bytes=sum(shard.bytes for shard in manifest.values()),
        statistics=statistics,
        images=images,
        captions=captions,
        frequent_images=[(repeat.count, read.record(repeat.shard, repeat.sample)) for repeat in images.most],
        frequent_captions=[(repeat.count, read.caption(repeat)) for repeat in captions.most],
        pictures=[read.source[int(index)] for index in np.sort(chosen)],
        limits=preparation.limits,
    )
    _write(preparation.out / "statistics.json", (json.dumps(_summary(page), indent=2) + "\n").encode())
    _write(preparation.out / "index.html", render(page).encode())
    shutil.rmtree(_unfinished(preparation), ignore_errors=True)
    return statistics


@dataclass(frozen=True)
class _Sample:
    """A sample as it is stored, and what there is to count about it."""

    row: bytes
    original_hash: int
    captions: tuple[str, ...]
    width: int
    height: int
    size: int
    format: str


def _checked(preparation: Preparation, index: int) -> _Sample:
    """Reads a sample and decodes its picture; BadSample where it cannot be used."""
    try:
        record = preparation.source[index]
    except BadSample as error:
        raise BadSample(error.reason, f"sample {index}: {error}") from error
    except OSError as error:
        raise BadSample("unreadable", f"sample {index}: {error}") from error
    original = record.image if isinstance(record.image, bytes) else encode_png(record.image)
    try:
        picture = open_picture(original, preparation.limits)
        scale = min((preparation.short_side or math.inf) / min(picture.width, picture.height), 1.0)
        pixels = picture.decode(scale)
    except BadSample as error:
        raise BadSample(error.reason, f"{record.name}: {error}") from error
    image, width, height = original, picture.width, picture.height
    shrunk = round(width * scale), round(height * scale)
    if scale < 1 and max(shrunk) <= _JPEG_SIDE:
        width, height = shrunk
        image = _jpeg(pixels, width, height)
    try:
        with Image.open(io.BytesIO(image)) as header:
            image_format = header.format or "unknown"
    except Image.DecompressionBombError as error:
        raise BadSample("image_too_large", f"{record.name}: {error}") from error
    return _Sample(
        row=encode_record(dataclasses.replace(record, image=image)),
        original_hash=content_hash(original),
        captions=record.captions,
        width=width,
        height=height,
        size=len(image),
        format=image_format,
    )


def _jpeg(pixels: np.ndarray, width: int, height: int) -> bytes:
    stream = io.BytesIO()
    shrunk = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    shrunk.save(stream, "JPEG", quality=_JPEG_QUALITY)
    return stream.getvalue()


def _put_in_place(
    preparation: Preparation,
    shard: int,
    temporary: Path,
    statistics: Statistics,
    hashes: Mapping[str, Sequence[tuple[int, int]]],
) -> None:
    with temporary.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    written = Shard(samples=statistics.kept, bytes=temporary.stat().st_size, sha256=digest)
    for kind, pairs in hashes.items():
        hash_file = temporary.with_name(f"{temporary.name}.{kind}.npy")
        save_hashes(hash_file, pairs)
        os.replace(hash_file, preparation.beside(shard, kind))
    os.replace(temporary, preparation.out / preparation.name(shard))
    _write(preparation.beside(shard, "json"), _FINISHED.dump_json(FinishedShard(written, statistics), indent=2) + b"\n")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Errors of the file system; ArrayRecord raises them as RuntimeError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"--out: cannot write {path}: {error}") from error


def _count_tokens(captions: Sequence[str], tokenizer: Tokenizer | None) -> list[int]:
    return tokenizer.encode(captions, _MOST_TOKENS)[1].sum(axis=1).tolist() if tokenizer else []


class _Reader:
    """Reads the finished shards."""

    def __init__(self, folder: Path, shards: Mapping[str, Shard]):
        files = [StoredFile(str(folder.resolve() / name), shard.bytes, "") for name, shard in shards.items()]
        self.source = ArrayRecordSource(ArrayRecordRows(files))
        self._starts = list(accumulate((shard.samples for shard in shards.values()), initial=0))

    def record(self, shard: int, sample: int) -> Record:
        return self.source[self._starts[shard] + sample]

    def caption(self, repeat: Repeat) -> str:
        captions = self.record(repeat.shard, repeat.sample).captions
        return next(caption for caption in captions if content_hash(caption.encode()) == repeat.hash)


def _summary(page: Page) -> dict[str, Any]:
    """The contents of statistics.json."""
    statistics = page.statistics
    return {
        "samples": statistics.samples,
        "kept": statistics.kept,
        "failed": statistics.failed,
        "failures": statistics.failures,
        "shards": page.shards,
        "stored_bytes": page.stored_bytes,
        "formats": statistics.formats,
        "repeated_images": {
            "share": page.images.share,
            "distinct": page.images.distinct,
            "most": [{"count": count, "name": record.name} for count, record in page.frequent_images],
        },
        "repeated_captions": {
            "share": page.captions.share,
            "distinct": page.captions.distinct,
            "most": [{"count": count, "caption": caption} for count, caption in page.frequent_captions],
        },
        "histograms": {
            name: asdict(histogram) | {"mean": histogram.mean, "median": histogram.quantile(0.5)}
            for name, histogram in statistics.histograms.items()
            if histogram.bins
        },
    }


def _flat(value: Any, name: str) -> dict[str, Any]:
    """Nested settings by dotted names, without paths."""
    if not isinstance(value, Mapping) or not value:
        return {name: value}
    return {
        inner: setting
        for key, item in value.items()
        if key not in _PATHS
        for inner, setting in _flat(item, f"{name}.{key}").items()
    }


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"--out: {path} is damaged ({error}); remove the folder, or choose another one") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"--out: {path} is damaged; remove the folder, or choose another one")
    return settings


def _refuse_differences(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    lines = [
        f"  {name}: {old.get(name, 'none')} -> {new.get(name, 'none')}"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]
    if lines:
        more = f"\n  and {len(lines) - _DIFFERENCES_SHOWN} more" if len(lines) > _DIFFERENCES_SHOWN else ""
        raise ConfigError(
            f"--out: {path.parent} holds shards made from something else; choose another folder, or remove it. "
            "The differences:\n" + "\n".join(lines[:_DIFFERENCES_SHOWN]) + more
        )


def _unfinished(preparation: Preparation) -> Path:
    return preparation.out / "unfinished"


def _write(path: Path, content: bytes) -> None:
    """Writes a file that is either the old or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
