"""What comparisons need: errors, random parameters, OpenCLIP without torchvision's operators.

Torch is imported inside functions, so that tests which need no oracle from it run without it.
"""

import functools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array, Float

from llip_jax.config import Config
from llip_jax.models.dual_encoder import abstract_model

Arrays = Mapping[str, Float[np.ndarray, "..."]]
Params = dict[str, Any]


fast_to_compile = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""jax.jit for functions that run once: half the time to compile, slower code, the same arithmetic."""


def relative_error(actual: Any, expected: Any) -> float:
    """Largest difference as a fraction of the largest expected magnitude; expected zeros are to be met exactly."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    difference, scale = np.abs(actual - expected).max(), np.abs(expected).max()
    if scale == 0:
        return 0.0 if difference == 0 else np.inf
    return float(difference / scale)


def tree_errors(actual: Any, expected: Any) -> dict[str, float]:
    """:func:`relative_error` of every leaf, by path."""
    errors = jax.tree.map(relative_error, actual, expected)
    return {jax.tree_util.keystr(path, simple=True, separator="."): e for path, e in jax.tree.leaves_with_path(errors)}


def above(errors: Mapping[str, float], tolerance: float) -> dict[str, float]:
    """The leaves that are further off than the tolerance; tests assert that there are none."""
    return {path: error for path, error in errors.items() if error > tolerance}


def random_params(config: Config, seed: int) -> Params:
    """Noise for every parameter of a model, around one for norm scales; cheaper to come by than the initial ones."""
    rng = np.random.default_rng(seed)

    def noise(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.ShapeDtypeStruct) -> Array:
        return jnp.asarray((path[-1].key == "scale") + 0.15 * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map_with_path(noise, nnx.to_pure_dict(nnx.state(abstract_model(config), nnx.Param)))


def import_open_clip() -> ModuleType:
    """OpenCLIP; skips the test where it is not installed."""
    pytest.importorskip("torch", reason="OpenCLIP needs torch, which is not installed")
    try:
        return pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    except RuntimeError:
        _declare_torchvision_operators()
        return pytest.importorskip("open_clip", reason="open_clip_torch is not installed")


@functools.cache
def _declare_torchvision_operators() -> Any:
    """Declares what a torchvision for CUDA lacks beside a torch for CPU; OpenCLIP imports it but calls none of it.

    The declarations live as long as the returned object, which the cache keeps.
    """
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def add_noise(module: Any, seed: int) -> None:
    """Noise on every bias, norm and token of a torch module: at their initial zeros and ones a mix-up goes unseen."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim <= 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def weights_and_gradients(module: Any) -> tuple[Arrays, Arrays]:
    """Parameters of a torch module and their gradients, by name."""
    parameters = dict(module.named_parameters())
    return (
        {name: parameter.detach().numpy() for name, parameter in parameters.items()},
        {name: parameter.grad.numpy() for name, parameter in parameters.items()},
    )


def torch_inputs(config: Config, batch: Mapping[str, np.ndarray]) -> tuple[Any, Any]:
    """Pixels, normalised and channels first, and tokens."""
    import torch

    mean, std = (np.array(x, np.float32) for x in (config.model.image_mean, config.model.image_std))
    pixels = (batch["image"].astype(np.float32) / 255 - mean) / std
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2)).double(), torch.from_numpy(batch["text"][:, 0]).long()
