"""Poolers: from image tokens and a text vector to the two sides of the pair scores.

The four rungs of the paper's ablation ladder (arXiv 2405.00740, section 5) differ only here: a class token, a class
token with registers, tokens averaged by learned weights, and tokens mixed by the text.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llip_jax.config import ModelConfig
from llip_jax.models.layers import normal_param, zeros_param
from llip_jax.models.sizes import ModelShape
from llip_jax.models.vision import TowerOutput
from llip_jax.ops.pair_scores import FixedSide, ImageSide, MixtureSide, TextSide
from llip_jax.parallel.sharding import in_use


class _TextProjection(nnx.Module):
    """What all poolers do with texts: project them to the joint width."""

    def __init__(self, config: ModelConfig, shape: ModelShape, dtype: Any, rngs: nnx.Rngs):
        dt, d = shape.text.width, shape.embed_dim
        self.text = normal_param(rngs, dt**-0.5, (dt, d), ("embed", None))
        self.text_bias = zeros_param((d,), (None,)) if config.text.projection_bias else None
        self.dtype = dtype

    def texts(self, pooled: Float[Array, "J Dt"]) -> TextSide:
        """Text side of the pair scores."""
        projected = pooled @ in_use(self.text, self.dtype)
        return TextSide(projected if self.text_bias is None else projected + in_use(self.text_bias, self.dtype))


class ClassToken(_TextProjection):
    """The first learned token, projected; the others are registers and are dropped (CLIP, SigLIP)."""

    def __init__(self, config: ModelConfig, shape: ModelShape, dtype: Any, rngs: nnx.Rngs):
        dv, d = shape.vision.width, shape.embed_dim
        self.image = normal_param(rngs, dv**-0.5, (dv, d), ("embed", None)) if config.vision.projection else None
        super().__init__(config, shape, dtype, rngs)

    def images(self, output: TowerOutput) -> ImageSide:
        """Image side of the pair scores."""
        return FixedSide(self.unconditioned(output))

    def unconditioned(self, output: TowerOutput) -> Float[Array, "N d"]:
        """The image embedding."""
        token = output.mixture[:, 0]
        return token if self.image is None else token @ in_use(self.image, self.dtype)


class LearnedAverage(_TextProjection):
    """All learned tokens, averaged head by head with learned weights that are the same for every text."""

    def __init__(self, config: ModelConfig, shape: ModelShape, dtype: Any, rngs: nnx.Rngs):
        dv, d, heads = shape.vision.width, shape.embed_dim, config.mixer_heads
        self.logits = zeros_param((heads, config.mixture_tokens), (None, None))
        self.value = normal_param(rngs, dv**-0.5, (dv, heads, d // heads), ("embed", None, None))
        self.output = normal_param(rngs, d**-0.5, (d, d), ("embed", None))
        super().__init__(config, shape, dtype, rngs)

    def images(self, output: TowerOutput) -> ImageSide:
        """Image side of the pair scores."""
        return FixedSide(self.unconditioned(output))

    def unconditioned(self, output: TowerOutput) -> Float[Array, "N d"]:
        """The averaged image embedding."""
        weights = jax.nn.softmax(self.logits[...], axis=-1).astype(self.dtype)
        values = jnp.einsum("nkd,dmh->nkmh", output.mixture, in_use(self.value, self.dtype))
        mixed = jnp.einsum("mk,nkmh->nmh", weights, values)
        return mixed.reshape(mixed.shape[0], -1) @ in_use(self.output, self.dtype)


class Mixer(_TextProjection):
    """Llip's pooler: the text's query decides how the mixture tokens are mixed."""

    def __init__(self, config: ModelConfig, shape: ModelShape, dtype: Any, rngs: nnx.Rngs):
        dv, dt, d, heads = shape.vision.width, shape.text.width, shape.embed_dim, config.mixer_heads
        split = (heads, d // heads)
        self.query = normal_param(rngs, dt**-0.5, (dt, *split), ("embed", None, None))
        self.key = normal_param(rngs, dv**-0.5, (dv, *split), ("embed", None, None))
        self.value = normal_param(rngs, dv**-0.5, (dv, *split), ("embed", None, None))
        self.output = normal_param(rngs, d**-0.5, (d, d), ("embed", None))
        # A unit normal: queries come from a layer norm, so that tokens with equal keys are told apart from the start.
        key_bias = (config.mixture_tokens, *split)
        self.key_bias = normal_param(rngs, 1.0, key_bias, (None, None, None)) if config.mixer_key_bias else None
        super().__init__(config, shape, dtype, rngs)
        self.temperature = config.mixer_temperature

    def images(self, output: TowerOutput) -> ImageSide:
        """Image side of the pair scores: keys, values and the output projection."""
        keys = jnp.einsum("nkd,dmh->nkmh", output.mixture, in_use(self.key, self.dtype))
        if self.key_bias is not None:
            keys += in_use(self.key_bias, self.dtype)
        return MixtureSide(keys, self._values(output), in_use(self.output, self.dtype), self.temperature)

    def texts(self, pooled: Float[Array, "J Dt"]) -> TextSide:
        """Text side of the pair scores: embedding and mixing queries."""
        queries = jnp.einsum("jd,dmh->jmh", pooled, in_use(self.query, self.dtype))
        return super().texts(pooled)._replace(queries=queries)

    def unconditioned(self, output: TowerOutput) -> Float[Array, "N d"]:
        """Mean of the mixture tokens through value and output projection: the embedding no text has conditioned."""
        mean = self._values(output).mean(axis=1)
        return mean.reshape(mean.shape[0], -1) @ in_use(self.output, self.dtype)

    def _values(self, output: TowerOutput) -> Float[Array, "N K M dh"]:
        return jnp.einsum("nkd,dmh->nkmh", output.mixture, in_use(self.value, self.dtype))


Pooler = ClassToken | LearnedAverage | Mixer
POOLERS: dict[str, type[ClassToken] | type[LearnedAverage] | type[Mixer]] = {
    "class_token": ClassToken,
    "registers": ClassToken,
    "average": LearnedAverage,
    "mixer": Mixer,
}


def token_count(config: ModelConfig) -> int:
    """Learned tokens of the vision tower: one for a plain class token, otherwise ``mixture_tokens``."""
    return 1 if config.pooler == "class_token" else config.mixture_tokens
