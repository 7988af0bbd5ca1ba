"""Where a device's memory goes: the state by its shardings, what the backward pass keeps, and what a compiler says."""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from llip_jax.config import Config
from llip_jax.models.dual_encoder import abstract_model
from llip_jax.models.pooling import token_count
from llip_jax.models.sizes import model_shape

GIB = 2**30
PAIR_BLOCKS = GIB // 2
"""Temporaries of the pair scores where no compiler says; blocks are chosen for half of that (ops/plan.py)."""


class Kept(NamedTuple):
    """Bytes of one device that the forward pass keeps for the backward pass, in its own memory and in its host's."""

    device: int
    host: int


@dataclass(frozen=True)
class OutOfMemory:
    """What a compiler says of a program that does not fit.

    needed, available: bytes; None where it does not say.
    temporaries_only: ``needed`` is without the program's arguments.
    largest: the largest arrays, as it describes them.
    """

    needed: int | None
    available: int | None
    temporaries_only: bool = False
    largest: tuple[str, ...] = ()


def device_bytes(tree: Any) -> int:
    """Bytes that a tree of ShapeDtypeStructs with shardings takes on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def kept(config: Config, images: int, tensor: int = 1) -> Kept:
    """What the towers keep of so many images and their captions on a device, where ``tensor`` divides heads and MLPs.

    By the model's shapes, without a compiler, which may keep less. Weights in use are not counted: what grows with the
    images is.
    """
    one, two = _residuals(config, 1, tensor), _residuals(config, 2, tensor)
    return Kept((two.device - one.device) * images, (two.host - one.host) * images)


def _residuals(config: Config, images: int, tensor: int) -> Kept:
    graph, variables = nnx.split(abstract_model(config), nnx.Param)
    model, texts = config.model, images * config.data.captions.slots

    def forward(params: Any, pixels: Any, tokens: Any) -> Any:
        def towers(params: Any) -> Any:
            encoder: Any = nnx.merge(graph, params)
            dropout = encoder.draw_dropout(images, jax.random.key(0))
            return encoder.encode_images(pixels, dropout), encoder.text(tokens, jnp.ones_like(tokens))

        return jax.vjp(towers, params)[1]

    pixels = jax.ShapeDtypeStruct((images, model.image_size, model.image_size, 3), jnp.uint8)
    tokens = jax.ShapeDtypeStruct((texts, model.text.length), jnp.int32)
    found = jax.make_jaxpr(forward)(nnx.to_pure_dict(variables), pixels, tokens).out_avals
    sizes = {jax.memory.Space.Device: 0, jax.memory.Space.Host: 0}
    for x in found:
        sizes[x.memory_space] += x.size * x.dtype.itemsize // (tensor if _has_heads_or_hidden(config, x.shape) else 1)
    return Kept(sizes[jax.memory.Space.Device], sizes[jax.memory.Space.Host])


def _has_heads_or_hidden(config: Config, dims: tuple[int, ...]) -> bool:
    """Whether an array has a dimension that the mesh axis ``tensor`` divides; by its neighbours: 12 may be layers."""
    shape, dims = model_shape(config.model), tuple(n for n in dims if n > 1)
    for tower in (shape.vision, shape.text):
        heads = (i for i, n in enumerate(dims) if n == tower.heads)
        vectors = any(dims[i + 1 : i + 2] == (tower.width // tower.heads,) for i in heads)
        weights = len(dims) > 3 and dims[-3] == tower.heads and tower.width not in dims
        if vectors or weights or dims[-1:] == (tower.mlp,):
            return True
    return False


def held_of_an_image(config: Config, tensor: int = 1) -> int:
    """Bytes of activations at the widest point of the backward pass: what is kept, and one layer computed again.

    That layer is the average of the tower with fewer layers, all that a policy would drop included.
    """
    model, shape = config.model, model_shape(config.model)
    if model.remat == "none":
        return kept(config, 1, tensor).device
    all_layers = dataclasses.replace(config, model=dataclasses.replace(model, remat="none"))
    layer = kept(all_layers, 1, tensor).device // max(shape.vision.layers, shape.text.layers)
    return kept(config, 1, tensor).device + layer


def pair_sides(config: Config, images: int) -> int:
    """Bytes of what all pairs are computed from on a device, float32 gradients included, and of a block of pairs."""
    d, model = model_shape(config.model).embed_dim, config.model
    itemsize = 2 if model.dtype == "bfloat16" else 4
    tokens = token_count(model) if model.pooler == "mixer" else 0
    vectors = 2 * tokens + 2 + 2 * config.data.captions.slots
    return images * vectors * d * (itemsize + 4) + PAIR_BLOCKS


_SIZE = r"([\d.]+)([KMGT]?)B?"
_NEEDED = (
    re.compile(rf"total memory required for HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
)


def out_of_memory(message: str) -> OutOfMemory | None:
    """What a TPU compiler's error says about memory; None for errors about something else."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    said = next((found for pattern in _NEEDED if (found := pattern.search(message))), None)
    largest = tuple(_allocation(block) for block in re.split(r"\n\s*={5,}", message) if "Shape: " in block)[:5]
    if said is None:
        return OutOfMemory(None, None, largest=largest)
    return OutOfMemory(_bytes(said[1], said[2]), _bytes(said[3], said[4]), "temporaries" in said[0], largest)


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * 1024 ** " KMGT".index(unit or " "))


def _allocation(block: str) -> str:
    size, shape = re.search(rf"Size: {_SIZE}", block), re.search(r"Shape: ([^{\s]+)", block)
    scope = re.search(r'op_name="([^"]*)"', block)
    words = (size and f"{_bytes(size[1], size[2]) / GIB:.2f} GiB", shape and shape[1], scope and scope[1])
    return " ".join(word for word in words if word)
