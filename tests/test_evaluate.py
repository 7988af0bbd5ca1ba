"""Evaluating a finished run: what is written, that it fits together, and further sets beside the run's own."""

import io
import json
import re
import shutil
import sys
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from run_helpers import finished_run, temporary_folder

from launch.evaluate import main
from llip_jax.config import ConfigError, Task
from llip_jax.data.toyworld import ToyWorld
from llip_jax.evaluate import TASKS, evaluate_run
from llip_jax.evaluation.figures import figure, load_outcomes
from llip_jax.training.run_directory import read_config

IMAGES = 24
ONE: tuple[Task, ...] = ("zero_shot", "retrieval", "choice", "diagnostics", "exhibits")


def benchmark_folder(folder: Path, images: int = 7) -> Path:
    """ToyWorld pictures in CLIP_benchmark's layout, with integers for classes."""
    source = ToyWorld(read_config(finished_run()).data.toyworld, "eval", 16)
    backgrounds = sorted({source[index].fields["background"] for index in range(images)})
    (folder / "test").mkdir(parents=True)
    (folder / "classnames.txt").write_text("\n".join(backgrounds))
    (folder / "zeroshot_classification_templates.txt").write_text("on a {c} background\n{c}")
    (folder / "test" / "nshards.txt").write_text("1")
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        for index in range(images):
            stream = io.BytesIO()
            Image.fromarray(source[index].image).save(stream, "PNG")
            label = str(backgrounds.index(source[index].fields["background"])).encode()
            for suffix, data in (("png", stream.getvalue()), ("cls", label)):
                member = tarfile.TarInfo(f"s{index}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder


@cache
def evaluated() -> Path:
    """The tiny run with everything that evaluation can do; not to be changed."""
    folder = temporary_folder()
    shutil.copytree(finished_run(), folder / "run")
    sets = {"plain": {"source": "clip_benchmark", "path": str(benchmark_folder(folder / "plain")), "robustness": "b"}}
    overrides = [
        "eval.choice_field=choices",
        "eval.groups=('background',)",
        "eval.scorers=('mean_text', 'attributes')",
        "eval.shortlist=3",
        "eval.probe_images=60",
        "data.label_field=background",
        "eval.robustness=b",
        f"eval.sets={sets!r}",
    ]
    evaluate_run(folder / "run", None, overrides, TASKS)
    return folder / "run"


def results() -> dict[str, Any]:
    return json.loads((evaluated() / "eval" / "8.json").read_text())


def at(figures: dict[str, Any], path: str) -> Any:
    for part in path.split("/"):
        figures = figures[part]
    return figures


def test_every_task_has_figures_and_nothing_is_left_out():
    found = results()
    tasks = {"zero_shot", "zero_shot_attributes", "retrieval", "two_stage", "choice", "knn", "linear_probe"}
    assert tasks | {"diagnostics", "groups", "sets", "robustness"} <= {*found}
    assert "left_out" not in found
    assert {*found["diagnostics"]} == {"spectra", "geometry", "schur", "mixture", "attribution", "inversion"}
    assert {*found["diagnostics"]["spectra"]} == {"unconditioned", "tower", "patches", "mixed", "text"}


def test_figures_are_the_means_of_their_outcomes_and_lie_in_their_intervals():
    names, digests, outcomes = load_outcomes(evaluated() / "eval" / "8.npz")
    assert len(set(digests)) == IMAGES
    assert names == [f"toyworld/eval/{index}" for index in range(IMAGES)]
    found = results()
    assert "retrieval/text_to_image_recall_at_5" in outcomes and "knn/tower/top_1_accuracy" in outcomes
    for path, outcome in outcomes.items():
        value = at(found, path)
        assert value == pytest.approx(figure(outcome)), path
        low, high = at(found, f"{path}_interval")
        assert low <= value <= high, path


def test_groups_are_figures_of_their_images_alone():
    found, outcomes = results(), load_outcomes(evaluated() / "eval" / "8.npz").outcomes
    source = ToyWorld(read_config(finished_run()).data.toyworld, "eval", 16)
    backgrounds = np.array([source[index].fields["background"] for index in range(IMAGES)])
    hits = outcomes["retrieval/image_to_text_recall_at_5"].values
    for value in set(backgrounds):
        own = found["groups"]["background"][value]["retrieval/image_to_text_recall_at_5"]
        assert own == pytest.approx(hits[backgrounds == value].mean())
    assert {*found["groups"]} == {"background"} and "groups" not in found["sets"]["plain"]


def test_exhibits_name_pictures_that_are_there():
    folder = evaluated() / "eval" / "8"
    exhibits = json.loads((folder / "exhibits.json").read_text())
    assert {*exhibits} == {"image_to_text", "text_to_image", "zero_shot", "maps", "mismatch"}
    named = set()

    def collect(value: Any) -> None:
        for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            collect(each)
        named.update([value] if isinstance(value, str) and value.endswith(".webp") else [])

    collect(exhibits)
    assert named == {path.name for path in folder.glob("*.webp")}
    for query in exhibits["image_to_text"]:
        assert query["right"] == (query["answers"][0]["text"] in query["captions"]) == (query["rank"] == 1)
    assert all(len(shown["captions"]) == 3 for shown in exhibits["maps"])


def test_a_further_set_has_its_own_classes_templates_figures_and_outcomes():
    found = results()["sets"]["plain"]
    assert found["images"] == 7 and found["texts"] == 0
    assert "zero_shot" in found and "zero_shot_attributes" in found
    assert found["left_out"]["retrieval"] == "no image has a caption"
    assert "train" in found["left_out"]["knn"]
    names, _, outcomes = load_outcomes(evaluated() / "eval" / "8" / "sets" / "plain.npz")
    assert len(names) == 7
    assert figure(outcomes["zero_shot/top_1_accuracy"]) == pytest.approx(found["zero_shot"]["top_1_accuracy"])
    group = results()["robustness"]["b"]
    accuracies = [results()["zero_shot"]["top_1_accuracy"], found["zero_shot"]["top_1_accuracy"]]
    assert group["members"] == ["own", "plain"]
    assert group["top_1_accuracy_mean"] == pytest.approx(np.mean(accuracies))
    assert group["top_1_accuracy_worst"] == min(accuracies)


def test_documents_for_clip_benchmark_are_written():
    documents = [json.loads(path.read_text()) for path in (evaluated() / "eval/8/clip_benchmark").iterdir()]
    kinds = {(document["dataset"], document["task"]) for document in documents}
    assert {("toyworld", "zeroshot_classification"), ("toyworld", "zeroshot_retrieval")} <= kinds
    assert ("plain", "zeroshot_classification") in kinds


def test_a_later_evaluation_adds_to_one_that_was_asked_the_same_and_replaces_another(tmp_path):
    shutil.copytree(finished_run(), tmp_path / "run")
    path, folder = tmp_path / "run/eval/8.json", tmp_path / "run/eval/8"
    trained = json.loads(path.read_text())
    evaluate_run(tmp_path / "run", None, (), ("exhibits",))
    first = json.loads(path.read_text())
    assert first["zero_shot"]["top_1_accuracy"] == trained["zero_shot"]["top_1_accuracy"]
    evaluate_run(tmp_path / "run", None, (), ("knn",))
    second = json.loads(path.read_text())
    assert second["retrieval"] == first["retrieval"] and second["texts"] == first["texts"] and "knn" in second
    assert (folder / "exhibits.json").exists() and [*folder.glob("*.webp")]
    assert "retrieval/image_to_text_recall_at_1" in load_outcomes(tmp_path / "run/eval/8.npz").outcomes

    evaluate_run(tmp_path / "run", None, ["data.toyworld.eval_size=20"], ("retrieval",))
    third = json.loads(path.read_text())
    assert third["overrides"] == ["data.toyworld.eval_size=20"] and third["images"] == 20
    assert "diagnostics" not in third and "knn" not in third and not [*folder.glob("*.webp")]
    assert len(load_outcomes(tmp_path / "run/eval/8.npz").names) == 20


def test_a_set_of_choices_alone_and_a_choice_alone(tmp_path):
    source = ToyWorld(read_config(finished_run()).data.toyworld, "eval", 16)
    folder = tmp_path / "choices"
    folder.mkdir()
    lines = []
    for index in range(5):
        Image.fromarray(source[index].image).save(folder / f"{index}.png")
        lines.append(json.dumps({"image": f"{index}.png", "choices": source[index].fields["choices"]}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    shutil.copytree(finished_run(), tmp_path / "run")
    sets = {"pairs": {"path": str(folder), "choice_field": "choices"}}
    overrides = ["eval.choice_field=choices", f"eval.sets={sets!r}"]
    found = evaluate_run(tmp_path / "run", None, overrides, ("choice", "zero_shot", "retrieval"))
    alone = evaluate_run(tmp_path / "run", None, overrides, ("choice",))
    assert found["sets"]["pairs"]["choice"]["accuracy_chance"] == 0.5
    assert alone["choice"] == found["choice"] and alone["sets"]["pairs"]["choice"] == found["sets"]["pairs"]["choice"]


def test_one_image_has_defined_results(tmp_path):
    shutil.copytree(finished_run(), tmp_path / "run")
    one = evaluate_run(tmp_path / "run", None, ["data.toyworld.eval_size=1", "eval.choice_field=choices"], ONE)
    assert one["images"] == 1
    assert one["zero_shot"]["top_1_accuracy"] == 1.0 == one["zero_shot"]["top_1_accuracy_chance"]
    assert one["retrieval"]["image_to_text_recall_at_1"] == 1.0
    assert "left_out" not in one
    json.dumps(one, allow_nan=False)


def test_mistakes_are_told_in_words():
    with pytest.raises(ConfigError, match=r"no checkpoint 5 in .*there are"):
        evaluate_run(finished_run(), 5)
    with pytest.raises(
        ConfigError, match=r"eval\.groups: no record has a field 'backgrond'\. Did you mean 'background'"
    ):
        evaluate_run(finished_run(), None, ["eval.groups=('backgrond',)"])
    with pytest.raises(ConfigError, match=r"eval\.sets\.lost\.path"):
        evaluate_run(finished_run(), None, ["eval.sets={'lost': {'source': 'clip_benchmark', 'path': '/no/where'}}"])
    workdir = ["--workdir", str(finished_run())]
    for words, told in (
        ([*workdir, "--tasks", "retreival"], "no task 'retreival'. Did you mean 'retrieval'?"),
        ([*workdir, "--tasks", ""], "--tasks: no task ''"),
        ([*workdir, "--out", "page.html"], "--out: only with --compare"),
        (["--compare", str(finished_run()), "--step", "3"], "step: not with --compare"),
    ):
        with pytest.raises(ConfigError, match=re.escape(told)):
            main(words)


def test_a_report_without_its_packages_is_refused_before_anything_is_evaluated(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("llip_jax.report")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"a report needs matplotlib: pip install 'llip_jax\[report\]'"):
        main(["--workdir", str(finished_run()), "--report"])
