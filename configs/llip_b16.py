"""Llip B/16 with the paper's recipe: 12.8 B samples, batch 32,768, 390,625 steps.

    python launch/train.py --config configs/llip_b16.py --config.data.path=FOLDER --workdir RUN

FOLDER holds captions.jsonl (README, "Your own data"). Look before you train, without allocating anything:

    python launch/train.py --config configs/llip_b16.py --check

Variants: :siglip, :registers, :average, :clip. Expect, after the whole recipe on the paper's 2.5 B MetaCLIP pairs,
COCO R@1 of 63.4 (image to text) and 45.6 (text to image); :siglip 59.7 and 42.0 (the paper's figures, not ours).
"""

from ml_collections import ConfigDict
from recipe import paper


def get_config(variant: str | None = None) -> ConfigDict:
    """The configuration."""
    return paper("B/16", variant, learning_rate=5e-4, beta2=0.98)
