"""What tests of big_vision need: its checkpoints, by name and shape, and a stand-in for its modules.

The stand-in is a few lines of our own over flax.linen, whose layers give parameters their names and layouts.
"""

import itertools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

Arrays = dict[str, np.ndarray]

# Odd and all different, so that no axis can pass for another.
PATCH, GRID, VOCABULARY, LENGTH = 3, 5, 301, 7
VISION = {"width": 24, "depth": 2, "mlp_dim": 28, "num_heads": 3}
TEXT = {"width": 20, "depth": 1, "mlp_dim": 36, "num_heads": 5}

_ATTENTION = {f"{name}/kernel": "dhe" for name in ("query", "key", "value")} | {"out/kernel": "hed", "out/bias": "d"}
_ATTENTION |= {f"{name}/bias": "he" for name in ("query", "key", "value")}
_BLOCK = {f"MultiHeadDotProductAttention_0/{name}": axes for name, axes in _ATTENTION.items()}
_BLOCK |= {"MlpBlock_0/Dense_0/kernel": "dm", "MlpBlock_0/Dense_0/bias": "m"}
_BLOCK |= {"MlpBlock_0/Dense_1/kernel": "md", "MlpBlock_0/Dense_1/bias": "d"}
_NORM = {"scale": "d", "bias": "d"}
_POOL = _BLOCK | {"probe": "11d"} | {f"LayerNorm_0/{leaf}": "d" for leaf in _NORM}
_BLOCK |= {f"LayerNorm_{i}/{leaf}": "d" for i, leaf in itertools.product(range(2), _NORM)}


def siglip(seed: int, scan_image: bool = False, scan_text: bool = False) -> Arrays:
    """A checkpoint of ``two_towers`` made of random numbers, with layers stacked or apart."""
    rng = np.random.default_rng(seed)
    arrays: Arrays = {}

    def draw(name: str, *shape: int) -> np.ndarray:
        return (name.endswith("scale") + 0.2 * rng.normal(size=shape)).astype(np.float32)

    def add(prefix: str, names: dict[str, str], sizes: dict[str, int]) -> None:
        axes = {"d": sizes["width"], "m": sizes["mlp_dim"], "h": sizes["num_heads"], "1": 1}
        axes["e"] = axes["d"] // axes["h"]
        arrays.update({f"{prefix}/{name}": draw(name, *(axes[a] for a in of)) for name, of in names.items()})

    for tower, sizes, scan in (("img/Transformer", VISION, scan_image), ("txt/Encoder_0", TEXT, scan_text)):
        add(f"{tower}/encoder_norm", _NORM, sizes)
        blocks = [f"{tower}/encoderblock_{i}" for i in range(sizes["depth"])]
        for block in blocks:
            add(block, _BLOCK, sizes)
        if scan:
            for leaf in _BLOCK:
                arrays[f"{tower}/encoderblock/{leaf}"] = np.stack([arrays.pop(f"{block}/{leaf}") for block in blocks])
    add("img/MAPHead_0", _POOL, VISION)
    dv, dt = VISION["width"], TEXT["width"]
    shapes = {"img/embedding/kernel": (PATCH, PATCH, 3, dv), "img/embedding/bias": (dv,), "t": (1,), "b": (1,)}
    shapes |= {"img/pos_embedding": (1, GRID**2, dv), "txt/pos_embedding": (1, LENGTH, dt)}
    shapes |= {"txt/Embed_0/embedding": (VOCABULARY, dt), "txt/head/kernel": (dt, dv), "txt/head/bias": (dv,)}
    return arrays | {name: draw(name, *shape) for name, shape in shapes.items()}


def saved(path: Path, arrays: Arrays, prefix: str = "params/") -> Path:
    """The path of a checkpoint, written."""
    np.savez(path, **{prefix + name: x for name, x in arrays.items()})
    return path


def nested(arrays: Arrays) -> Any:
    """Parameters as linen takes them."""
    return traverse_util.unflatten_dict(arrays, sep="/")


def batch(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and texts, one text more."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (4, GRID * PATCH, GRID * PATCH, 3), np.uint8)
    return images, rng.integers(0, VOCABULARY, (5, LENGTH), np.int32)


def value_range(images: np.ndarray) -> np.ndarray:
    """Pixels as its pipeline gives them: ``value_range(-1,1)``."""
    return images / np.float32(255) * 2 - 1


def fields(**scan: bool) -> dict[str, Any]:
    """Arguments of ``two_towers.Model``."""
    image = VISION | {"patch_size": (PATCH, PATCH), "pool_type": "map"} | scan
    text = TEXT | {"vocab_size": VOCABULARY} | scan
    return {"image": image, "text": text, "out_dim": (None, VISION["width"]), "bias_init": -10.0}


class MlpBlock(nn.Module):
    mlp_dim: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.gelu(nn.Dense(self.mlp_dim)(x))
        return nn.Dense(x.shape[-1])(hidden)


class Block(nn.Module):
    mlp_dim: int
    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.LayerNorm()(x)
        x += nn.MultiHeadDotProductAttention(self.num_heads)(y)
        y = nn.LayerNorm()(x)
        return x + MlpBlock(self.mlp_dim)(y)


class Encoder(nn.Module):
    depth: int
    mlp_dim: int
    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.depth):
            x = Block(self.mlp_dim, self.num_heads, name=f"encoderblock_{i}")(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class MAPHead(nn.Module):
    mlp_dim: int
    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        probe = self.param("probe", nn.initializers.normal(), (1, 1, x.shape[-1]))
        x = nn.MultiHeadDotProductAttention(self.num_heads)(jnp.repeat(probe, len(x), axis=0), x)
        y = nn.LayerNorm()(x)
        return (x + MlpBlock(self.mlp_dim)(y))[:, 0]


class Vit(nn.Module):
    """For ``big_vision.models.vit.Model``."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch_size: tuple[int, int]
    pool_type: str

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = nn.Conv(self.width, self.patch_size, self.patch_size, "VALID", name="embedding")(image)
        x = x.reshape(len(x), -1, self.width)
        x += self.param("pos_embedding", nn.initializers.normal(), (1, *x.shape[1:]))
        x = Encoder(self.depth, self.mlp_dim, self.num_heads, name="Transformer")(x)
        return MAPHead(self.mlp_dim, self.num_heads)(x) if self.pool_type == "map" else x.mean(1), {"encoded": x}


class Text(nn.Module):
    num_classes: int
    vocab_size: int
    width: int
    depth: int
    mlp_dim: int
    num_heads: int

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocab_size, self.width)(text)
        x += self.param("pos_embedding", nn.initializers.normal(), (1, *x.shape[1:]))
        x = Encoder(self.depth, self.mlp_dim, self.num_heads)(x)
        return nn.Dense(self.num_classes, name="head")(x[:, -1])


class TwoTowers(nn.Module):
    """For ``big_vision.models.proj.image_text.two_towers.Model``."""

    image: Any
    text: Any
    out_dim: tuple[None, int]
    bias_init: float

    @nn.compact
    def __call__(self, image: jax.Array, text: jax.Array) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        zimg, ztxt = Vit(**self.image, name="img")(image)[0], Text(self.out_dim[1], **self.text, name="txt")(text)
        t, b = (self.param(name, nn.initializers.zeros, (1,)) for name in ("t", "b"))
        zimg, ztxt = (z / jnp.linalg.norm(z, axis=1, keepdims=True) for z in (zimg, ztxt))
        return zimg, ztxt, {"t": jnp.exp(t), "b": b}
