"""Stopped and killed runs, as real processes: going on gives the same numbers as never stopping, bit by bit."""

import json
import random
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from run_helpers import TINY, finished_run, metrics, numbers, tiny_config, train

from llip_jax.data.toyworld import ToyWorld
from llip_jax.parallel.mesh import make_mesh
from llip_jax.training.checkpoints import Checkpoints
from llip_jax.training.metrics import MetricsWriter
from llip_jax.training.optimizer import make_optimizer
from llip_jax.training.run_directory import read_config
from llip_jax.training.state import TrainState, state_spec

KILL_WHILE_SAVING = """
def kill_while_saving(event, arguments):
    # Orbax has written arrays of step {step} and now gives them their name inside the unfinished checkpoint.
    if event == "os.{event}" and "/{step}.orbax-checkpoint-tmp/state" in str(arguments[0]):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill_while_saving)
"""

SIGNAL_IN_STEP = """
from llip_jax.training.recorder import Recorder
add = Recorder.add
def add_and_signal(self, step, *arguments):
    add(self, step, *arguments)
    if step == {step}:
        os.kill(os.getpid(), signal.{signal})
Recorder.add = add_and_signal
"""

SIGNAL_IN_EVALUATION = """
from llip_jax.evaluation import evaluator
eval_blocks = evaluator.eval_blocks
evaluations = []
def eval_blocks_and_signal(*arguments):
    evaluations.append(arguments)
    for block in eval_blocks(*arguments):
        yield block
        if len(evaluations) == {evaluation}:
            os.kill(os.getpid(), signal.SIGTERM)
# The last block's progress is reported before the generator goes on: let the signal come after the first block.
evaluator.eval_blocks = eval_blocks_and_signal
"""


def saved_state(workdir: Path, step: int) -> TrainState:
    config = read_config(workdir)
    spec = state_spec(config, make_optimizer(config.optimizer, config.train.steps), make_mesh(config.mesh))
    return Checkpoints(workdir / "checkpoints", config.checkpoint, read_only=True).restore(step, spec.abstract)[0]


def assert_same_run(workdir: Path, reference: Path) -> None:
    """Equal log lines, evaluations, and last state (parameters, both moments, counters): every bit."""
    assert numbers(workdir) == numbers(reference)
    names = sorted(path.name for path in (reference / "eval").iterdir())
    assert names == sorted(path.name for path in (workdir / "eval").iterdir())
    for name in names:
        assert (workdir / "eval" / name).read_text() == (reference / "eval" / name).read_text()
    last = read_config(reference).train.steps
    states = [dict(jax.tree_util.tree_leaves_with_path(saved_state(run, last))) for run in (workdir, reference)]
    assert len(states[0]) == len(states[1]) > 60
    for path, array in states[0].items():
        assert np.array_equal(array, states[1][path]), jax.tree_util.keystr(path)


def unfinished(workdir: Path) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints").iterdir() if "tmp" in path.name)


def complete(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def test_a_run_stopped_in_every_way_equals_one_never_stopped(tmp_path: Path) -> None:
    run = tmp_path / "run"

    killed = train(run, hook=KILL_WHILE_SAVING.format(event="rename", step=4))
    assert killed.returncode == -signal.SIGKILL
    assert unfinished(run) == ["4.orbax-checkpoint-tmp"], "the kill must have torn a checkpoint"
    assert complete(run) == [2, 3], "an evaluation begins with a save"

    stopped = train(run, hook=SIGNAL_IN_STEP.format(step=5, signal="SIGTERM"))
    assert stopped.returncode == 75, stopped.stderr
    assert "going on from step 3" in stopped.stdout
    assert "stopped by SIGTERM after step 5" in stopped.stdout
    assert unfinished(run) == []
    assert complete(run) == [3, 4, 5]

    stopped = train(run, hook=SIGNAL_IN_EVALUATION.format(evaluation=1))
    assert stopped.returncode == 75, stopped.stderr
    assert "going on from step 5" in stopped.stdout
    assert "stopped by SIGTERM after step 6" in stopped.stdout
    assert not (run / "eval/6.json").exists(), "the evaluation must have been cut short"

    finished = train(run)
    assert finished.returncode == 0, finished.stderr
    assert "going on from step 6" in finished.stdout
    assert [line["step"] for line in metrics(run)] == list(range(1, TINY["train.steps"] + 1))
    assert_same_run(run, finished_run())


@pytest.mark.parametrize("seconds", [1.5, 3.0])
def test_a_signal_while_libraries_are_imported_is_a_stop_like_any_other(tmp_path: Path, seconds: float) -> None:
    hook = f"import threading; threading.Timer({seconds}, os.kill, (os.getpid(), signal.SIGTERM)).start()"
    done = train(tmp_path / "run", hook=hook)
    assert done.returncode == 75, done.stderr
    assert "stopped by SIGTERM before the first step: nothing to save" in done.stdout


LOSE_DIRECTORY = """
from llip_jax.training.recorder import Recorder
add = Recorder.add
def add_and_lose(self, step, *arguments):
    add(self, step, *arguments)
    if step == {step}:
        folder = sys.argv[sys.argv.index("--workdir") + 1]
        os.rename(folder, folder + "_gone")
        {then}
Recorder.add = add_and_lose
"""


@pytest.mark.parametrize(
    ("step", "then"), [(8, "pass"), pytest.param(5, "os.kill(os.getpid(), signal.SIGTERM)", marks=pytest.mark.slow)]
)
def test_a_last_save_that_fails_is_no_success(tmp_path: Path, step: int, then: str) -> None:
    done = train(tmp_path / "run", {"eval.every_steps": 100}, hook=LOSE_DIRECTORY.format(step=step, then=then))
    assert done.returncode == 1, done.stdout
    assert "error: " in done.stderr
    assert "saved, the same command" not in done.stdout and "Training goes on" not in done.stderr
    assert 2 in complete(tmp_path / "run_gone")


def test_finished_run_stays_as_it_is(tmp_path: Path) -> None:
    run = shutil.copytree(finished_run(), tmp_path / "run")
    done = train(run)
    assert done.returncode == 0, done.stderr
    assert (run / "metrics.jsonl").read_text() == (finished_run() / "metrics.jsonl").read_text()
    assert_same_run(run, finished_run())


@pytest.mark.slow
def test_stopped_in_an_evaluation_between_checkpoints(tmp_path: Path) -> None:
    """The step is saved then, although no checkpoint was due; also with unreadable images and sparse log lines."""
    world = ToyWorld(tiny_config().data.toyworld, "train", image_size=20)
    lines = []
    for index in range(80):
        record = world[index]
        image = tmp_path / f"{index}.png"
        Image.fromarray(record.image).save(image)
        if index % 5 == 0:
            image.write_bytes(b"not an image")
        lines.append({"image": image.name, "captions": record.captions, "label": str(record.fields["label"])})
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    fields = {
        "data.source": "folder",
        "data.path": tmp_path,
        "data.label_field": "label",
        "data.folder.eval_fraction": 0.4,
        "data.limits.replaced_share": 1.0,
        "data.augment.flip": True,
        "data.augment.crop_scale": "(0.5,1.0)",
        "checkpoint.every_steps": 100,
        "train.log_every_steps": 4,
    }
    reference, run = tmp_path / "reference", tmp_path / "run"
    assert train(reference, fields).returncode == 0

    stopped = train(run, fields, hook=SIGNAL_IN_EVALUATION.format(evaluation=1))
    assert stopped.returncode == 75, stopped.stderr
    assert "stopped by SIGTERM after step 3" in stopped.stdout
    assert complete(run) == [3]
    assert not (run / "eval/3.json").exists()
    assert train(run, fields).returncode == 0
    assert metrics(run)[-1]["replaced_by_reason"] == {"not_an_image": metrics(run)[-1]["replaced_samples"]}
    assert metrics(run)[-1]["replaced_samples"] > 0
    assert json.loads((run / "eval/3.json").read_text())["unreadable_images"] > 0
    assert_same_run(run, reference)


def test_torn_last_line_of_metrics_is_dropped(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": step / 10}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines)[:-4])
    writer = MetricsWriter(tmp_path, start_step=5)
    writer.write(6, {"loss": None})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [*lines[:2], '{"step": 6, "loss": null}']


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_any_sequence_of_stops(tmp_path: Path, seed: int) -> None:
    chance, run = random.Random(seed), tmp_path / "run"
    code, attempts = None, 0
    while code != 0:
        hooks = [
            KILL_WHILE_SAVING.format(event=chance.choice(["mkdir", "rename"]), step=chance.choice([2, 4, 6, 8])),
            SIGNAL_IN_STEP.format(step=chance.randrange(1, 9), signal=chance.choice(["SIGTERM", "SIGINT", "SIGKILL"])),
            SIGNAL_IN_EVALUATION.format(evaluation=chance.choice([1, 2])),
            "",
        ]
        done = train(run, hook=chance.choice(hooks))
        code, attempts = done.returncode, attempts + 1
        assert code in (0, 75, -signal.SIGKILL), done.stderr
        assert attempts < 50
    assert_same_run(run, finished_run())


def test_evaluations_of_steps_that_are_done_again_are_done_again(tmp_path: Path) -> None:
    """A run that died after evaluating a step it had not saved may come back to it with other parameters."""
    workdir = shutil.copytree(finished_run(), tmp_path / "run")
    for step in (6, 8):
        shutil.rmtree(workdir / "checkpoints" / str(step))
        (workdir / "eval" / f"{step}.json").write_text("{}")
    assert train(workdir).returncode == 0
    for step in (3, 6, 8):
        name = f"eval/{step}.json"
        assert (workdir / name).read_text() == (finished_run() / name).read_text()
