"""Typed, frozen and validated configuration: the only reader of ConfigDict.

A file under configs/ builds a ``ConfigDict``; :func:`resolve` turns it once into the frozen dataclasses below.
Every mistake is reported together as a :class:`ConfigError` that names the field, the value and what was expected.
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pydantic
from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

_STRICT = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Pooler = Literal["mixer", "average", "registers", "class_token"]
"""How the image side becomes an embedding; the last three are the lower rungs of the paper's ablation ladder."""


class ConfigError(ValueError):
    """Bad configuration or input: the message is meant for the user, without a traceback (exit code 2)."""


def nearest(name: str, valid: list[str]) -> str:
    """' Did you mean X?' for the closest valid name, or the list of valid names when none is close."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else f" Valid names: {', '.join(sorted(valid))}."


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class VisionConfig:
    """Vision tower shape; None takes the value of ``model.size``."""

    layers: int | None = Field(default=None, ge=1)
    width: int | None = Field(default=None, ge=1)
    mlp: int | None = Field(default=None, ge=1)
    heads: int | None = Field(default=None, ge=1)
    patch: int | None = Field(default=None, ge=1)


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class TextConfig:
    """Text tower shape; None takes the value of ``model.size``. ``length`` counts tokens, start and end included."""

    layers: int | None = Field(default=None, ge=1)
    width: int | None = Field(default=None, ge=1)
    mlp: int | None = Field(default=None, ge=1)
    heads: int | None = Field(default=None, ge=1)
    length: int = Field(default=77, ge=3)


@dataclass(frozen=True, config=_STRICT, kw_only=True)
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
    embed_dim: int | None = Field(default=None, ge=1)
    """Joint width d; None takes the value of ``model.size``."""
    image_size: int = Field(default=224, ge=1)
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    vision: VisionConfig = Field(default_factory=VisionConfig)
    text: TextConfig = Field(default_factory=TextConfig)
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "relu"] = "gelu"
    layer_norm_epsilon: float = Field(default=1e-5, gt=0)
    patch_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of patches left out in training (FLIP, arXiv 2212.00794)."""
    logit_scale: float = Field(default=10.0, gt=0, le=100)
    logit_bias: float | Literal["prior"] | None = -10.0
    """Initial b; None: no bias; 'prior': log(p / (1 - p)) with p = 1 / global batch."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type; parameters stay float32. 'auto': float32 on CPU, bfloat16 on accelerators."""
    remat: Literal["none", "dots", "layer"] = "none"
    """What the backward pass recomputes: nothing, all but matrix products, or each layer."""
    scan_layers: bool | Literal["auto"] = "auto"
    """Compile one layer and loop over depth. 'auto': loop on accelerators, unroll on CPU (faster steps there)."""


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class PairLossConfig:
    """One pairwise loss term of the objective."""

    weight: float = Field(default=1.0, gt=0)
    duplicates: Literal["ignore", "positive", "negative"] = "ignore"
    """Pairs of *other* samples with the same image or the same caption: masked, taught as matches, or (the papers' way)
    left as negatives."""


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class ObjectiveConfig:
    """A weighted list of terms, at least one; None leaves a term out. Naming another term adds it to the sigmoid."""

    sigmoid: PairLossConfig | None = Field(default_factory=PairLossConfig)
    softmax: PairLossConfig | None = None

    @model_validator(mode="after")
    def _some_term(self) -> "ObjectiveConfig":
        if not self.terms():
            raise ValueError("expected at least one term (sigmoid, softmax)")
        return self

    def terms(self) -> dict[str, PairLossConfig]:
        """The terms in use by name."""
        return {f.name: term for f in dataclasses.fields(self) if (term := getattr(self, f.name)) is not None}


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class PairScoresConfig:
    """How training compares every image with every text of the batch. Only rounding depends on it."""

    implementation: Literal["streamed", "kernel", "dense"] = "streamed"
    """Block by block; the same with a Pallas kernel for each block (TPU, mixer only); or all pairs at once."""
    exchange: Literal["ring", "gather"] = "ring"
    """Over several devices: texts pass around a ring of devices, or every device gathers all of them."""
    image_block: int | None = Field(default=None, ge=1)
    """Images of a block on a device; None chooses by shapes and memory."""
    text_block: int | None = Field(default=None, ge=1)
    """Texts of a block on a device; None chooses by shapes and memory."""


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class TrainConfig:
    """Length and batch of the run."""

    batch_size: int = Field(default=256, ge=2)
    """Images a step over all devices and processes (the global batch)."""
    steps: int = Field(default=1000, ge=0)
    log_every_steps: int = Field(default=10, ge=1)


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class OptimizerConfig:
    """AdamW, linear warm-up then cosine decay to zero. Weight decay skips biases, norms, logit scale and bias."""

    learning_rate: float = Field(default=5e-4, gt=0)
    warmup_steps: int = Field(default=2000, ge=0)
    weight_decay: float = Field(default=0.2, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.98, ge=0, lt=1)
    epsilon: float = Field(default=1e-6, gt=0)
    clip_norm: float | None = Field(default=1.0, gt=0)


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class ToyWorldConfig:
    """The generated world of small scenes (llip_jax/data/toyworld.py)."""

    train_size: int = Field(default=20_000, ge=1)
    eval_size: int = Field(default=1_000, ge=1)
    seed: int = Field(default=0, ge=0)
    groups: int = Field(default=1, ge=1, le=3)
    """Groups of equal objects in a scene."""
    aspects: tuple[int, int] = (1, 6)
    """Fewest and most aspects that one caption mentions."""
    captions: int = Field(default=6, ge=1, le=32)
    """Captions of each scene."""
    caption_noise: float = Field(default=0.0, ge=0, le=1)
    """Share of training captions taken from another scene."""
    pixel_noise: float = Field(default=0.02, ge=0)
    """Standard deviation of Gaussian pixel noise, as a fraction of white."""
    duplicates: float = Field(default=0.0, ge=0, lt=1)
    """Share of training samples that repeat an earlier scene's picture."""

    @field_validator("aspects")
    @classmethod
    def _ordered(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= value[0] <= value[1] <= 7:
            raise ValueError(f"expected (fewest, most) with 1 <= fewest <= most <= 7, got {value}")
        return value


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class FolderConfig:
    """A folder with captions.jsonl (llip_jax/data/formats/folder.py)."""

    split_field: str = "split"
    train_split: str = "train"
    eval_split: str = "val"
    eval_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Held out for evaluation, by a hash of the image path, when no record has ``split_field``."""
    specific_field: str | None = "n_names"
    """Record field saying how many leading captions are specific to the image; where a record lacks it, all are."""
    duplicate_field: str | None = "pixel_id"
    """Record field that is equal for identical images; where a record lacks it, the image is taken to be unique."""
    eval_exclude: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Evaluation leaves out records whose field has one of these values; a field that no record has is reported."""


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class AugmentConfig:
    """Training-time image augmentation, drawn from (seed, index)."""

    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Area of the random crop as a share of the image; (1, 1) turns cropping off."""
    flip: bool = False
    """Mirror half of the images (wrong where captions say left and right)."""
    color: float = Field(default=0.0, ge=0, le=1)
    """Strength of brightness, contrast and saturation changes."""
    grayscale: float = Field(default=0.0, ge=0, le=1)
    """Share of images turned grey."""

    @field_validator("crop_scale")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] <= 1:
            raise ValueError(f"expected (low, high) with 0 < low <= high <= 1, got {value}")
        return value


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class CaptionRules:
    """Which captions of a record fill the slots of a step, drawn from (seed, index) without repeating one.

    Captions are grouped by kind: the column they come from (``data.fields.captions``). A slot first draws the kind, by
    ``weights``, and then one caption of it. With the defaults every caption is equally likely, as LaCLIP (arXiv
    2305.20088) draws from an original and its rewrites.
    """

    specific_probability: float = Field(default=1.0, ge=0, le=1)
    """Chance that a slot is drawn from the record's specific captions; otherwise from all of them."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Chances of kinds in proportion to each other, as VeCLIP (arXiv 2310.07699) takes original or enriched captions
    with 0.5 each; kinds that are not named are drawn only when no named one is left. Empty: all captions alike."""
    first: str | None = None
    """Kind that fills slot 0 wherever a record has it."""
    min_words: int = Field(default=1, ge=1)
    """A draw of fewer words gives way to the record's first caption (LaCLIP: 2)."""
    sentences: dict[str, tuple[int, int]] = Field(default_factory=dict)
    """Kinds whose captions are cut into sentences; a draw is a run of so many (fewest, most), as in DreamLIP (arXiv
    2403.17007) and FLAIR (arXiv 2412.03561)."""

    @field_validator("weights")
    @classmethod
    def _positive(cls, value: dict[str, float]) -> dict[str, float]:
        if any(weight < 0 for weight in value.values()) or (value and not any(value.values())):
            raise ValueError(f"expected weights of at least 0, one of them positive, got {value}")
        return value

    @field_validator("sentences")
    @classmethod
    def _ordered(cls, value: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        for kind, (fewest, most) in value.items():
            if not 1 <= fewest <= most:
                raise ValueError(f"expected (fewest, most) with 1 <= fewest <= most for {kind!r}, got {fewest, most}")
        return value


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class CaptionConfig(CaptionRules):
    """Caption rules, and how many slots they fill."""

    slots: int = Field(default=1, ge=1)
    """C: captions of one image in a step."""


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class TokenizerConfig:
    """'clip': CLIP's byte-pair vocabulary. 'trained': a small byte-level BPE trained on the training captions once
    and kept in the run directory. Otherwise the path of a Hugging Face tokenizer.json or a SentencePiece .model."""

    name: str = "clip"
    vocabulary_size: int = Field(default=49_408, ge=300)
    """Rows of the token table; for 'trained' the largest vocabulary to learn."""


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class FieldsConfig:
    """Which columns of a web format hold what; dots lead into nested columns (``json.caption``)."""

    image: tuple[str, ...] = ()
    """Columns with encoded images, the first one present is taken; empty: the format's usual names."""
    captions: tuple[str, ...] = ()
    """Columns with a string or a list of strings, all are taken; empty: the format's usual name."""
    duplicate: str | None = None
    """Column that is equal for identical images; None compares the bytes of the image files."""

    @field_validator("image", "captions", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if isinstance(value, str):
            return (value,)
        return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class TfdsConfig:
    """Splits of a TensorFlow Datasets data set (llip_jax/data/formats/tfds.py)."""

    train_split: str = "train"
    eval_split: str = "validation"
    data_dir: str | None = None
    """Where prepared data sets lie; None: where TensorFlow Datasets puts them."""


SourceFormat = Literal["toyworld", "folder", "webdataset", "parquet", "array_record", "tfds"]


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class SourceConfig:
    """One source of samples."""

    source: SourceFormat = "folder"
    path: str = ""
    """A file, folder or URL; for sharded formats also a pattern with * or {0000..0099}, or several after commas; for
    `tfds` the name of the data set, as in tfds.load."""
    eval_path: str = ""
    """Evaluation data of the same format. Empty: the source's own evaluation split or, where the format has none,
    held-out samples."""
    eval_samples: int = Field(default=5000, ge=1)
    """Samples to hold out, evenly spread over the source: every tenth at most, and at least one."""
    fields: FieldsConfig = Field(default_factory=FieldsConfig)
    toyworld: ToyWorldConfig = Field(default_factory=ToyWorldConfig)
    folder: FolderConfig = Field(default_factory=FolderConfig)
    tfds: TfdsConfig = Field(default_factory=TfdsConfig)


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class PartConfig(SourceConfig):
    """One part of a mixture."""

    weight: float = Field(default=1.0, ge=0)
    """Share of the samples, in proportion to the other parts' weights; 0 leaves the part out."""
    captions: CaptionRules | None = None
    """In place of those of ``data.captions``; None: those."""


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class LimitsConfig:
    """What a sample may be. One beyond these, or unreadable, is replaced by the next one of its source."""

    replaced_share: float = Field(default=0.1, gt=0, le=1)
    """The run stops when more than this share of all samples so far (at least 1,000) had to be replaced."""
    image_bytes: int = Field(default=64 * 2**20, ge=1)
    pixels: int = Field(default=64 * 2**20, ge=1)
    """Width times height, by the image's header; a larger image is not decoded. (Pillow has a limit of its own at 179
    million, for all but ordinary JPEGs.)"""
    image_side: int = Field(default=2, ge=1)
    """Fewest pixels of the shorter side: images of a single pixel come from tracking."""
    caption_characters: int = Field(default=10_000, ge=1)
    """A longer caption is cut before it is tokenized."""


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class DataConfig(SourceConfig):
    """Where samples come from and how they become batches."""

    mixture: dict[str, PartConfig] = Field(default_factory=dict)
    """Named sources in proportion to their weights, in place of ``data.source``."""
    changed: Literal["refuse", "accept"] = "refuse"
    """Whether a run may be resumed on data that is not what it began with."""
    index_dir: str = ""
    """Where indices of tar shards are kept; empty: llip_jax in the user's cache folder."""
    label_field: str | None = None
    """Record field whose value is the class name in zero-shot evaluation; None: retrieval only."""
    limits: LimitsConfig = Field(default_factory=LimitsConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    captions: CaptionConfig = Field(default_factory=CaptionConfig)
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    workers: int = Field(default=0, ge=0)
    """Processes that decode; 0 decodes in threads of the training process."""
    threads: int = Field(default=2, ge=1)
    """Decoding threads of each process."""
    prefetch_batches: int = Field(default=2, ge=1)
    """Batches of each process that are made ahead."""

    @model_validator(mode="after")
    def _one_or_several(self) -> "DataConfig":
        if not self.mixture:
            return self
        if not any(part.weight for part in self.mixture.values()):
            raise ValueError("expected a mixture with at least one weight above 0")
        idle = [name for name in ("path", "eval_path") if getattr(self, name)]
        idle += ["fields"] if self.fields != FieldsConfig() else []
        if idle:
            raise ValueError(f"{' and '.join(idle)} have no effect beside data.mixture; set them in data.mixture.NAME")
        return self


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class CheckpointConfig:
    """Saved without stopping training; the newest ``keep`` are kept, and every ``keep_every_steps``-th for good."""

    every_steps: int = Field(default=1000, ge=1)
    keep: int = Field(default=3, ge=1)
    keep_every_steps: int | None = Field(default=None, ge=1)


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class EvalConfig:
    """Evaluation during training (and always after the last step)."""

    every_steps: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=256, ge=1)
    """Images, or texts, of one evaluation block over all devices."""
    templates: tuple[str, ...] = ("a picture of a {}.", "an image showing a {}.", "a {} seen up close.", "one {}.")
    """Prompts of zero-shot classification; each ``{}`` becomes the class name."""
    shortlist: int | None = Field(default=None, ge=1)
    """Report two-stage retrieval too, with shortlists of so many (evaluation/two_stage.py); None: exact only."""

    @field_validator("templates")
    @classmethod
    def _filled(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or any("{}" not in template for template in value):
            raise ValueError(f"expected at least one template, each with '{{}}' for the class name, got {value}")
        return value


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; -1 (one axis at most) takes what the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    @model_validator(mode="after")
    def _sizes(self) -> "MeshConfig":
        sizes = (self.data, self.fsdp, self.tensor)
        if any(n == 0 or n < -1 for n in sizes) or sizes.count(-1) > 1:
            raise ValueError(f"expected positive sizes and at most one -1, got data, fsdp, tensor = {sizes}")
        return self


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class Config:
    """Everything a run depends on; written to config.json of the run directory."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    model: ModelConfig = Field(default_factory=ModelConfig)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    pair_scores: PairScoresConfig = Field(default_factory=PairScoresConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    mesh: MeshConfig = Field(default_factory=MeshConfig)


_ADAPTER = pydantic.TypeAdapter(Config)


def resolve(raw: Mapping[str, Any]) -> Config:
    """The typed configuration of a ConfigDict (as a plain nested mapping) or of a config.json.

    Raises:
        ConfigError: every unknown name, wrong type and impossible value, one a line.
    """
    try:
        # Through JSON: one set of rules for files under configs/, command lines and a run directory's config.json.
        return _ADAPTER.validate_json(json.dumps(raw))
    except TypeError as error:
        raise ConfigError(f"config: {error}; expected numbers, strings, tuples, booleans and None") from None
    except pydantic.ValidationError as error:
        problems: dict[str, list[str]] = {}
        for e in error.errors():
            subject, text = _message(e["type"], e["loc"], e["msg"], e["input"])
            problems.setdefault(subject, []).append(text)
        # A field of several types has one problem for each of them.
        raise ConfigError(
            "\n".join(f"{subject}{' or '.join(problems[subject])}" for subject in sorted(problems))
        ) from None


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict, ready for JSON; :func:`resolve` takes it back unchanged."""
    return _ADAPTER.dump_python(config, mode="json")


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Fields in which two configurations (or parts of them) differ, as 'field: old -> new'."""
    if dataclasses.is_dataclass(old) and type(old) is type(new):
        old, new = ({f.name: getattr(x, f.name) for f in dataclasses.fields(x)} for x in (old, new))
    if not isinstance(old, dict) or not isinstance(new, dict) or old.keys() != new.keys():
        return [] if old == new else [f"{path}: {old!r} -> {new!r}"]
    return [line for name in old for line in differences(old[name], new[name], f"{path}.{name}".lstrip("."))]


def _message(kind: str, location: tuple[int | str, ...], text: str, value: Any) -> tuple[str, str]:
    """What a pydantic error is about, and what is wrong with it."""
    owner: type = Config
    path: list[str] = []
    parts = iter(location)
    for part in parts:
        names = [f.name for f in dataclasses.fields(owner)]
        if part not in names:
            if kind == "unexpected_keyword_argument":
                return f"{'.'.join([*path, str(part)])}: ", f"no such field.{nearest(str(part), names)}"
            break
        path.append(str(part))
        hint = get_type_hints(owner)[str(part)]
        inner = _dataclass_in(hint)
        if inner is None:
            break
        if get_origin(hint) is dict and (key := next(parts, None)) is not None:
            path.append(str(key))
        owner = inner
    # What follows the field's own path names alternatives of its type, not something the user wrote.
    text = text.removeprefix("Value error, ")
    return f"{'.'.join(path) or 'config'}: {value!r} is not valid: ", text[0].lower() + text[1:]


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass in a type hint such as ``PairLossConfig | None`` or ``dict[str, PartConfig]``."""
    return next((t for t in (hint, *get_args(hint)) if isinstance(t, type) and dataclasses.is_dataclass(t)), None)
