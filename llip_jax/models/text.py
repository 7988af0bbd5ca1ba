"""Text tower: a transformer read at one token."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llip_jax.config import ModelConfig
from llip_jax.models.layers import Transformer, layer_norm, normal_param
from llip_jax.models.sizes import ModelShape
from llip_jax.parallel.sharding import constrain, in_use


class TextTower(nnx.Module):
    """CLIP's text tower (arXiv 2103.00020, section 2.4), or SigLIP's, whose tokens see each other and the padding."""

    def __init__(
        self, config: ModelConfig, shape: ModelShape, vocabulary: int, *, dtype: Any, scan: bool, rngs: nnx.Rngs
    ):
        d = shape.text.width
        self.embedding = normal_param(rngs, 0.02, (vocabulary, d), ("vocab", "embed"))
        # Whole everywhere: small, and the compiler would gather activations to divide a sum over the batch.
        self.positions = normal_param(rngs, 0.01, (config.text.length, d), (None, None))
        self.transformer = Transformer(
            shape.text,
            activation=config.text.activation or config.activation,
            epsilon=config.layer_norm_epsilon,
            causal=config.text.causal,
            dtype=dtype,
            attend=config.attention,
            remat=config.remat,
            scan=scan,
            rngs=rngs,
        )
        self.norm_final = layer_norm(d, config.layer_norm_epsilon, dtype, rngs)
        self.pooling, self.dtype = config.text.pooling, dtype

    def __call__(self, tokens: Int[Array, "J L"], mask: Int[Array, "J L"]) -> Float[Array, "J Dt"]:
        """The end-of-text token, which is the one before the padding, or the last of all, after the final norm.

        ``mask`` is 1 on real tokens and 0 on the padding behind them, where causal attention never looks. A text
        without any token (an empty caption slot) reads its first position.
        """
        return self.read(self.transformer(self.placed(self.embed(tokens))), mask)

    def observed(
        self, embedded: Float[Array, "J L Dt"], mask: Int[Array, "J L"], offsets: Float[Array, "layers J H L L"]
    ) -> tuple[Float[Array, "J Dt"], Float[Array, "layers J H L L"]]:
        """The same of token embeddings, with what :meth:`Transformer.observed` adds and returns."""
        x, weights = self.transformer.observed(self.placed(embedded), offsets)
        return self.read(x, mask), weights

    def embed(self, tokens: Int[Array, "J L"]) -> Float[Array, "J L Dt"]:
        """Token embeddings, without positions."""
        return in_use(self.embedding, self.dtype)[tokens]

    def placed(self, embedded: Float[Array, "J L Dt"]) -> Float[Array, "J L Dt"]:
        """What the transformer reads: token embeddings and positions."""
        return constrain(embedded + in_use(self.positions, self.dtype)[: embedded.shape[1]], "batch", None, None)

    def read(self, x: Float[Array, "J L Dt"], mask: Int[Array, "J L"]) -> Float[Array, "J Dt"]:
        """The vector of the text after the transformer."""
        return self.norm_final(jnp.take_along_axis(x, self.read_at(mask)[:, None, None], axis=1)[:, 0])

    def read_at(self, mask: Int[Array, "J L"]) -> Int[Array, "J"]:
        """The position that :meth:`read` takes."""
        if self.pooling == "last":
            return jnp.full(len(mask), mask.shape[1] - 1)
        return jnp.maximum(mask.sum(axis=1) - 1, 0)
