"""Caption recipes: which captions of a record fill the slots of a training step."""

import re
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llip_jax.config import CaptionRules

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*")


class Choice(NamedTuple):
    """The text of one slot, and the caption it is taken from."""

    caption: int
    text: str


class _Piece(NamedTuple):
    """What one draw takes: a caption, or one of as many runs of its sentences as it has sentences."""

    caption: int
    sentences: tuple[str, ...]
    number: int


def generator(seed: int, stream: str, index: int) -> np.random.Generator:
    """Random numbers for one use (``stream``) at one global position: the same call always gives the same numbers."""
    return np.random.default_rng((seed, zlib.crc32(stream.encode()), index))


def choose_captions(
    captions: Sequence[str],
    kinds: Sequence[str],
    specific: int,
    rules: CaptionRules,
    slots: int,
    seed: int,
    index: int,
) -> tuple[Choice, ...]:
    """Draws texts without replacement, one a slot; a pure function of its arguments.

    A slot draws a kind by ``rules.weights`` (slot 0: ``rules.first``), then, with ``rules.specific_probability`` and
    while any is left, one of the leading ``specific`` captions, and otherwise any that is left.

    Args:
        captions, kinds, specific: as in :class:`llip_jax.data.records.Record`.
        rules: see :class:`llip_jax.config.CaptionRules`.
        slots: most texts to draw.
        seed, index: of the run, and the global position.

    Returns:
        Choices in slot order: ``slots`` of them, or fewer where nothing is left to draw.
    """
    if len(captions) == 1 and kinds[0] not in rules.sentences:
        return (Choice(0, captions[0]),)  # nothing to draw, as with most web data
    rng = generator(seed, "captions", index)
    remaining = [piece for i, kind in enumerate(kinds) for piece in _pieces(i, captions[i], kind, rules)]
    chosen: list[Choice] = []
    while remaining and len(chosen) < slots:
        pool = _of_one_kind(remaining, kinds, rules, len(chosen), rng)
        preferred = [piece for piece in pool if piece.caption < specific]
        if preferred and rng.random() < rules.specific_probability:
            pool = preferred
        piece = pool[rng.integers(len(pool))]
        remaining.remove(piece)
        choice = Choice(piece.caption, _text(piece, kinds[piece.caption], rules, rng))
        if len(choice.text.split()) < rules.min_words:
            choice = Choice(0, captions[0])
            remaining = [piece for piece in remaining if piece.caption != 0]
        if choice not in chosen:
            chosen.append(choice)
    return tuple(chosen)


def _pieces(caption: int, text: str, kind: str, rules: CaptionRules) -> list[_Piece]:
    if kind not in rules.sentences:
        return [_Piece(caption, (text,), 0)]
    sentences = tuple(sentence for sentence in _SENTENCE_END.split(text.strip()) if sentence)
    return [_Piece(caption, sentences, number) for number in range(len(sentences))]


def _of_one_kind(
    pieces: list[_Piece], kinds: Sequence[str], rules: CaptionRules, slot: int, rng: np.random.Generator
) -> list[_Piece]:
    """The pieces of the kind that this slot draws; all of them where the rules do not say."""
    if slot == 0 and rules.first is not None:
        pool = [piece for piece in pieces if kinds[piece.caption] == rules.first]
        if pool:
            return pool
    if not rules.weights:
        return pieces
    present = sorted({kinds[piece.caption] for piece in pieces})
    weights = np.array([rules.weights.get(kind, 0.0) for kind in present])
    if not weights.any():
        return pieces
    kind = present[np.searchsorted(np.cumsum(weights) / weights.sum(), rng.random(), side="right")]
    return [piece for piece in pieces if kinds[piece.caption] == kind]


def _text(piece: _Piece, kind: str, rules: CaptionRules, rng: np.random.Generator) -> str:
    if kind not in rules.sentences:
        return piece.sentences[0]
    fewest, most = rules.sentences[kind]
    length = min(int(rng.integers(fewest, most + 1)), len(piece.sentences))
    start = int(rng.integers(len(piece.sentences) - length + 1))
    return " ".join(piece.sentences[start : start + length])
