"""Losses over pair logits. All arithmetic in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llip_jax.objectives.pairs import PairTargets


def sigmoid_loss(logits: Float[Array, "N J"], pairs: PairTargets) -> Float[Array, ""]:
    """Pairwise sigmoid loss, summed over pairs and divided by the number of images (SigLIP, arXiv 2303.15343, alg. 1).

    With weights that sum to 1 over the captions of an image, the scale does not depend on how many there are.
    """
    loss = -(pairs.target * jax.nn.log_sigmoid(logits) + (1 - pairs.target) * jax.nn.log_sigmoid(-logits))
    return jnp.sum(pairs.weight * pairs.mask * loss) / logits.shape[0]


def softmax_loss(logits: Float[Array, "N J"], pairs: PairTargets) -> Float[Array, ""]:
    """Symmetric cross-entropy (CLIP, arXiv 2103.00020, figure 3), for several positives and masked pairs.

    Image to text: each image's target is its weighted positives, normalised; images count alike. Text to image: each
    text's target is its positives, normalised; texts count by their weight. Masked pairs are in no denominator.
    """
    counts = pairs.mask > 0
    # A large finite number: infinities would turn into NaN in the gradient of rows that are masked throughout.
    masked = jnp.where(counts, logits, -1e30)
    positives = pairs.target * pairs.mask
    by_image = _cross_entropy(masked, positives * pairs.weight, counts, axis=1)
    by_text = _cross_entropy(masked, positives, counts, axis=0)
    image_weight = (positives * pairs.weight).sum(axis=1) > 0
    text_weight = pairs.weight[0] * (positives.sum(axis=0) > 0)
    return 0.5 * (_weighted_mean(by_image, image_weight.astype(jnp.float32)) + _weighted_mean(by_text, text_weight))


def _cross_entropy(
    logits: Float[Array, "N J"], positives: Float[Array, "N J"], counts: Array, axis: int
) -> Float[Array, " n"]:
    """Cross-entropy against the normalised positives; 0 where there is none."""
    target = positives / jnp.maximum(positives.sum(axis=axis, keepdims=True), 1e-30)
    return -jnp.sum(target * jnp.where(counts, jax.nn.log_softmax(logits, axis=axis), 0.0), axis=axis)


def _weighted_mean(x: Float[Array, " n"], weight: Float[Array, " n"]) -> Float[Array, ""]:
    return jnp.sum(x * weight) / jnp.maximum(jnp.sum(weight), 1e-30)
