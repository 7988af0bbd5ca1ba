"""An image model of big_vision (which has to be on the path) as a tower: ``model.vision.big_vision`` names it."""

import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8

from llip_jax.config import ConfigError, ModelConfig
from llip_jax.models.layers import AttentionPool, normal_param
from llip_jax.models.sizes import ModelShape
from llip_jax.models.vision import TowerOutput, normalized_pixels
from llip_jax.parallel.sharding import in_use

PACKAGE = "big_vision.models"


class BigVisionTower(nnx.Module):
    """An image model of big_vision as a vision tower: learned queries attend to its encoded patches (AttentionPool).

    Args:
        config: of the whole model; ``vision.big_vision`` names the module and the arguments of its ``Model``.
        shape: its vision width is that of the tower's patches; width, heads and mlp are those of the attention.
        tokens: number of learned queries.
        dtype: what the attention computes in; a ``vit`` has ``dtype_mm`` among its arguments.
        rngs: initial values.

    Raises:
        ConfigError: big_vision or the module cannot be imported, or its patches are not of that shape.
    """

    def __init__(self, config: ModelConfig, shape: ModelShape, tokens: int, *, dtype: Any, rngs: nnx.Rngs):
        theirs = config.vision.big_vision
        assert theirs is not None  # or this is not the tower
        module = import_big_vision(f"{PACKAGE}.{theirs.name}").Model(**{"pool_type": "gap", **theirs.arguments})
        picture = jnp.zeros([1, config.image_size, config.image_size, 3])
        self.encoder = nnx.bridge.ToNNX(module, rngs).lazy_init(picture)
        self.encoder.to_nnx__rngs = None  # else random state would be part of the model's
        self.mean, self.std, self.dtype = config.image_mean, config.image_std, dtype
        width = jax.eval_shape(self._patches, picture).shape[-1]
        if width != shape.vision.width:
            raise ConfigError(f"model.vision.width: {shape.vision.width}, but big_vision's {theirs.name!r} has {width}")
        self.tokens = normal_param(rngs, width**-0.5, (tokens, width), (None, "embed"))
        activation = config.vision.activation or config.activation
        self.attention_pool = AttentionPool(shape.vision, activation, config.layer_norm_epsilon, dtype, rngs)

    def draw_dropout(self, images: int, key: Key[Array, ""]) -> Key[Array, "N"]:
        """One key, which it draws by for all images at once; a row for each image as of other towers."""
        return jnp.broadcast_to(key, (images,))

    def __call__(self, images: UInt8[Array, "N H W 3"], dropout: Key[Array, "N"] | None = None) -> TowerOutput:
        """Image tokens; with ``dropout`` (:meth:`draw_dropout`) its dropout is on (training)."""
        pixels = normalized_pixels(images, self.mean, self.std)
        patches = self._patches(pixels, None if dropout is None else dropout[0]).astype(self.dtype)
        return TowerOutput(self.attention_pool(in_use(self.tokens, self.dtype), patches), patches)

    def _patches(self, pixels: Float[Array, "N H W 3"], dropout_key: Key[Array, ""] | None = None) -> Array:
        rngs = None if dropout_key is None else nnx.Rngs(dropout=dropout_key)
        _, out = self.encoder(pixels, train=dropout_key is not None, rngs=rngs)
        return out["encoded"]


def import_big_vision(module: str) -> ModuleType:
    """A module of big_vision.

    Raises:
        ConfigError: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{module} cannot be imported ({error}); put a clone of github.com/google-research/big_vision on PYTHONPATH"
        ) from error
