"""Runs of several processes: one run to them all, whoever is told to stop, killed or frozen."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from run_helpers import ended, metrics, start_processes, train, train_command, train_on_processes
from test_resume import assert_same_run

from llip_jax.config import ConfigError
from llip_jax.training.trainer import tells_of_a_lost_process

MESH = {"mesh.data": 2, "mesh.fsdp": 4}
"""Eight devices, however many processes they are in."""

SIGNAL_ONE = """
if sys.argv[-1] == "1":
    from llip_jax.training.recorder import Recorder
    add = Recorder.add
    def add_and_signal(self, step, *arguments):
        add(self, step, *arguments)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
    Recorder.add = add_and_signal
"""

FREEZE_ONE = """
if sys.argv[-1] == "1":
    from llip_jax.training.recorder import Recorder
    add = Recorder.add
    def add_and_freeze(self, step, *arguments):
        add(self, step, *arguments)
        if step == 4:
            os.kill(os.getpid(), signal.SIGSTOP)
    Recorder.add = add_and_freeze
"""


def test_bad_input_is_not_taken_for_a_lost_process() -> None:
    assert tells_of_a_lost_process(ValueError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer"))
    assert not tells_of_a_lost_process(
        ConfigError("data.path: 100 samples in a row cannot be used: Connection refused")
    )
    assert not tells_of_a_lost_process(ValueError("operands could not be broadcast together"))


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_a_save_and_another_number_goes_on(tmp_path: Path) -> None:
    fields = {"mesh.data": 2, "mesh.fsdp": 2, "train.steps": 7, "eval.every_steps": 7}
    stopped = train_on_processes(tmp_path / "run", fields, processes=2, devices=2, hook=SIGNAL_ONE)
    assert [done.returncode for done in stopped] == [75, 75], stopped[0].stderr
    assert "stopped by a signal to another process after step 6" in stopped[0].stdout
    assert "stopped by" not in stopped[1].stdout, "one process speaks for all"

    finished = train(tmp_path / "run", fields, devices=4)
    assert finished.returncode == 0, finished.stderr
    assert "going on from step 6" in finished.stdout

    alone = train(tmp_path / "alone", fields, devices=4)
    assert alone.returncode == 0, alone.stderr
    ours, theirs = metrics(tmp_path / "run"), metrics(tmp_path / "alone")
    assert [line["sample_hash"] for line in ours] == [line["sample_hash"] for line in theirs]
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], abs=5e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices", "mesh"), [(2, 4, MESH), (4, 2, MESH), (4, 4, {"mesh.fsdp": 4})])
def test_losses_are_those_of_one_process(tmp_path: Path, processes: int, devices: int, mesh: dict[str, int]) -> None:
    several = train_on_processes(tmp_path / "several", mesh, processes=processes, devices=devices)
    assert [done.returncode for done in several] == [0] * processes, several[0].stderr
    alone = train(tmp_path / "alone", mesh, devices=processes * devices)
    assert alone.returncode == 0, alone.stderr
    ours, theirs = metrics(tmp_path / "several"), metrics(tmp_path / "alone")
    assert [line["sample_hash"] for line in ours] == [line["sample_hash"] for line in theirs]
    # Sums over devices are made in another order where processes exchange them.
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], abs=5e-6)
    assert {path.name for path in (tmp_path / "several/eval").iterdir()} == {"3.json", "6.json", "8.json"}


@pytest.mark.slow
def test_a_frozen_process_ends_the_others(tmp_path: Path) -> None:
    fields = MESH | {"faults.process_s": 10.0, "faults.step_s": 60.0}
    started = start_processes(train_command(tmp_path / "run", fields, FREEZE_ONE), 2, 4)
    begun = time.monotonic()
    try:
        assert started[0].wait(timeout=200) != 0
    finally:
        started[1].kill()
    print(f"ended after {time.monotonic() - begun:.0f} s, start-up included")
    finished = train_on_processes(tmp_path / "run", MESH)
    assert [done.returncode for done in finished] == [0, 0], finished[0].stderr


KILLS = int(os.environ.get("LLIP_JAX_KILLS", 20))


def interrupted(workdir: Path, reference: Path, number: signal.Signals, times: int) -> None:
    """Sends a signal at random moments and starts again on two or four processes, until a run, or several where one is
    not long enough, has been interrupted so often; what it comes to must be the reference, bit by bit.

    SIGKILL goes to one process, SIGTERM to all, as a scheduler sends them.
    """
    rng = random.Random()
    faults = {"faults.process_s": 10.0, "faults.start_s": 150.0, "faults.step_s": 100.0}
    left = times
    while left:
        shutil.rmtree(workdir, ignore_errors=True)
        codes = [1]
        while any(codes):
            processes = rng.choice((2, 4))
            started = start_processes(train_command(workdir, MESH | faults, ""), processes, 8 // processes)
            begun, moment = time.monotonic(), rng.uniform(2, 45)
            while time.monotonic() - begun < moment and all(process.poll() is None for process in started):
                time.sleep(0.05)
            hit = left > 0 and all(process.poll() is None for process in started)
            if hit:
                for process in [rng.choice(started)] if number == signal.SIGKILL else started:
                    process.send_signal(number)
            sent = time.monotonic()
            done = ended(started, timeout=400)  # those that wait for one that never came have patience for 300 s
            codes = [process.returncode for process in done]
            errors = [process.stderr[-3000:] for process in done]
            if any(codes):
                assert hit, f"ended with {codes} by itself: {errors}"
                assert all(codes) if number == signal.SIGKILL else set(codes) == {75}, f"{codes}: {errors}"
                left -= 1
                seconds = time.monotonic() - sent
                print(f"{number.name} after {moment:.1f} s of {processes}: {codes} {seconds:.1f} s later, {left} left")
        assert_same_run(workdir, reference)


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_interrupted_at_random_moments_it_is_the_same_run(tmp_path: Path, number: signal.Signals) -> None:
    whole = train_on_processes(tmp_path / "whole", MESH)
    assert [done.returncode for done in whole] == [0, 0], whole[0].stderr
    interrupted(tmp_path / "run", tmp_path / "whole", number, KILLS)
