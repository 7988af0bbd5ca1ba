"""Llip (Latent Language Image Pretraining) in JAX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llip_jax.config import ConfigError
    from llip_jax.inference import Images, Model, Texts, load

__all__ = ["ConfigError", "Images", "Model", "Texts", "load"]


def __getattr__(name: str) -> Any:
    # Data workers import this package: they must start fast and without jax.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "ConfigError":
        from llip_jax.config import ConfigError

        return ConfigError
    from llip_jax import inference

    return getattr(inference, name)


def __dir__() -> list[str]:
    return __all__
