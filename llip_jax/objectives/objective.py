"""A run's objective: a weighted list of terms over what one forward pass offers them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from llip_jax.config import ObjectiveConfig, PairLossConfig, PairScoresConfig
from llip_jax.models.dual_encoder import DualEncoder
from llip_jax.models.vision import TowerOutput
from llip_jax.objectives.losses import SigmoidLoss, SoftmaxLoss, Targets, Together
from llip_jax.objectives.pairs import pair_ids, pair_targets
from llip_jax.ops.pair_blocks import prepare
from llip_jax.ops.pair_kernel import with_kernel
from llip_jax.ops.pair_loss import PairLoss, Statistics, pair_loss
from llip_jax.ops.pair_scores import TextSide
from llip_jax.ops.plan import make_plan


class Encoded(NamedTuple):
    """What a loss needs of the towers: image tokens [N, ...], and the texts of the J = N*C caption slots."""

    images: TowerOutput
    texts: TextSide


@dataclass(frozen=True)
class Forward:
    """One forward pass over a batch; each part is computed when a term first asks for it.

    batch: device arrays named as in data.records.Batch.
    dropout: what DualEncoder.draw_dropout drew for this batch; None leaves dropout out.
    """

    model: DualEncoder
    batch: Mapping[str, Array]
    dropout: Shaped[Array, "N ..."] | None = None
    pair_scores: PairScoresConfig = field(default_factory=PairScoresConfig)
    ring: tuple[int, ...] | None = None
    """Order in which the pair scores' texts visit the devices of the mesh, see ops.plan."""
    encoded: Encoded | None = None
    """What the towers have made of this batch elsewhere; None: they go through it here."""

    @cached_property
    def images(self) -> TowerOutput:
        """Image tokens [N, ...]."""
        if self.encoded is not None:
            return self.encoded.images
        return self.model.encode_images(self.batch["image"], self.dropout)

    @cached_property
    def texts(self) -> TextSide:
        """The J = N*C caption slots, image by image."""
        if self.encoded is not None:
            return self.encoded.texts
        tokens, mask = self.batch["text"], self.batch["text_mask"]
        return self.model.text_side(tokens.reshape(-1, tokens.shape[-1]), mask.reshape(-1, mask.shape[-1]))

    @cached_property
    def logits(self) -> Float[Array, "N J"]:
        """Every image against every caption slot, all at once."""
        return self.model.logits(self.model.image_side(self.images), self.texts)

    def pair_loss(self, loss: PairLoss) -> tuple[Float[Array, ""], Statistics]:
        """A loss over all images and caption slots, in the way that ``pair_scores`` says."""
        b = self.batch
        image_ids, text_ids = pair_ids(b["image_group"], b["text_group"], b["caption_weight"])
        if self.pair_scores.implementation == "dense":
            statistics = loss.statistics(self.logits, image_ids, text_ids, jnp.ones(self.logits.shape, bool))
            return loss.value(statistics), statistics
        prepared = prepare(self.model.image_side(self.images), self.texts)
        if self.pair_scores.implementation == "kernel":
            prepared = with_kernel(prepared)
        plan = make_plan(prepared, self.pair_scores, self.ring)
        return pair_loss(loss, prepared, self.model.affine(), image_ids, text_ids, plan)


PAIR_TERMS: dict[str, Callable[[Targets], PairLoss]] = {"sigmoid": SigmoidLoss, "softmax": SoftmaxLoss}


def objective(config: ObjectiveConfig, forward: Forward) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Weighted sum of the terms, and each term by name (as ``loss/NAME``) when there are several.

    Terms over pairs share one sweep over the pairs.
    """
    terms = config.terms()
    together = Together(
        {name: PAIR_TERMS[name](_targets(term)) for name, term in terms.items()},
        {name: term.weight for name, term in terms.items()},
    )
    loss, statistics = forward.pair_loss(together)
    if len(terms) == 1:
        return loss, {}
    return loss, {f"loss/{name}": jax.lax.stop_gradient(x) for name, x in together.values(statistics).items()}


def _targets(term: PairLossConfig) -> Targets:
    return partial(pair_targets, duplicates=term.duplicates)
