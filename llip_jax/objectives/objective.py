"""A run's objective: a weighted list of terms over what one forward pass offers them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import jax
from jaxtyping import Array, Float, Key

from llip_jax.config import ObjectiveConfig, PairLossConfig
from llip_jax.models.dual_encoder import DualEncoder
from llip_jax.models.vision import TowerOutput
from llip_jax.objectives.losses import sigmoid_loss, softmax_loss
from llip_jax.objectives.pairs import PairTargets, pair_targets
from llip_jax.ops.pair_scores import TextSide


@dataclass(frozen=True)
class Forward:
    """One forward pass over a batch; each part is computed when a term first asks for it.

    batch: device arrays named as in data.records.Batch.
    dropout_key: randomness of this step; None leaves dropout out.
    """

    model: DualEncoder
    batch: Mapping[str, Array]
    dropout_key: Key[Array, ""] | None = None

    @cached_property
    def images(self) -> TowerOutput:
        """Image tokens [N, ...]."""
        return self.model.encode_images(self.batch["image"], self.dropout_key)

    @cached_property
    def texts(self) -> TextSide:
        """The J = N*C caption slots, image by image."""
        tokens, mask = self.batch["text"], self.batch["text_mask"]
        return self.model.text_side(tokens.reshape(-1, tokens.shape[-1]), mask.reshape(-1, mask.shape[-1]))

    @cached_property
    def logits(self) -> Float[Array, "N J"]:
        """Every image against every caption slot."""
        return self.model.logits(self.model.image_side(self.images), self.texts)

    def pairs(self, config: PairLossConfig) -> PairTargets:
        """Which of the pairs match."""
        b = self.batch
        return pair_targets(b["image_group"], b["text_group"], b["caption_weight"], config.duplicates)


Term = Callable[[Forward, PairLossConfig], Float[Array, ""]]

TERMS: dict[str, Term] = {
    "sigmoid": lambda forward, config: sigmoid_loss(forward.logits, forward.pairs(config)),
    "softmax": lambda forward, config: softmax_loss(forward.logits, forward.pairs(config)),
}


def objective(config: ObjectiveConfig, forward: Forward) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Weighted sum of the terms, and each term by name (as ``loss/NAME``) when there are several."""
    values = {name: TERMS[name](forward, term) for name, term in config.terms().items()}
    loss = sum((term.weight * values[name] for name, term in config.terms().items()), start=jax.numpy.float32(0))
    return loss, {f"loss/{name}": value for name, value in values.items()} if len(values) > 1 else {}
