"""A run: objective, pair scores, length, optimizer, where it starts, checkpoints, evaluation, mesh."""

import dataclasses
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from llip_jax.config.data import DataConfig, SourceConfig
from llip_jax.config.errors import STRICT, listed
from llip_jax.config.model import ModelConfig


@dataclass(frozen=True, config=STRICT, kw_only=True)
class PairLossConfig:
    """One pairwise loss term of the objective."""

    weight: float = Field(default=1.0, gt=0)
    duplicates: Literal["ignore", "positive", "negative"] = "ignore"
    """Pairs of *other* samples with the same image or the same caption: masked, taught as matches, or (the papers' way)
    left as negatives."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
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


@dataclass(frozen=True, config=STRICT, kw_only=True)
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


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TrainConfig:
    """Length and batch of the run."""

    batch_size: int = Field(default=256, ge=2)
    """Images a step over all devices and processes (the global batch)."""
    microbatches: int = Field(default=1, ge=1)
    """Pieces in which the towers go through a batch, to save memory; every image still meets every text."""
    steps: int = Field(default=1000, ge=0)
    log_every_steps: int = Field(default=10, ge=1)
    frozen: tuple[str, ...] = ()
    """Parameters that stay as they are, as patterns of paths in model.txt: ``vision/*`` locks the image tower (LiT,
    arXiv 2111.07991). They take no gradient and no optimizer state."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Keep a moving average of the parameters, which evaluation and export use; None: no average. The decay of update
    t is min(ema_decay, (1 + t) / (10 + t))."""

    @field_validator("frozen", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return listed(value)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class OptimizerConfig:
    """AdamW, linear warm-up then cosine decay to zero. Weight decay skips biases, norms, logit scale and bias."""

    learning_rate: float = Field(default=5e-4, gt=0)
    warmup_steps: int = Field(default=2000, ge=0)
    weight_decay: float = Field(default=0.2, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.98, ge=0, lt=1)
    epsilon: float = Field(default=1e-6, gt=0)
    clip_norm: float | None = Field(default=1.0, gt=0)
    rates: dict[str, float] = Field(default_factory=dict)
    """Factors of the learning rate by patterns of paths in model.txt, as in ``{"pooler/query": 10.0}``; of several
    patterns that match, the longest counts."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor of the learning rate from each layer of a tower to the one below it; embeddings are below all layers
    (arXiv 2106.08254, appendix)."""

    @field_validator("rates")
    @classmethod
    def _not_negative(cls, value: dict[str, float]) -> dict[str, float]:
        if wrong := {pattern: rate for pattern, rate in value.items() if rate <= 0}:
            raise ValueError(f"expected factors above 0 (train.frozen keeps parameters as they are), got {wrong}")
        return value


@dataclass(frozen=True, config=STRICT, kw_only=True)
class InitConfig:
    """Where the parameters of step 0 come from, and how a fixed-embedding model becomes a Llip."""

    source: str = Field(default="", alias="from")
    """Weights of another library, a folder of ``save_pretrained`` or a run directory (docs/weights.md); empty: random.
    Fields of ``model``, ``data.tokenizer`` and ``objective`` that the configuration leaves out are the source's."""
    tokens: Literal["copies", "fresh"] = "copies"
    """New mixture tokens: copies of the source's class token (or attention query), with which the first scores equal
    the source's; or random ones beside it."""
    token_noise: float = Field(default=0.0, ge=0)
    """Standard deviation of noise on the copies, as a share of the class token's own; with it the first scores are only
    close to the source's."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class CheckpointConfig:
    """Saved without stopping training; the newest ``keep`` are kept, and every ``keep_every_steps``-th for good."""

    every_steps: int = Field(default=1000, ge=1)
    every_minutes: float | None = Field(default=None, gt=0)
    """Save as well when so long has gone since the last save, so that no more is lost; None: by steps only."""
    keep: int = Field(default=3, ge=1)
    keep_every_steps: int | None = Field(default=None, ge=1)
    failures: int = Field(default=3, ge=1)
    """Saves in a row that may fail (a full disk, a directory that is gone) before the run stops."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class FaultsConfig:
    """What a run does about numbers that are wrong, and how long it waits for what does not come."""

    not_finite: Literal["stop", "skip", "rewind"] = "stop"
    """Where loss or gradient is not finite: stop the run, leave out that update, or go back to the newest checkpoint
    and on from there without the batches up to and with this one."""
    spike: Literal["log", "skip", "rewind", "stop"] = "log"
    """The same for a loss above ``spike_factor`` times the median of the last ``spike_window`` losses."""
    spike_factor: float | None = Field(default=None, gt=1)
    """None: no loss is a spike."""
    spike_window: int = Field(default=100, ge=10)
    limit: int = Field(default=10, ge=1)
    """Updates left out in a row, or rewinds to one checkpoint, after which the run stops."""
    start_s: float | None = Field(default=3600.0, gt=0)
    """Seconds from the start to the end of the first step, compiling included, or for one block of an evaluation, after
    which a process ends itself with stack traces and an exit code that is not 0; None: it waits for ever."""
    step_s: float | None = Field(default=1800.0, gt=0)
    """The same for one step, or one save that is waited for."""
    process_s: float = Field(default=100.0, ge=5)
    """Seconds without a sign of life from one process after which the others end themselves."""


Scorer = Literal["mean_text", "mean_score", "max_score", "attributes"]
Task = Literal["zero_shot", "retrieval", "choice", "knn", "linear_probe", "diagnostics", "inversion", "exhibits"]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ClassesConfig:
    """What images are told apart by, and what else is known about them."""

    classes: str = ""
    """Class names, or names with the texts that describe them: a .txt file (a name a line), a .json file
    (docs/evaluation.md), ``open_clip:imagenet`` or ``clip_benchmark:NAME`` of an installed package. Empty: the labels
    that occur."""
    templates_from: str = ""
    """Prompts in place of ``eval.templates``: a .txt file (one a line), a .json file (a list), ``open_clip:imagenet``,
    ``open_clip:simple`` or ``clip_benchmark:NAME``."""
    choice_field: str | None = None
    """Record field with the captions of an image-caption choice, the true one first; None: no such task."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class EvalSetConfig(SourceConfig, ClassesConfig):
    """A further evaluation set: all samples at ``path``.

    Formats with splits give the evaluation split: ``folder.eval_split`` of a list whose records have a split,
    ``tfds.eval_split``, ``test/`` of clip_benchmark, ToyWorld's. Samples may lack captions unless ``fields.captions``
    names them.
    """

    label_field: str | None = None
    """Record field with the class: its name, its number among ``classes``, or a list of these (several labels an
    image). None: no classification, but for `clip_benchmark`, which knows it."""
    robustness: str = ""
    """Sets with the same word here are one set and its variants, of which mean and worst are reported.
    ``eval.robustness`` puts the run's own set among them."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class EvalConfig(ClassesConfig):
    """Evaluation during training (and always after the last step), and what launch/evaluate.py does more."""

    every_steps: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=256, ge=1)
    """Images, or texts, of one evaluation block over all devices."""
    tasks: tuple[Task, ...] = ("zero_shot", "retrieval")
    """What is done as often as that; launch/evaluate.py --tasks does what it is told."""
    scorers: tuple[Scorer, ...] = ("mean_text",)
    """How the several texts of a class become one score (evaluation/scorers.py)."""
    templates: tuple[str, ...] = ("a picture of a {}.", "an image showing a {}.", "a {} seen up close.", "one {}.")
    """Prompts of zero-shot classification; each ``{}`` becomes the class name."""
    shortlist: int | None = Field(default=None, ge=1)
    """Report two-stage retrieval too, with shortlists of so many (evaluation/two_stage.py); None: exact only."""
    groups: tuple[str, ...] = ()
    """Record fields by whose values figures are broken down."""
    probe_images: int = Field(default=5000, ge=1)
    """Labelled training images that k-NN and linear probes learn from, at most."""
    sets: dict[str, EvalSetConfig] = Field(default_factory=dict)
    """Further evaluation sets by name, for launch/evaluate.py."""
    robustness: str = ""
    """See ``eval.sets``."""

    @field_validator("tasks", "scorers", "groups", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return listed(value)

    @field_validator("scorers")
    @classmethod
    def _some(cls, value: tuple[Scorer, ...]) -> tuple[Scorer, ...]:
        if not value:
            raise ValueError("expected at least one scorer")
        return value

    @field_validator("tasks")
    @classmethod
    def _in_training(cls, value: tuple[Task, ...]) -> tuple[Task, ...]:
        if later := [task for task in value if task in ("inversion", "exhibits")]:
            raise ValueError(f"{', '.join(later)}: not while training; expected --tasks of launch/evaluate.py")
        return value

    @field_validator("templates")
    @classmethod
    def _filled(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or any("{}" not in template for template in value):
            raise ValueError(f"expected at least one template, each with '{{}}' for the class name, got {value}")
        return value

    @field_validator("sets")
    @classmethod
    def _named(cls, value: dict[str, EvalSetConfig]) -> dict[str, EvalSetConfig]:
        for name, own in value.items():
            if not name.replace("-", "").replace("_", "").isalnum() or name == "own":
                raise ValueError(f"expected names of letters, digits, - and _ (but not 'own'), got {name!r}")
            if not own.path and own.source != "toyworld":
                raise ValueError(f"{name} has no path")
            if own.eval_path or own.eval_samples != SourceConfig().eval_samples:
                raise ValueError(f"{name}: eval_path and eval_samples have no effect here; path names all samples")
        return value


@dataclass(frozen=True, config=STRICT, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; -1 (one axis, or data and fsdp) takes what the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    fsdp_limit: int = Field(default=256, ge=1)
    """With data and fsdp -1: fsdp takes as many as divide this, which divides the towers' widths, and data the rest."""

    @model_validator(mode="after")
    def _sizes(self) -> "MeshConfig":
        sizes = (self.data, self.fsdp, self.tensor)
        if any(n == 0 or n < -1 for n in sizes) or (sizes.count(-1) > 1 and self.tensor == -1):
            raise ValueError(
                f"expected positive sizes, -1 for one of them or for data and fsdp, got data, fsdp, tensor = {sizes}"
            )
        return self


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Config:
    """Everything a run depends on; written to config.json of the run directory."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    model: ModelConfig = Field(default_factory=ModelConfig)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    pair_scores: PairScoresConfig = Field(default_factory=PairScoresConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    init: InitConfig = Field(default_factory=InitConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    faults: FaultsConfig = Field(default_factory=FaultsConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    mesh: MeshConfig = Field(default_factory=MeshConfig)
