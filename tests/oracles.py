"""What comparisons need: errors, random parameters, OpenCLIP without torchvision's operators, its weights as ours.

Torch is imported inside functions, so that tests which need no oracle from it run without it.
"""

import functools
import re
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


def params_from_open_clip(arrays: Arrays, heads: tuple[int, int], class_token: Float[np.ndarray, "Dv"]) -> Params:
    """OpenCLIP's parameters (or their gradients) as those of our class-token model without a logit bias.

    heads: of the vision and the text tower.
    class_token: OpenCLIP adds a position to it, we do not. Of weights it is the sum of both; the gradients of both are
        equal, and either is the gradient of the sum.
    """
    vision_heads, text_heads = heads
    kernel = arrays["visual.conv1.weight"]  # out, in, row, column
    return {
        "vision": {
            "patch_kernel": kernel.transpose(2, 3, 1, 0).reshape(-1, len(kernel)),
            "tokens": class_token[None],
            "positions": arrays["visual.positional_embedding"][1:],
            "norm_pre": _norm(arrays, "visual.ln_pre"),
            "transformer": {"blocks": _blocks(arrays, "visual.transformer.resblocks", vision_heads)},
            "norm_post": _norm(arrays, "visual.ln_post"),
        },
        "text": {
            "embedding": arrays["token_embedding.weight"],
            "positions": arrays["positional_embedding"],
            "transformer": {"blocks": _blocks(arrays, "transformer.resblocks", text_heads)},
            "norm_final": _norm(arrays, "ln_final"),
        },
        "pooler": {"image": arrays["visual.proj"], "text": arrays["text_projection"]},
        "log_scale": arrays["logit_scale"],
    }


def _norm(arrays: Arrays, name: str) -> Params:
    return {"scale": arrays[f"{name}.weight"], "bias": arrays[f"{name}.bias"]}


def _blocks(arrays: Arrays, name: str, heads: int) -> Params:
    """All blocks of one tower, stacked along a leading layer axis."""
    prefix = re.compile(re.escape(name) + r"\.(\d+)\.")
    layers = 1 + max(int(match[1]) for match in map(prefix.match, arrays) if match)
    blocks = [_block(arrays, f"{name}.{layer}", heads) for layer in range(layers)]
    return jax.tree.map(lambda *layers: np.stack(layers), *blocks)


def _block(arrays: Arrays, name: str, heads: int) -> Params:
    qkv = arrays[f"{name}.attn.in_proj_weight"]  # queries, keys and values below each other, head by head
    width = qkv.shape[1]
    split = (3, heads, width // heads)
    return {
        "norm1": _norm(arrays, f"{name}.ln_1"),
        "qkv": qkv.T.reshape(width, *split),
        "qkv_bias": arrays[f"{name}.attn.in_proj_bias"].reshape(split),
        "out": arrays[f"{name}.attn.out_proj.weight"].T.reshape(*split[1:], width),
        "out_bias": arrays[f"{name}.attn.out_proj.bias"],
        "norm2": _norm(arrays, f"{name}.ln_2"),
        "up": arrays[f"{name}.mlp.c_fc.weight"].T,
        "up_bias": arrays[f"{name}.mlp.c_fc.bias"],
        "down": arrays[f"{name}.mlp.c_proj.weight"].T,
        "down_bias": arrays[f"{name}.mlp.c_proj.bias"],
    }


OPEN_CLIP_NAMES = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_model.encoder.layers": "transformer.resblocks",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
"""Parts of Hugging Face's names and what OpenCLIP calls them."""


def open_clip_from_hugging_face(arrays: Arrays) -> Arrays:
    """Parameters (or gradients) of transformers' CLIPModel under OpenCLIP's names and in its shapes."""
    renamed = {}
    for name, array in arrays.items():
        for part, open_clip_part in OPEN_CLIP_NAMES.items():
            name = name.replace(part, open_clip_part)
        renamed[name] = array
    renamed["visual.proj"] = renamed.pop("visual_projection.weight").T
    renamed["text_projection"] = renamed.pop("text_projection.weight").T
    for name in [name for name in renamed if ".self_attn.q_proj." in name]:
        parts = [renamed.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        block, _, kind = name.partition(".self_attn.q_proj.")
        renamed[f"{block}.attn.in_proj_{kind}"] = np.concatenate(parts)
    return renamed
