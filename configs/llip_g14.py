"""Llip G/14 with the paper's recipe: 12.8 B samples, batch 32,768, 390,625 steps.

    python launch/train.py --config configs/llip_g14.py --config.data.path=FOLDER --workdir RUN

FOLDER holds captions.jsonl (README, "Your own data"). Look before you train, without allocating anything:

    python launch/train.py --config configs/llip_g14.py --check

Variants: :siglip, :registers, :average, :clip. Expect, after the whole recipe on the paper's 2.5 B MetaCLIP pairs,
83.5 % on ImageNet zero-shot, COCO R@1 72.7 and 54.2 (the paper's figures; MetaCLIP: 82.1, 66.7 and 49.6).
"""

from ml_collections import ConfigDict
from recipe import paper


def get_config(variant: str | None = None) -> ConfigDict:
    """The configuration."""
    # The widths, 1664 and 1280, divide by no more than 128.
    return paper("G/14", variant, learning_rate=4e-4, beta2=0.95, mesh={"data": -1, "fsdp": -1, "fsdp_limit": 128})
