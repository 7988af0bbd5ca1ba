"""A small Llip on ToyWorld, for two CPU cores: trained and evaluated in a few minutes, nothing to download.

    python launch/train.py --config configs/llip_demo.py --workdir runs/demo

Expect, on 2 cores: two to three minutes of training, zero-shot accuracy 15 to 22 % of 300 classes (chance 0.33 %),
image to text R@1 about 11 % and text to image 5 % (chance 0.20 %).

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
            "vision": {"layers": 3},
            "text": {"layers": 1, "length": 20},
            "mixture_tokens": 8,
            "mixer_heads": 4,
            "activation": "relu",
            "logit_bias": "prior",
        },
        "train": {"batch_size": 64, "steps": 500},
        "optimizer": {"learning_rate": 1.5e-3, "warmup_steps": 50, "weight_decay": 0.05, "beta2": 0.95},
        "data": {
            "source": "toyworld",
            "label_field": "scene_name",
            "toyworld": {"aspects": (2, 6), "eval_size": 500},
            # Cropping would blur the textures, which are one pixel fine.
            "augment": {"crop_scale": (1.0, 1.0)},
            "tokenizer": {"name": "trained", "vocabulary_size": 512},
        },
        "checkpoint": {"every_steps": 250},
        "eval": {
            "every_steps": 250,
            "templates": ("a {}", "{}"),
            "choice_field": "choices",
            "groups": ("colour", "shape", "background", "choice_aspect"),
        },
    }
    return with_variant(config, variant)
