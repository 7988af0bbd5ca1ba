"""Vision tower: a ViT over learned image tokens and patches."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, UInt8

from llip_jax.config import ModelConfig
from llip_jax.models.layers import AttentionPool, Transformer, WeightedTokens, layer_norm, normal_param, zeros_param
from llip_jax.models.sizes import ModelShape
from llip_jax.parallel.sharding import constrain, in_use


class TowerOutput(NamedTuple):
    """Image tokens after the final layer norm.

    mixture: the learned tokens: K mixture tokens, or a class token (first) and registers. With attention pooling, what
        its queries read from the patches.
    patches: one token a patch, row by row; fewer under patch dropout.
    """

    mixture: Float[Array, "N K Dv"]
    patches: Float[Array, "N P Dv"]


class Attention(NamedTuple):
    """Attention weights of a vision tower; S is K + P where learned tokens go through the tower, else P.

    layers: of each layer and head, query then key.
    pool: of attention pooling, where the tower has it.
    """

    layers: Float[Array, "layers N H S S"]
    pool: Float[Array, "N H K P"] | None


def patchify(images: Float[Array, "N H W C"], patch: int) -> Float[Array, "N P patch*patch*C"]:
    """Cuts images into flattened square patches, row by row."""
    n, h, w, c = images.shape
    x = images.reshape(n, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, (h // patch) * (w // patch), patch * patch * c)


class VisionTower(nnx.Module):
    """ViT over [learned tokens ; patches] with CLIP's extra layer norm before the blocks, or SigLIP's (VisionConfig).

    Learned tokens have no position: theirs would only add to the token itself. (CLIP's checkpoints carry one for the
    class token; added to the token it gives the same function with ``width`` fewer parameters.) With attention pooling
    they are its queries and the blocks see the patches alone.
    """

    def __init__(self, config: ModelConfig, shape: ModelShape, tokens: int, *, dtype: Any, scan: bool, rngs: nnx.Rngs):
        d, vision, epsilon = shape.vision.width, config.vision, config.layer_norm_epsilon
        activation = vision.activation or config.activation
        in_sequence = vision.pooling == "tokens"
        patches = (config.image_size // shape.patch) ** 2
        pixels = shape.patch**2 * 3
        self.patch_kernel = normal_param(rngs, pixels**-0.5, (pixels, d), (None, "embed"))
        self.patch_bias = zeros_param((d,), (None,)) if vision.patch_bias else None
        # Whole everywhere: they are small, and the compiler would gather activations to divide sums over the batch.
        self.tokens = normal_param(rngs, d**-0.5, (tokens, d), (None, None))
        self.positions = normal_param(rngs, d**-0.5, (patches, d), (None, None))
        self.norm_pre = layer_norm(d, epsilon, dtype, rngs) if vision.norm_pre else None
        self.transformer = Transformer(
            shape.vision,
            activation=activation,
            epsilon=epsilon,
            causal=False,
            weighted=WeightedTokens(tokens, vision.token_weight) if in_sequence and vision.token_weight != 1 else None,
            dtype=dtype,
            attend=config.attention,
            remat=config.remat,
            scan=scan,
            rngs=rngs,
        )
        self.norm_post = layer_norm(d, epsilon, dtype, rngs)
        self.attention_pool = None if in_sequence else AttentionPool(shape.vision, activation, epsilon, dtype, rngs)
        self.patch, self.image_size, self.heads = shape.patch, config.image_size, shape.vision.heads
        self.patch_dropout, self.dtype = config.patch_dropout, dtype
        self.mean, self.std = config.image_mean, config.image_std

    def draw_dropout(self, images: int, key: Key[Array, ""]) -> Int[Array, "N kept"] | None:
        """The patches that each image keeps under patch dropout: a random ceil((1 - rate) P); None without dropout.

        Drawn once for a batch, so that it does not depend on the pieces in which the batch is gone through.
        """
        if self.patch_dropout == 0:
            return None
        patches = self.positions.shape[0]
        keep = math.ceil((1 - self.patch_dropout) * patches)
        random = constrain(jax.random.uniform(key, (images, patches)), "batch", None)
        return jnp.argsort(random, axis=1)[:, :keep]

    def __call__(self, images: UInt8[Array, "N H W 3"], dropout: Int[Array, "N kept"] | None = None) -> TowerOutput:
        """Image tokens; with ``dropout`` (:meth:`draw_dropout`) only of some patches (FLIP, arXiv 2212.00794).

        Raises:
            ValueError: images of another size or type.
        """
        x = self._embedded(images)
        if dropout is not None:
            x = jnp.take_along_axis(x, dropout[:, :, None], axis=1)
        tokens = in_use(self.tokens, self.dtype)
        if self.attention_pool is not None:
            patches = self.norm_post(self.transformer(self._first_norm(x)))
            return TowerOutput(mixture=self.attention_pool(tokens, patches), patches=patches)
        x = self.norm_post(self.transformer(self._first_norm(self._with_tokens(x, tokens))))
        return TowerOutput(mixture=x[:, : tokens.shape[0]], patches=x[:, tokens.shape[0] :])

    def observed(self, images: UInt8[Array, "N H W 3"], offsets: Attention) -> tuple[TowerOutput, Attention]:
        """The same, ``offsets`` added to all attention weights, and those weights (see Transformer.observed)."""
        x, tokens = self._embedded(images), in_use(self.tokens, self.dtype)
        if self.attention_pool is not None:
            assert offsets.pool is not None
            patches, layers = self.transformer.observed(self._first_norm(x), offsets.layers)
            patches = self.norm_post(patches)
            mixture, pool = self.attention_pool.observed(tokens, patches, offsets.pool)
            return TowerOutput(mixture, patches), Attention(layers, pool)
        x, layers = self.transformer.observed(self._first_norm(self._with_tokens(x, tokens)), offsets.layers)
        x = self.norm_post(x)
        return TowerOutput(mixture=x[:, : tokens.shape[0]], patches=x[:, tokens.shape[0] :]), Attention(layers, None)

    def no_offsets(self, images: int) -> Attention:
        """Zeros for :meth:`observed`."""
        tokens, patches = self.tokens.shape[0], self.positions.shape[0]
        length = patches if self.attention_pool is not None else tokens + patches
        layers = jnp.zeros((self.transformer.layers, images, self.heads, length, length), jnp.float32)
        return Attention(
            layers,
            None if self.attention_pool is None else jnp.zeros((images, self.heads, tokens, patches), jnp.float32),
        )

    def _embedded(self, images: UInt8[Array, "N H W 3"]) -> Float[Array, "N P Dv"]:
        """Patches with their positions."""
        if images.dtype != jnp.uint8 or images.shape[1:] != (self.image_size, self.image_size, 3):
            expected = f"uint8 [N, {self.image_size}, {self.image_size}, 3]"
            raise ValueError(f"images: expected {expected}, got {images.dtype} {list(images.shape)}")
        pixels = normalized_pixels(images, self.mean, self.std)
        x = patchify(pixels.astype(self.dtype), self.patch) @ in_use(self.patch_kernel, self.dtype)
        if self.patch_bias is not None:
            x += in_use(self.patch_bias, self.dtype)
        return x + in_use(self.positions, self.dtype)

    def _with_tokens(self, x: Float[Array, "N P Dv"], tokens: Float[Array, "K Dv"]) -> Float[Array, "N S Dv"]:
        return jnp.concatenate([jnp.broadcast_to(tokens, (x.shape[0], *tokens.shape)), x], axis=1)

    def _first_norm(self, x: Float[Array, "N S Dv"]) -> Float[Array, "N S Dv"]:
        x = constrain(x, "batch", None, None)
        return x if self.norm_pre is None else self.norm_pre(x)


def normalized_pixels(
    images: UInt8[Array, "N H W 3"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "N H W 3"]:
    """Pixels as towers take them, in float32: the subtraction would cost bfloat16 about a grey level."""
    return (images.astype(jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(std)
