"""Effects of fine-tuning, against controls: at equal steps and with the same batches, three seeds.

Whether a Llip gets below its source depends on the source: on emoji it does (benchmarks/fine_tuning.py,
docs/weights.md), here, where the source has seen 200 steps only, it does not on two seeds of three.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
from run_helpers import ROOT, metrics, temporary_folder

from llip_jax.config import resolve
from llip_jax.config_files import read
from llip_jax.training.loop import train
from llip_jax.training.start import completed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SEEDS = (0, 1, 2)
SCRATCH, FINE_TUNING = str(ROOT / "configs" / "llip_demo.py"), str(ROOT / "configs" / "finetune.py")
OTHER_WORLD = {
    "data.source": "toyworld",
    "data.toyworld.seed": 7,
    "data.toyworld.aspects": (2, 6),
    "data.toyworld.pixel_noise": 0.15,
    "data.toyworld.eval_size": 50,
    "data.augment.crop_scale": (1.0, 1.0),
    "train.steps": 50,
    "train.batch_size": 64,
    "train.log_every_steps": 1,
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_steps": 5,
    "eval.every_steps": 50,
}


def run(file: str, workdir: Path, fields: dict[str, Any]) -> Path:
    raw = read(file, [f"{name}={value}" for name, value in fields.items()])
    assert train(resolve(completed(raw, workdir)), workdir) == 0
    return workdir


@functools.cache
def source() -> Path:
    """A SigLIP trained on ToyWorld for 200 steps."""
    return run(f"{SCRATCH}:siglip", temporary_folder() / "run", {"train.steps": 200, "eval.every_steps": 200})


@functools.cache
def loss(arm: str, seed: int) -> float:
    """Training loss over the last ten of 50 steps on another world."""
    fields = OTHER_WORLD | {"seed": seed}
    if arm == "scratch":
        file, fields = f"{SCRATCH}:siglip", fields | {"data.tokenizer.name": source() / "tokenizer.json"}
    else:
        file, fields = f"{FINE_TUNING}{arm}", fields | {"init.from": source()}
    lines = metrics(run(file, temporary_folder() / "run", fields))
    return sum(line["loss"] for line in lines[-10:]) / 10


@pytest.mark.parametrize("seed", SEEDS)
def test_fine_tuning_beats_training_from_scratch(seed: int) -> None:
    assert loss(":as_is", seed) < loss("scratch", seed) - 0.3


@pytest.mark.parametrize("seed", SEEDS)
def test_a_llip_does_not_fall_behind_its_source(seed: int) -> None:
    """On seeds 0 and 1 it was 0.021 and 0.001 above, of losses about 3.7; on seed 2 below."""
    assert loss("", seed) < loss(":as_is", seed) + 0.06
