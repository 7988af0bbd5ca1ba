"""Pallas TPU kernels for the cosines of a block of pairs: nothing as large as pairs x d leaves the chip's VMEM.

They compute what MetricScorer and GramScorer (ops/pair_blocks.py) compute, one image with all texts of the block at a
time. Texts lie along the lanes (the last axis) and everything else along the sublanes, where heads are stacked and
cut, and where sums over tokens and over d run. For an image, with w its mixing weights [MK, j]:

- metric form: x = mixed values [d, j],  y = folded texts [d, j],                A = S = Wo Wo^T [d, d];
- Gram form:   x = w [MK, j],            y = values times folded texts [MK, j],  A = the image's Gram matrix [MK, MK];

and in both the cosine is x.y / sqrt(x.Ax). The backward kernel computes all of it again: to fetch x and Ax from HBM
would take about as long.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from llip_jax.ops.pair_blocks import GramScorer, MetricScorer, MixtureBlock, Prepared, TextBlock, norm_floor

VMEM_LIMIT = 48 * 2**20
"""Bytes of VMEM for a kernel: three quarters of what a core of tpu7x has, the least of v5e, v6e and tpu7x."""

_LANES = 128

Ref = Any
"""An array in VMEM: the whole of one that belongs to texts or to all pairs, an image's part of the others."""


@dataclass(frozen=True)
class KernelScorer:
    """Mixture scores by TPU kernels, the norm by Gram matrices where images have them and else by S [d, d].

    ``interpret`` runs the kernels on any device, slowly. VMEM limits the texts of a block, not its images; the more
    texts, the fewer bytes of an image are moved for a pair.
    """

    temperature: float
    interpret: bool = False

    def forward(
        self, images: MixtureBlock, texts: TextBlock, shared: Float[Array, "d d"] | None
    ) -> tuple[Float[Array, "n j"], None]:
        """See BlockScorer; keeps nothing.

        Raises:
            ValueError: the block does not fit into VMEM.
        """
        (cosine,) = _run(self, images, texts, shared, None)
        return cosine[:, 0, : len(texts.queries)], None

    def backward(
        self,
        kept: None,
        images: MixtureBlock,
        texts: TextBlock,
        shared: Float[Array, "d d"] | None,
        cotangent: Float[Array, "n j"],
    ) -> tuple[MixtureBlock, TextBlock, Float[Array, "d d"] | None]:
        """See BlockScorer.

        Raises:
            ValueError: the block does not fit into VMEM.
        """
        queries, folded, keys, values, quadratic = _run(self, images, texts, shared, cotangent)
        queries, folded = (x.T[: len(texts.queries)] for x in (queries, folded))
        keys, values = (x.reshape(images.keys.shape) for x in (keys, values))
        gram, metric = (None, quadratic) if images.gram is None else (quadratic, None)
        return MixtureBlock(keys, values, gram), TextBlock(queries.reshape(texts.queries.shape), folded), metric

    def bytes_of_a_pair(self, images: MixtureBlock) -> int:
        """Logit, target, weight, mask and gradient; a pair's mixture stays in VMEM."""
        return 40


class _Form(NamedTuple):
    """What a kernel knows when it is compiled."""

    heads: int
    tokens: int
    width: int
    """Of a head."""
    gram: bool
    temperature: float

    def cuts(self) -> Iterator[tuple[slice, slice]]:
        """Each head's part of d and of M K."""
        for head in range(self.heads):
            yield slice(head * self.width, (head + 1) * self.width), slice(head * self.tokens, (head + 1) * self.tokens)


class _Refs(NamedTuple):
    """What both kernels read, and their scratch (float32). D is d in the metric form, M K in the Gram form."""

    queries: Float[Ref, "d j"]
    folded: Float[Ref, "d j"]
    keys: Float[Ref, "K d"]
    values: Float[Ref, "K d"]
    quadratic: Float[Ref, "D D"]
    """A, symmetric."""
    weights: Float[Ref, "MK j"]
    made: Float[Ref, "D j"]
    """x in the metric form, y in the Gram form; the other of the two is at hand."""
    stretched: Float[Ref, "D j"]
    """A x."""

    def x_and_y(self, form: _Form) -> tuple[Ref, Ref]:
        return (self.weights, self.made) if form.gram else (self.made, self.folded)


def _score(form: _Form, refs: _Refs) -> tuple[Float[Array, "1 j"], Float[Array, "1 j"], Bool[Array, "1 j"]]:
    """Cosine and reciprocal norm of an image's pairs, and whether it is above its floor; fills the scratch."""
    dtype = refs.values.dtype
    for part, tokens in form.cuts():
        logits = _matmul(refs.keys[:, part], refs.queries[part]) * (1 / form.temperature)
        exponentials = jnp.exp(logits - logits.max(0, keepdims=True))
        weights = exponentials / exponentials.sum(0, keepdims=True)
        refs.weights[tokens] = weights
        if form.gram:
            refs.made[tokens] = _matmul(refs.values[:, part], refs.folded[part])
        else:
            refs.made[part] = _matmul(refs.values[:, part], weights.astype(dtype), "T.")
    x, y = refs.x_and_y(form)
    refs.stretched[...] = _matmul(refs.quadratic[...], x[...].astype(dtype))
    numerator = (x[...] * y[...]).sum(0, keepdims=True)
    square, x_square, stretched_square = (
        (a[...] * b[...]).sum(0, keepdims=True)
        for a, b in ((x, refs.stretched), (x, x), (refs.stretched, refs.stretched))
    )
    floor = norm_floor(x_square, stretched_square, dtype)
    reciprocal = jax.lax.rsqrt(jnp.maximum(square, floor))
    return numerator * reciprocal, reciprocal, square > floor


def _forward_kernel(form: _Form, *all_refs: Ref) -> None:
    inputs, cosine, scratch = all_refs[:5], all_refs[5], all_refs[6:]
    cosine[...], _, _ = _score(form, _Refs(*inputs, *scratch))


def _backward_kernel(form: _Form, *all_refs: Ref) -> None:
    inputs, cotangent, results, scratch = all_refs[:5], all_refs[5], all_refs[6:11], all_refs[11:]
    refs = _Refs(*inputs, *scratch)
    d_queries, d_folded, d_keys, d_values, d_quadratic = results

    @pl.when(pl.program_id(0) == 0)
    def start_sums() -> None:
        for total in (d_queries, d_folded) if form.gram else (d_queries, d_folded, d_quadratic):
            total[...] = jnp.zeros(total.shape, total.dtype)

    dtype = refs.values.dtype
    cosine, reciprocal, above_floor = _score(form, refs)
    x, y = refs.x_and_y(form)
    by_numerator = cotangent[...] * reciprocal
    # A norm at its floor has no gradient.
    by_square = jnp.where(above_floor, -0.5 * by_numerator * cosine * reciprocal, 0.0)
    outer = _matmul((by_square * x[...]).astype(dtype), x[...].astype(dtype), ".T")
    if form.gram:
        d_quadratic[...] = outer
    else:
        d_quadratic[...] += outer
        d_folded[...] += by_numerator * x[...]
    d_x = refs.stretched
    d_x[...] = by_numerator * y[...] + 2 * by_square * refs.stretched[...]
    for part, tokens in form.cuts():
        keys, values, weights = refs.keys[:, part], refs.values[:, part], refs.weights[tokens]
        if form.gram:
            d_weights = d_x[tokens]
            d_y = (by_numerator * weights).astype(dtype)
            d_values[:, part] = _matmul(d_y, refs.folded[part], ".T")
            d_folded[part] += _matmul(values, d_y, "T.")
        else:
            d_mixed = d_x[part].astype(dtype)
            d_weights = _matmul(values, d_mixed)
            d_values[:, part] = _matmul(weights.astype(dtype), d_mixed, ".T")
        centre = (weights * d_weights).sum(0, keepdims=True)
        d_logits = (weights * (d_weights - centre) * (1 / form.temperature)).astype(dtype)
        d_keys[:, part] = _matmul(d_logits, refs.queries[part], ".T")
        d_queries[part] += _matmul(keys, d_logits, "T.")


def _matmul(a: Array, b: Array, transposed: Literal["..", "T.", ".T"] = "..") -> Array:
    """Product of matrices, transposed where marked, in float32; of float32 operands it is exact to float32."""
    contracted = ((0 if transposed[0] == "T" else 1,), (1 if transposed[1] == "T" else 0,))
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, (contracted, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _run(
    scorer: KernelScorer,
    images: MixtureBlock,
    texts: TextBlock,
    shared: Float[Array, "d d"] | None,
    cotangent: Float[Array, "n j"] | None,
) -> list[Float[Array, "..."]]:
    """Cosines [n, 1, j], or for a cotangent the gradients in the order and layout of the kernels' inputs; j padded."""
    n, k, m, dh = images.keys.shape
    form = _Form(m, k, dh, images.gram is not None, scorer.temperature)
    quadratic = images.gram if form.gram else shared
    assert quadratic is not None
    # The Gram form takes folded texts into products only.
    folded = texts.folded.astype(images.values.dtype) if form.gram else texts.folded
    inputs = [
        _pad_texts(texts.queries.reshape(-1, m * dh).T),
        _pad_texts(folded.T),
        images.keys.reshape(n, k, m * dh),
        images.values.reshape(n, k, m * dh),
        quadratic,
    ]
    j = inputs[0].shape[1]
    _check_vmem(form, j, images.values.dtype.itemsize)
    gradients = [x.shape for x in inputs]
    if cotangent is not None:
        inputs.append(_pad_texts(cotangent.astype(jnp.float32))[:, None])
    results: list[tuple[int, ...]] = [(n, 1, j)] if cotangent is None else gradients
    scratch = [(m * k, j), (quadratic.shape[-1], j), (quadratic.shape[-1], j)]
    call = pl.pallas_call(
        partial(_forward_kernel if cotangent is None else _backward_kernel, form),
        grid=(n,),
        in_specs=[_spec(x.shape) for x in inputs],
        out_specs=[_spec(shape) for shape in results],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        # The backward pass sums over images, one after the other.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel" if cotangent is None else "arbitrary",), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=scorer.interpret,
    )
    return call(*inputs)


def _spec(shape: tuple[int, ...]) -> pl.BlockSpec:
    """The part of an image of arrays that have images (three axes); else the whole, brought once and not ahead."""
    if len(shape) == 3:
        return pl.BlockSpec((None, *shape[1:]), lambda image: (image, 0, 0))
    return pl.BlockSpec(shape, lambda image: (0, 0), pipeline_mode=pl.Buffered(1))


def _pad_texts(x: Float[Array, "rows j"]) -> Float[Array, "rows padded"]:
    """To whole lanes; texts of the padding have no cotangent and so no part in any gradient."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % _LANES)))


def _check_vmem(form: _Form, j: int, itemsize: int) -> None:
    """By about what the backward kernel takes, so that both kernels take the same blocks."""
    d, tokens = form.heads * form.width, form.heads * form.tokens
    rows, with_gradient = tokens if form.gram else d, itemsize + 4
    texts = d * j * (with_gradient + (itemsize if form.gram else 4) + 4)
    # Images come and go two at a time.
    image = 2 * 2 * form.tokens * d * with_gradient
    quadratic = (2 if form.gram else 1) * rows**2 * with_gradient
    scratch = 4 * j * (tokens + 2 * rows)
    # What the compiler was seen to take for a product with A: operands (float32 ones in parts) and result.
    values = rows * j * (8 if itemsize == 2 else 28)
    estimate = texts + image + quadratic + scratch + values
    if estimate > VMEM_LIMIT:
        raise ValueError(
            f"a block of {j} texts takes about {estimate / 2**20:.0f} MiB of VMEM, of {VMEM_LIMIT / 2**20:.0f} MiB: "
            "use fewer texts in a block (fewer images change nothing)"
        )


def with_kernel(prepared: Prepared) -> Prepared:
    """The same pairs, scored by the kernels.

    Raises:
        ValueError: images are not mixed by texts.
    """
    scorer = prepared.scorer
    if not isinstance(scorer, MetricScorer | GramScorer):
        raise ValueError(f"kernels score images that texts mix, got {type(scorer).__name__}")
    return prepared._replace(scorer=KernelScorer(scorer.temperature))
