"""Llip L/14 with the paper's recipe: 12.8 B samples, batch 32,768, 390,625 steps.

    python launch/train.py --config configs/llip_l14.py --config.data.path=FOLDER --workdir RUN

FOLDER holds captions.jsonl (README, "Your own data"). Look before you train, without allocating anything:

    python launch/train.py --config configs/llip_l14.py --check

Variants: :siglip, :registers, :average, :clip. Expect, after the whole recipe on the paper's 2.5 B MetaCLIP pairs,
80.9 % on ImageNet zero-shot, COCO R@1 68.1 and 50.6; :siglip 79.4 %, 65.4 and 48.1 (the paper's figures).
"""

from ml_collections import ConfigDict
from recipe import paper


def get_config(variant: str | None = None) -> ConfigDict:
    """The configuration."""
    return paper("L/14", variant, learning_rate=4e-4, beta2=0.95)
