"""Hyper-parameters, chosen for every rung with the same number of trials, on data that no result is reported on."""

import json
import math
import random
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.evidence.cases import Case
from benchmarks.evidence.rows import read
from llip_jax.config import ConfigError

TRIALS = {"toyworld": 6, "emoji": 3}
"""Of each rung. (Those on emoji take longer, and are shorter runs than the ones reported.)"""
RUNGS = {
    "toyworld": ("siglip", "registers", "average", "llip_16", "clip"),
    "emoji": ("siglip", "registers", "average", "llip_16"),
}
_OTHER_WORLD = {"data.toyworld.seed": 1}
"""Its training and test scenes are not those of the results."""
_SHORTER = {"train.steps": 600}
"""Than the runs that are reported."""
VALIDATION_VENDOR = "fxos"
"""Whose emoji the trials are judged on, without those of the test vendor. (Concepts that the reported runs never see
are among them, of this vendor.)"""
MEASURE = {"toyworld": "zero_shot", "emoji": "names_image_to_text_r1"}


def trials(data: str = "toyworld") -> list[Case]:
    """The trials. Trial i draws the same rates for every rung, and a Llip's further fields within the same budget."""
    cases = []
    for number in range(TRIALS[data]):
        for rung in RUNGS[data]:
            rng = random.Random(f"trial {number}")
            fields: dict[str, Any] = {
                "optimizer.learning_rate": round(math.exp(rng.uniform(math.log(1e-3), math.log(1e-2))), 5),
                "optimizer.weight_decay": rng.choice((0.01, 0.05, 0.2)),
                "model.logit_scale": rng.choice((5.0, 10.0, 20.0)),
            }
            if rung == "llip_16":
                fields["model.mixer_temperature"] = rng.choice((0.5, 1.0, 2.0, 5.0))
                fields["model.mixer_heads"] = rng.choice((1, 2, 4))
            topics, setting = (6, _OTHER_WORLD) if data == "toyworld" else (None, _SHORTER)
            cases.append(Case(rung, 1000 + number, topics, "small", {**setting, **fields}))
    return cases


def ways() -> list[Case]:
    """What was tried on emoji, where Llip does not win: on the validation vendor; SigLIP of the same seed beside it."""
    common = {
        **_SHORTER,
        "optimizer.learning_rate": 0.0012,
        "optimizer.weight_decay": 0.01,
        "model.logit_scale": 20.0,
    }
    llip = {"model.mixer_temperature": 5.0, "model.mixer_heads": 4}
    sharp = llip | {"model.mixer_temperature": 1.0}
    longer, longest = {"train.steps": 3000}, {"train.steps": 9000}
    names = {"data.captions.specific_probability": 1.0}
    wider = {"model.vision.width": 128, "model.vision.mlp": 512}
    tried: tuple[tuple[int, str, dict[str, Any]], ...] = (
        (1002, "siglip", {}),
        (1002, "llip_16", llip),
        (1002, "llip_16", sharp),
        (1002, "llip_16", llip | {"optimizer.rates": {"vision/tokens": 30.0}}),
        (1002, "llip_4", llip),
        (1002, "llip_1", llip),
        (1002, "llip_16", sharp | {"optimizer.learning_rate": 0.0025}),
        (1002, "llip_16", llip | {"model.mixer_key_bias": True}),
        (1003, "siglip", longer),
        (1003, "llip_16", llip | longer),
        (1003, "llip_4", llip | longer),
        (1004, "siglip", names),
        (1004, "llip_16", llip | names),
        (1004, "siglip", wider),
        (1004, "llip_16", llip | wider),
        (1005, "siglip", longest),
        (1005, "llip_16", llip | longest),
    )
    return [Case(arm, seed, None, "small", common | changes) for seed, arm, changes in tried]


def without_test(emoji: Path, folder: Path) -> Path:
    """A copy of the emoji without the test vendor's, the validation vendor's being held out."""
    shutil.copytree(emoji / "images", folder / "images")
    rows = [json.loads(line) for line in (emoji / "captions.jsonl").read_text().splitlines()]
    kept = [row for row in rows if row["split"] == "train"]
    lines = [json.dumps(row | {"split": "val" if row["vendor"] == VALIDATION_VENDOR else "train"}) for row in kept]
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def best(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each data set and rung ("toyworld/siglip") the fields of the best trial, of equal ones the first."""
    found: dict[str, Mapping[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        name, measure = f"{row['data']}/{row['arm']}", MEASURE[row["data"]]
        if name not in found or row["figures"][measure] > found[name]["figures"][measure]:
            found[name] = row
    return {
        name: {field: value for field, value in row["changes"].items() if field not in _OTHER_WORLD | _SHORTER}
        for name, row in found.items()
    }


def chosen(path: Path, data: Collection[str] = ("toyworld", "emoji")) -> dict[str, dict[str, Any]]:
    """``best`` of a file of trials.

    Args:
        path: the file.
        data: what has to be there.

    Raises:
        ConfigError: a trial is missing.
    """
    rows = read(path) if path.exists() else []
    there = {Case.of(row).key() for row in rows}
    for name in data:
        if missing := [case for case in trials(name) if case.key() not in there]:
            raise ConfigError(f"{path}: {len(missing)} trials on {name} are missing; expected all of --search")
    return best(rows)
