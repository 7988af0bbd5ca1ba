"""Transformer layers: pre-norm blocks, stacked over depth, with a rematerialisation policy."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from llip_jax.models.sizes import TowerShape
from llip_jax.ops.attention import Implementation, attention
from llip_jax.parallel.sharding import constrain, in_use

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
}

LAYER_INPUT = "layer_input"

# What the forward pass keeps for the backward pass.
REMAT_POLICIES: dict[str, Any] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "layer": jax.checkpoint_policies.nothing_saveable,
}


def normal_param(rngs: nnx.Rngs, std: float, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2) whose dimensions are named by ``axes`` (parallel.sharding)."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


def zeros_param(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    """A float32 parameter of zeros (biases)."""
    return nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes)


def layer_norm(width: int, epsilon: float, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer norm with two-pass variance: the one-pass form loses digits where the mean is large."""
    return nnx.LayerNorm(width, epsilon=epsilon, dtype=dtype, use_fast_variance=False, rngs=rngs)


class WeightedTokens(NamedTuple):
    """The first tokens of a sequence count ``weight`` times as much as the others where they are attended to."""

    tokens: int
    weight: float

    def bias(self, length: int) -> Float[Array, "1 1 1 S"]:
        """What attention adds to its logits (proportional attention, arXiv 2210.09461, section 3), in float32."""
        bias = jnp.where(jnp.arange(length) < self.tokens, math.log(self.weight), 0.0)
        return bias.astype(jnp.float32)[None, None, None]


class Block(nnx.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    Initialised as CLIP's text tower (arXiv 2103.00020), both towers alike: residual projections shrink with depth.
    """

    def __init__(
        self,
        shape: TowerShape,
        activation: str,
        epsilon: float,
        causal: bool,
        weighted: WeightedTokens | None,
        attend: Implementation,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        d, h, dh = shape.width, shape.heads, shape.width // shape.heads
        residual_std = d**-0.5 * (2 * shape.layers) ** -0.5
        self.norm1 = layer_norm(d, epsilon, dtype, rngs)
        self.qkv = normal_param(rngs, d**-0.5, (d, 3, h, dh), ("embed", None, "heads", None))
        self.qkv_bias = zeros_param((3, h, dh), (None, "heads", None))
        self.out = normal_param(rngs, residual_std, (h, dh, d), ("heads", None, "embed"))
        self.out_bias = zeros_param((d,), (None,))
        self.norm2 = layer_norm(d, epsilon, dtype, rngs)
        self.up = normal_param(rngs, (2 * d) ** -0.5, (d, shape.mlp), ("embed", "mlp"))
        self.up_bias = zeros_param((shape.mlp,), ("mlp",))
        self.down = normal_param(rngs, residual_std, (shape.mlp, d), ("mlp", "embed"))
        self.down_bias = zeros_param((d,), (None,))
        self.activation, self.causal, self.weighted, self.attend = activation, causal, weighted, attend
        self.dtype = dtype

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """The block's output."""
        x = constrain(x + self.attention(self.norm1(x)), "batch", None, None)
        return constrain(x + self.mlp(self.norm2(x)), "batch", None, None)

    def attention(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Multi-head self-attention."""
        q, k, v, bias = self._attended(x)
        return self._projected(attention(q, k, v, bias, causal=self.causal, implementation=self.attend))

    def observed(
        self, x: Float[Array, "B S D"], offset: Float[Array, "B H S S"]
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B H S S"]]:
        """The block's output with ``offset`` added to the attention weights, and those weights (query, then key)."""
        q, k, v, bias = self._attended(self.norm1(x))
        weights = attention_weights(q, k, bias, self.causal) + offset
        x = x + self._projected(jnp.einsum("bhqk,bkhe->bqhe", weights.astype(self.dtype), v))
        return x + self.mlp(self.norm2(x)), weights

    def _attended(self, x: Float[Array, "B S D"]) -> tuple[Array, Array, Array, Array | None]:
        """Queries, keys, values [B, S, H, dh], and what is added to the products of the first two."""
        qkv = jnp.einsum("bsd,dche->cbshe", x, in_use(self.qkv, self.dtype))
        qkv = constrain(qkv + in_use(self.qkv_bias, self.dtype)[:, None, None], None, "batch", None, "heads", None)
        return qkv[0], qkv[1], qkv[2], None if self.weighted is None else self.weighted.bias(x.shape[1])

    def _projected(self, mixed: Float[Array, "B S H dh"]) -> Float[Array, "B S D"]:
        return jnp.einsum("bshe,hed->bsd", mixed, in_use(self.out, self.dtype)) + in_use(self.out_bias, self.dtype)

    def mlp(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Two-layer perceptron."""
        return _mlp(self, x)


class AttentionPool(nnx.Module):
    """Vectors of learned queries: y = attention(queries, patches), then y + mlp(norm(y)) (arXiv 2106.04560).

    SigLIP's head has one query; with K of them this is where a Llip's mixture tokens come from.
    """

    def __init__(self, shape: TowerShape, activation: str, epsilon: float, dtype: Any, rngs: nnx.Rngs):
        d, h, dh = shape.width, shape.heads, shape.width // shape.heads
        self.query = normal_param(rngs, d**-0.5, (d, h, dh), ("embed", "heads", None))
        self.query_bias = zeros_param((h, dh), ("heads", None))
        self.key_value = normal_param(rngs, d**-0.5, (d, 2, h, dh), ("embed", None, "heads", None))
        self.key_value_bias = zeros_param((2, h, dh), (None, "heads", None))
        self.out = normal_param(rngs, d**-0.5, (h, dh, d), ("heads", None, "embed"))
        self.out_bias = zeros_param((d,), (None,))
        self.norm = layer_norm(d, epsilon, dtype, rngs)
        self.up = normal_param(rngs, (2 * d) ** -0.5, (d, shape.mlp), ("embed", "mlp"))
        self.up_bias = zeros_param((shape.mlp,), ("mlp",))
        self.down = normal_param(rngs, d**-0.5, (shape.mlp, d), ("mlp", "embed"))
        self.down_bias = zeros_param((d,), (None,))
        self.activation, self.dtype = activation, dtype

    def __call__(self, queries: Float[Array, "K D"], patches: Float[Array, "B P D"]) -> Float[Array, "B K D"]:
        """One vector for each query."""
        q, k, v = self._attended(queries, patches)
        return self._finished(jax.nn.dot_product_attention(q, k, v))

    def observed(
        self, queries: Float[Array, "K D"], patches: Float[Array, "B P D"], offset: Float[Array, "B H K P"]
    ) -> tuple[Float[Array, "B K D"], Float[Array, "B H K P"]]:
        """The same with ``offset`` added to the attention weights, and those weights."""
        q, k, v = self._attended(queries, patches)
        weights = attention_weights(q, k, None, causal=False) + offset
        return self._finished(jnp.einsum("bhqk,bkhe->bqhe", weights.astype(self.dtype), v)), weights

    def _attended(self, queries: Float[Array, "K D"], patches: Float[Array, "B P D"]) -> tuple[Array, Array, Array]:
        """Queries [B, K, H, dh], keys and values [B, P, H, dh]."""
        q = jnp.einsum("kd,dhe->khe", queries, in_use(self.query, self.dtype)) + in_use(self.query_bias, self.dtype)
        q = jnp.broadcast_to(q, (patches.shape[0], *q.shape))
        kv = jnp.einsum("bpd,dche->cbphe", patches, in_use(self.key_value, self.dtype))
        kv = constrain(kv + in_use(self.key_value_bias, self.dtype)[:, None, None], None, "batch", None, "heads", None)
        return constrain(q, "batch", None, "heads", None), kv[0], kv[1]

    def _finished(self, mixed: Float[Array, "B K H dh"]) -> Float[Array, "B K D"]:
        y = jnp.einsum("bkhe,hed->bkd", mixed, in_use(self.out, self.dtype)) + in_use(self.out_bias, self.dtype)
        return constrain(y + _mlp(self, self.norm(y)), "batch", None, None)


def attention_weights(
    q: Float[Array, "B Q H dh"], k: Float[Array, "B S H dh"], bias: Float[Array, "1 1 1 S"] | None, causal: bool
) -> Float[Array, "B H Q S"]:
    """What jax.nn.dot_product_attention mixes values by, in float32."""
    logits = jnp.einsum("bqhe,bkhe->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if bias is not None:
        logits += bias
    if causal:
        logits = jnp.where(jnp.tri(logits.shape[-2], logits.shape[-1], dtype=bool), logits, -jnp.inf)
    return jax.nn.softmax(logits, axis=-1)


def _mlp(layer: Block | AttentionPool, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    hidden = x @ in_use(layer.up, layer.dtype) + in_use(layer.up_bias, layer.dtype)
    hidden = ACTIVATIONS[layer.activation](constrain(hidden, "batch", None, "mlp"))
    return hidden @ in_use(layer.down, layer.dtype) + in_use(layer.down_bias, layer.dtype)


class Transformer(nnx.Module):
    """Blocks whose parameters are stacked along a leading layer axis, whether the depth is scanned or unrolled."""

    def __init__(
        self,
        shape: TowerShape,
        *,
        activation: str,
        epsilon: float,
        causal: bool,
        weighted: WeightedTokens | None = None,
        attend: Implementation = "xla",
        dtype: Any,
        remat: Literal["none", "dots", "layer", "offload"],
        scan: bool,
        rngs: nnx.Rngs,
    ):
        @nnx.split_rngs(splits=shape.layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make_blocks(rngs: nnx.Rngs) -> Block:
            return Block(shape, activation, epsilon, causal, weighted, attend, dtype, rngs)

        self.blocks = make_blocks(rngs)
        self.layers, self.remat, self.scan = shape.layers, remat, scan

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """All blocks in turn."""
        graph, stacked = nnx.split(self.blocks)

        def layer(x: Array, params: nnx.State) -> Array:
            return nnx.merge(graph, params)(checkpoint_name(x, LAYER_INPUT))

        if self.remat != "none":
            # Inside a scan the loop itself keeps the recomputation from being merged with the forward pass.
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan)
        if self.scan:
            return jax.lax.scan(lambda x, params: (layer(x, params), None), x, stacked)[0]
        leaves, structure = jax.tree.flatten(stacked)
        # The transpose of lax.split is one concatenation; that of indexing would add up `layers` padded copies.
        pieces = zip(*(jax.lax.split(leaf, [1] * self.layers) for leaf in leaves), strict=True)
        for piece in pieces:
            x = layer(x, jax.tree.unflatten(structure, [leaf[0] for leaf in piece]))
        return x

    def observed(
        self, x: Float[Array, "B S D"], offsets: Float[Array, "layers B H S S"]
    ) -> tuple[Float[Array, "B S D"], Float[Array, "layers B H S S"]]:
        """All blocks with ``offsets`` added to their attention weights, and those weights.

        To be looked at and differentiated by: a gradient with respect to ``offsets`` (zeros) is one with respect to the
        weights. Attention is written out, so memory grows with layers x heads x S^2 an image.
        """
        graph, stacked = nnx.split(self.blocks)

        def layer(x: Array, inputs: tuple[nnx.State, Array]) -> tuple[Array, Array]:
            params, offset = inputs
            return nnx.merge(graph, params).observed(x, offset)

        return jax.lax.scan(layer, x, (stacked, offsets))
