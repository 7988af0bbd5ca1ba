"""The paper's recipe, shared by the full-size configurations.

Llip (arXiv 2405.00740), section 5, trains 12.8 B samples at a global batch of 32,768. What we could not read there is
marked in docs/architecture.md, "Readings of the paper".
"""

from typing import Any

from ml_collections import ConfigDict

from llip_jax.config_files import with_variant

SAMPLES = 12_800_000_000
BATCH = 32_768


def paper(size: str, variant: str | None, *, learning_rate: float, beta2: float, **sections: Any) -> ConfigDict:
    """A full-size Llip: K = 64 mixture tokens, 8 mixer heads, 224 pixels, on a folder given by ``data.path``.

    ``sections`` are further top-level sections; they replace those of the recipe.
    """
    config: dict[str, Any] = {
        "model": {
            "size": size,
            "mixture_tokens": 64,
            "mixer_heads": 8,
            "activation": "quick_gelu",
            "remat": "layer",
            "attention": "kernel",
        },
        "train": {"batch_size": BATCH, "steps": SAMPLES // BATCH, "log_every_steps": 50},
        "optimizer": {
            "learning_rate": learning_rate,
            "warmup_steps": 2000,
            "weight_decay": 0.2,
            "beta2": beta2,
        },
        "data": {"source": "folder", "workers": 16, "threads": 2, "prefetch_batches": 2},
        "checkpoint": {"every_steps": 2000, "every_minutes": 10.0, "keep_every_steps": 50_000},
        "eval": {"every_steps": 10_000},
        "mesh": {"data": -1, "fsdp": -1, "fsdp_limit": 256},
    }
    return with_variant(config | sections, variant)
