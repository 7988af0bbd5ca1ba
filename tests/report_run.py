"""A run directory with every file that the report reads, made up: its schema in one place."""

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llip_jax.config import ToyWorldConfig, resolve, to_dict
from llip_jax.data.toyworld import ToyWorld
from llip_jax.evaluation.figures import Outcome, figures_of, intervals, save_outcomes
from llip_jax.sessions import FILE, Session

STEPS = (250, 500)
_PIXELS = 32
_HEADS, _TOKENS = 4, 8
_CAPTIONS, _CLASSES = 6, 300
_WHILE_TRAINING = ("zero_shot", "retrieval")
_PROBES, _EMBEDDINGS = ("knn", "linear_probe"), ("unconditioned", "tower", "patches")

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
    (workdir / FILE).write_text("".join(json.dumps(asdict(session)) + "\n" for session in _sessions(rng)))
    names = [world[i].name + hostile for i in range(images)]
    digests = [f"{i:032x}" for i in range(images)]
    early, late = (_outcomes(rng, images, skill) for skill in (0.5, 1))
    in_training = {"step": STEPS[0], **_counts(images), **_figures(early, _WHILE_TRAINING)}
    (workdir / "eval" / f"{STEPS[0]}.json").write_text(json.dumps(in_training))
    save_outcomes(workdir / "eval" / f"{STEPS[1]}.npz", names, digests, late)
    folder = workdir / "eval" / str(STEPS[1])
    (folder / "sets").mkdir(parents=True)
    of_set = _outcomes(rng, 12, 1)
    results = {"step": STEPS[1], "overrides": [], **_results(rng, late, images, hostile)}
    results |= {"sets": {"photos": _results(rng, of_set, 12, hostile)}, "robustness": _robustness(hostile)}
    (workdir / "eval" / f"{STEPS[1]}.json").write_text(json.dumps(results))
    save_outcomes(folder / "sets" / "photos.npz", names[:12], digests[:12], of_set)
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


def _sessions(rng: np.random.Generator) -> list[Session]:
    """The first is killed at step 270 and goes on from 250."""
    sessions, began = [], 1.75e9
    for first, last, end in ((0, 270, None), (250, STEPS[-1], "finished")):
        training_s = (last - first) * rng.uniform(0.18, 0.2)
        seconds = {
            "start": 4.2,
            "compile": 6.8,
            "save": 1.1,
            "evaluation": 5.3,
            "other": 0.7,
            "restore": 1.6 * (first > 0),
        }
        seconds |= {"step": 0.97 * training_s, "data": 0.03 * training_s}
        seen = began + sum(seconds.values())
        sessions.append(
            Session(
                began=began,
                seen=seen,
                batch_size=64,
                first=first,
                last=last,
                steps=last - first,
                seconds=seconds,
                ideal_step_s=0.08,
                peak_bytes=3 * 2**30,
                end=end,
            )
        )
        began = seen + 30
    return sessions


def _outcomes(rng: np.random.Generator, images: int, skill: float) -> dict[str, Outcome]:
    """By TASK/FIGURE."""
    by_image, by_caption = np.arange(images), np.repeat(np.arange(images), _CAPTIONS)
    figures = {
        "retrieval/image_to_text_recall_at_1": (by_image, 0.2, 1 / images),
        "retrieval/image_to_text_recall_at_5": (by_image, 0.5, 5 / images),
        "retrieval/text_to_image_recall_at_1": (by_caption, 0.1, 1 / images),
        "retrieval/text_to_image_recall_at_5": (by_caption, 0.3, 5 / images),
        "choice/accuracy": (by_image, 0.7, 0.5),
    }
    for task in ("zero_shot", *(f"{probe}/{name}" for probe in _PROBES for name in _EMBEDDINGS)):
        figures |= {
            f"{task}/top_1_accuracy": (by_image, 0.3, 1 / _CLASSES),
            f"{task}/top_5_accuracy": (by_image, 0.9, 5 / _CLASSES),
            f"{task}/mean_per_class_recall": (by_image, 0.3, 1 / _CLASSES),
        }
    in_class = np.bincount(by_image % 7)[by_image % 7]
    return {
        name: Outcome(
            (rng.random(len(unit)) < skill * rate).astype(float),
            unit,
            1 / in_class if name.endswith("per_class_recall") else np.ones(len(unit)),
            np.full(len(unit), chance),
        )
        for name, (unit, rate, chance) in figures.items()
    }


def _counts(images: int) -> dict[str, int]:
    return {"images": images, "unreadable_images": 1, "texts": _CAPTIONS * images, "classes": _CLASSES}


def _figures(outcomes: dict[str, Outcome], tasks: tuple[str, ...]) -> dict[str, Any]:
    """Figures with chance levels, nested by task and embedding."""
    nested: dict[str, Any] = {}
    for path, value in figures_of({k: v for k, v in outcomes.items() if k.split("/")[0] in tasks}).items():
        *parts, name = path.split("/")
        holder = nested
        for part in parts:
            holder = holder.setdefault(part, {})
        holder[name] = value
    return nested


def _results(rng: np.random.Generator, outcomes: dict[str, Outcome], images: int, hostile: str) -> dict[str, Any]:
    """Of one set, as launch/evaluate.py writes it."""
    results: dict[str, Any] = _counts(images) | _figures(outcomes, (*_WHILE_TRAINING, "choice", *_PROBES))
    for path, limits in intervals(outcomes, draws=50).items():
        *parts, name = path.split("/")
        holder = results
        for part in parts:
            holder = holder[part]
        holder[f"{name}_interval"] = list(limits)
    results["retrieval"] |= {"image_to_text_median_rank": 24.0, "text_to_image_median_rank": 31.5}
    counts = {"training_images": 2000, "unseen_images": 6, "classes": 446}
    for place, name in enumerate(_EMBEDDINGS):
        results["knn"][name] |= {"k": 20, "temperature": 0.07, **counts}
        results["linear_probe"][name] |= {
            "inverse_regularization": (10.0, 1.0, 10.0)[place],
            "converged": name != "tower",
            **counts,
        }
    results["asked"] = {
        "images": f"images {images}",
        "texts": f"texts {images}",
        "classes": "classes",
        "training": "training",
    }
    results["groups"] = {
        f"background{hostile}": {
            colour + hostile: {
                "queries": int(rng.integers(*size)),
                **_flat(_figures(outcomes, (*_WHILE_TRAINING, *_PROBES))),
            }
            for colour, size in (("red", (20, 90)), ("green", (20, 90)), ("blue", (2, 19)))
        }
    }
    results["diagnostics"] = _diagnostics(rng, images)
    results["left_out"] = {"inversion": f"images share no labels{hostile}"}
    return results


def _flat(figures: dict[str, Any], path: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in figures.items():
        found |= _flat(value, f"{path}{key}/") if isinstance(value, dict) else {f"{path}{key}": value}
    return found


def _diagnostics(rng: np.random.Generator, images: int) -> dict[str, Any]:
    use = rng.dirichlet(np.ones(_TOKENS), _HEADS)
    pairs = _CAPTIONS * images
    lengths = {"unconditioned": 64, "tower": 128, "patches": 128, "mixed": 64, "text": 64}
    geometry = {"alignment": 1.5, "uniformity_image": -2.4, "modality_gap": 0.86, "modality_separability": 1.0}
    schur = {"entropy": 0.6, "image_entropy": 1.8, "text_entropy": 1.1, "text_share": 0.7, "text_share_chance": 0.36}
    return {
        "spectra": {
            name: {
                "singular_values": (0.4 * np.exp(-np.arange(d) / 14)).tolist(),
                "effective_rank": 25.0 + d / 100,
                "participation_ratio": 5.6,
                "mean_length": 0.59,
                "dimensions": d,
                "images": images,
            }
            for name, d in lengths.items()
        },
        "geometry": {
            "pairs": pairs,
            "uniformity_rows": 8192,
            "uniformity_text": -2.1,
            **geometry,
            **{f"unconditioned_{name}": value for name, value in geometry.items()},
        },
        "mixture": {
            "pairs": pairs,
            "images_of_several_captions": images,
            "entropy": (-(use * np.log(use)).sum(1) / np.log(_TOKENS)).tolist(),
            "token_use": use.tolist(),
            "token_largest": rng.dirichlet(np.ones(_TOKENS), _HEADS).tolist(),
            "dead_tokens": [0, 1, 0, 0],
            "dead_in_all_heads": 0,
            "movement": 0.49,
            "movement_by_head": rng.random(_HEADS).tolist(),
            "caption_share": 0.68,
            "mixed_cosine": 0.8,
            "mixed_cosine_between_images": 0.26,
        },
        "schur": {
            "pairs": pairs,
            "unconditioned": {**schur, "text_rank": 64},
            "mixed": {**schur, "text_rank": 64},
            "factors": {"colour": {"variance_share": 0.297, "variance_share_chance": 0.014}},
        },
        "attribution": {
            "images": 64,
            "threshold": -5e-05,
            "cosine_own": 0.25,
            "f_clip_score_own": -0.01,
            "misaligned_words_own": 0.37,
            "cosine_other": -0.38,
            "f_clip_score_other": -0.03,
            "misaligned_words_other": 0.41,
            "auroc_cosine": 0.97,
            "auroc_f_clip_score": 0.68,
            "auroc_chance": 0.5,
        },
        "inversion": {
            "images": 256,
            "gallery": 499,
            "steps": 150,
            "pseudo_words": 1,
            "intra_modal_map": 0.45,
            "inter_modal_map": 0.34,
            "map_chance": 0.015,
            "cosine": 0.44,
        },
    }


def _robustness(hostile: str) -> dict[str, Any]:
    return {
        f"photos{hostile}": {
            "members": ["own", "photos"],
            "top_1_accuracy_mean": 0.2,
            "top_1_accuracy_worst": 0.1,
            "worst_member": "photos",
        }
    }


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
