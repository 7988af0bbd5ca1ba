"""The dual encoder: sizes, towers, poolers."""

from typing import Literal

from pydantic import Field, PositiveFloat
from pydantic.dataclasses import dataclass

from llip_jax.config.errors import STRICT

Pooler = Literal["mixer", "average", "registers", "class_token"]
"""How the image side becomes an embedding; the last three are the lower rungs of the paper's ablation ladder."""


Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu"]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class BigVisionConfig:
    """An image model of big_vision, where its modules can be imported (llip_jax/models/big_vision.py)."""

    name: str = "vit"
    """Its module, or one with the same outputs (``proj.flexi.vit``)."""
    arguments: dict[str, bool | int | float | str | tuple[int, ...]] = Field(default_factory=dict)
    """Of its ``Model``: ``{"variant": "B/16", "scan": True}``."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class VisionConfig:
    """Vision tower; a shape that is None takes the value of ``model.size``. The defaults are CLIP's tower."""

    layers: int | None = Field(default=None, ge=1)
    width: int | None = Field(default=None, ge=1)
    mlp: int | None = Field(default=None, ge=1)
    heads: int | None = Field(default=None, ge=1)
    patch: int | None = Field(default=None, ge=1)
    activation: Activation | None = None
    """None: ``model.activation``."""
    big_vision: BigVisionConfig | None = None
    """In place of our tower; what follows, ``layers`` and ``patch`` have no effect then, learned tokens query its
    patches, and ``width`` is what they are wide."""
    patch_bias: bool = False
    """A bias beside the patch embedding."""
    norm_pre: bool = True
    """A layer norm before the first block."""
    pooling: Literal["tokens", "attention"] = "tokens"
    """The learned tokens go through the tower beside the patches (CLIP's class token, Llip), or are the queries of an
    attention over the finished patches (SigLIP's head; arXiv 2106.04560, section 3)."""
    token_weight: float = Field(default=1.0, gt=0)
    """How much one learned token counts in the tower's attention, against a patch. 1/K makes K copies of a class token
    count as the one they came from (proportional attention, arXiv 2210.09461)."""
    projection: bool = True
    """A class token is projected to the joint width; without, the tower's width is the joint one (SigLIP)."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TextConfig:
    """Text tower; a shape that is None takes the value of ``model.size``. The defaults are CLIP's tower.

    ``length`` counts tokens, start and end included.
    """

    layers: int | None = Field(default=None, ge=1)
    width: int | None = Field(default=None, ge=1)
    mlp: int | None = Field(default=None, ge=1)
    heads: int | None = Field(default=None, ge=1)
    length: int = Field(default=77, ge=3)
    activation: Activation | None = None
    """None: ``model.activation``."""
    causal: bool = True
    """A token sees only those before it; otherwise all, and the padding too (SigLIP)."""
    pooling: Literal["end", "last"] = "end"
    """The tower is read at the end-of-text token, or at the last of the ``length`` tokens (SigLIP)."""
    projection_bias: bool = False
    """A bias beside the projection to the joint width."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ModelConfig:
    """The dual encoder.

    ``mixture_tokens`` counts all learned image tokens: for `registers` the class token too; `class_token` has one only.
    """

    size: str = "B/16"
    pooler: Pooler = "mixer"
    mixture_tokens: int = Field(default=64, ge=1)
    mixer_heads: int = Field(default=8, ge=1)
    mixer_temperature: float = Field(default=5.0, gt=0)
    """Divides the raw query-key product. 5 is our reading of the paper, see docs/architecture.md."""
    mixer_key_bias: bool = False
    """A learned vector for each mixture token and head is added to its key. With it, equal tokens are told apart by the
    texts, so that a Llip may start from copies of a class token (llip_jax/interop/surgery.py)."""
    embed_dim: int | None = Field(default=None, ge=1)
    """Joint width d; None takes the value of ``model.size``."""
    image_size: int = Field(default=224, ge=1)
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.26862954, 0.26130258, 0.27577711)
    vision: VisionConfig = Field(default_factory=VisionConfig)
    text: TextConfig = Field(default_factory=TextConfig)
    activation: Activation = "gelu"
    """Of both towers, unless they name their own."""
    layer_norm_epsilon: float = Field(default=1e-5, gt=0)
    patch_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of patches left out in training (FLIP, arXiv 2212.00794)."""
    logit_scale: float = Field(default=10.0, gt=0, le=100)
    logit_bias: float | Literal["prior"] | None = -10.0
    """Initial b; None: no bias; 'prior': log(p / (1 - p)) with p = 1 / global batch."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type; parameters stay float32. 'auto': float32 on CPU, bfloat16 on accelerators."""
    remat: Literal["none", "dots", "layer", "offload"] = "none"
    """What the backward pass recomputes: nothing, all but matrix products, or each layer. 'offload': each layer too,
    from inputs that wait in the host's memory."""
    attention: Literal["xla", "kernel"] = "xla"
    """How the towers attend: by XLA, or on TPUs by kernels that keep the weights on the chip (ops/attention.py)."""
    scan_layers: bool | Literal["auto"] = "auto"
    """Compile one layer and loop over depth. 'auto': loop on accelerators, unroll on CPU (faster steps there)."""
