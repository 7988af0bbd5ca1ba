"""Our results among CLIP_benchmark's own: their metrics on the same scores, their documents, their command."""

import csv
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from oracles import import_open_clip

from llip_jax.evaluation.choice import choice_outcomes
from llip_jax.evaluation.classification import accuracy
from llip_jax.evaluation.clip_benchmark import documents
from llip_jax.evaluation.figures import figures_of
from llip_jax.evaluation.retrieval import positives_from_owners, recall_at_k

torch = pytest.importorskip("torch")
pytest.importorskip("clip_benchmark")


class Vectors:
    """A model that is asked for vectors it was given: an image is its number, and so is a text."""

    def __init__(self, images: np.ndarray, texts: np.ndarray):
        self.images, self.texts = torch.from_numpy(images), torch.from_numpy(texts)

    def encode_image(self, images: Any) -> Any:
        return self.images[images.flatten().long()]

    def encode_text(self, tokens: Any) -> Any:
        return self.texts[tokens]


def tokenizer(texts: list[str]) -> Any:
    return torch.tensor([int(text) for text in texts])


def vectors(seed: int, count: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def only(written: dict[str, dict[str, Any]]) -> dict[str, Any]:
    (document,) = written.values()
    return document


def test_retrieval_has_their_names_and_values() -> None:
    from clip_benchmark.metrics.zeroshot_retrieval import evaluate

    images, texts = vectors(0, 30), vectors(1, 60)
    batches = [(torch.arange(30).float(), [[str(2 * i), str(2 * i + 1)] for i in range(30)])]
    theirs = evaluate(Vectors(images, texts), batches, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    positives = positives_from_owners(np.arange(60) // 2, images=30)
    ours = only(documents({"retrieval": recall_at_k(images @ texts.T, positives)}, "flickr", "m", "p"))
    assert ours["task"] == "zeroshot_retrieval"
    assert ours["metrics"] == pytest.approx(theirs)
    assert theirs["image_retrieval_recall@5"] != theirs["text_retrieval_recall@5"]


@pytest.mark.parametrize("classes", [4, 7])
def test_classification_has_their_names_and_values(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from clip_benchmark.metrics import zeroshot_classification as peer

    # Its accuracy() calls float() on an array of one number, which NumPy no longer takes.
    monkeypatch.setattr(peer, "float", lambda x: float(x) if isinstance(x, str) else x.item(), raising=False)
    images, texts = vectors(2, 90), vectors(3, classes)
    labels = np.arange(90) % classes
    names = [str(c) for c in range(classes)]
    loader = type("Loader", (list,), {"dataset": SimpleNamespace(classes=names)})
    batches = loader([(torch.arange(90).float(), torch.from_numpy(labels))])
    theirs = peer.evaluate(Vectors(images, texts), batches, tokenizer, names, ["{c}"], "cpu", amp=False)
    results = {"classes": classes, "zero_shot": accuracy(images @ texts.T, labels)}
    ours = only(documents(results, "cifar", "m", "p"))
    assert ours["task"] == "zeroshot_classification"
    assert ours["metrics"] == pytest.approx({name: value for name, value in theirs.items() if not math.isnan(value)})
    assert ("acc5" in ours["metrics"]) == (classes >= 5)


def test_choice_has_their_names_and_values() -> None:
    from clip_benchmark.metrics.image_caption_selection import evaluate

    images, texts = vectors(4, 20), vectors(5, 60)
    own = [[str(3 * i + c) for c in range(3)] for i in range(20)]
    pixels = torch.arange(20).float().reshape(20, 1, 1, 1)
    theirs = evaluate(Vectors(images, texts), [(pixels, own)], tokenizer, "cpu", amp=False)
    scores = np.einsum("nd,ncd->nc", images, texts.reshape(20, 3, 8))
    results = {"choice": figures_of(choice_outcomes(scores, np.ones((20, 3), bool)))}
    ours = only(documents(results, "sugar_crepe", "m", "p"))
    assert ours["task"] == "image_caption_selection"
    assert ours["metrics"] == pytest.approx(theirs)


def results() -> dict[str, Any]:
    """As in eval/STEP.json, with chance levels and intervals that their documents have no place for."""
    classification = {"top_1_accuracy": 0.5, "top_5_accuracy": 0.9, "mean_per_class_recall": 0.4}
    recalls = {f"{d}_recall_at_{k}": k / 20 for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    return {
        "step": 500,
        "classes": 300,
        "zero_shot": classification | {"top_1_accuracy_chance": 1 / 300, "top_1_accuracy_interval": [0.4, 0.6]},
        "zero_shot_max_score": {"top_1_accuracy": 0.1},
        "retrieval": recalls | {"image_to_text_median_rank": 3.0},
        "choice": {"accuracy": 0.7, "accuracy_chance": 0.5},
        "knn": {"unconditioned": {"top_1_accuracy": 0.2}},
        "linear_probe": {"unconditioned": classification | {"converged": True}, "mixture_mean": {}},
    }


def test_clip_benchmark_build_puts_ours_beside_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = documents(results(), "wds/vtab/pets", "llip b/16", "../runs/demo")
    theirs = {
        "dataset": "wds/vtab/pets",
        "model": "ViT-B-32",
        "pretrained": "openai",
        "task": "zeroshot_classification",
        "metrics": {"acc1": 0.87, "acc5": 0.99, "mean_per_class_recall": 0.86},
        "language": "en",
    }
    assert len(written) == 3  # no linear probe: ours is another protocol
    for name, document in {**written, "theirs.json": theirs}.items():
        assert set(document) == set(theirs)
        (tmp_path / name).write_text(json.dumps(document, allow_nan=False))
    assert len(list(tmp_path.iterdir())) == 4
    import_open_clip()  # so that torchvision can be imported, which the command does
    if importlib.util.find_spec("pycocoevalcap") is None:  # for captioning alone, and brings Java programs
        monkeypatch.setitem(sys.modules, "clip_benchmark.metrics.captioning", ModuleType("captioning"))
    from clip_benchmark.cli import main

    table = tmp_path / "benchmark.csv"
    monkeypatch.setattr(sys, "argv", ["clip_benchmark", "build", str(tmp_path), "--output", str(table)])
    main()
    with table.open() as stream:
        rows = {(row["model_fullname"], row["task"]): row for row in csv.DictReader(stream)}
    ours = "llip b/16 ../runs/demo"
    assert len(rows) == 4
    assert {row["dataset"] for row in rows.values()} == {"wds/vtab/pets"}
    assert {row["language"] for row in rows.values()} == {"en"}
    assert float(rows["ViT-B-32 openai", "zeroshot_classification"]["acc1"]) == 0.87
    for (name, task), expected in {
        (ours, "zeroshot_classification"): {"acc1": 0.5, "acc5": 0.9, "mean_per_class_recall": 0.4},
        (ours, "zeroshot_retrieval"): {"image_retrieval_recall@5": 0.25, "text_retrieval_recall@10": 0.5, "acc1": None},
        (ours, "image_caption_selection"): {"text_acc": 0.7, "acc": 0.7, "image_acc": 1.0},
    }.items():
        row = rows[name, task]
        assert {column: float(row[column]) if row[column] else None for column in expected} == expected


def test_multi_label_classification_is_their_mean_average_precision() -> None:
    document = only(documents({"classes": 20, "zero_shot": {"mean_average_precision": 0.3}}, "voc", "m", "p"))
    assert document["metrics"] == {"mean_average_precision": 0.3}


def test_file_names_stay_in_their_folder() -> None:
    for name in documents(results(), "../../etc/passwd", ".hidden model", "a\\b\0c\n"):
        assert Path(name).name == name
        assert not name.startswith((".", "-"))
        assert name.isascii() and name.isprintable()


def test_sets_without_these_tasks_give_no_document() -> None:
    assert documents({"step": 5, "images": 3, "diagnostics": {}}, "d", "m", "p") == {}
