"""What is run: the rungs of the ladder, their ablations, and how large they are."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from llip_jax.config import Config, resolve, to_dict
from llip_jax.config_files import overridden, read

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHORTCUT = "shortcut"
"""A change that is no field: every image mixed by its own caption, whatever it is compared with (shortcut.py)."""

ARMS: dict[str, tuple[str, int]] = {
    "siglip": ("siglip", 1),
    "registers": ("registers", 16),
    "average": ("average", 16),
    "llip_1": ("", 1),
    "llip_4": ("", 4),
    "llip_16": ("", 16),
    "llip_64": ("", 64),
    "clip": ("clip", 1),
}
"""Variant of the configuration, learned image tokens."""
RUNG = {arm: "llip_16" if arm.startswith("llip") else arm for arm in ARMS}
"""Whose hyper-parameters an arm takes."""

SCALES: dict[str, dict[str, Any]] = {
    "small": {},
    # For a GPU: pictures of 96 pixels in 144 patches, larger batches, a thousand times the FLOPs.
    "gpu": {
        "model.image_size": 96,
        "model.vision.layers": 6,
        "model.vision.width": 192,
        "model.vision.mlp": 768,
        "model.text.layers": 2,
        "model.text.width": 128,
        "model.text.mlp": 512,
        "train.batch_size": 256,
        "train.steps": 3000,
        "data.toyworld.train_size": 65536,
    },
    # To see that everything works.
    "smoke": {"train.steps": 30, "data.toyworld.train_size": 512, "data.toyworld.eval_size": 256},
}
"""Changed fields."""

EMOJI = {
    "model.embed_dim": 32,
    "model.image_size": 32,
    "model.vision.layers": 3,
    "model.text.width": 64,
    "model.text.mlp": 256,
    "model.text.length": 16,
    "train.batch_size": 64,
    "train.steps": 1000,
    "data.source": "folder",
    "data.tokenizer.vocabulary_size": 4096,
    "data.captions.slots": 2,
    "data.captions.specific_probability": 0.75,
    "data.augment.crop_scale": (0.7, 1.0),
    "data.augment.color": 0.3,
    "data.augment.grayscale": 0.1,
    # Concepts whose every drawing is kept from training: whether names are understood, or only known.
    "data.folder.train_exclude": {"concept_split": ("unseen",)},
    "data.folder.eval_exclude": {"category": ("Flags",)},
    "eval.tasks": ("retrieval",),
    "eval.choice_field": None,
    "eval.groups": ("concept_split",),
}
"""Fields in which emoji differ from the shelf."""


@dataclass(frozen=True)
class Case:
    """One run: an arm, a seed, and what differs from the arm's configuration."""

    arm: str
    seed: int
    topics: int | None = 6
    """None: emoji."""
    scale: str = "small"
    changes: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Case":
        """The case of a row of results."""
        return cls(**{own.name: row[own.name] for own in fields(cls)})

    @property
    def data(self) -> str:
        """Name of the data set."""
        return "emoji" if self.topics is None else "toyworld"

    def key(self) -> str:
        """Equal for equal cases, in results too."""
        return json.dumps([self.data, self.arm, self.seed, self.topics, self.scale, dict(self.changes)], sort_keys=True)

    def config(self, tuned: Mapping[str, Any], emoji: str = "") -> Config:
        """The run's configuration.

        Args:
            tuned: fields chosen for the arm's rung.
            emoji: the folder.
        """
        variant, tokens = ARMS[self.arm]
        changed: dict[str, Any] = {"seed": self.seed, "model.mixture_tokens": tokens, **SCALES[self.scale]}
        if self.topics is None:
            changed |= EMOJI | {"data.path": emoji}
            if self.scale == "smoke":
                changed["train.steps"] = SCALES["smoke"]["train.steps"]
        else:
            changed["data.toyworld.topics"] = self.topics
        changed |= {**tuned, **self.changes}
        changed.pop(SHORTCUT, None)
        raw = read(f"{CONFIGS / 'llip_ladder.py'}:{variant}")
        if self.topics is None:
            raw["data"].pop("toyworld")
        words = [f"{name}={value if isinstance(value, str) else repr(value)}" for name, value in changed.items()]
        return resolve(overridden(raw, words))


SEEDS = range(5)
_RUNGS = ("siglip", "registers", "average", "llip_16")
ABLATIONS: tuple[dict[str, Any], ...] = (
    *({"model.mixer_temperature": value} for value in (0.2, 1.0, 20.0)),
    *({"model.mixer_heads": value} for value in (1, 8)),
)
"""Of Llip with K = 16."""
COMPARED: tuple[dict[str, Any], ...] = (
    {"train.steps": 4500},
    *({"data.captions.slots": value} for value in (1, 2)),
    *({"model.embed_dim": value} for value in (16, 32)),
)
"""Of Llip with K = 16 and SigLIP: three times as long, fewer captions an image, and other joint widths."""
EXTRA_SEEDS = 3
"""Of ablations and comparisons."""


def preset(name: str, seeds: Sequence[int] = SEEDS) -> list[Case]:
    """The cases of a preset, what matters most first."""
    return list(_cases(name, seeds))


def emoji_cases(seeds: Sequence[int] = SEEDS, scale: str = "small") -> list[Case]:
    """The ladder on emoji."""
    return [Case(arm, seed, None, scale) for seed in seeds for arm in _RUNGS]


def tuned_config(case: Case, tuned: Mapping[str, Mapping[str, Any]], emoji: str = "FOLDER") -> Config:
    """The configuration of a case with what was chosen for its rung ("toyworld/siglip")."""
    return case.config(tuned.get(f"{case.data}/{RUNG[case.arm]}", {}), emoji)


def digest(config: Config) -> str:
    """Equal for equal configurations, wherever the data lies."""
    fields = to_dict(config)
    fields["data"]["path"] = ""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def groups(cases: Sequence[Case]) -> list[list[Case]]:
    """Cases that see the same batches."""
    found: dict[tuple[int, int | None], list[Case]] = {}
    for case in cases:
        found.setdefault((case.seed, case.topics), []).append(case)
    return list(found.values())


def shares(cases: Sequence[Case], jobs: int) -> list[list[Case]]:
    """The cases of each worker: those of a group one after the other in the same one."""
    shares: list[list[Case]] = [[] for _ in range(jobs)]
    for group in groups(cases):
        min(shares, key=len).extend(group)
    return shares


def _cases(name: str, seeds: Sequence[int]) -> Iterator[Case]:
    if name == "smoke":
        for seed in seeds[:2]:
            yield from (Case(arm, seed, topics, "smoke") for topics in (6, 1) for arm in ("siglip", "llip_16"))
            yield Case("llip_4", seed, 6, "smoke")
            yield Case("llip_16", seed, 6, "smoke", {SHORTCUT: True})
        return
    scale = "gpu" if name == "gpu" else "small"
    for seed in seeds:
        yield from (Case(arm, seed, 6, scale) for arm in (*_RUNGS, "llip_1", "llip_4", "clip"))
        yield Case("llip_16", seed, 6, scale, {SHORTCUT: True})
        yield from (Case(arm, seed, 1, scale) for arm in (*_RUNGS, "clip"))
    if name == "quick":
        return
    for seed in seeds:
        yield Case("llip_64", seed, 6, scale)
        yield from (Case(arm, seed, topics, scale) for topics in (2, 3, 4, 5) for arm in _RUNGS)
    for seed in seeds[:EXTRA_SEEDS]:
        yield from (Case("llip_16", seed, 6, scale, changes) for changes in ABLATIONS)
        yield from (Case(arm, seed, 6, scale, changes) for changes in COMPARED for arm in ("siglip", "llip_16"))
