"""Steps whose numbers are wrong: a run that goes back passes over their batches, and is the same after a kill."""

import signal
from pathlib import Path

from run_helpers import metrics, numbers, train

POISON = """
from llip_jax.data import pipeline
read = pipeline.BatchReader.__call__
def read_with_a_bad_batch(self, number):
    batch = read(self, number)
    if number == 4:  # of step 5
        batch["caption_weight"][...] = float("nan")
    return batch
pipeline.BatchReader.__call__ = read_with_a_bad_batch
"""

KILL_AT_6 = """
from llip_jax.training.recorder import Recorder
add = Recorder.add
def add_and_kill(self, step, *arguments):
    add(self, step, *arguments)
    if step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
Recorder.add = add_and_kill
"""

FIELDS = {"faults.not_finite": "rewind", "eval.every_steps": 8, "checkpoint.every_steps": 3}


def test_a_run_that_goes_back_passes_over_the_batches_and_does_so_again_after_a_kill(tmp_path: Path) -> None:
    done = train(tmp_path / "run", FIELDS, hook=POISON)
    assert done.returncode == 0, done.stderr
    assert "step 5: loss 0, gradient norm nan" in done.stdout
    assert "back to step 3; the 2 batches since are passed over (2 in all so far)" in done.stdout
    lines = numbers(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 9))

    clean = train(tmp_path / "clean", FIELDS | {"train.steps": 10, "optimizer.warmup_steps": 2})
    assert clean.returncode == 0, clean.stderr
    hashes = [line["sample_hash"] for line in metrics(tmp_path / "clean")]
    # Steps 4 and 5 see what steps 6 and 7 would have seen, and so on.
    assert [line["sample_hash"] for line in lines] == hashes[:3] + hashes[5:10]

    killed = train(tmp_path / "killed", FIELDS, hook=POISON + KILL_AT_6)
    assert killed.returncode == -signal.SIGKILL
    finished = train(tmp_path / "killed", FIELDS, hook=POISON)
    assert finished.returncode == 0, finished.stderr
    assert numbers(tmp_path / "killed") == lines


def test_without_a_checkpoint_to_go_back_to_the_run_ends(tmp_path: Path) -> None:
    done = train(tmp_path, FIELDS | {"checkpoint.every_steps": 100}, hook=POISON)
    assert done.returncode == 1
    assert "there is no checkpoint to go back to" in done.stderr and "Traceback" not in done.stderr


def test_a_skipped_update_is_counted_and_the_run_goes_on(tmp_path: Path) -> None:
    done = train(tmp_path, FIELDS | {"faults.not_finite": "skip"}, hook=POISON)
    assert done.returncode == 0, done.stderr
    lines = metrics(tmp_path)
    assert [line["skipped_updates"] for line in lines] == [0] * 4 + [1] * 4
    assert lines[4]["grad_norm"] is None and lines[5]["grad_norm"] is not None
    assert "step 5: loss 0, gradient norm nan" in done.stdout + done.stderr
