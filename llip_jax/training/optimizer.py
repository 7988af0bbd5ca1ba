"""AdamW with warm-up and cosine decay."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from llip_jax.config import OptimizerConfig
from llip_jax.models.dual_encoder import MAX_LOG_SCALE


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear from 0 over ``warmup_steps`` (at most all steps), then cosine to 0 at the last step."""
    warmup = min(config.warmup_steps, steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0, peak_value=config.learning_rate, warmup_steps=warmup, decay_steps=max(steps, warmup + 1)
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Gradient clipping by global norm, then AdamW (arXiv 1711.05101)."""
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


def clamp_logit_scale(params: dict[str, Any]) -> dict[str, Any]:
    """Keeps a = exp(a') at most 100, as CLIP does (arXiv 2103.00020, section 2.5)."""
    return params | {"log_scale": jnp.minimum(params["log_scale"], MAX_LOG_SCALE)}
