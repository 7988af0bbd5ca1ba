"""Fine-tuning on real pictures: a Llip made of a trained model, that model itself, and both from scratch.

    python benchmarks/fine_tuning.py --emoji FOLDER --base RUN --workdir DIR --out benchmarks/results/fine_tuning.jsonl

FOLDER: the emoji of README ("Your own data"), six vendors. RUN: configs/llip_folder.py:siglip, 600 steps, on five of
them. The sixth (openmoji) is divided by emoji family: four fifths to train on, a fifth to evaluate. All arms of a seed
see the same batches. One JSON line a run: training loss (mean of the last ten steps), image-to-text recall on the
held-out fifth.
"""

import argparse
import hashlib
import json
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path

import jax

from llip_jax.config import resolve
from llip_jax.config_files import read
from llip_jax.training.loop import train
from llip_jax.training.start import completed

ROOT = Path(__file__).resolve().parents[1]
FINE_TUNING, SCRATCH = str(ROOT / "configs" / "finetune.py"), str(ROOT / "configs" / "llip_folder.py")

ARMS: dict[str, tuple[str, list[str]]] = {
    "source": (f"{FINE_TUNING}:as_is", []),
    # Whether it is the faster tokens alone that help.
    "source, token rate": (f"{FINE_TUNING}:as_is", ["optimizer.rates={'vision/tokens': 30.0}"]),
    "llip": (FINE_TUNING, []),
    "llip, no rates": (FINE_TUNING, ["optimizer.rates={}"]),
    "locked source": (f"{FINE_TUNING}:locked", []),
    "scratch source": (f"{SCRATCH}:siglip", ["optimizer.warmup_steps=20"]),
    "scratch llip": (SCRATCH, ["optimizer.warmup_steps=20", "model.mixture_tokens=16"]),
}
"""Configuration and changed fields."""


def sixth_vendor(emoji: Path, folder: Path) -> Path:
    """A folder with the pictures of openmoji, divided by family."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for line in (emoji / "captions.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["vendor"] != "openmoji" or record["category"] == "Flags":
            continue
        held_out = hashlib.sha256(record["family"].encode()).digest()[0] % 5 == 0
        target = folder / record["image"]
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copyfile(emoji / record["image"], target)
        lines.append(json.dumps(record | {"split": "val" if held_out else "train"}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run(arm: str, seed: int, steps: int, fields: list[str], data: Path, base: Path, workdir: Path) -> dict[str, object]:
    """Trains one arm; its figures."""
    overrides = [f"data.path={data}", f"seed={seed}", f"train.steps={steps}", "train.batch_size=128"]
    overrides += [f"eval.every_steps={steps}", f"checkpoint.every_steps={steps}", "train.log_every_steps=1", *fields]
    if not arm.startswith("scratch"):
        overrides.append(f"init.from={base}")
    else:
        overrides.append(f"data.tokenizer.name={base / 'tokenizer.json'}")
    file, changes = ARMS[arm]
    raw = read(file, [*changes, *overrides])
    path = workdir / f"{re.sub('[^a-z]+', '_', arm)}-{steps}-{seed}"
    shutil.rmtree(path, ignore_errors=True)
    config = resolve(completed(raw, path))
    assert train(config, path) == 0
    losses = [json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()]
    retrieval = json.loads((path / "eval" / f"{steps}.json").read_text())["retrieval"]
    return {
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "learning_rate": config.optimizer.learning_rate,
        "first_loss": losses[0],
        "loss": sum(losses[-10:]) / 10,
        **{f"image_to_text_r{k}": retrieval[f"image_to_text_recall_at_{k}"] for k in (1, 5, 10)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=50)
    args, rest = parser.parse_known_args()
    data = sixth_vendor(args.emoji, args.workdir / "openmoji")
    fields = [word.removeprefix("--config.") for word in rest]
    about = {"fields": fields, "jax": jax.__version__, "device": jax.devices()[0].device_kind}
    for seed in args.seeds:
        for arm in args.arms:
            figures = run(arm, seed, args.steps, fields, data, args.base, args.workdir)
            line = {**figures, **about, "date": datetime.now(UTC).isoformat(timespec="seconds")}
            print(line, flush=True)
            with args.out.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
