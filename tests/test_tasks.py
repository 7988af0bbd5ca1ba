"""Tasks on readings made up here: what is computed of which rows, and what is left out with which words."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from llip_jax.config import EvalConfig
from llip_jax.evaluation.classes import ClassSpec
from llip_jax.evaluation.reading import Annotation, Labelled, Own, Reading
from llip_jax.evaluation.retrieval import recall_at_k
from llip_jax.evaluation.tasks import TASKS, run_tasks

N, C, D = 12, 3, 5


def reading(**changes: Any) -> Reading:
    """Twelve images of three classes with two captions each, one of them shared by images 0 and 1."""
    rng = np.random.default_rng()
    captions = [(f"a{row}", f"b{max(row, 1)}") for row in range(N)]
    texts = sorted({text for own in captions for text in own})
    positives = np.array([[text in own for text in texts] for own in captions])
    made = Reading(
        rows=np.arange(N),
        annotations=[
            Annotation(f"image {row}", own, (row % C,), (), {"half": row < 6}) for row, own in enumerate(captions)
        ],
        unreadable=0,
        texts=texts,
        positives=positives,
        caption_scores=rng.normal(size=positives.shape).astype(np.float32),
        text_embedding=rng.normal(size=(len(texts), D)),
        classes=ClassSpec.from_names([f"class {c}" for c in range(C)], ["{}"]),
        multi_label=False,
        class_scores={"mean_text": rng.normal(size=(N, C))},
        embeddings={"unconditioned": rng.normal(size=(N, D))},
        captions=None,
        choices=None,
        train=None,
    )
    return dataclasses.replace(made, **changes)


def test_images_without_captions_take_no_part_in_retrieval_but_keep_their_rows():
    full = reading()
    described = np.arange(N) != 4
    positives = full.positives * described[:, None]
    kept = positives.any(axis=0)
    partly = dataclasses.replace(
        full,
        texts=[text for text, keep in zip(full.texts, kept, strict=True) if keep],
        positives=positives[:, kept],
        caption_scores=full.caption_scores[:, kept],
    )
    result = run_tasks(partly, ("retrieval",), EvalConfig())
    expected = recall_at_k(partly.caption_scores[described], partly.positives[described])
    assert result.figures["retrieval"] == expected
    assert 4 not in result.outcomes["retrieval/image_to_text_recall_at_1"].unit
    assert result.outcomes["retrieval/image_to_text_recall_at_1"].unit.max() == N - 1
    assert set(result.outcomes["retrieval/text_to_image_recall_at_1"].unit) == {*range(N)} - {4}


def test_several_labels_an_image_are_judged_by_average_precision():
    rng = np.random.default_rng()
    made = reading()
    labels = [tuple(np.flatnonzero(rng.random(C) < 0.5).tolist()) for _ in range(N - 1)] + [(0, 1, 2)]
    annotations = [own._replace(labels=label) for own, label in zip(made.annotations, labels, strict=True)]
    result = run_tasks(dataclasses.replace(made, annotations=annotations, multi_label=True), TASKS, EvalConfig())
    from sklearn.metrics import average_precision_score

    targets = np.array([[c in label for c in range(C)] for label in labels])
    expected = [average_precision_score(targets[:, c], made.class_scores["mean_text"][:, c]) for c in range(C)]
    assert result.figures["zero_shot"]["mean_average_precision"] == pytest.approx(np.mean(expected))
    assert result.figures["left_out"]["knn"] == "images have several labels"


def test_probes_learn_on_training_images_also_of_classes_that_the_set_has_not():
    made = reading()
    centres = 5 * np.eye(D)[:4]
    train = Labelled({"unconditioned": np.repeat(centres, 3, axis=0)}, np.repeat(np.arange(4), 3), "")
    embeddings = {"unconditioned": centres[made.labels()]}
    result = run_tasks(
        dataclasses.replace(made, train=train, embeddings=embeddings), ("knn", "linear_probe"), EvalConfig()
    )
    for probe in ("knn", "linear_probe"):
        assert result.figures[probe]["unconditioned"]["top_1_accuracy"] == 1
        assert result.figures[probe]["unconditioned"]["top_1_accuracy_chance"] == pytest.approx(1 / 4)
        assert f"{probe}/unconditioned/top_1_accuracy" in result.outcomes


def test_a_choice_is_between_an_images_own_texts():
    mask = np.arange(4) < np.array([3, 0, 4] + [2] * 9)[:, None]
    cosines = np.where(mask, np.arange(4), np.inf)
    cosines[2] = [5, 4, 3, 2]
    made = reading(choices=Own(mask, np.zeros((N, 4), int), cosines, None, None))
    figures = run_tasks(made, ("choice",), EvalConfig()).figures["choice"]
    assert figures["accuracy"] == pytest.approx(1 / 11)
    assert figures["accuracy_chance"] == pytest.approx((1 / 3 + 1 / 4 + 9 / 2) / 11)


def test_what_a_set_has_nothing_for_is_named_with_the_reason():
    bare = reading(classes=None, class_scores={}, texts=[], positives=np.zeros((N, 0), bool))
    figures = run_tasks(bare, TASKS, EvalConfig()).figures
    assert {*figures["left_out"]} == {"zero_shot", "retrieval", "choice", "knn", "linear_probe"}
    assert "data.label_field" in figures["left_out"]["zero_shot"]
    assert "eval.choice_field" in figures["left_out"]["choice"]
    assert {*figures["diagnostics"]} == {"spectra"}
