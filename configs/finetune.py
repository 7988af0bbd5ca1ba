"""Fine-tunes given weights on your own data, as a Llip that begins with the weights' own scores.

    python launch/train.py --config configs/finetune.py --config.init.from=WEIGHTS --config.data.path=FOLDER \
        --workdir runs/finetuned

WEIGHTS: a folder or file of OpenCLIP, Hugging Face or big_vision, what save_pretrained wrote, or a run directory.
FOLDER holds captions.jsonl (README, "Your own data"). Model, tokenizer and loss are the source's; length, batch and
learning rates follow the number of pictures (llip_jax/training/start.py); the run's config.json says what they came to.

Variants: configs/finetune.py:as_is (the model as it is, no mixer), :locked (image tower locked, arXiv 2111.07991).
"""

from typing import Any

from ml_collections import ConfigDict

from llip_jax.config import ConfigError, nearest
from llip_jax.config_files import merged

VARIANTS: dict[str, dict[str, Any]] = {
    "": {"model": {"pooler": "mixer"}},
    "as_is": {},
    "locked": {"train": {"frozen": ("vision/*",)}},
}


def get_config(variant: str | None = None) -> ConfigDict:
    """The configuration."""
    if (variant or "") not in VARIANTS:
        raise ConfigError(f"variant: no variant named {variant!r}.{nearest(str(variant), [v for v in VARIANTS if v])}")
    config: dict[str, Any] = {
        "data": {
            "source": "folder",
            "augment": {"crop_scale": (0.8, 1.0)},
            "captions": {"specific_probability": 0.75},
        },
    }
    return ConfigDict(merged(config, VARIANTS[variant or ""]))
