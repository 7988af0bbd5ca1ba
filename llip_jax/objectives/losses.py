"""Losses over pair logits. All arithmetic in float32.

Each is given by sums and log-sum-exps over the pairs of each image and text (ops/pair_loss.py), so that the same lines
serve a whole matrix of logits and one that is never formed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from llip_jax.objectives.pairs import PairTargets
from llip_jax.ops.pair_loss import PairLoss, Statistics
from llip_jax.ops.sweep import Reduced, Tree

Targets = Callable[[Tree, Tree], PairTargets]
"""From the ids of n images and j texts to what their pairs are."""

_NOWHERE = -1e30
"""Logit of a masked pair: finite, so that differences of log-sum-exps are numbers also where no pair counts."""


@dataclass(frozen=True)
class SigmoidLoss:
    """Pairwise sigmoid loss, summed over pairs and divided by the number of images (SigLIP, arXiv 2303.15343, alg. 1).

    With weights that sum to 1 over the captions of an image, the scale does not depend on how many there are.
    """

    targets: Targets
    linear: ClassVar[bool] = True

    def statistics(
        self, logits: Float[Array, "n j"], image_ids: Tree, text_ids: Tree, counts: Bool[Array, "n j"]
    ) -> Statistics:
        """Each image's sum of losses."""
        pairs = self.targets(image_ids, text_ids)
        # -log sigmoid(s) where they match and -log sigmoid(-s) where not, their common part computed once.
        # (Not exp(-abs): jax's derivative of abs at 0 is 1.)
        loss = jnp.log1p(jnp.exp(jnp.minimum(logits, -logits)))
        loss += pairs.target * jnp.maximum(-logits, 0) + (1 - pairs.target) * jnp.maximum(logits, 0)
        weighted = jnp.where(counts & (pairs.mask > 0), pairs.weight * loss, 0)
        return Statistics(Reduced(weighted.sum(axis=1), None), Reduced(None, None))

    def value(self, statistics: Statistics) -> Float[Array, ""]:
        """Mean over images."""
        return statistics.images.sums.mean()


@dataclass(frozen=True)
class SoftmaxLoss:
    """Symmetric cross-entropy (CLIP, arXiv 2103.00020, figure 3), for several positives and masked pairs.

    Image to text: each image's target is its weighted positives, normalised; images count alike. Text to image: each
    text's target is its positives, normalised; texts count by their weight. Masked pairs are in no denominator.
    """

    targets: Targets
    linear: ClassVar[bool] = False

    def statistics(
        self, logits: Float[Array, "n j"], image_ids: Tree, text_ids: Tree, counts: Bool[Array, "n j"]
    ) -> Statistics:
        """Each direction's log-sum-exp, and sums of positives with and without their logits."""
        pairs = self.targets(image_ids, text_ids)
        counts &= pairs.mask > 0
        positives = jnp.where(counts, pairs.target, 0)
        weighted = positives * pairs.weight
        masked = jnp.where(counts, logits, _NOWHERE)

        def direction(targets: Float[Array, "n j"], axis: int) -> Reduced:
            sums = _Direction(targets.sum(axis), (targets * logits).sum(axis), weighted.sum(axis))
            return Reduced(sums, jax.nn.logsumexp(masked, axis=axis))

        return Statistics(direction(weighted, 1), direction(positives, 0))

    def value(self, statistics: Statistics) -> Float[Array, ""]:
        """Mean of the two directions."""
        by_image, has_text = _cross_entropy(statistics.images)
        by_text, has_image = _cross_entropy(statistics.texts)
        # A text weighs the same in all its pairs: what its positives weigh on average.
        weight = has_image * statistics.texts.sums.weighted / jnp.maximum(statistics.texts.sums.positives, _TINY)
        return 0.5 * (_weighted_mean(by_image, has_text) + _weighted_mean(by_text, weight))


@dataclass(frozen=True)
class Together:
    """A weighted sum of losses over the same pairs, in one sweep."""

    losses: Mapping[str, PairLoss]
    weights: Mapping[str, float]

    @property
    def linear(self) -> bool:
        """Whether all are."""
        return all(loss.linear for loss in self.losses.values())

    def statistics(
        self, logits: Float[Array, "n j"], image_ids: Tree, text_ids: Tree, counts: Bool[Array, "n j"]
    ) -> Statistics:
        """Of every loss, by name."""
        own = {name: loss.statistics(logits, image_ids, text_ids, counts) for name, loss in self.losses.items()}

        def by_name(reduced: Mapping[str, Reduced]) -> Reduced:
            return Reduced(
                {name: x.sums for name, x in reduced.items()}, {name: x.logsumexps for name, x in reduced.items()}
            )

        return Statistics(
            by_name({name: x.images for name, x in own.items()}), by_name({name: x.texts for name, x in own.items()})
        )

    def value(self, statistics: Statistics) -> Float[Array, ""]:
        """Weighted sum."""
        values = self.values(statistics)
        return sum((self.weights[name] * value for name, value in values.items()), start=jnp.float32(0))

    def values(self, statistics: Statistics) -> dict[str, Float[Array, ""]]:
        """Every loss by name, unweighted."""
        return {
            name: loss.value(Statistics(*(Reduced(x.sums[name], x.logsumexps[name]) for x in statistics)))
            for name, loss in self.losses.items()
        }


class _Direction(NamedTuple):
    """Sums over the pairs of each query."""

    positives: Float[Array, " n"]
    logits: Float[Array, " n"]
    """Of the positives."""
    weighted: Float[Array, " n"]


_TINY = 1e-30


def _cross_entropy(queries: Reduced) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Against the normalised positives, 0 where there is none; and 1 where there is one."""
    sums: _Direction = queries.sums
    some = sums.positives > 0
    loss = jnp.where(some, queries.logsumexps - sums.logits / jnp.maximum(sums.positives, _TINY), 0.0)
    return loss, some.astype(jnp.float32)


def _weighted_mean(x: Float[Array, " n"], weight: Float[Array, " n"]) -> Float[Array, ""]:
    return jnp.sum(x * weight) / jnp.maximum(jnp.sum(weight), _TINY)
