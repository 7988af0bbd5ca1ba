"""All pairs of images and texts, block by block, on one device or around a ring of them.

A *sweep* calls a function on every block of images x texts and reduces what it returns by image, by text, and over
all: sums (of losses and of gradients) and log-sum-exps. Its memory is one block's, and the reduced arrays. Over several
devices images stay where they are; texts, and what is reduced for them, travel.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool

Tree = Any
"""Nested arrays with one row for each image (or text)."""

Exchange = Literal["ring", "gather"]


class Reduced(NamedTuple):
    """Sums and log-sum-exps over pairs; nested arrays."""

    sums: Tree
    logsumexps: Tree


class BlockResult(NamedTuple):
    """Of n images and j texts: reduced over the texts [n, ...], over the images [j, ...], and over both."""

    images: Reduced
    texts: Reduced
    shared: Tree


Body = Callable[[Tree, Tree, Bool[Array, "n j"]], BlockResult]
"""Images, texts, and which of their pairs count: at a ragged end a block repeats pairs of the block before."""


class BlockSizes(NamedTuple):
    """Images and texts of a block; more than there are means all."""

    images: int
    texts: int


class Plan(NamedTuple):
    """How all pairs are gone through: blocks, the mesh axes that divide images and texts, and how texts get around."""

    sizes: BlockSizes
    axes: tuple[str, ...] = ()
    exchange: Exchange = "ring"
    ring: tuple[int, ...] | None = None
    """Positions along the axes in the order of the ring; None: one after another."""


def merge(a: Reduced, b: Reduced) -> Reduced:
    """Of two disjoint sets of pairs together."""
    return Reduced(jax.tree.map(jnp.add, a.sums, b.sums), jax.tree.map(jnp.logaddexp, a.logsumexps, b.logsumexps))


def sweep(body: Body, images: Tree, texts: Tree, sizes: BlockSizes) -> BlockResult:
    """Every image with every text at hand."""
    return _sweep_into(_nothing(body, images, texts, sizes), body, images, texts, sizes)


def sweep_mesh(
    body: Callable[[Tree, Tree, Tree, Bool[Array, "n j"]], BlockResult],
    images: Tree,
    texts: Tree,
    shared: Tree,
    plan: Plan,
) -> BlockResult:
    """Every image with every text of all devices of the mesh in use.

    ``body`` takes the shared arrays third. Exchange 'ring' passes the texts from device to device, each transfer beside
    the work on the texts at hand, so that memory does not grow with the number of devices; 'gather' brings all texts to
    every device at once, for fewer and larger blocks.
    """
    axes = plan.axes
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in axes)
    if devices == 1:
        return sweep(lambda i, t, fresh: body(i, t, shared, fresh), images, texts, plan.sizes)

    def on_device(images: Tree, texts: Tree, shared: Tree) -> tuple[Reduced, Reduced, Tree]:
        over = _around_ring if plan.exchange == "ring" else _gathered
        result = over(lambda i, t, fresh: body(i, t, shared, fresh), images, texts, plan, devices)
        return result.images, result.texts, jax.lax.psum(result.shared, axes)

    divided, whole = PartitionSpec(axes), PartitionSpec()
    specs = (divided, divided, whole)
    return BlockResult(
        *jax.shard_map(on_device, in_specs=specs, out_specs=specs, check_vma=False)(images, texts, shared)
    )


def _around_ring(body: Body, images: Tree, texts: Tree, plan: Plan, devices: int) -> BlockResult:
    sizes, axes = plan.sizes, plan.axes
    ring = plan.ring or range(devices)
    to_next = [(ring[i - 1], ring[i]) for i in range(devices)]

    def pass_on(tree: Tree) -> Tree:
        return jax.tree.map(lambda x: jax.lax.ppermute(x, axes, to_next), tree)

    def step(_: Array, carry: tuple[Tree, BlockResult]) -> tuple[Tree, BlockResult]:
        here, so_far = carry
        # Neither transfer depends on the work below: both run beside it. What is reduced for the texts at hand was left
        # behind on the device before this one.
        coming, left_behind = pass_on(here), pass_on(so_far.texts)
        empty = _nothing(body, images, here, sizes)
        result = _sweep_into(so_far._replace(texts=empty.texts), body, images, here, sizes)
        return coming, result._replace(texts=merge(left_behind, result.texts))

    _, result = jax.lax.fori_loop(0, devices, step, (texts, _nothing(body, images, texts, sizes)))
    return result._replace(texts=pass_on(result.texts))


def _gathered(body: Body, images: Tree, texts: Tree, plan: Plan, devices: int) -> BlockResult:
    axes = plan.axes
    everywhere = jax.tree.map(lambda x: jax.lax.all_gather(x, axes, tiled=True), texts)
    result = sweep(body, images, everywhere, plan.sizes)

    def combine(x: Array) -> Array:
        by_device = jax.lax.all_to_all(x.reshape(devices, -1, *x.shape[1:]), axes, 0, 0)
        return jax.nn.logsumexp(by_device, axis=0)

    sums = jax.tree.map(lambda x: jax.lax.psum_scatter(x, axes, tiled=True), result.texts.sums)
    return result._replace(texts=Reduced(sums, jax.tree.map(combine, result.texts.logsumexps)))


def _sweep_into(start: BlockResult, body: Body, images: Tree, texts: Tree, sizes: BlockSizes) -> BlockResult:
    n, j = rows(images), rows(texts)
    height, width = min(sizes.images, n), min(sizes.texts, j)
    down, across = -(-n // height), -(-j // width)

    def step(block: Array, so_far: BlockResult) -> BlockResult:
        # The last block of a ragged end starts early; the pairs it repeats are marked.
        row, column = (block // across) * height, (block % across) * width
        top, left = jnp.minimum(row, n - height), jnp.minimum(column, j - width)
        fresh = (top + jnp.arange(height) >= row)[:, None] & (left + jnp.arange(width) >= column)
        result = body(_slice(images, top, height), _slice(texts, left, width), fresh)
        return BlockResult(
            _merge_at(so_far.images, result.images, top, height),
            _merge_at(so_far.texts, result.texts, left, width),
            jax.tree.map(jnp.add, so_far.shared, result.shared),
        )

    return jax.lax.fori_loop(0, down * across, step, start)


def _nothing(body: Body, images: Tree, texts: Tree, sizes: BlockSizes) -> BlockResult:
    """The result of no pair at all: sums of 0 and log-sum-exps of minus infinity."""
    n, j = rows(images), rows(texts)
    height, width = min(sizes.images, n), min(sizes.texts, j)
    abstract = jax.eval_shape(body, _slice(images, 0, height), _slice(texts, 0, width), jnp.ones((height, width), bool))

    def empty(reduced: Reduced, length: int) -> Reduced:
        def full(x: Array, value: float) -> Array:
            return jnp.full((length, *x.shape[1:]), value, x.dtype)

        return Reduced(
            jax.tree.map(lambda x: full(x, 0), reduced.sums),
            jax.tree.map(lambda x: full(x, -jnp.inf), reduced.logsumexps),
        )

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract.shared)
    return BlockResult(empty(abstract.images, n), empty(abstract.texts, j), zeros)


def _merge_at(so_far: Reduced, block: Reduced, start: Array, length: int) -> Reduced:
    merged = merge(_slice(so_far, start, length), block)
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, start, 0), so_far, merged)


def _slice(tree: Tree, start: Array | int, length: int) -> Tree:
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, length), tree)


def rows(tree: Tree) -> int:
    """How many images (or texts) nested arrays hold.

    Raises:
        ValueError: they disagree.
    """
    counts = {len(x) for x in jax.tree.leaves(tree)}
    if len(counts) != 1:
        raise ValueError(f"expected nested arrays with one number of rows, got {sorted(counts)}")
    return counts.pop()
