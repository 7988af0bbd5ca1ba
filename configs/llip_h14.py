"""Llip H/14 with the paper's recipe: 12.8 B samples, batch 32,768, 390,625 steps.

    python launch/train.py --config configs/llip_h14.py --config.data.path=FOLDER --workdir RUN

FOLDER holds captions.jsonl (README, "Your own data"). Look before you train, without allocating anything:

    python launch/train.py --config configs/llip_h14.py --check

Variants: :siglip, :registers, :average, :clip. Expect, after the whole recipe on the paper's 2.5 B MetaCLIP pairs,
82.7 % on ImageNet zero-shot (the authors' figure, from their rebuttal).
"""

from ml_collections import ConfigDict
from recipe import paper


def get_config(variant: str | None = None) -> ConfigDict:
    """The configuration."""
    return paper("H/14", variant, learning_rate=4e-4, beta2=0.95)
