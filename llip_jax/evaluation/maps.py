"""Which patches of an image agree with a caption: the caption's mixture, carried through the tower's attention.

A Llip reads one image in many ways (arXiv 2405.00740, section 3): a caption mixes the K mixture tokens into the vector
that it is compared with. What the tokens know of the patches they took through attention; a map follows the caption's
cosine back along both.

The mixing weights on the tokens' attention alone (rolled out, arXiv 2005.00928) are no such map: on ToyWorld's scenes
of two groups they do not tell the named one from the other, for two captions mix much the same tokens, and tokens look
at all objects. What tells them is the direction of the caption in what the tokens took (benchmarks/pointing_game.py).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from llip_jax.config import ConfigError
from llip_jax.models.dual_encoder import DualEncoder
from llip_jax.models.vision import Attention, TowerOutput, VisionTower
from llip_jax.ops.pair_scores import MixtureSide, TextSide, cosines, normalize


def caption_maps(
    model: DualEncoder, images: UInt8[Array, "n H W 3"], texts: TextSide
) -> Float[Array, "n J height width"]:
    """How much each patch adds to the cosine of every image, mixed by a caption, with that caption.

    With A[l, h, k, p] the attention weight by which token k takes from patch p in head h of layer l, and
    s = cos(z, t), z = concat_m(sum_k w[m, k] v[k, m]) Wo, the cosine of the caption's mixture with its text::

        map[p] = sum over l, h, k of A[l, h, k, p] * ds / dA[l, h, k, p]

    where the mixing weights w of (image, caption) stay as they are. The derivative is what the patch writes into the
    token, through the layers above, times the token's weight in the mixture, along the text. Of attention pooling the
    sum runs over its heads and queries. A patch that speaks against the caption is negative. What patches took from
    each other counts where the tokens found it.

    Models without a mixer (class token, registers, learned average) have maps too: their vector is the same for all
    captions, but each caption asks for another direction of it.

    Memory: about ten times layers x heads x S^2 float32 numbers an image, whatever the number of captions.

    Args:
        model: whose vision tower shows its attention.
        images: as the tower takes them.
        texts: J captions, at least one.

    Raises:
        ConfigError: the vision tower is big_vision's.
    """
    output, map_along = _observed(model, images)

    def agreement(mixture: Float[Array, "n K Dv"], text: TextSide) -> Float[Array, ""]:
        side = model.image_side(TowerOutput(mixture, output.patches))
        if isinstance(side, MixtureSide):
            side = side._replace(keys=jax.lax.stop_gradient(side.keys))
        return cosines(side, text).sum()

    def map_of(text: TextSide) -> Float[Array, "n height width"]:
        return map_along(jax.grad(agreement)(output.mixture, jax.tree.map(lambda x: x[None], text)))

    return jnp.moveaxis(jax.lax.map(map_of, texts), 0, 1)


def uncaptioned_maps(model: DualEncoder, images: UInt8[Array, "n H W 3"]) -> Float[Array, "n height width"]:
    """Which patches the embedding that no caption has conditioned comes from.

    The map of :func:`caption_maps` with the mixture tokens weighted alike, and with s = |z|, the length of the vector,
    in place of its cosine with a text.

    Raises:
        ConfigError: the vision tower is big_vision's.
    """
    output, map_along = _observed(model, images)

    def length(mixture: Float[Array, "n K Dv"]) -> Float[Array, ""]:
        vector = model.unconditioned_embedding(TowerOutput(mixture, output.patches)).astype(jnp.float32)
        return (vector * jax.lax.stop_gradient(normalize(vector))).sum()

    return map_along(jax.grad(length)(output.mixture))


def map_bytes(model: DualEncoder) -> int:
    """What the maps of one image take, about: attention weights, their gradients, and what lies between."""
    return 10 * sum(4 * x.size for x in jax.tree.leaves(jax.eval_shape(lambda: _tower(model).no_offsets(1))))


INFERNO = np.array(
    [[0, 0, 4], [66, 10, 104], [147, 38, 103], [221, 81, 58], [252, 165, 10], [252, 255, 164]], np.float32
)
"""Matplotlib's colour map at equal steps: lightness rises all the way, which colour-blind people see too."""


def overlay(
    image: UInt8[np.ndarray, "H W 3"], map: Float[np.ndarray, "height width"], *, side: int = 256
) -> UInt8[np.ndarray, "tall wide 3"]:
    """The map in colours over the picture in grey, for people: lightest at the highest patch, dark from zero down.

    Every map is scaled by its own maximum, so that colours of two maps do not compare.

    Args:
        image: the pixels that the map is of.
        map: of patches.
        side: the longer side of a smaller picture is enlarged to about so many pixels, by whole numbers.
    """
    times = max(1, side // max(image.shape[:2]))
    grey = (image.repeat(times, axis=0).repeat(times, axis=1) @ np.array([0.299, 0.587, 0.114]))[..., None]
    size = (grey.shape[1], grey.shape[0])
    heat = Image.fromarray(np.maximum(map, 0).astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    level = np.asarray(heat) / max(map.max(), np.finfo(np.float32).tiny) * (len(INFERNO) - 1)
    coloured = np.stack([np.interp(level, np.arange(len(INFERNO)), channel) for channel in INFERNO.T], axis=-1)
    return np.rint(0.45 * grey + 0.55 * coloured).astype(np.uint8)


def _tower(model: DualEncoder) -> VisionTower:
    if not isinstance(model.vision, VisionTower):
        raise ConfigError("model.vision.big_vision: maps need a vision tower of ours; big_vision's hides its attention")
    return model.vision


def _observed(
    model: DualEncoder, images: UInt8[Array, "n H W 3"]
) -> tuple[TowerOutput, Callable[[Float[Array, "n K Dv"]], Float[Array, "n height width"]]]:
    """The tower's output, and the map of a derivative by its mixture tokens."""
    tower = _tower(model)
    tokens, side = tower.tokens.shape[0], tower.image_size // tower.patch

    def mixture(offsets: Attention) -> tuple[Float[Array, "n K Dv"], tuple[TowerOutput, Attention]]:
        output, weights = tower.observed(images, offsets)
        return output.mixture, (output, weights)

    _, pull, (output, weights) = jax.vjp(mixture, tower.no_offsets(len(images)), has_aux=True)

    def map_along(derivative: Float[Array, "n K Dv"]) -> Float[Array, "n height width"]:
        (gradient,) = pull(derivative)
        if weights.pool is not None:
            edges = weights.pool * gradient.pool
        else:
            to_tokens = np.s_[..., :tokens, tokens:]
            edges = (weights.layers[to_tokens] * gradient.layers[to_tokens]).sum(axis=0)
        return edges.sum(axis=(1, 2)).reshape(-1, side, side)

    return output, map_along
