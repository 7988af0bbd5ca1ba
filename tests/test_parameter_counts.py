"""Parameter counts of the size table against OpenCLIP's own configurations; nothing is allocated on either side."""

import jax
import pytest
from flax import nnx
from oracles import import_open_clip

from llip_jax.config import Config, resolve
from llip_jax.config_files import with_variant
from llip_jax.models.dual_encoder import abstract_model
from llip_jax.models.sizes import SIZES

OPEN_CLIP_NAMES = {
    "B/32": "ViT-B-32",
    "B/16": "ViT-B-16",
    "L/14": "ViT-L-14",
    "H/14": "ViT-H-14",
    "G/14": "ViT-bigG-14",
}
TOKENS, HEADS = 64, 8


def parameter_count(size: str, variant: str) -> int:
    """All parameters of one rung of the ladder."""
    base = {"model": {"size": size, "mixture_tokens": TOKENS, "mixer_heads": HEADS}}
    config: Config = resolve(with_variant(base, variant).to_dict())
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract_model(config), nnx.Param)))


@pytest.mark.parametrize("size", OPEN_CLIP_NAMES)
def test_clip_counts_as_open_clip_without_the_class_tokens_position(size: str) -> None:
    open_clip = import_open_clip()
    import torch

    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config(OPEN_CLIP_NAMES[size]))
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert parameter_count(size, "clip") == expected - SIZES[size].vision.width


@pytest.mark.parametrize("size", SIZES)
def test_what_each_rung_adds_to_clip(size: str) -> None:
    dv, dt, d = SIZES[size].vision.width, SIZES[size].text.width, SIZES[size].embed_dim
    clip = parameter_count(size, "clip")
    bias, more_tokens = 1, (TOKENS - 1) * dv
    assert parameter_count(size, "siglip") - clip == bias
    assert parameter_count(size, "registers") - clip == bias + more_tokens
    # The value projection [Dv, d] takes the place of CLIP's image projection, of the same size.
    assert parameter_count(size, "average") - clip == bias + more_tokens + HEADS * TOKENS + d * d
    assert parameter_count(size, "") - clip == bias + more_tokens + dt * d + dv * d + d * d
