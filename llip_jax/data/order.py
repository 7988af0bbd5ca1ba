"""Which sample stands at which global position: shuffled epochs of each source, sources in proportion."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import grain
import numpy as np
from jaxtyping import Int

from llip_jax.data.captions import generator

_TABLED = 2**16
"""Sources up to this size are shuffled by tables."""
_UNIT = 2**32
"""Weights are rounded to whole shares of this."""


class Indices(Protocol):
    """Endless indices by position."""

    def __getitem__(self, position: int) -> int: ...


def epochs(size: int, seed: int, stream: str = "order") -> Indices:
    """Endless indices of one source: every run of ``size`` positions is another permutation."""
    # Grain seeds epoch e with seed + e: drawing the seed keeps neighbouring seeds from repeating each other's epochs.
    start = int(generator(seed, stream, 0).integers(2**32))
    if size <= _TABLED:
        return _SmallEpochs(size, start)
    if (size - 1) & (size - 2) == 0:  # one more than a power of two
        return _WalkedEpochs(size, grain.MapDataset.range(size + 1).shuffle(start).repeat())
    return grain.MapDataset.range(size).shuffle(start).repeat()


@dataclass(frozen=True)
class _WalkedEpochs:
    """By the permutations of one more index, followed on where they lead to that one.

    Of 65,537, 262,145 and 1,048,577 indices, Grain's shuffle (0.2.18) leaves one out and gives another twice.
    """

    size: int
    one_more: grain.MapDataset[int]

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.size)
        start = epoch * (self.size + 1)
        index = self.one_more[start + place]
        return index if index < self.size else self.one_more[start + self.size]


@dataclass(frozen=True)
class _SmallEpochs:
    """By tables: Grain's shuffle takes 6 µs for a position among a billion, but 2,400 µs among seven."""

    size: int
    seed: int

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.size)
        return int(_permutation(self.size, self.seed, epoch)[place])


@lru_cache(64)
def _permutation(size: int, seed: int, epoch: int) -> Int[np.ndarray, "size"]:
    return np.random.default_rng((seed, epoch)).permutation(size).astype(np.uint16)


@dataclass(frozen=True)
class SampleOrder:
    """Endless (source, index in the source) by global position; a pure function, without tables of samples.

    Each source comes in epochs, each a permutation of its samples of its own; it depends on the seed and the source's
    name only, so that other sources may come and go without changing it. Sources alternate as evenly as their weights
    allow: among any n positions in a row, a source has its share of n to within the number of sources.

    Args:
        names, sizes, weights: of each source; sizes in samples.
        seed: of the run.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int

    def __getitem__(self, position: int) -> tuple[int, int]:
        source, visit = interleave(position, self._shares)
        return source, self._epochs[source][visit]

    @cached_property
    def _shares(self) -> tuple[int, ...]:
        return tuple(max(1, round(weight / sum(self.weights) * _UNIT)) for weight in self.weights)

    @cached_property
    def _epochs(self) -> tuple[Indices, ...]:
        return tuple(
            epochs(size, self.seed, f"order {name}" if name else "order")
            for name, size in zip(self.names, self.sizes, strict=True)
        )


def interleave(position: int, shares: Sequence[int]) -> tuple[int, int]:
    """The source at a position, and how many of its samples stand before that.

    Positions are dealt out source by source: the first takes its share of them, evenly spread, the next one its share
    of what is left, and so on. (So does Grain's mixture; its shares are whole per cents of the smallest one's.)
    """
    before, after, left = position, position + 1, sum(shares)
    for source, share in enumerate(shares):
        # Of the positions up to here, those that go to later sources.
        later_before, later_after = before * (left - share) // left, after * (left - share) // left
        if later_before == later_after:
            return source, before - later_before
        before, after, left = later_before, later_after, left - share
    raise AssertionError("the last source takes all that is left")
