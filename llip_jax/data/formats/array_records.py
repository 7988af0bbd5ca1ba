"""ArrayRecord shards: a record is one msgpack map. What launch/prepare_data.py writes, and training reads."""

import hashlib
import io
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pydantic
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import UInt8
from PIL import Image

from llip_jax.config import ConfigError
from llip_jax.data.files import StoredFile, unique_names
from llip_jax.data.records import BadSample, Record

SUFFIX = ".array_record"
MANIFEST = "shards.json"
"""File beside the shards that says what is in them, so that none has to be opened at the start of a run."""
WRITER_OPTIONS = "group_size:1,uncompressed"
"""One record a chunk, for random access. Pictures are compressed already."""

_COLUMNS = {
    "image": bytes,
    "captions": list,
    "kinds": list,
    "specific": int,
    "image_group": str,
    "name": str,
    "fields": dict,
}
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0,footer_prefetch_bytes:256k"
_BUFFER_BYTES = 2**15
_READERS_KEPT = 128
"""Shards that a process holds open: each takes a file handle, of which systems commonly grant 1,024."""
_OPENED_AT_ONCE = 16
_TAIL_BYTES = 2**18
"""The end of a shard holds the positions of its records, at 9 bytes each, before 64 KiB of their own."""


@pydantic.dataclasses.dataclass(frozen=True)
class Shard:
    """What the manifest says of a shard."""

    samples: int
    bytes: int
    sha256: str


_MANIFEST = pydantic.TypeAdapter(dict[str, Shard])


def encode_record(record: Record) -> bytes:
    """A record as stored. Encoded images stay as they are; pixels become PNG.

    ``fields`` are kept as plain nested data: arrays and tuples as lists, keys as strings, and what msgpack does not
    know (dates, decimals, integers beyond 64 bits) as its text.

    Raises:
        BadSample: strings that are not UTF-8, or data nested too deeply.
    """
    row = {
        "image": record.image if isinstance(record.image, bytes) else encode_png(record.image),
        "captions": record.captions,
        "kinds": record.kinds,
        "specific": record.specific,
        "image_group": record.image_group,
        "name": record.name,
    }
    try:
        return msgpack.packb(row | {"fields": _plain(record.fields)})
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_metadata", f"{record.name!r} cannot be stored: {error}") from error


def encode_png(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """Pixels without loss, and with little time for compression."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def decode_row(data: bytes) -> dict[str, Any]:
    """The columns of a stored record: those of :class:`Record`, with lists for its tuples.

    Only plain data comes out, and no length is believed that is beyond the size of ``data``.

    Raises:
        BadSample: anything else than what :func:`encode_record` writes.
    """
    try:
        row = msgpack.unpackb(data, timestamp=1, ext_hook=_refuse_extension)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_metadata", f"not a record of llip_jax: {error}") from error
    if not isinstance(row, dict) or {name: type(value) for name, value in row.items()} != _COLUMNS:
        raise BadSample("bad_metadata", f"not a record of llip_jax: expected a map of {', '.join(_COLUMNS)}")
    captions, kinds = row["captions"], row["kinds"]
    if not all(isinstance(text, str) for text in (*captions, *kinds)) or len(captions) != len(kinds):
        raise BadSample("bad_metadata", "expected captions and kinds to be equally many strings")
    if not captions or not all(map(str.strip, captions)) or not 0 <= row["specific"] <= len(captions):
        raise BadSample("bad_metadata", "expected captions that are not empty, and 0 <= specific <= their number")
    return row


class ArrayRecordRows:
    """The rows of local ArrayRecord shards, one shard after the other; see :class:`llip_jax.data.records.Rows`.

    Counts come from the manifest beside a shard where it fits the shard's size; other shards are opened once.

    Args:
        files: the shards, in order.
        field: what the configuration calls them.

    Raises:
        ConfigError: a file that is not local or cannot be opened as ArrayRecord, or a damaged manifest.
    """

    def __init__(self, files: Sequence[StoredFile], field: str = "data.path"):
        self._paths = tuple(_local_path(file.url, field) for file in files)
        shards = _describe(files, self._paths)
        self._ends = tuple(accumulate(samples for samples, _ in shards))
        self._identity = {
            name: f"{samples} samples, {file.size} bytes, {digest}"
            for name, file, (samples, digest) in zip(unique_names(files), files, shards, strict=True)
        }
        self._readers = _Readers()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> tuple[str, Mapping[str, Any]]:
        """See :class:`llip_jax.data.records.Rows`."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} outside of 0 <= index < {len(self)}")
        shard = bisect_right(self._ends, index)
        path, position = self._paths[shard], index - (self._ends[shard - 1] if shard else 0)
        try:
            row = decode_row(self._readers.read(path, position))
        except BadSample as error:
            raise BadSample(error.reason, f"{path}, record {position}: {error}") from error
        return row["name"], row

    def identity(self) -> Mapping[str, str]:
        """See :class:`llip_jax.data.records.Source`."""
        return self._identity


@dataclass(frozen=True)
class ArrayRecordSource:
    """The records as they were given to :func:`encode_record`; see :class:`llip_jax.data.records.Source`."""

    rows: ArrayRecordRows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        """See :class:`llip_jax.data.records.Source`."""
        _, row = self.rows[index]
        return Record(**{**row, "captions": tuple(row["captions"]), "kinds": tuple(row["kinds"])})

    def identity(self) -> Mapping[str, str]:
        """That of the rows."""
        return self.rows.identity()


def dump_manifest(shards: Mapping[str, Shard]) -> bytes:
    """The contents of the file ``MANIFEST``, by names of shards."""
    return _MANIFEST.dump_json(dict(shards), indent=2) + b"\n"


class _Readers:
    """Open shards, the least recently used ones closed; none goes along to another process."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, ArrayRecordReader] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["_Readers"], tuple[()]]:
        return _Readers, ()

    def read(self, path: str, position: int) -> bytes:
        """One record; BadSample where the shard or the record is damaged."""
        with self._lock:
            reader = self._open.get(path)
            if reader is not None:
                self._open.move_to_end(path)
        if reader is None:
            reader = _open(path)  # outside of the lock: other threads need not wait
            with self._lock:
                self._open[path] = reader
                while len(self._open) > _READERS_KEPT:
                    self._open.popitem(last=False)  # closed by the last thread that reads from it
        try:
            return reader.read([position])[0]
        except RuntimeError as error:
            raise BadSample("unreadable", str(error)) from error


def _open(path: str) -> ArrayRecordReader:
    reader = ArrayRecordReader(path, options=_READER_OPTIONS, file_reader_buffer_size=_BUFFER_BYTES)
    if not reader.ok():
        try:
            reader.read([0])  # tells what is wrong
        except RuntimeError as error:
            raise BadSample("unreadable", str(error)) from error
    return reader


def _describe(files: Sequence[StoredFile], paths: Sequence[str]) -> list[tuple[int, str]]:
    """Samples and digest of each shard."""
    manifests = {folder: _read_manifest(folder) for folder in {os.path.dirname(path) for path in paths}}

    def describe(file: StoredFile, path: str) -> tuple[int, str]:
        folder, name = os.path.split(path)
        shard = manifests[folder].get(name)
        if shard is not None and shard.bytes == file.size:
            return shard.samples, f"sha256 {shard.sha256[:16]}"
        try:
            samples = _open(path).num_records()
            with open(path, "rb") as stream:
                stream.seek(max(file.size - _TAIL_BYTES, 0))
                tail = hashlib.sha256(stream.read(_TAIL_BYTES)).hexdigest()
        except (BadSample, OSError) as error:
            raise ConfigError(f"{path}: cannot be read as ArrayRecord ({error})") from error
        return samples, f"end of sha256 {tail[:16]}"

    with ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:
        return list(pool.map(describe, files, paths))


def _read_manifest(folder: str) -> dict[str, Shard]:
    path = Path(folder, MANIFEST)
    try:
        return _MANIFEST.validate_json(path.read_bytes()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a manifest of shards ({error}); without the file, shards are opened") from error


def _local_path(url: str, field: str) -> str:
    path = url.removeprefix("file://")
    if "://" in path:
        raise ConfigError(
            f"{field}: {url!r} is not a local file, and ArrayRecord shards are read from those only; mount the "
            "bucket (gcsfuse, s3fs, ...) or copy the shards, or store them as tar shards, which are read from anywhere"
        )
    return path


def _refuse_extension(code: int, data: bytes) -> None:
    raise ValueError(f"extension type {code}")


def _plain(value: Any) -> Any:
    match value:
        case None | bool() | str() | bytes() | float():
            return value
        case int():
            return value if -(2**63) <= value < 2**64 else str(value)
        case np.ndarray() | np.generic():
            return _plain(value.tolist())
        case Mapping():
            return {str(name): _plain(item) for name, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain(item) for item in value]
        case _:
            return str(value)
