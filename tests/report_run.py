"""A run directory with every file that the report reads, made up: its schema in one place."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llip_jax.config import ToyWorldConfig, resolve, to_dict
from llip_jax.data.toyworld import ToyWorld
from llip_jax.evaluation.figures import Outcome, figures_of, intervals, save_outcomes

STEPS = (250, 500)
_PIXELS = 32
_HEADS, _TOKENS = 4, 8

CONFIG: dict[str, Any] = {
    "model": {"size": "Ti/4", "image_size": _PIXELS, "mixture_tokens": _TOKENS, "mixer_heads": _HEADS},
    "train": {"batch_size": 64, "steps": STEPS[-1]},
    "data": {"source": "toyworld", "label_field": "scene_name"},
}


def write_run(workdir: Path, seed: int = 0, images: int = 24, hostile: str = "") -> None:
    """Writes the run.

    Args:
        workdir: an empty or missing folder.
        seed: of all figures; names and captions of the images are those of any other seed.
        images: how many were evaluated.
        hostile: added to every text that a stranger may have written.
    """
    rng = np.random.default_rng(seed)
    world = ToyWorld(ToyWorldConfig(), "eval", _PIXELS)
    (workdir / "eval").mkdir(parents=True)
    config = {**CONFIG, "seed": seed, "data": {**CONFIG["data"], "path": hostile}}
    (workdir / "config.json").write_text(json.dumps(to_dict(resolve(config))))
    (workdir / "model.txt").write_text("pooler/key  [128, 4, 16]\n\nparameters: 914,178 (0.003 GiB in float32)\n")
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in _metrics(rng)))
    for step in STEPS:
        outcomes = _outcomes(rng, images, step / STEPS[-1])
        results = {"step": step, **_results(rng, outcomes, images, hostile)}
        (workdir / "eval" / f"{step}.json").write_text(json.dumps(results))
        names = [world[i].name + hostile for i in range(images)]
        save_outcomes(workdir / "eval" / f"{step}.npz", names, outcomes)
    folder = workdir / "eval" / str(STEPS[-1])
    folder.mkdir()
    (folder / "exhibits.json").write_text(json.dumps(_exhibits(rng, world, folder, hostile)))


def _metrics(rng: np.random.Generator) -> list[dict[str, Any]]:
    lines = []
    for step in range(10, STEPS[-1] + 1, 10):
        lines.append(
            {
                "step": step,
                "loss": 4 + 1.5 * np.exp(-step / 120) + 0.05 * rng.standard_normal(),
                "examples_seen": 64 * step,
                "examples_per_second": 340 + 10 * rng.standard_normal(),
                "step_time_s": 0.19,
                "data_wait_fraction": 0.01 * rng.random(),
                "mfu": None,
                "logit_bias": -4.1 - step / 5000,
                "grad_norm": 1.5 + 20 * np.exp(-step / 20),
                "learning_rate": 1.5e-3 * min(step / 50, (1 + np.cos(np.pi * step / STEPS[-1])) / 2),
                "logit_scale": 10 - step / 500,
                "replaced_samples": 0,
                "replaced_by_reason": {},
                "sample_hash": 1,
            }
        )
    return lines


def _outcomes(rng: np.random.Generator, images: int, skill: float) -> dict[str, Outcome]:
    """By TASK/FIGURE."""
    captions = 6
    by_image, by_caption = np.arange(images), np.repeat(np.arange(images), captions)
    figures = {
        "zero_shot/top_1_accuracy": (by_image, 0.3, 1 / 300),
        "zero_shot/top_5_accuracy": (by_image, 0.9, 5 / 300),
        "retrieval/image_to_text_recall_at_1": (by_image, 0.2, 1 / images),
        "retrieval/image_to_text_recall_at_5": (by_image, 0.5, 5 / images),
        "retrieval/text_to_image_recall_at_1": (by_caption, 0.1, 1 / images),
        "retrieval/text_to_image_recall_at_5": (by_caption, 0.3, 5 / images),
        "choice/accuracy": (by_image, 0.7, 0.25),
    }
    return {
        name: Outcome(
            (rng.random(len(unit)) < skill * rate).astype(float), unit, np.ones(len(unit)), np.full(len(unit), chance)
        )
        for name, (unit, rate, chance) in figures.items()
    }


def _results(rng: np.random.Generator, outcomes: dict[str, Outcome], images: int, hostile: str) -> dict[str, Any]:
    results: dict[str, Any] = {"images": images, "unreadable_images": 1, "texts": 6 * images, "classes": 300}
    figures, ranges = figures_of(outcomes), intervals(outcomes)
    for path, value in (figures | {f"{path}_interval": list(limits) for path, limits in ranges.items()}).items():
        task, name = path.split("/")
        results.setdefault(task, {})[name] = value
    results["retrieval"]["image_to_text_median_rank"] = 24.0
    results["knn"] = {"unconditioned": {"top_1_accuracy": 0.4, "top_1_accuracy_chance": 0.003, "k": 20}}
    results["groups"] = {
        f"background{hostile}": {
            colour + hostile: {
                "queries": int(rng.integers(20, 90)),
                "zero_shot/top_1_accuracy": float(rng.uniform(0.1, 0.4)),
                "retrieval/image_to_text_recall_at_1": float(rng.uniform(0.05, 0.2)),
            }
            for colour in ("red", "green", "blue", "white")
        }
    }
    use = rng.dirichlet(np.ones(_TOKENS), _HEADS)
    results["diagnostics"] = {
        "spectra": {
            name: {
                "singular_values": (30 * np.exp(-np.arange(64) / decay)).tolist(),
                "effective_rank": 1.8 * decay,
                "dimensions": 64,
            }
            for name, decay in (("unconditioned", 9.0), ("mixture_mean", 14.0), ("text", 18.0))
        },
        "geometry": {"alignment": 1.02, "uniformity_image": -1.9, "uniformity_text": -2.4, "modality_gap": 0.61},
        "mixture": {
            "entropy": (-(use * np.log(use)).sum(1)).tolist(),
            "token_use": use.tolist(),
            "movement": 0.37,
        },
    }
    results["left_out"] = {"linear_probe": f"needs labelled training images{hostile}"}
    results["sets"] = {"photos": {"images": 12, "unreadable_images": 0, "zero_shot": results["zero_shot"]}}
    results["robustness"] = {
        f"photos{hostile}": {
            "members": ["own", "photos"],
            "top_1_accuracy_mean": 0.2,
            "top_1_accuracy_worst": 0.1,
            "worst_member": "photos",
        }
    }
    return results


def _exhibits(rng: np.random.Generator, world: ToyWorld, folder: Path, hostile: str) -> dict[str, Any]:
    def show(index: int) -> str:
        return save(f"i{index}.webp", world[index].image)

    def save(name: str, pixels: np.ndarray) -> str:
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "webp", lossless=True)
        (folder / name).write_bytes(data.getvalue())
        return name

    def text(index: int, number: int = 0) -> str:
        return world[index].captions[number] + hostile

    def label(index: int) -> str:
        return world[index].fields["scene_name"] + hostile

    def scores() -> list[float]:
        return sorted(rng.uniform(0, 0.4, 5).tolist(), reverse=True)

    image_to_text, text_to_image, zero_shot, maps = [], [], [], []
    for i in range(4):
        rank = i + 1
        others = [j for j in rng.permutation(5).tolist() if j != i]
        shown = [*others[: rank - 1], i, *others[rank - 1 :]]
        answers = [{"text": text(j), "score": score, "right": j == i} for j, score in zip(shown, scores(), strict=True)]
        named = {"image": show(i), "name": world[i].name + hostile}
        image_to_text.append(
            {**named, "right": rank == 1, "rank": rank, "captions": [text(i), text(i, 1)], "answers": answers}
        )
        pictures = [
            {"image": show(j), "name": world[j].name + hostile, "score": score, "right": j == i}
            for j, score in zip(shown, scores(), strict=True)
        ]
        text_to_image.append({"text": text(i), "right": rank == 1, "rank": rank, "answers": pictures})
        classes = [{"text": label(j), "score": s, "right": j == i} for j, s in zip(shown, scores(), strict=True)]
        zero_shot.append({**named, "label": label(i), "right": rank == 1, "answers": classes})
        centres = rng.uniform(6, 26, (4, 2))
        mapped = [save(f"m{i}_{n}.webp", _highlight(world[i].image, centre)) for n, centre in enumerate(centres)]
        captions = [
            {"text": text(i, n), "score": float(rng.uniform(0.1, 0.4)), "map": name}
            for n, name in enumerate(mapped[1:])
        ]
        maps.append({**named, "uncaptioned": mapped[0], "captions": captions})
    tokens = [["a", 0.01], ["blue" + hostile, -0.8], ["circle", 0.3], ["in the", 0.05], ["corner", -0.1]]
    mismatch = [{"image": "i0.webp", "name": world[0].name, "text": text(0), "score": 0.2, "tokens": tokens}]
    return {
        "image_to_text": image_to_text,
        "text_to_image": text_to_image,
        "zero_shot": zero_shot,
        "maps": maps,
        "mismatch": mismatch,
    }


def _highlight(pixels: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """The picture, dark but for where it is looked at."""
    y, x = np.mgrid[: len(pixels), : len(pixels)]
    weight = np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / 60)
    return (pixels * (0.2 + 0.8 * weight[..., None])).astype(np.uint8)
