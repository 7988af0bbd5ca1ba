"""Cosines of every image with every text, streamed to the host: device memory does not grow with the number of images.

Images go through the device in blocks of one shape. One call scores a block against all texts (Llip, arXiv 2405.00740:
the image mixed by the text it is compared with), in a loop over pieces that fit memory, and its result is copied to
the host while the next block is computed.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from llip_jax.ops.pair_blocks import check_sides, prepare
from llip_jax.ops.pair_scores import FixedSide, ImageSide, TextSide, mix, mixing_weights, normalize
from llip_jax.ops.plan import BLOCK_TEXTS, block_bytes, even
from llip_jax.ops.sweep import rows
from llip_jax.parallel.sharding import ACTIVATIONS, constrain

Tag = TypeVar("Tag")
Side = TypeVar("Side", bound=ImageSide | TextSide)

Progress = Callable[[int], Any]
"""Called with the number of images done since the last call."""

Bar = Callable[[int, str, str], AbstractContextManager[Progress]]
"""Of a total, a unit and a label: a progress bar for what may take longer than a few seconds."""


@contextlib.contextmanager
def silent(total: int, unit: str, label: str) -> Iterator[Progress]:
    """No progress bar."""
    yield lambda _: None


def score(
    images: ImageSide, texts: TextSide, *, image_block: int = 256, progress: Progress = lambda _: None
) -> Float[np.ndarray, "N J"]:
    """Cosine of every image with every text, in float32 on the host.

    Both sides may be NumPy or JAX arrays; NumPy images come to the device block by block. With a mesh in use, the
    images of a block are divided over its batch axes.

    Args:
        images: N images.
        texts: J texts, at least one.
        image_block: images of a block, at least 1; two blocks are on the device at a time.
        progress: called after each block.

    Raises:
        ValueError: shapes disagree, there is no text, ``image_block`` is below 1, or a cosine is not finite.
    """
    check_sides(images, texts)
    if image_block < 1:
        raise ValueError(f"expected an image_block of at least 1, got {image_block}")
    total = image_count(images)
    starts = range(0, total, image_block)
    sides = (by_image(itemgetter(slice(start, start + image_block)), images) for start in starts)
    scores = np.empty((total, len(texts.embedding)), np.float32)
    for start, block in zip(starts, score_blocks(sides, texts), strict=True):
        scores[start : start + len(block)] = block
        progress(len(block))
    return scores


def score_blocks(image_sides: Iterable[ImageSide], texts: TextSide) -> Iterator[Float[np.ndarray, "n J"]]:
    """Cosines of each image side with all texts, in order; the next side is asked for before a result is given.

    Sides with fewer images than the first are filled up to it, so that nothing compiles twice; a larger one compiles
    once more.

    Raises:
        ValueError: shapes disagree, there is no text, or a cosine is not finite.
    """
    if not len(texts.embedding):
        raise ValueError("expected at least one text, got none")
    texts = to_all_devices(texts)

    def on_device() -> Iterator[tuple[int, Float[Array, "padded J"]]]:
        block = 0
        for side in image_sides:
            check_sides(side, texts)
            count = image_count(side)
            block = max(block, -(-max(count, 1) // batch_devices()) * batch_devices())
            yield count, cosines(_padded(side, block), texts)

    done = 0
    for count, block in one_late(on_device()):
        check_finite(block[:count], done + np.arange(count)[:, None])
        yield block[:count]
        done += count


class OwnScores(NamedTuple):
    """n images, each with C texts of its own; see ``reading.Own``."""

    cosines: Float[Array, "n C"]
    mixed: Float[Array, "n C d"] | None
    weights: Float[Array, "n C M K"] | None


def own_scores(images: ImageSide, texts: TextSide, own: Int[Array, "n C"]) -> OwnScores:
    """Every image with the texts that ``own`` gives it, rows of ``texts``, each mixing it in turn."""

    def one(image: ImageSide, own: Int[Array, "C"]) -> OwnScores:
        image = by_image(lambda x: x[None], image)
        embedding = normalize(texts.embedding[own])
        if isinstance(image, FixedSide):
            mixed, weights = jnp.broadcast_to(normalize(image.embedding), embedding.shape), None
        else:
            assert texts.queries is not None
            queries = texts.queries[own]
            mixed, weights = normalize(mix(image, queries)[0]), mixing_weights(image, queries)[0]
        return OwnScores(jnp.einsum("cd,cd->c", mixed, embedding, precision="highest"), mixed, weights)

    return jax.vmap(one, in_axes=(image_axes(images), 0))(images, own)


def one_late(results: Iterable[tuple[Tag, Array]]) -> Iterator[tuple[Tag, np.ndarray]]:
    """The results on the host, each waited for only once the next has been given to the device."""
    waiting: tuple[Tag, Array] | None = None
    for tag, result in results:
        result.copy_to_host_async()
        if waiting is not None:
            yield waiting[0], np.asarray(waiting[1])
        waiting = tag, result
    if waiting is not None:
        yield waiting[0], np.asarray(waiting[1])


@jax.jit
def cosines(images: ImageSide, texts: TextSide) -> Float[Array, "n J"]:
    """One block of images, its rows divided over the batch axes of the mesh in use, with all texts; whole everywhere.

    Temporaries: what is prepared for each image and each text, and one piece of pairs.
    """
    if batch_devices() == 1:
        return _by_pieces(images, texts)
    divided: Any = PartitionSpec(ACTIVATIONS["batch"])
    whole = PartitionSpec()
    image_specs = by_image(lambda _: divided, jax.tree.map(lambda _: whole, images))
    over_devices = jax.shard_map(_by_pieces, in_specs=(image_specs, whole), out_specs=divided, check_vma=False)
    return constrain(over_devices(images, texts), None, None)


def _by_pieces(images: ImageSide, texts: TextSide) -> Float[Array, "n J"]:
    scorer, image_rows, text_rows, shared = prepare(images, texts)
    n, j = rows(image_rows), rows(text_rows)
    width = even(j, BLOCK_TEXTS)
    height = even(n, block_bytes() // (scorer.bytes_of_a_pair(image_rows) * width))
    across, down = -(-j // width), -(-n // height)

    def piece(index: Array, scores: Float[Array, "n J"]) -> Float[Array, "n J"]:
        # The last piece of a ragged end starts early and computes some pairs again.
        top = jnp.minimum(index // across * height, n - height)
        left = jnp.minimum(index % across * width, j - width)
        some_images = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, top, height), image_rows)
        some_texts = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, left, width), text_rows)
        return jax.lax.dynamic_update_slice(scores, scorer.forward(some_images, some_texts, shared)[0], (top, left))

    return jax.lax.fori_loop(0, down * across, piece, jnp.zeros((n, j), jnp.float32))


def image_count(images: ImageSide) -> int:
    """N."""
    return len(images.embedding if isinstance(images, FixedSide) else images.keys)


def by_image(change: Callable[[Array], Array], images: ImageSide) -> ImageSide:
    """The same change made to every array that has a row for each image."""
    if isinstance(images, FixedSide):
        return FixedSide(change(images.embedding))
    return images._replace(keys=change(images.keys), values=change(images.values))


def image_axes(images: ImageSide) -> Any:
    """For jax.vmap over images: 0 for every array that has a row for each image, None for the others."""
    rows: Callable[[Array], Any] = lambda _: 0  # noqa: E731  (by_image changes arrays into arrays elsewhere)
    return by_image(rows, jax.tree.map(lambda _: None, images))


def to_all_devices(side: Side) -> Side:
    """On the device, or whole on every device of the mesh in use."""
    return jax.device_put(side, None if jax.sharding.get_abstract_mesh().empty else PartitionSpec())


def batch_devices() -> int:
    """Over how many devices the mesh in use divides images; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in ACTIVATIONS["batch"])


def _padded(images: ImageSide, block: int) -> ImageSide:
    missing = block - image_count(images)
    if not missing:
        return images
    return by_image(lambda x: jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)), images)


def check_finite(cosines: Float[np.ndarray, "*pairs"], images: Int[np.ndarray, "*pairs"]) -> None:
    """Raises ValueError where a cosine is not finite; ``images`` are the rows they belong to."""
    bad = ~np.isfinite(cosines)
    if bad.any():
        of = np.unique(np.broadcast_to(images, bad.shape)[bad])
        named = ", ".join(map(str, of[:10])) + (", ..." if len(of) > 10 else "")
        raise ValueError(f"{bad.sum()} of {bad.size} cosines are not finite, those of {len(of)} images: rows {named}")
