"""Losses over all pairs of images and texts, without ever holding all pairs.

A loss is given by *statistics* of each image and each text (sums and log-sum-exps over their pairs) and its *value* as
a function of them. The gradient is computed in the forward pass, block by block, beside the loss: a loss that is linear
in its statistics (sigmoid) needs one sweep over the pairs, any other (softmax) one before it for the statistics. A loop
that is differentiated as it stands would keep every block for the backward pass, or compute every block twice.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from llip_jax.ops.pair_blocks import Prepared
from llip_jax.ops.pair_scores import Affine
from llip_jax.ops.sweep import BlockResult, Plan, Reduced, Tree, sweep_mesh


class Statistics(NamedTuple):
    """Of each image over its texts, and of each text over its images."""

    images: Reduced
    texts: Reduced


class PairLoss(Protocol):
    """A loss over pairs."""

    @property
    def linear(self) -> bool:
        """Whether the value is linear in sums, without log-sum-exps: its derivative is known before any pair is."""
        ...

    def statistics(
        self, logits: Float[Array, "n j"], image_ids: Tree, text_ids: Tree, counts: Bool[Array, "n j"]
    ) -> Statistics:
        """Over the pairs of a block that count; log-sum-exps are finite also where none does.

        ``image_ids`` and ``text_ids`` are the block's rows of the vectors (ids, weights) that say which pairs match.
        """
        ...

    def value(self, statistics: Statistics) -> Float[Array, ""]:
        """The loss, given the statistics over all pairs."""
        ...


class _Inputs(NamedTuple):
    """What gradients are taken of."""

    images: Tree
    texts: Tree
    shared: Tree
    affine: Affine


class _Rows(NamedTuple):
    """What a block needs of its images (or texts)."""

    arrays: Tree
    ids: Tree
    derivative: Reduced | None = None
    """Of the loss with respect to their statistics over all pairs."""
    logsumexps: Tree = None
    """Over all pairs."""


class _Sums(NamedTuple):
    gradients: Tree
    statistics: Tree


def pair_loss(
    loss: PairLoss, prepared: Prepared, affine: Affine, image_ids: Tree, text_ids: Tree, plan: Plan
) -> tuple[Float[Array, ""], Statistics]:
    """The loss over all pairs, and the statistics it is made of.

    Differentiable in the prepared arrays and in scale and bias, through the loss alone: the statistics are constants.
    ``image_ids`` and ``text_ids`` are nested arrays of N and J rows, handed to the loss block by block.
    """
    scorer = prepared.scorer

    def block(
        images: _Rows, texts: _Rows, shared: tuple[Tree, Affine], fresh: Bool[Array, "n j"]
    ) -> tuple[Float[Array, "n j"], Tree, Statistics, Any]:
        arrays, affine = shared
        cosines, kept = scorer.forward(images.arrays, texts.arrays, arrays)
        statistics, pull = jax.vjp(
            lambda x: loss.statistics(x, images.ids, texts.ids, fresh), affine.scale * cosines + affine.bias
        )
        return cosines, kept, statistics, pull

    def statistics_of_block(images: _Rows, texts: _Rows, shared: Tree, fresh: Array) -> BlockResult:
        statistics = block(images, texts, shared, fresh)[2]
        return BlockResult(statistics.images, statistics.texts, None)

    def gradients_of_block(images: _Rows, texts: _Rows, shared: tuple[Tree, Affine], fresh: Array) -> BlockResult:
        arrays, affine = shared
        cosines, kept, statistics, pull = block(images, texts, shared, fresh)
        (d_logits,) = pull(Statistics(_derivative(images, statistics.images), _derivative(texts, statistics.texts)))
        d_images, d_texts, d_shared = scorer.backward(
            kept, images.arrays, texts.arrays, arrays, affine.scale * d_logits
        )
        return BlockResult(
            Reduced(_Sums(d_images, statistics.images.sums), statistics.images.logsumexps),
            Reduced(_Sums(d_texts, statistics.texts.sums), statistics.texts.logsumexps),
            (d_shared, Affine((d_logits * cosines).sum(), d_logits.sum())),
        )

    def statistics_of_all(inputs: _Inputs, ids: tuple[Tree, Tree]) -> Statistics:
        result = sweep_mesh(
            statistics_of_block,
            _Rows(inputs.images, ids[0]),
            _Rows(inputs.texts, ids[1]),
            (inputs.shared, inputs.affine),
            plan,
        )
        return Statistics(result.images, result.texts)

    def with_gradients(inputs: _Inputs, ids: tuple[Tree, Tree]) -> tuple[tuple[Array, Statistics], _Inputs]:
        if loss.linear:
            abstract = jax.eval_shape(statistics_of_all, inputs, ids)
            all_pairs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
        else:
            all_pairs = statistics_of_all(inputs, ids)
        derivative = jax.grad(loss.value)(all_pairs)
        result = sweep_mesh(
            gradients_of_block,
            _Rows(inputs.images, ids[0], derivative.images, all_pairs.images.logsumexps),
            _Rows(inputs.texts, ids[1], derivative.texts, all_pairs.texts.logsumexps),
            (inputs.shared, inputs.affine),
            plan,
        )
        statistics = Statistics(*(Reduced(x.sums.statistics, x.logsumexps) for x in (result.images, result.texts)))
        gradients = _Inputs(result.images.sums.gradients, result.texts.sums.gradients, *result.shared)
        return (loss.value(statistics), statistics), gradients

    @jax.custom_vjp
    def over_all(inputs: _Inputs, ids: tuple[Tree, Tree]) -> tuple[Array, Statistics]:
        statistics = statistics_of_all(inputs, ids)
        return loss.value(statistics), statistics

    inputs = _Inputs(prepared.images, prepared.texts, prepared.shared, affine)
    types = jax.tree.map(lambda x: x.dtype, inputs)

    def backward(gradients: _Inputs, cotangents: tuple[Array, Statistics]) -> tuple[_Inputs, None]:
        return jax.tree.map(lambda x, dtype: (cotangents[0] * x).astype(dtype), gradients, types), None

    over_all.defvjp(with_gradients, backward)
    value, statistics = over_all(inputs, (image_ids, text_ids))
    return value, jax.lax.stop_gradient(statistics)


def _derivative(rows: _Rows, block: Reduced) -> Reduced:
    """Of the loss with respect to this block's statistics; its share of a log-sum-exp is exp(block - all)."""
    assert rows.derivative is not None
    shares = jax.tree.map(lambda own, over_all: jnp.exp(own - over_all), block.logsumexps, rows.logsumexps)
    return Reduced(rows.derivative.sums, jax.tree.map(jnp.multiply, rows.derivative.logsumexps, shares))
