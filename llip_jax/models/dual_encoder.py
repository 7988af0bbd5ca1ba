"""The dual encoder: two towers, a pooler, and the affine map from cosines to logits."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, Shaped, UInt8

from llip_jax.config import Config
from llip_jax.models.big_vision import BigVisionTower
from llip_jax.models.pooling import POOLERS, Pooler, token_count
from llip_jax.models.sizes import model_shape
from llip_jax.models.text import TextTower
from llip_jax.models.vision import TowerOutput, VisionTower
from llip_jax.ops.pair_scores import Affine, ImageSide, TextSide, cosines
from llip_jax.parallel.sharding import constrain, whole

MAX_LOG_SCALE = math.log(100.0)
"""CLIP clamps the log of the logit scale here after every step."""


class DualEncoder(nnx.Module):
    """Llip, and with other poolers CLIP, SigLIP and the rungs between."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        model = config.model
        shape = model_shape(model)
        dtype = compute_dtype(model.dtype)
        scan = jax.default_backend() != "cpu" if model.scan_layers == "auto" else model.scan_layers
        self.vision: VisionTower | BigVisionTower
        if model.vision.big_vision is None:
            self.vision = VisionTower(model, shape, token_count(model), dtype=dtype, scan=scan, rngs=rngs)
        else:
            self.vision = BigVisionTower(model, shape, token_count(model), dtype=dtype, rngs=rngs)
        vocabulary = config.data.tokenizer.vocabulary_size
        self.text = TextTower(model, shape, vocabulary, dtype=dtype, scan=scan, rngs=rngs)
        self.pooler: Pooler = POOLERS[model.pooler](model, shape, dtype, rngs)
        self.log_scale = nnx.Param(jnp.float32(math.log(model.logit_scale)), axes=())
        bias = initial_bias(model.logit_bias, config.train.batch_size)
        self.bias = None if bias is None else nnx.Param(jnp.float32(bias), axes=())

    def draw_dropout(self, images: int, key: Key[Array, ""]) -> Shaped[Array, "N ..."] | None:
        """What is random about a batch of so many images in training, a row for each; None: nothing."""
        return self.vision.draw_dropout(images, key)

    def encode_images(
        self, images: UInt8[Array, "N H W 3"], dropout: Shaped[Array, "N ..."] | None = None
    ) -> TowerOutput:
        """Image tokens of raw pixels; ``dropout`` (:meth:`draw_dropout`) turns dropout on (training)."""
        return self.vision(images, dropout)

    def image_side(self, output: TowerOutput) -> ImageSide:
        """What the pair scores need of images; rows stay divided over the batch axes."""
        return self.pooler.images(output)

    def text_side(self, tokens: Int[Array, "J L"], mask: Int[Array, "J L"]) -> TextSide:
        """What the pair scores need of texts."""
        return self.pooler.texts(self.text(tokens, mask))

    def unconditioned_embedding(self, output: TowerOutput) -> Float[Array, "N d"]:
        """One vector an image, whatever the text, L2-normalised by the caller where wanted.

        For the mixer this is *not* what pairs are scored with; name it when reporting results obtained from it.
        """
        return self.pooler.unconditioned(output)

    def logits(self, images: ImageSide, texts: TextSide) -> Float[Array, "N J"]:
        """a * cosine + b of every image with every text, float32, all at once."""
        # Images stay where they are; the texts, d numbers each, are gathered.
        texts = whole(texts)
        scale, bias = self.affine()
        return constrain(scale * cosines(images, texts) + bias, "batch", None)

    def affine(self) -> Affine:
        """a and b."""
        return Affine(jnp.exp(self.log_scale[...]), jnp.float32(0) if self.bias is None else self.bias[...])


def initial_bias(setting: float | str | None, batch_size: int) -> float | None:
    """Starting value of b; 'prior' is the log-odds of a match, 1 / (batch - 1), among all pairs of a batch."""
    if setting == "prior":
        p = 1 / batch_size
        return math.log(p / (1 - p))
    return setting  # type: ignore[return-value]  # the other strings are excluded by ModelConfig


def compute_dtype(name: str) -> Any:
    """The type towers compute in."""
    if name == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(name).type


def abstract_model(config: Config) -> nnx.Module:
    """The model with shapes in place of arrays: nothing is allocated."""
    return nnx.eval_shape(lambda: DualEncoder(config, rngs=nnx.Rngs(0)))
