"""What a step changes and how: trained parameters, AdamW with warm-up and cosine decay, learning rates, average."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from llip_jax.config import Config, ConfigError, OptimizerConfig
from llip_jax.models.dual_encoder import MAX_LOG_SCALE
from llip_jax.training.paths import Params, by_path, matching, nested

ABOVE_BLOCKS = ("norm_post", "norm_final", "attention_pool")
"""Parts of a tower that come after its blocks."""


def trained_paths(frozen: Collection[str], params: Params) -> frozenset[str]:
    """Paths of the parameters that no pattern of ``train.frozen`` matches.

    Raises:
        ConfigError: a pattern that matches nothing, or nothing left to train.
    """
    paths = by_path(params).keys()
    trained = frozenset(paths).difference(*(matching("train.frozen", pattern, paths) for pattern in frozen))
    if not trained:
        raise ConfigError(f"train.frozen: {tuple(frozen)} matches every parameter; expected some to train")
    return trained


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear from 0 over ``warmup_steps`` (at most all steps), then cosine to 0 at the last step."""
    warmup = min(config.warmup_steps, steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0, peak_value=config.learning_rate, warmup_steps=warmup, decay_steps=max(steps, warmup + 1)
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Gradient clipping by global norm, then AdamW (arXiv 1711.05101).

    Its state does not depend on ``rates`` and ``layer_decay`` (:func:`rate_factors`), which a run may change.
    """
    adamw = optax.adamw(
        learning_rate_schedule(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    return adamw if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def decayed(params: Any) -> Any:
    """True for the parameters that weight decay shrinks: all but biases, norms, logit scale and bias."""

    def is_decayed(path: tuple[Any, ...], _: Any) -> bool:
        name = path[-1].key
        return not (name.endswith("bias") or name.endswith("scale"))

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def rate_factors(config: Config, params: Params, trained: Collection[str]) -> Params | None:
    """Factors of the trained parameters' updates, weight decay included: those of their learning rates.

    Product of ``optimizer.rates`` and ``optimizer.layer_decay``; a number, or one for each layer of a stack. None
    where all are 1.

    Raises:
        ConfigError: a pattern of ``optimizer.rates`` that matches no trained parameter.
    """
    rates, layer_decay = config.optimizer.rates, config.optimizer.layer_decay
    if not rates and layer_decay == 1:
        return None
    leaves = by_path(params)
    factors = {path: np.float32(layer_decay ** _layers_down(path, leaves)) for path in trained}
    # By length, not in the order written: ConfigDict sorts its keys.
    rate = {
        path: rates[pattern]
        for pattern in sorted(rates, key=lambda pattern: (len(pattern), pattern))
        for path in matching("optimizer.rates", pattern, trained)
    }
    return nested({path: factor * np.float32(rate.get(path, 1)) for path, factor in factors.items()})


def _layers_down(path: str, leaves: dict[str, Any]) -> Any:
    """How far a parameter lies below the top of its tower of L layers, as BEiT counts (arXiv 2106.08254).

    0 above the blocks and outside the towers, L - l for block l (counted from 0), L + 1 below the blocks.
    """
    tower, _, name = path.partition("/")
    if tower not in ("vision", "text") or name.startswith(ABOVE_BLOCKS):
        return 0
    if path == "vision/tokens" and "vision/attention_pool/query" in leaves:  # the queries of that pooling
        return 0
    stacked = leaves.get(f"{tower}/transformer/blocks/qkv")
    if stacked is None:
        raise ConfigError("optimizer.layer_decay: the layers of a tower of big_vision are not known; expected 1.0")
    layers = stacked.shape[0]
    if name.startswith("transformer/"):
        return np.arange(layers, 0, -1).reshape(-1, *[1] * (leaves[path].ndim - 1))
    return layers + 1


def clamp_logit_scale(params: Params, before: Params) -> Params:
    """Keeps a = exp(a') at most 100, as CLIP does (arXiv 2103.00020, section 2.5), where it is trained.

    One that is larger ``before`` the update, as SigLIP's released weights have, does not grow.
    """
    if "log_scale" not in params:
        return params
    return params | {"log_scale": jnp.minimum(params["log_scale"], jnp.maximum(before["log_scale"], MAX_LOG_SCALE))}


def moving_average(ema: Params, params: Params, decay: float, updates: Int[Array, ""]) -> Params:
    """The average of the parameters after an update that ``updates`` others preceded.

    Its decay is min(decay, (1 + t) / (10 + t)), t = ``updates``: the first parameters are soon forgotten.
    """
    # One minus that, written so that a decay near 1 loses no digits.
    return optax.incremental_update(params, ema, jnp.maximum(1 - decay, 9 / (10 + updates)))
