"""The mistake that Llip must not make, made: a training step in which every image is mixed by its own caption.

The pair of image i and caption j is scored with image i mixed by caption i. The mixing then carries the answer, the
loss falls, and nothing is learned of the picture (docs/pair_scores.md).
"""

from functools import cached_property

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from llip_jax.config import Config, PairScoresConfig
from llip_jax.objectives.objective import Forward, objective
from llip_jax.ops.pair_scores import MixtureSide, normalize
from llip_jax.training.optimizer import clamp_logit_scale
from llip_jax.training.state import StateSpec, TrainState
from llip_jax.training.step import Batch, Metrics, TrainStep


class Shortcut(Forward):
    """A forward pass with wrong scores: caption c of another image meets the image mixed by its own caption c."""

    @cached_property
    def logits(self) -> Float[Array, "N J"]:
        """Every image against every caption slot."""
        images, texts = self.model.image_side(self.images), self.texts
        assert isinstance(images, MixtureSide) and texts.queries is not None
        own = texts.queries.reshape(len(images.keys), -1, *texts.queries.shape[1:])
        weights = jax.nn.softmax(jnp.einsum("ncmh,nkmh->ncmk", own, images.keys) / images.temperature, axis=-1)
        mixed = jnp.einsum("ncmk,nkmh->ncmh", weights, images.values)
        z = normalize(mixed.reshape(*mixed.shape[:2], -1) @ images.output)
        t = normalize(texts.embedding).reshape(*z.shape)
        scale, bias = self.model.affine()
        return (scale * jnp.einsum("ncd,jcd->njc", z, t) + bias).reshape(len(z), -1)


def make_shortcut_step(config: Config, spec: StateSpec, optimizer: optax.GradientTransformation) -> TrainStep:
    """As training.step.make_train_step, but for the scores."""

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def loss(params: optax.Params) -> tuple[Float[Array, ""], Metrics]:
            model = nnx.merge(spec.graph, params)
            return objective(config.objective, Shortcut(model, batch, None, PairScoresConfig(implementation="dense")))

        (value, _), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = clamp_logit_scale(optax.apply_updates(state.params, updates), state.params)
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state), {"loss": value}

    return train_step
