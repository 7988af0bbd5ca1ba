"""A small Llip on ToyWorld, for two CPU cores: trained and evaluated in a few minutes, nothing to download.

    python launch/train.py --config configs/llip_demo.py --workdir runs/demo

Variants: configs/llip_demo.py:siglip, :registers, :average, :clip (the rungs below Llip, and CLIP).
"""

from ml_collections import ConfigDict

from llip_jax.config_files import with_variant


def get_config(variant: str | None = None) -> ConfigDict:
    """The demo's configuration."""
    config = {
        "model": {
            "size": "Ti/4",
            "image_size": 32,
            "mixture_tokens": 8,
            "mixer_heads": 4,
            "text": {"length": 24},
            "activation": "relu",
            "logit_bias": "prior",
        },
        "train": {"batch_size": 256, "steps": 600},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 60},
        "data": {
            "source": "toyworld",
            "label_field": "class_name",
            "tokenizer": {"name": "trained", "vocabulary_size": 512},
        },
        "checkpoint": {"every_steps": 200},
        "eval": {"every_steps": 200, "templates": ("a {}", "{}")},
    }
    return with_variant(config, variant)
