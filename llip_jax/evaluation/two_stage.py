"""Retrieval in two stages: a shortlist by embeddings that no text has conditioned, then exact scores of it alone.

Text-conditioned scores (Llip, arXiv 2405.00740) need every (image, text) pair, which no index of vectors can look up.
The first stage here is text-independent: an image is its *unconditioned* embedding
(``DualEncoder.unconditioned_embedding``), one vector whatever the text. Its ranking is not Llip's and is never reported
as such; it only says which pairs the second stage scores, each image mixed by the text it is compared with.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llip_jax.evaluation.retrieval import recall_at_k
from llip_jax.evaluation.scoring import (
    batch_devices,
    by_image,
    check_finite,
    image_count,
    one_late,
    score_blocks,
    to_all_devices,
)
from llip_jax.ops.pair_blocks import check_sides
from llip_jax.ops.pair_scores import FixedSide, ImageSide, TextSide, cosines
from llip_jax.ops.plan import block_bytes, even
from llip_jax.parallel.sharding import constrain

_BLOCK = 256
"""Images of a block of the first stage, and rows that are sorted at a time."""
_TASK_TEXTS = 32
"""Texts that an image meets in one task of the second stage, at most."""
_TOP = 10
"""Answers looked at when exact and two-stage results are compared."""

Vectors = Any
"""NumPy or JAX array [n, d]."""


class Shortlist(NamedTuple):
    """Answers of each query that the first stage lets through, in no order."""

    texts: Int[np.ndarray, "N L"]
    """Of each image."""
    images: Int[np.ndarray, "J L"]
    """Of each text."""

    def of_images(self) -> Bool[np.ndarray, "N J"]:
        """Whether a text is in an image's shortlist."""
        listed = np.zeros((len(self.texts), len(self.images)), bool)
        np.put_along_axis(listed, self.texts, True, axis=1)
        return listed

    def of_texts(self) -> Bool[np.ndarray, "N J"]:
        """Whether an image is in a text's shortlist."""
        listed = np.zeros((len(self.texts), len(self.images)), bool)
        np.put_along_axis(listed, self.images.T, True, axis=0)
        return listed

    def pairs(self) -> Bool[np.ndarray, "N J"]:
        """Pairs that the second stage scores: those in either shortlist."""
        return self.of_images() | self.of_texts()


def shortlist(images: Vectors, texts: Vectors, length: int) -> Shortlist:
    """The ``length`` texts nearest each image and images nearest each text, by cosine; all of them where fewer exist.

    Args:
        images: unconditioned embeddings of N images, of any norm.
        texts: embeddings of J texts, of any norm.
        length: L, at least 1. Which of equal cosines at the end of a list get in is arbitrary.

    Raises:
        ValueError: shapes disagree, there is no image or no text, ``length`` is below 1, or a cosine is not finite.
    """
    if length < 1:
        raise ValueError(f"expected shortlists of at least 1, got {length}")
    if not len(images):
        raise ValueError("expected at least one image, got none")
    starts = range(0, len(images), _BLOCK)
    sides = (FixedSide(images[start : start + _BLOCK]) for start in starts)
    of_images: list[np.ndarray] = []
    # Of each text: the best images of the blocks so far and their cosines.
    best = np.zeros((0, len(texts)), np.int64)
    best_cosines = np.zeros((0, len(texts)), np.float32)
    for start, block in zip(starts, score_blocks(sides, TextSide(texts)), strict=True):
        of_images.append(_top(block, length))
        candidates = np.concatenate([best_cosines, block])
        kept = _top(candidates.T, length).T
        index = np.concatenate([best, np.broadcast_to(start + np.arange(len(block))[:, None], block.shape)])
        best, best_cosines = (np.take_along_axis(x, kept, axis=0) for x in (index, candidates))
    return Shortlist(np.concatenate(of_images), best.T)


def rescore(
    image_sides: Iterable[ImageSide], texts: TextSide, pairs: Bool[np.ndarray, "N J"]
) -> Float[np.ndarray, "N J"]:
    """Cosines of some pairs, in float32 on the host, and minus infinity for all others.

    The work is cut into tasks of one image and up to 32 texts, so that an image's mixture tokens are read once for
    them; one call does several tasks and has one shape.

    Args:
        image_sides: the N images in order, in as many sides as wanted; sides of one length compile once.
        texts: J texts, at least one.
        pairs: which to score.

    Raises:
        ValueError: shapes disagree, there are not as many images as rows of ``pairs``, or a cosine is not finite.
    """
    if len(texts.embedding) != pairs.shape[1]:
        raise ValueError(f"expected pairs [N, {len(texts.embedding)}], got {pairs.shape}")
    texts = to_all_devices(texts)
    width = even(int(pairs.sum(axis=1).max(initial=1)), _TASK_TEXTS)

    def on_device() -> Iterator[tuple[tuple[np.ndarray, ...], Float[Array, "T b"]]]:
        first = 0
        for side in image_sides:
            check_sides(side, texts)
            end = first + image_count(side)
            if end > len(pairs):
                raise ValueError(f"expected {len(pairs)} images, one for each row of pairs, got more")
            # Whole everywhere: a task finds its image on whatever device it is.
            side = to_all_devices(side)
            tasks, size = _Tasks.of(pairs[first:end], width), _tasks_of_a_call(side, width)
            for start in range(0, len(tasks.image), size):
                call = tasks.cut(start, size)
                task, slot = np.nonzero(call.used)
                where = first + call.image[task], call.texts[task, slot], task, slot
                yield where, task_scores(side, texts, call.image, call.texts)
            first = end
        if first != len(pairs):
            raise ValueError(f"expected {len(pairs)} images, one for each row of pairs, got {first}")

    scores = np.full(pairs.shape, -np.inf, np.float32)
    for (image, text, task, slot), block in one_late(on_device()):
        check_finite(block[task, slot], image)
        scores[image, text] = block[task, slot]
    return scores


class _Tasks(NamedTuple):
    """T times one image and b texts."""

    image: Int[np.ndarray, "T"]
    texts: Int[np.ndarray, "T b"]
    used: Bool[np.ndarray, "T b"]

    @classmethod
    def of(cls, pairs: Bool[np.ndarray, "n J"], width: int) -> "_Tasks":
        image, text = np.nonzero(pairs)
        counts = pairs.sum(axis=1)
        tasks = -(-counts // width)
        # Of each pair: how many of its image's come before it, and with that its task and its place there.
        before = np.arange(len(image)) - np.repeat(counts.cumsum() - counts, counts)
        task, slot = (tasks.cumsum() - tasks)[image] + before // width, before % width
        texts, used = (np.zeros((tasks.sum(), width), dtype) for dtype in (np.int32, bool))
        texts[task, slot], used[task, slot] = text, True
        return cls(np.repeat(np.arange(len(pairs), dtype=np.int32), tasks), texts, used)

    def cut(self, start: int, size: int) -> "_Tasks":
        """So many tasks from one on, empty ones after the last."""

        def rows(x: np.ndarray) -> np.ndarray:
            x = x[start : start + size]
            return np.pad(x, [(0, size - len(x))] + [(0, 0)] * (x.ndim - 1))

        return _Tasks(*map(rows, self))


@jax.jit
def task_scores(
    images: ImageSide, texts: TextSide, image: Int[Array, "T"], own_texts: Int[Array, "T b"]
) -> Float[Array, "T b"]:
    """Cosines of one image with b texts, T times."""

    def task(image: Int[Array, ""], own_texts: Int[Array, "b"]) -> Float[Array, "b"]:
        # Dense: with few texts an image, what ops/pair_blocks.py prepares for a text costs as much as it saves.
        one_image = by_image(lambda x: x[image][None], images)
        return cosines(one_image, jax.tree.map(lambda x: x[own_texts], texts))[0]

    divided = jax.vmap(task)(constrain(image, "batch"), constrain(own_texts, "batch", None))
    return constrain(divided, None, None)


def _tasks_of_a_call(images: ImageSide, width: int) -> int:
    """As many as memory allows, but about two an image at most; the devices of a mesh get equal numbers."""
    if isinstance(images, FixedSide):
        tokens = images.embedding.shape[1]
        of_a_pair = 3 * tokens
    else:
        _, k, m, dh = images.keys.shape
        tokens, of_a_pair = 2 * k * m * dh, m * (2 * k + 4 * dh)
    devices = batch_devices()
    fitting = block_bytes() // (4 * (tokens + width * of_a_pair))
    return devices * max(1, min(fitting, 2 * image_count(images) // devices))


def two_stage_figures(
    exact: Float[np.ndarray, "N J"], positives: Bool[np.ndarray, "N J"], listed: Shortlist
) -> dict[str, Any]:
    """What retrieval in two stages reaches, and how much of the exact result survives it.

    Args:
        exact: scores of all pairs. The second stage's (``rescore``) are the same but for rounding, of fewer pairs.
        positives: pairs that match; every query has one.
        listed: the first stage's result.

    Returns:
        The figures of ``recall_at_k`` with all pairs outside both shortlists never listed; ``shortlist`` (its length)
        and ``rescored_share`` (of all pairs); and for each direction D, in [0, 1]: ``D_best_in_shortlist``, the share
        of queries whose exact best answer is in their own shortlist, and ``D_top_10_overlap``, the share of the exact
        best ten that is among the best ten of the two stages.

    Raises:
        ValueError: see ``recall_at_k``.
    """
    pairs = listed.pairs()
    figures: dict[str, Any] = dict(recall_at_k(np.where(pairs, exact, -np.inf), positives))
    figures["shortlist"] = max(listed.texts.shape[1], listed.images.shape[1])
    figures["rescored_share"] = float(pairs.mean())
    for name, scores, own, rescored in (
        ("image_to_text", exact, listed.of_images(), pairs),
        ("text_to_image", exact.T, listed.of_texts().T, pairs.T),
    ):
        best = scores == scores.max(axis=1, keepdims=True)
        # Of several equally good answers, each is the best with the same probability.
        figures[f"{name}_best_in_shortlist"] = float(np.mean((best & own).sum(axis=1) / best.sum(axis=1)))
        # What is rescored keeps its exact score, so whatever of the exact best ten is rescored is in the new best ten.
        kept = [
            np.take_along_axis(rescored[rows], _top(scores[rows], _TOP), axis=1)
            for rows in (slice(start, start + _BLOCK) for start in range(0, len(scores), _BLOCK))
        ]
        figures[f"{name}_top_{_TOP}_overlap"] = float(np.mean(np.concatenate(kept)))
    return figures


def _top(scores: Float[np.ndarray, "Q A"], k: int) -> Int[np.ndarray, "Q k"]:
    """Columns of the k highest scores of each row, in no order; all where there are fewer."""
    k = min(k, scores.shape[1])
    return np.argpartition(scores, scores.shape[1] - k, axis=1)[:, scores.shape[1] - k :]
