"""What a data set is like, counted shard by shard and added up: sizes, lengths, formats, failures, repetitions."""

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

import numpy as np

from llip_jax.data.records import BadSample, Reason

QUANTITIES = {
    "width": "Width in pixels",
    "height": "Height in pixels",
    "short_side": "Shorter side in pixels",
    "pixels": "Pixels of an image",
    "image_bytes": "Bytes of an image file",
    "captions": "Captions of an image",
    "words": "Words of a caption",
    "characters": "Characters of a caption",
    "tokens": "Tokens of a caption, with start and end",
}
"""Everything that has a histogram."""

_PRECISION_BITS = 7
_FAILURES_SHOWN = 5
_MESSAGE_CHARACTERS = 500
_HASHES_AT_ONCE = 2**24

Key = TypeVar("Key")


@dataclass
class Histogram:
    """Counts of whole numbers: exact below 128, above that to within 1 part in 64. Total and extremes are exact."""

    bins: dict[int, int] = field(default_factory=dict)
    """Smallest value that falls into a bin -> count."""
    total: int = 0
    minimum: int = 0
    maximum: int = 0

    @property
    def count(self) -> int:
        """How many values."""
        return sum(self.bins.values())

    @property
    def mean(self) -> float:
        """NaN without values."""
        return self.total / self.count if self.bins else math.nan

    def add(self, value: int) -> None:
        """Counts one value of at least 0."""
        width = self.resolution(value)
        self._extend({value // width * width: 1}, value, value, value)

    def resolution(self, value: int) -> int:
        """Width of the bin that a value falls into: a power of two."""
        return 1 << max(value.bit_length() - _PRECISION_BITS, 0)

    def merge(self, other: "Histogram") -> None:
        """Adds the other's counts."""
        if other.bins:
            self._extend(other.bins, other.total, other.minimum, other.maximum)

    def quantile(self, share: float) -> int:
        """The value (as precise as the bins) at a share of all values in order; 0 without values."""
        rank, seen = share * (self.count - 1), 0
        for value, count in sorted(self.bins.items()):
            seen += count
            if seen > rank:
                return value
        return 0

    def _extend(self, bins: Mapping[int, int], total: int, minimum: int, maximum: int) -> None:
        self.minimum = min(self.minimum, minimum) if self.bins else minimum
        self.maximum = max(self.maximum, maximum)
        self.total += total
        _add(self.bins, bins)


@dataclass
class Statistics:
    """What became of samples: those kept, and by reason those left out with the first few messages."""

    kept: int = 0
    failed: dict[Reason, int] = field(default_factory=dict)
    failures: dict[Reason, list[str]] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=lambda: {name: Histogram() for name in QUANTITIES})

    @property
    def samples(self) -> int:
        """Kept and failed."""
        return self.kept + sum(self.failed.values())

    def add_failure(self, error: BadSample) -> None:
        """Counts a sample that was left out."""
        message = str(error).encode(errors="backslashreplace").decode()[:_MESSAGE_CHARACTERS]
        self.merge(Statistics(failed={error.reason: 1}, failures={error.reason: [message]}))

    def add_image(self, width: int, height: int, size: int, image_format: str) -> None:
        """Counts the image of a sample that was kept."""
        self.kept += 1
        self.formats[image_format] = self.formats.get(image_format, 0) + 1
        values = {"width": width, "height": height, "short_side": min(width, height), "pixels": width * height}
        for name, value in (values | {"image_bytes": size}).items():
            self.histograms[name].add(value)

    def add_captions(self, captions: Sequence[str], tokens: Iterable[int]) -> None:
        """Counts the captions of a sample that was kept; ``tokens`` is empty where they are not counted."""
        self.histograms["captions"].add(len(captions))
        for caption in captions:
            self.histograms["words"].add(len(caption.split()))
            self.histograms["characters"].add(len(caption))
        for number in tokens:
            self.histograms["tokens"].add(number)

    def merge(self, other: "Statistics") -> None:
        """Adds those of the samples that follow."""
        self.kept += other.kept
        _add(self.failed, other.failed)
        _add(self.formats, other.formats)
        for reason, messages in other.failures.items():
            self.failures[reason] = [*self.failures.get(reason, []), *messages][:_FAILURES_SHOWN]
        for name, histogram in self.histograms.items():
            histogram.merge(other.histograms[name])


@dataclass(frozen=True)
class Repeat:
    """Content that occurs ``count`` times; once in ``sample`` of the shard number ``shard``."""

    count: int
    hash: int
    shard: int
    sample: int


@dataclass(frozen=True)
class Repetition:
    """How often contents repeat each other exactly (by 64 bits of hash), and the most frequent repeated ones."""

    total: int
    distinct: int
    most: list[Repeat]

    @property
    def share(self) -> float:
        """Share of contents that repeat an earlier one."""
        return 1 - self.distinct / self.total if self.total else 0.0


def content_hash(content: bytes) -> int:
    """64 bits."""
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def save_hashes(path: Path, hashes: Sequence[tuple[int, int]]) -> None:
    """Writes (hash, sample of the shard) pairs, sorted: a row of hashes and a row of samples."""
    np.save(path, np.array(sorted(hashes), np.uint64).reshape(-1, 2).T.copy())


def find_repetition(paths: Sequence[Path], most: int) -> Repetition:
    """Compares the hashes of all shards (files of :func:`save_hashes`), in memory that does not grow with them.

    Goes through the range of hashes part by part; in every file, a part is one piece.
    """
    total = sum(np.load(path, mmap_mode="r").shape[1] for path in paths)
    parts = -(-total // _HASHES_AT_ONCE)
    distinct = 0
    repeats: list[tuple[int, int]] = []
    for part in range(parts):
        low, high = part * 2**64 // parts, (part + 1) * 2**64 // parts - 1
        values, counts = np.unique(np.concatenate([_between(path, low, high) for path in paths]), return_counts=True)
        distinct += len(values)
        # Counts of hashes beyond the most frequent ones only decide among equals.
        frequent = np.flatnonzero(counts > 1)
        if len(frequent) > most:
            least = np.partition(counts[frequent], -most)[-most]
            frequent = frequent[counts[frequent] >= least]
        candidates = zip(counts[frequent].tolist(), values[frequent].tolist(), strict=True)
        repeats = heapq.nsmallest(most, [*repeats, *candidates], key=lambda repeat: (-repeat[0], repeat[1]))
    return Repetition(total, distinct, [Repeat(count, value, *_find(paths, value)) for count, value in repeats])


def _between(path: Path, low: int, high: int) -> np.ndarray:
    hashes, _ = np.load(path, mmap_mode="r")
    return hashes[np.searchsorted(hashes, np.uint64(low)) : np.searchsorted(hashes, np.uint64(high), side="right")]


def _find(paths: Sequence[Path], value: int) -> tuple[int, int]:
    """Shard and sample where a hash first occurs."""
    for shard, path in enumerate(paths):
        hashes, samples = np.load(path, mmap_mode="r")
        row = np.searchsorted(hashes, np.uint64(value))
        if row < len(hashes) and hashes[row] == value:
            return shard, int(samples[row])
    raise ValueError(f"no shard has the hash {value:016x}")


def _add(counts: dict[Key, int], others: Mapping[Key, int]) -> None:
    for key, count in others.items():
        counts[key] = counts.get(key, 0) + count
