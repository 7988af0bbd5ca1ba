"""A small Llip on your own images: a folder with captions.jsonl, one object a line with ``image`` and ``captions``.

    python launch/train.py --config configs/llip_folder.py --config.data.path=FOLDER --workdir runs/mine

Lines may have a ``split`` (train, val); without it a tenth of the images is held out. Sized for small pictures and two
CPU cores.

Expect, on the emoji of README ("Your own data") and 2 cores: 27 minutes, image to text R@1 2.5 % and R@5 7.3 %: 40
and 23 times chance.

Variants: configs/llip_folder.py:siglip, :registers, :average, :clip.
"""

from ml_collections import ConfigDict

from llip_jax.config_files import with_variant


def get_config(variant: str | None = None) -> ConfigDict:
    """The configuration."""
    config = {
        "model": {
            "size": "Ti/4",
            "image_size": 32,
            "vision": {"patch": 8},
            "text": {"layers": 2, "length": 16},
            "embed_dim": 128,
            "mixture_tokens": 8,
            "mixer_heads": 4,
            "activation": "relu",
            "logit_bias": "prior",
        },
        "train": {"batch_size": 256, "steps": 1600, "log_every_steps": 20},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 100, "weight_decay": 0.1, "beta2": 0.95},
        "data": {
            "source": "folder",
            "tokenizer": {"name": "trained", "vocabulary_size": 4096},
            # Colour and grey-scale changes, because held-out pictures may be drawn in another style.
            "augment": {"crop_scale": (0.7, 1.0), "color": 0.3, "grayscale": 0.1},
            "captions": {"specific_probability": 0.75},
            # Flags in the emoji set are a memorisation test of their own; folders without categories lose nothing.
            "folder": {"eval_exclude": {"category": ("Flags",)}},
        },
        "checkpoint": {"every_steps": 200},
        "eval": {"every_steps": 200},
    }
    return with_variant(config, variant)
