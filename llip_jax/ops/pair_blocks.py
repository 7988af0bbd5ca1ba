"""Cosines of a block of pairs and their gradients, everything that does not depend on the pair done beforehand.

The dense form (ops/pair_scores.py) projects every mixed image by Wo and normalises it, which costs d^2 for a pair in
the forward pass and twice that in the backward pass. Here, with u the mixed values before Wo and t the normalised text:

- the numerator is u . (Wo t), where Wo t is made once for a text;
- the norm is sqrt(u . S u) with S = Wo Wo^T made once for all pairs; S u is also the norm's gradient, so that the
  backward pass costs one product with d^2 terms (that of S) in place of two;
- or, where M K < d, the norm is sqrt(w . G w) with w the mixing weights and G the Gram matrix of an image's M K
  projected value vectors, (M K)^2 for a pair.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from llip_jax.ops.pair_scores import SMALLEST_SQUARE, FixedSide, ImageSide, TextSide, normalize
from llip_jax.parallel.sharding import by_rows

Tree = Any
"""Nested arrays."""

_EXACT = jax.lax.Precision.HIGHEST
_GRAM_BYTES = 8 * 2**20
"""Temporaries of making Gram matrices, about."""


class MixtureBlock(NamedTuple):
    """Of n images: what their mixture by any text needs. ``gram`` is None where the norm is taken by ``metric``."""

    keys: Float[Array, "n K M dh"]
    values: Float[Array, "n K M dh"]
    gram: Float[Array, "n MK MK"] | None


class TextBlock(NamedTuple):
    """Of j texts: mixing queries, and the normalised embedding folded through Wo (float32)."""

    queries: Float[Array, "j M dh"]
    folded: Float[Array, "j d"]


class BlockScorer(Protocol):
    """Cosines of n images with j texts, and their gradients in float32.

    Images and texts are nested arrays with n and j rows; ``shared`` belongs to all pairs.
    """

    def forward(self, images: Tree, texts: Tree, shared: Tree) -> tuple[Float[Array, "n j"], Tree]:
        """Cosines, and what the backward pass wants kept."""
        ...

    def backward(
        self, kept: Tree, images: Tree, texts: Tree, shared: Tree, cotangent: Float[Array, "n j"]
    ) -> tuple[Tree, Tree, Tree]:
        """Gradients of images, texts and shared."""
        ...

    def bytes_of_a_pair(self, images: Tree) -> int:
        """Temporaries that one pair of a block takes, about."""
        ...


class Prepared(NamedTuple):
    """Both sides ready to be scored block by block."""

    scorer: BlockScorer
    images: Tree
    texts: Tree
    shared: Tree


@dataclass(frozen=True)
class FixedScorer:
    """Plain products of normalised vectors, in full float32: the logit scale multiplies what would be rounded away."""

    def forward(self, images: Array, texts: Array, shared: None) -> tuple[Float[Array, "n j"], None]:
        """Images [n, d] and texts [j, d], normalised."""
        return jnp.matmul(images, texts.T, precision=_EXACT), None

    def backward(self, kept: None, images: Array, texts: Array, shared: None, cotangent: Array) -> tuple:
        """Two products."""
        return (
            jnp.matmul(cotangent, texts, precision=_EXACT),
            jnp.matmul(cotangent.T, images, precision=_EXACT),
            None,
        )

    def bytes_of_a_pair(self, images: Array) -> int:
        """Logit, target, weight, mask and gradient."""
        return 40


class _MetricKept(NamedTuple):
    weights: Float[Array, "n M j K"]
    mixed: Float[Array, "n j M dh"]
    stretched: Float[Array, "n j M dh"]
    """S u."""
    norm: "_Norm"


class _GramKept(NamedTuple):
    weights: Float[Array, "n M j K"]
    products: Float[Array, "n M j K"]
    stretched: Float[Array, "n M j K"]
    """G w."""
    norm: "_Norm"


class _Norm(NamedTuple):
    cosine: Float[Array, "n j"]
    reciprocal: Float[Array, "n j"]
    above_floor: Bool[Array, "n j"]


@dataclass(frozen=True)
class MetricScorer:
    """Mixture scores with the norm by S = Wo Wo^T [d, d]."""

    temperature: float

    def forward(self, images: MixtureBlock, texts: TextBlock, shared: Array) -> tuple[Float[Array, "n j"], _MetricKept]:
        """See BlockScorer."""
        weights = _mixing_weights(images, texts, self.temperature)
        mixed = _product("nmjk,nkmh->njmh", weights.astype(images.values.dtype), images.values)
        flat = mixed.reshape(*mixed.shape[:2], -1)
        stretched = _product("nje,ed->njd", flat.astype(shared.dtype), shared)
        square, mixed_square, stretched_square = (
            (a * b).sum(-1) for a, b in ((flat, stretched), (flat, flat), (stretched, stretched))
        )
        floor = norm_floor(mixed_square, stretched_square, shared.dtype)
        norm = _cosine(jnp.einsum("njd,jd->nj", flat, texts.folded, precision=_EXACT), square, floor)
        return norm.cosine, _MetricKept(weights, mixed, stretched.reshape(mixed.shape), norm)

    def backward(
        self, kept: _MetricKept, images: MixtureBlock, texts: TextBlock, shared: Array, cotangent: Array
    ) -> tuple[MixtureBlock, TextBlock, Array]:
        """See BlockScorer."""
        dtype = images.values.dtype
        numerator, square = _cosine_gradient(kept.norm, cotangent)
        folded = texts.folded.reshape(-1, *kept.mixed.shape[2:])
        d_mixed = numerator[..., None, None] * folded + (2 * square)[..., None, None] * kept.stretched
        d_mixed = d_mixed.astype(dtype)
        flat = kept.mixed.reshape(-1, shared.shape[0])
        d_shared = _product("pe,pd->ed", (square.reshape(-1, 1) * flat).astype(dtype), flat.astype(dtype))
        d_folded = (numerator[..., None] * kept.mixed.reshape(*numerator.shape, -1)).sum(0)
        d_values = _product("nmjk,njmh->nkmh", kept.weights.astype(dtype), d_mixed)
        d_weights = _product("njmh,nkmh->nmjk", d_mixed, images.values)
        d_keys, d_queries = _query_key_gradient(kept.weights, d_weights, images, texts, self.temperature)
        return MixtureBlock(d_keys, d_values, None), TextBlock(d_queries, d_folded), d_shared

    def bytes_of_a_pair(self, images: MixtureBlock) -> int:
        """Three vectors of d, four of M K."""
        _, k, m, dh = images.keys.shape
        return 4 * m * (3 * dh + 4 * k)


@dataclass(frozen=True)
class GramScorer:
    """Mixture scores with the norm by each image's Gram matrix [M K, M K]."""

    temperature: float

    def forward(self, images: MixtureBlock, texts: TextBlock, shared: None) -> tuple[Float[Array, "n j"], _GramKept]:
        """See BlockScorer."""
        assert images.gram is not None
        weights = _mixing_weights(images, texts, self.temperature)
        n, m, _, k = weights.shape
        products = _product("jmh,nkmh->nmjk", self._folded(images, texts), images.values)
        gram = images.gram.reshape(n, m * k, m, k)
        stretched = _product("njp,npmk->nmjk", _by_pair(weights).astype(gram.dtype), gram)
        square, weight_square, stretched_square = (
            (a * b).sum((1, 3)) for a, b in ((weights, stretched), (weights, weights), (stretched, stretched))
        )
        floor = norm_floor(weight_square, stretched_square, gram.dtype)
        norm = _cosine((weights * products).sum((1, 3)), square, floor)
        return norm.cosine, _GramKept(weights, products, stretched, norm)

    def backward(
        self, kept: _GramKept, images: MixtureBlock, texts: TextBlock, shared: None, cotangent: Array
    ) -> tuple[MixtureBlock, TextBlock, None]:
        """See BlockScorer."""
        dtype = images.values.dtype
        numerator, square = (x[:, None, :, None] for x in _cosine_gradient(kept.norm, cotangent))
        d_weights = numerator * kept.products + 2 * square * kept.stretched
        d_products = (numerator * kept.weights).astype(dtype)
        d_values = _product("nmjk,jmh->nkmh", d_products, self._folded(images, texts))
        d_folded = _product("nmjk,nkmh->jmh", d_products, images.values).reshape(texts.folded.shape)
        d_gram = _product(
            "njp,njr->npr", _by_pair(square * kept.weights).astype(dtype), _by_pair(kept.weights).astype(dtype)
        )
        d_keys, d_queries = _query_key_gradient(kept.weights, d_weights, images, texts, self.temperature)
        return MixtureBlock(d_keys, d_values, d_gram), TextBlock(d_queries, d_folded), None

    def bytes_of_a_pair(self, images: MixtureBlock) -> int:
        """Eight vectors of M K."""
        _, k, m, _ = images.keys.shape
        return 4 * m * 8 * k

    @staticmethod
    def _folded(images: MixtureBlock, texts: TextBlock) -> Float[Array, "j M dh"]:
        return texts.folded.reshape(texts.queries.shape).astype(images.values.dtype)


def prepare(images: ImageSide, texts: TextSide) -> Prepared:
    """Everything that does not depend on the pair, done once; the norm's form is the cheaper one for these shapes.

    Raises:
        ValueError: shapes disagree, or mixture images meet texts without queries.
    """
    check_sides(images, texts)
    unit = normalize(texts.embedding)
    if isinstance(images, FixedSide):
        return Prepared(FixedScorer(), normalize(images.embedding), unit, None)
    assert texts.queries is not None
    output = images.output.astype(jnp.float32)
    folded = TextBlock(texts.queries, jnp.matmul(unit, output.T, precision=_EXACT))
    k, m, dh = images.keys.shape[1:]
    if _gram_is_cheaper(len(unit), k, m, dh):
        gram = _gram(images.values, images.output)
        return Prepared(GramScorer(images.temperature), MixtureBlock(images.keys, images.values, gram), folded, None)
    metric = jnp.matmul(output, output.T, precision=_EXACT).astype(images.values.dtype)
    return Prepared(MetricScorer(images.temperature), MixtureBlock(images.keys, images.values, None), folded, metric)


def _gram(values: Float[Array, "n K M dh"], output: Float[Array, "d d"]) -> Float[Array, "n MK MK"]:
    """Products of every two of an image's value vectors after Wo.

    The vectors, M times the values, are made for some images at a time, and again for the backward pass.
    """
    _, k, m, dh = values.shape
    some = max(1, _GRAM_BYTES // (4 * m * k * m * dh))

    @jax.checkpoint
    def of_image(values: Float[Array, "K M dh"], output: Float[Array, "d d"]) -> Float[Array, "MK MK"]:
        # In the operands' type: XLA's CPU backend has no bfloat16 product of this form with a float32 result.
        precision = _EXACT if values.dtype == jnp.float32 else None
        vectors = jnp.einsum("kmh,mhd->mkd", values, output.reshape(m, dh, m * dh), precision=precision)
        vectors = vectors.reshape(m * k, m * dh)
        return _product("pd,rd->pr", vectors, vectors).astype(values.dtype)

    def of_images(values: Float[Array, "n K M dh"], output: Float[Array, "d d"]) -> Float[Array, "n MK MK"]:
        return jax.lax.map(lambda v: of_image(v, output), values, batch_size=some)

    return by_rows(of_images, values, output)


def _product(spec: str, a: Array, b: Array) -> Array:
    """In float32; of float32 operands exact to float32 on every device, whatever its default."""
    precision = _EXACT if a.dtype == b.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


def mixture_multiply_adds(texts: int, k: int, m: int, dh: int) -> tuple[int, int]:
    """Of one image with all texts, in the cheaper of the two forms: forward; forward and backward."""
    d, vectors = m * dh, m * k
    forward, both = 2 * texts * k * d, 6 * texts * k * d
    if _gram_is_cheaper(texts, k, m, dh):
        making = vectors**2 * d + k * d**2
        return forward + texts * vectors**2 + making, both + _gram_multiply_adds(texts, k, m, dh)
    return forward + texts * d**2, both + _metric_multiply_adds(texts, k, m, dh)


def _gram_is_cheaper(texts: int, k: int, m: int, dh: int) -> bool:
    return _gram_multiply_adds(texts, k, m, dh) < _metric_multiply_adds(texts, k, m, dh)


def _metric_multiply_adds(texts: int, k: int, m: int, dh: int) -> int:
    """What the norm takes by S, an image."""
    return 2 * texts * (m * dh) ** 2


def _gram_multiply_adds(texts: int, k: int, m: int, dh: int) -> int:
    """What the norm takes by the Gram matrix, an image: with all texts, and to make the matrix (twice: the backward
    pass makes it again) and its gradient."""
    d, vectors = m * dh, m * k
    return 2 * texts * vectors**2 + 4 * (vectors**2 * d + k * d**2)


def _mixing_weights(images: MixtureBlock, texts: TextBlock, temperature: float) -> Float[Array, "n M j K"]:
    return jax.nn.softmax(_product("jmh,nkmh->nmjk", texts.queries, images.keys) / temperature, axis=-1)


def _by_pair(weights: Float[Array, "n M j K"]) -> Float[Array, "n j MK"]:
    n, m, j, k = weights.shape
    return weights.swapaxes(1, 2).reshape(n, j, m * k)


def norm_floor(vector_square: Array, stretched_square: Array, dtype: Any) -> Array:
    """The least that x . A x can be told from zero by, given the squares of x and of A x, in products of this type.

    x . A x loses digits where A x is nearly at right angles to x, as where Wo all but removes the mixed values; rounded
    operands can even make it negative. Below this floor nothing of it is left.
    """
    return jnp.maximum(jnp.finfo(dtype).eps * jnp.sqrt(vector_square) * jnp.sqrt(stretched_square), SMALLEST_SQUARE)


def _cosine(numerator: Float[Array, "n j"], square: Float[Array, "n j"], floor: Float[Array, "n j"]) -> _Norm:
    reciprocal = jax.lax.rsqrt(jnp.maximum(square, floor))
    return _Norm(numerator * reciprocal, reciprocal, square > floor)


def _cosine_gradient(norm: _Norm, cotangent: Float[Array, "n j"]) -> tuple[Float[Array, "n j"], Float[Array, "n j"]]:
    """With respect to numerator and squared norm; a norm at its floor has no gradient."""
    numerator = cotangent * norm.reciprocal
    square = -0.5 * cotangent * norm.cosine * norm.reciprocal**2
    return numerator, jnp.where(norm.above_floor, square, 0.0)


def _query_key_gradient(
    weights: Float[Array, "n M j K"],
    d_weights: Float[Array, "n M j K"],
    images: MixtureBlock,
    texts: TextBlock,
    temperature: float,
) -> tuple[Float[Array, "n K M dh"], Float[Array, "j M dh"]]:
    """Through the softmax to keys and queries."""
    centre = (weights * d_weights).sum(-1, keepdims=True)
    d_products = (weights * (d_weights - centre) / temperature).astype(images.keys.dtype)
    return (
        _product("nmjk,jmh->nkmh", d_products, texts.queries),
        _product("nmjk,nkmh->jmh", d_products, images.keys),
    )


def check_sides(images: ImageSide, texts: TextSide) -> None:
    """The two sides belong together.

    Raises:
        ValueError: they do not; the message names the arrays, their shapes and what was expected.
    """
    embedding = texts.embedding
    if embedding.ndim != 2:
        raise ValueError(f"text embedding: expected [J, d], got {embedding.shape}")
    if isinstance(images, FixedSide):
        if images.embedding.ndim != 2 or images.embedding.shape[1] != embedding.shape[1]:
            raise ValueError(f"image embedding: expected [N, {embedding.shape[1]}], got {images.embedding.shape}")
        return
    if texts.queries is None:
        raise ValueError("mixture images need texts with queries")
    if images.keys.ndim != 4 or images.keys.shape != images.values.shape:
        raise ValueError(
            f"keys and values: expected one shape [N, K, M, dh], got {images.keys.shape} and {images.values.shape}"
        )
    m, dh = images.keys.shape[2:]
    for name, x, expected in (
        ("queries", texts.queries, (len(embedding), m, dh)),
        ("text embedding", embedding, (len(embedding), m * dh)),
        ("output projection", images.output, (m * dh, m * dh)),
    ):
        if x.shape != expected:
            raise ValueError(f"{name}: expected {expected} for {m} heads of {dh}, got {x.shape}")
