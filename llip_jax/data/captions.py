"""Caption recipes: which captions of a record fill the slots of a training step."""

import zlib
from collections.abc import Sequence

import numpy as np

from llip_jax.config import CaptionConfig


def generator(seed: int, stream: str, index: int) -> np.random.Generator:
    """Random numbers for one use (``stream``) at one global position: the same call always gives the same numbers."""
    return np.random.default_rng((seed, zlib.crc32(stream.encode()), index))


def choose_captions(
    captions: Sequence[str], specific: int, config: CaptionConfig, seed: int, index: int
) -> tuple[int, ...]:
    """Draws captions without replacement, one a slot; a pure function of its arguments.

    Each slot is drawn, with ``config.specific_probability`` and while any is left, from the leading ``specific``
    captions, and otherwise from all that are left.

    Returns:
        Indices into ``captions`` in slot order: ``config.slots`` of them, or all where there are fewer captions.
    """
    rng = generator(seed, "captions", index)
    remaining = list(range(len(captions)))
    chosen: list[int] = []
    for _ in range(min(config.slots, len(captions))):
        preferred = [i for i in remaining if i < specific]
        pool = preferred if preferred and rng.random() < config.specific_probability else remaining
        chosen.append(pool[rng.integers(len(pool))])
        remaining.remove(chosen[-1])
    return tuple(chosen)
