"""Gradients of a batch whose towers go through it in pieces, while every image still meets every text of the batch.

As in GradCache (arXiv 2101.06983): the towers encode all pieces without a gradient; the loss is taken once, over all
pairs, with its gradient by the embeddings; then each piece is encoded again, and its share of that gradient pulled back
to the parameters. What the backward pass keeps of the towers is one piece's. The price is one more forward pass of the
towers, and over several devices a gather of the weights and a sum of the gradients for each piece.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from llip_jax.config import Config, ConfigError
from llip_jax.objectives.objective import Encoded
from llip_jax.parallel.sharding import constrain

Tree = Any
"""Nested arrays."""


def check_microbatches(config: Config, shards: int) -> None:
    """Whether ``train.microbatches`` can be had, over so many pieces of the mesh (parallel.mesh.batch_shards).

    Raises:
        ConfigError: the pieces would not be equal, or a tower draws its randomness for all images at once.
    """
    pieces, batch = config.train.microbatches, config.train.batch_size
    if pieces == 1:
        return
    images = batch // shards
    if images % pieces:
        divisors = [n for n in range(1, images + 1) if images % n == 0]
        raise ConfigError(
            f"train.microbatches={pieces} does not divide the {images} images of a device ({batch} = {images} x "
            f"{shards} devices of mesh.data x mesh.fsdp); nearest: {min(divisors, key=lambda n: abs(n - pieces))}"
        )
    theirs = config.model.vision.big_vision
    if theirs is not None:
        for name in ("dropout", "stoch_depth"):
            if theirs.arguments.get(name):
                raise ConfigError(
                    f"train.microbatches={pieces}: big_vision's {theirs.name!r} draws {name} for all images at once, "
                    f"which pieces cannot repeat; expected train.microbatches=1 or {name} = 0 among "
                    "model.vision.big_vision.arguments"
                )


def value_and_grad(
    loss: Callable[[Tree, Encoded], tuple[Array, Any]],
    encode: Callable[[Tree, Tree], Encoded],
    params: Tree,
    batch: Tree,
    *,
    pieces: int,
    shards: int,
    shardings: Tree,
) -> tuple[tuple[Array, Any], Tree]:
    """Like ``jax.value_and_grad(loss(params, encode(params, batch)), has_aux=True)``, in pieces.

    Args:
        loss: ``(params, encoded) -> (loss, aux)``, of the whole batch.
        encode: ``(params, batch) -> encoded``, of any rows; each row of its result depends on its own image alone.
        params: what the gradient is taken of, in float32, as is the sum of the pieces' gradients.
        batch: nested arrays with a row for each image.
        pieces: divide the rows of each device, so that none leaves its device (check_microbatches).
        shards: number of devices among which rows are divided.
        shardings: of the gradient.
    """
    batch = jax.tree.map(lambda x: _divided(x, pieces, shards), batch)
    encoded = jax.lax.map(lambda piece: encode(params, piece), batch)
    encoded = jax.tree.map(lambda x: _joined(x, shards), encoded)
    value, (gradient, of_encoded) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, encoded)

    def add_piece(so_far: Tree, inputs: tuple[Tree, Encoded]) -> tuple[Tree, None]:
        piece, of_piece = inputs
        _, pull = jax.vjp(lambda params: encode(params, piece), params)
        so_far = jax.tree.map(jnp.add, so_far, *pull(of_piece))
        # The sum is kept where the parameters are: divided among devices, not whole on each.
        return jax.lax.with_sharding_constraint(so_far, shardings), None

    of_encoded = jax.tree.map(lambda x: _divided(x, pieces, shards), of_encoded)
    return value, jax.lax.scan(add_piece, gradient, (batch, of_encoded))[0]


def _divided(x: Array, pieces: int, shards: int) -> Array:
    """[B, ...] -> [pieces, B / pieces, ...]: the rows of each device, cut into ``pieces``."""
    rows, rest = x.shape[0] // (shards * pieces), x.shape[1:]
    x = _pinned(x.reshape(shards, pieces, rows, *rest), 0)
    return _pinned(x.swapaxes(0, 1).reshape(pieces, shards * rows, *rest), 1)


def _joined(x: Array, shards: int) -> Array:
    """The inverse of :func:`_divided`."""
    pieces, rows, rest = x.shape[0], x.shape[1] // shards, x.shape[2:]
    x = _pinned(x.reshape(pieces, shards, rows, *rest), 1)
    return _pinned(x.swapaxes(0, 1).reshape(shards * pieces * rows, *rest), 0)


def _pinned(x: Array, batch_axis: int) -> Array:
    return constrain(x, *("batch" if axis == batch_axis else None for axis in range(x.ndim)))
