"""Tar shards of WebDataset, with random access: an index says where each sample begins; nothing is ever extracted.

A sample is a run of members whose names agree up to the first dot of the last component, as WebDataset groups them.
It is contiguous in its shard, so one position a sample is index enough, and one read gets the whole of it.
"""

import bisect
import fcntl
import hashlib
import itertools
import logging
import multiprocessing
import os
import shutil
import tarfile
import time
import uuid
from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pydantic
from jaxtyping import Int64
from tqdm import tqdm

from llip_jax.config import ConfigError
from llip_jax.data.files import StoredFile, read_range, unique_names
from llip_jax.data.formats.tar_members import NoEndMark, key_and_extension, read_member
from llip_jax.data.records import BadSample

MAX_SAMPLE_BYTES = 256 * 2**20
"""Samples that take more of their shard are not read."""

_STRETCH, _REMOTE_STRETCH = 4 * 2**10, 8 * 2**20  # bytes that a scan reads at once
_ALONE_SECONDS = 5.0  # a scan that takes longer starts processes
_VERIFIED_BYTES = 64 * 2**20  # a larger index is trusted for its size; what it says is checked with each sample
_INDEX_VERSION = 1
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "Zstandard"}

_logger = logging.getLogger(__name__)


class TarRows:
    """The samples of shards, in order: a column for each member, named by what follows the first dot, in lower case.

    Columns are bytes as stored. Of members with the same name the first counts. Folders, links, devices, hidden files
    and WebDataset's ``__meta__`` files are passed over. What follows damage in a shard is not part of the data; a
    warning says so.

    Args:
        files: the shards.
        index_dir: where the index is kept. It is built when there is none for these very files, by reading all headers
            of all shards.

    Raises:
        ConfigError: a shard is compressed, no shard has a sample, or the index cannot be written.
        OSError: a shard cannot be read.
    """

    def __init__(self, files: Sequence[StoredFile], index_dir: Path):
        self._files = tuple(files)
        self._names = unique_names(self._files)
        self._index = _index_file(self._files, index_dir)
        self._shards = _load_index(self._index, self._files) or _build_index(self._index, self._files)
        self._ends = list(itertools.accumulate(shard.samples for shard in self._shards))
        if not len(self):
            reason = next((f" ({name} {damage})" for name, damage in self.damaged.items()), "")
            raise ConfigError(f"{self._names[0]}: no sample in any of {len(self._files)} tar shards{reason}")
        for name, damage in list(self.damaged.items())[:10]:
            _logger.warning("%s %s", name, damage)
        if len(self.damaged) > 10:
            _logger.warning("%d shards of %d are damaged", len(self.damaged), len(self._files))

    @property
    def damaged(self) -> dict[str, str]:
        """The shards that can be used in part only, and why."""
        return {
            name: f"is damaged at {shard.damage}; its first {shard.samples} samples are used"
            for name, shard in zip(self._names, self._shards, strict=True)
            if shard.damage
        }

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> tuple[str, Mapping[str, Any]]:
        """The sample's name, "shard/key", and its columns.

        Raises:
            BadSample: the shard has changed since it was indexed, or the sample is too large.
            OSError: the shard cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        file, name = self._files[number], self._names[number]
        start, end = self._positions[index + number : index + number + 2].tolist()
        if end - start > MAX_SAMPLE_BYTES:
            raise BadSample("image_too_large", f"{name}, byte {start}: a sample of {end - start} bytes")
        try:
            if not 0 <= start < end:
                raise tarfile.ReadError(f"remove {self._index}")
            key, columns = _read_sample(read_range(file, start, end - start))
        except tarfile.TarError as error:
            raise BadSample("unreadable", f"{name}, byte {start}: not the sample that was indexed ({error})") from error
        return f"{name}/{key}", columns

    def identity(self) -> Mapping[str, str]:
        """Number of samples, bytes, and a digest of where the samples lie, by shard."""
        parts = zip(self._names, self._files, self._shards, strict=True)
        return {name: f"{shard.samples} samples, {file.size} bytes, {shard.digest}" for name, file, shard in parts}

    @cached_property
    def _positions(self) -> Int64[np.ndarray, "positions"]:
        """Where each sample of a shard starts and the last one ends, shard after shard."""
        return np.asarray(np.memmap(self._index, "<i8", "r"))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_positions"}


def _read_sample(data: bytes) -> tuple[str, dict[str, bytes]]:
    """Key and columns."""

    def read(start: int, length: int) -> bytes:
        return data[start : start + length]

    key = None
    columns: dict[str, bytes] = {}
    position = 0
    while position < len(data):
        member = read_member(read, position)
        if member is None or member.start + member.size > len(data):
            raise tarfile.ReadError("it ends early")
        position = member.end
        if (parts := key_and_extension(member.name)) is None:
            continue
        if key is None:
            key = parts[0]
        elif parts[0] != key:
            raise tarfile.ReadError("another one follows")
        column = parts[1].decode(errors="surrogateescape").lower()
        if column not in columns:
            columns[column] = data[member.start : member.start + member.size]
    if key is None:
        raise tarfile.ReadError("it has no name")
    return key.decode(errors="replace"), columns


def _scan(file: StoredFile) -> tuple["array[int]", str]:
    """Where the samples of a shard start and the last one ends; and what is wrong with the shard, "" for nothing."""
    read = _Stretches(file)
    for magic, kind in _COMPRESSED.items():
        if read(0, len(magic)) == magic:
            raise ConfigError(f"{file.url} is compressed ({kind}), which rules out random access; decompress it first")
    positions = array("q")
    key = None
    position = 0
    damage = ""
    try:
        while (member := read_member(read, position)) is not None:
            parts = key_and_extension(member.name)
            if parts is not None and parts[0] != key:
                key = parts[0]
                positions.append(position)
            if member.start + member.size > file.size:
                raise tarfile.ReadError(f"a member of {member.size} bytes runs past the end")
            position = member.end
    except tarfile.TarError as error:
        damage = f"byte {position} ({error})"
        if positions and not isinstance(error, NoEndMark):
            position = positions.pop()  # the damaged member may be of this sample
    positions.append(min(position, file.size))
    return positions, damage


class _Stretches:
    """Reads a file front to back, a stretch at a time, leaving out what nobody asks for."""

    def __init__(self, file: StoredFile):
        self._file = file
        self._stretch = _REMOTE_STRETCH if "://" in file.url else _STRETCH
        self._start = 0
        self._data = b""

    def __call__(self, start: int, length: int) -> bytes:
        if not self._start <= start <= start + length <= self._start + len(self._data):
            available = max(0, self._file.size - start)
            self._data = read_range(self._file, start, min(max(length, self._stretch), available))
            self._start = start
        return self._data[start - self._start : start - self._start + length]


@dataclass(frozen=True)
class _Shard:
    """What the index says of a shard besides positions."""

    samples: int
    digest: str
    damage: str


_SHARD = pydantic.TypeAdapter(_Shard)
_SHARDS = pydantic.TypeAdapter(tuple[_Shard, ...])


def _index_file(files: Sequence[StoredFile], index_dir: Path) -> Path:
    """The positions of all shards, 8 bytes each; a JSON file beside it, written last, says whose they are."""
    digest = hashlib.sha256(f"{_INDEX_VERSION}\n".encode())
    for file in files:
        digest.update(f"{file.url}\0{file.size}\0{file.stamp}\n".encode(errors="surrogateescape"))
    return index_dir / f"tars-{digest.hexdigest()[:32]}.int64"


def _load_index(path: Path, files: Sequence[StoredFile]) -> tuple[_Shard, ...] | None:
    """None if there is no index, or it is damaged."""
    try:
        shards = _SHARDS.validate_json(path.with_suffix(".json").read_bytes())
        lengths = [8 * (shard.samples + 1) for shard in shards]
        size = path.stat().st_size
        if len(shards) != len(files) or size != sum(lengths):
            return None
        if size <= _VERIFIED_BYTES:
            with path.open("rb") as stream:
                if any(_digest(stream.read(n)) != shard.digest for n, shard in zip(lengths, shards, strict=True)):
                    return None
    except (OSError, ValueError):
        return None
    return shards


def _build_index(path: Path, files: Sequence[StoredFile]) -> tuple[_Shard, ...]:
    """Scans the shards but those that an interrupted call has done. One process builds while others wait."""
    parts = path.with_suffix(".parts")
    with _locked(path.with_suffix(".lock")):
        if shards := _load_index(path, files):
            return shards
        parts.mkdir(exist_ok=True)
        tasks = [(file, parts / str(number)) for number, file in enumerate(files)]
        _scan_all(tasks)
        built = []
        with _replacing(path) as stream:
            for task in tasks:
                shard, positions = _scan_once(*task)
                built.append(shard)
                stream.write(positions)
            stream.flush()
            os.fsync(stream.fileno())  # on disk before the file that vouches for it
        with _replacing(path.with_suffix(".json")) as stream:
            stream.write(_SHARDS.dump_json(tuple(built)))
        shutil.rmtree(parts, ignore_errors=True)
    return tuple(built)


def _scan_all(tasks: Sequence[tuple[StoredFile, Path]]) -> None:
    waiting = deque(tasks)
    began = time.monotonic()
    with tqdm(total=len(tasks), desc="indexing tar shards", unit="shard", delay=3) as bar:
        while waiting and time.monotonic() - began < _ALONE_SECONDS:
            _scan_once(*waiting.popleft())
            bar.update()
        if not waiting:
            return
        # Processes, as parsing holds the interpreter's lock; spawned, as this one may have threads.
        with ProcessPoolExecutor(min(len(waiting), os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
            try:
                for done in as_completed([pool.submit(_scan_aside, task) for task in waiting]):
                    done.result()
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _scan_aside(task: tuple[StoredFile, Path]) -> None:
    _scan_once(*task)


def _scan_once(file: StoredFile, part: Path) -> tuple[_Shard, bytes]:
    """The shard's entry in the index and its positions, from ``part`` if that is there, otherwise written to it."""
    with suppress(OSError, ValueError):
        entry, _, kept = part.read_bytes().partition(b"\n")
        shard = _SHARD.validate_json(entry)
        if shard.digest == _digest(kept):
            return shard, kept
    scanned, damage = _scan(file)
    positions = np.array(scanned, "<i8").tobytes()
    shard = _Shard(len(scanned) - 1, _digest(positions), damage)
    with _replacing(part) as stream:
        stream.write(_SHARD.dump_json(shard) + b"\n" + positions)
    return shard, positions


def _digest(positions: bytes) -> str:
    return hashlib.sha256(positions).hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("w")
    except OSError as error:
        raise ConfigError(f"data.index_dir: no index of tar shards can be kept in {path.parent} ({error})") from error
    with stream:
        with suppress(OSError):  # where locks are not supported, several processes do the same work, safely
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when it is complete."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as stream:
            yield stream
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
