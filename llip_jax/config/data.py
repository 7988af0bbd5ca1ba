"""Where samples come from and how they become batches."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from llip_jax.config.errors import STRICT, listed


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ToyWorldConfig:
    """The generated world of small scenes (llip_jax/data/toyworld.py)."""

    train_size: int = Field(default=20_000, ge=1)
    eval_size: int = Field(default=1_000, ge=1)
    seed: int = Field(default=0, ge=0)
    layout: Literal["scattered", "shelf"] = "scattered"
    """'shelf': six objects, each of another shape in a place of its own and of a random colour; a caption names one of
    them (llip_jax/data/toyworld_shelf.py). 'scattered': groups of objects anywhere, and captions of any aspects."""
    topics: int = Field(default=6, ge=1, le=6)
    """Shelf: of how many of the objects captions speak, which is how diverse they are."""
    groups: int = Field(default=1, ge=1, le=3)
    """Scattered: groups of equal objects in a scene."""
    aspects: tuple[int, int] = (1, 6)
    """Scattered: fewest and most aspects that one caption mentions."""
    captions: int = Field(default=6, ge=1, le=32)
    """Captions of each scene. To evaluate, a shelf has one for each topic, in the same words where the same is true."""
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

    @model_validator(mode="after")
    def _of_this_layout(self) -> "ToyWorldConfig":
        defaults = {"groups": 1, "aspects": (1, 6)} if self.layout == "shelf" else {"topics": 6}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                raise ValueError(f"{name}={getattr(self, name)} has no effect with layout={self.layout!r}")
        return self


@dataclass(frozen=True, config=STRICT, kw_only=True)
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
    train_exclude: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Training leaves out records whose field has one of these values; a field that no record has is reported."""
    eval_exclude: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Evaluation likewise."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
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


@dataclass(frozen=True, config=STRICT, kw_only=True)
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


@dataclass(frozen=True, config=STRICT, kw_only=True)
class CaptionConfig(CaptionRules):
    """Caption rules, and how many slots they fill."""

    slots: int = Field(default=1, ge=1)
    """C: captions of one image in a step."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TokenizerConfig:
    """'clip': CLIP's byte-pair vocabulary. 'trained': a small byte-level BPE trained on the training captions once
    and kept in the run directory. Otherwise the path of a Hugging Face tokenizer.json or a SentencePiece .model."""

    name: str = "clip"
    vocabulary_size: int = Field(default=49_408, ge=300)
    """Rows of the token table; for 'trained' the largest vocabulary to learn."""
    clean: Literal["none", "lower", "canonicalize"] = "none"
    """What happens to a text before a tokenizer of a file sees it. 'lower': lower case (SigLIP 2). 'canonicalize': also
    ASCII punctuation removed and white space collapsed (SigLIP). ('clip' has its own cleaning.)"""
    pad: int = Field(default=0, ge=0)
    """Token behind the end of a text; towers that see padding (SigLIP) need the one they were trained with."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
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
        return listed(value)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TfdsConfig:
    """Splits of a TensorFlow Datasets data set (llip_jax/data/formats/tfds.py)."""

    train_split: str = "train"
    eval_split: str = "validation"
    data_dir: str | None = None
    """Where prepared data sets lie; None: where TensorFlow Datasets puts them."""


SourceFormat = Literal["toyworld", "folder", "webdataset", "parquet", "array_record", "tfds", "clip_benchmark"]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class SourceConfig:
    """One source of samples."""

    source: SourceFormat = "folder"
    path: str = ""
    """A file, folder or URL; for sharded formats also a pattern with * or {0000..0099}, or several after commas; for
    `tfds` the name of the data set, as in tfds.load; for `clip_benchmark` the data set's folder, with train/ and
    test/."""
    eval_path: str = ""
    """Evaluation data of the same format. Empty: the source's own evaluation split or, where the format has none,
    held-out samples."""
    eval_samples: int = Field(default=5000, ge=1)
    """Samples to hold out, evenly spread over the source: every tenth at most, and at least one."""
    fields: FieldsConfig = Field(default_factory=FieldsConfig)
    toyworld: ToyWorldConfig = Field(default_factory=ToyWorldConfig)
    folder: FolderConfig = Field(default_factory=FolderConfig)
    tfds: TfdsConfig = Field(default_factory=TfdsConfig)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class PartConfig(SourceConfig):
    """One part of a mixture."""

    weight: float = Field(default=1.0, ge=0)
    """Share of the samples, in proportion to the other parts' weights; 0 leaves the part out."""
    captions: CaptionRules | None = None
    """In place of those of ``data.captions``; None: those."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
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


@dataclass(frozen=True, config=STRICT, kw_only=True)
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
