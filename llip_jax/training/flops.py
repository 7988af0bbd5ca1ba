"""Floating-point operations of a training step, counted from the model's shape, and the peak of known chips."""

import math

import jax
from flax import nnx

from llip_jax.config import Config
from llip_jax.models.dual_encoder import abstract_model
from llip_jax.models.pooling import token_count
from llip_jax.models.sizes import TowerShape, model_shape
from llip_jax.ops.pair_blocks import mixture_multiply_adds
from llip_jax.parallel.chips import chip_of
from llip_jax.training.optimizer import trained_paths


def train_step_flops(config: Config) -> float:
    """Model FLOPs of one step: 3 x the forward pass (recomputation is not work the model asked for), 1 x in a tower
    that is frozen whole.

    Pair scores are counted as they are computed block by block, which takes less than 3 x their forward pass.
    """
    shape = model_shape(config.model)
    d, images = shape.embed_dim, config.train.batch_size
    texts = images * config.data.captions.slots
    patches = math.ceil((config.model.image_size // shape.patch) ** 2 * (1 - config.model.patch_dropout))
    tokens = token_count(config.model)
    in_sequence = config.model.vision.pooling == "tokens"
    width, mlp = shape.vision.width, shape.vision.mlp
    vision = _tower(shape.vision, tokens * in_sequence + patches) + 2 * patches * shape.patch**2 * 3 * width
    if not in_sequence:
        vision += 4 * patches * width**2 + tokens * (2 * width**2 + 4 * width * mlp + 4 * patches * width)
    text = _tower(shape.text, config.model.text.length)
    if config.model.pooler == "mixer":
        projections = images * 4 * tokens * shape.vision.width * d + texts * 4 * shape.text.width * d
        heads = config.model.mixer_heads
        pairs = 2.0 * mixture_multiply_adds(texts, tokens, heads, d // heads)[1]
    else:
        projections = images * 2 * tokens * shape.vision.width * d + texts * 2 * shape.text.width * d
        pairs = 6.0 * texts * d
    towers = _passes(config, "vision") * images * vision + _passes(config, "text") * texts * text
    return towers + 3.0 * projections + images * pairs


def _passes(config: Config, tower: str) -> float:
    params = nnx.to_pure_dict(nnx.state(abstract_model(config), nnx.Param))
    return 3.0 if any(path.startswith(f"{tower}/") for path in trained_paths(config.train.frozen, params)) else 1.0


def _tower(shape: TowerShape, tokens: int) -> float:
    """Forward FLOPs of one sequence: 2 a weight and token, and both attention products, causal ones in full."""
    weights = 4 * shape.width**2 + 2 * shape.width * shape.mlp
    return shape.layers * (2 * tokens * weights + 4 * tokens**2 * shape.width)


def peak_flops(devices: list[jax.Device]) -> float | None:
    """Dense bf16 peak of all devices together, or None where a kind is not in the table of chips."""
    chips = [chip_of(device.device_kind) for device in devices]
    return None if None in chips else sum(chip.peak_bf16 / chip.devices_per_chip for chip in chips if chip is not None)
