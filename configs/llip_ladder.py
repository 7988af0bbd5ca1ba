"""The paper's ladder in small: ToyWorld's shelf, where a caption names one of six objects and d is 8.

    python launch/train.py --config configs/llip_ladder.py --workdir runs/ladder

Half a minute on one CPU core. ``--config.data.toyworld.topics=1`` is the control: all captions speak of one object.
benchmarks/ladder.py runs all rungs, with several seeds, controls and ablations; docs/results.md shows what came out.

Expect: image to text R@1 above 95 % (chance 14 %). Of :siglip 37 to 90 %: one of six true captions is enough for it, so
see the zero-shot accuracy of benchmarks/ladder.py: 39 % against Llip's 99.8 %.

Variants: configs/llip_ladder.py:siglip, :registers, :average, :clip.
"""

from ml_collections import ConfigDict

from llip_jax.config_files import with_variant


def get_config(variant: str | None = None) -> ConfigDict:
    """The configuration."""
    config = {
        "model": {
            "size": "Ti/4",
            "image_size": 24,
            "vision": {"patch": 8, "layers": 2, "width": 64, "mlp": 256, "heads": 4},
            "text": {"length": 14, "layers": 1, "width": 32, "mlp": 128, "heads": 4},
            # Narrow; with 16 or 32 the models with one vector do a little better (docs/results.md).
            "embed_dim": 8,
            "mixture_tokens": 16,
            "mixer_heads": 2,
            "activation": "relu",
            "logit_bias": "prior",
        },
        "train": {"batch_size": 32, "steps": 1500, "log_every_steps": 10},
        "optimizer": {"learning_rate": 2e-3, "warmup_steps": 40, "weight_decay": 0.01, "beta2": 0.95},
        "data": {
            "source": "toyworld",
            "toyworld": {"layout": "shelf", "topics": 6, "train_size": 8192, "eval_size": 1024},
            "augment": {"crop_scale": (1.0, 1.0)},
            "captions": {"slots": 6},
            "tokenizer": {"name": "trained", "vocabulary_size": 512},
        },
        "checkpoint": {"every_steps": 500},
        "eval": {"every_steps": 500, "choice_field": "choices", "tasks": ("retrieval", "choice")},
    }
    return with_variant(config, variant)
