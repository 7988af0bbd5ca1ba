"""The size table (CLIP and OpenCLIP towers) and the fully resolved shape of a model."""

from dataclasses import dataclass

from llip_jax.config import ConfigError, ModelConfig, nearest


@dataclass(frozen=True)
class TowerShape:
    """layers, width, hidden width of the MLP, attention heads."""

    layers: int
    width: int
    mlp: int
    heads: int


@dataclass(frozen=True)
class ModelShape:
    """Vision and text tower, patch side in pixels, joint width d."""

    vision: TowerShape
    text: TowerShape
    patch: int
    embed_dim: int


SIZES = {
    "Ti/4": ModelShape(TowerShape(4, 128, 512, 4), TowerShape(3, 128, 512, 4), 4, 64),
    "S/16": ModelShape(TowerShape(12, 384, 1536, 6), TowerShape(12, 384, 1536, 6), 16, 384),
    "B/32": ModelShape(TowerShape(12, 768, 3072, 12), TowerShape(12, 512, 2048, 8), 32, 512),
    "B/16": ModelShape(TowerShape(12, 768, 3072, 12), TowerShape(12, 512, 2048, 8), 16, 512),
    "L/14": ModelShape(TowerShape(24, 1024, 4096, 16), TowerShape(12, 768, 3072, 12), 14, 768),
    "H/14": ModelShape(TowerShape(32, 1280, 5120, 16), TowerShape(24, 1024, 4096, 16), 14, 1024),
    "G/14": ModelShape(TowerShape(48, 1664, 8192, 16), TowerShape(32, 1280, 5120, 20), 14, 1280),
}


def model_shape(config: ModelConfig) -> ModelShape:
    """The size's shape with the configuration's overrides.

    Raises:
        ConfigError: an unknown size, or dimensions that do not divide.
    """
    if config.size not in SIZES:
        raise ConfigError(f"model.size: no size named {config.size!r}.{nearest(config.size, list(SIZES))}")
    base = SIZES[config.size]
    v, t = config.vision, config.text
    shape = ModelShape(
        vision=TowerShape(
            v.layers or base.vision.layers,
            v.width or base.vision.width,
            v.mlp or base.vision.mlp,
            v.heads or base.vision.heads,
        ),
        text=TowerShape(
            t.layers or base.text.layers, t.width or base.text.width, t.mlp or base.text.mlp, t.heads or base.text.heads
        ),
        patch=v.patch or base.patch,
        embed_dim=config.embed_dim or base.embed_dim,
    )
    _divides("model.image_size", config.image_size, "model.vision.patch", shape.patch)
    _divides("model.vision.width", shape.vision.width, "model.vision.heads", shape.vision.heads)
    _divides("model.text.width", shape.text.width, "model.text.heads", shape.text.heads)
    if not v.projection and config.pooler in ("class_token", "registers") and shape.embed_dim != shape.vision.width:
        raise ConfigError(
            f"model.vision.projection=False needs model.embed_dim={shape.embed_dim} to be the vision tower's width, "
            f"model.vision.width={shape.vision.width}"
        )
    if config.pooler in ("mixer", "average"):
        _divides("model.embed_dim", shape.embed_dim, "model.mixer_heads", config.mixer_heads)
    return shape


def _divides(name: str, value: int, by_name: str, by: int) -> None:
    if value % by:
        raise ConfigError(
            f"{name}={value} is not a multiple of {by_name}={by} ({value} = {value // by} x {by} + {value % by})"
        )
