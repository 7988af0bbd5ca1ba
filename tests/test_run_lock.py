"""Two runs on one run directory, as real processes: one of them is refused, or takes over from one that is gone."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from run_helpers import ROOT

from llip_jax.command_line import RunFailed
from llip_jax.config import ConfigError
from llip_jax.training.run_lock import RunLock

BEAT_S = 0.1

PROGRAM = """
import sys, time
from pathlib import Path
from llip_jax.command_line import RunFailed
from llip_jax.training.run_lock import RunLock
workdir, machine = Path(sys.argv[1]), sys.argv[2] or None
try:
    with RunLock(workdir, machine=machine, beat_s=float(sys.argv[3])) as lock:
        print("holding", flush=True)
        if sys.argv[4] == "end":
            sys.exit(0)
        while True:
            time.sleep(0.01)
            (workdir / "written").write_text(str(time.monotonic()))
except RunFailed as error:
    sys.exit(f"refused: {error}")
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a run; waits until it holds the lock, unless ``expect`` is ""."""
    started = []

    def run(workdir: Path, machine: str = "", expect: str = "holding", then: str = "hold") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(workdir), machine, str(BEAT_S), then],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        if expect:
            assert expect in "".join(iter(process.stdout.readline, f"{expect}\n")) + expect
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def killed(process: subprocess.Popen[str]) -> subprocess.Popen[str]:
    """Dead, but still in the table of processes, as where a container's first process waits for none."""
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    return process


def holder(workdir: Path) -> int:
    return json.loads((workdir / "run.lock").read_text())["pid"]


@pytest.mark.parametrize("machine", ["", "another"], ids=["same machine", "another machine"])
def test_a_second_run_is_refused_and_told_who_holds_the_directory(tmp_path: Path, start: Start, machine: str) -> None:
    first = start(tmp_path)
    second = start(tmp_path, machine, expect="")
    _, err = second.communicate(timeout=30)
    assert second.returncode == 1
    assert re.search(rf"refused: --workdir: {tmp_path} is in use by process {first.pid} on \S+ \(since 2", err)
    assert "taken over by itself" in err
    assert first.poll() is None and holder(tmp_path) == first.pid


def test_a_run_that_ends_leaves_no_lock(tmp_path: Path, start: Start) -> None:
    run = start(tmp_path / "new" / "run", then="end")
    assert run.wait(30) == 0
    assert list((tmp_path / "new" / "run").iterdir()) == []


def test_a_killed_run_is_taken_over_at_once_on_the_same_machine(tmp_path: Path, start: Start) -> None:
    killed(start(tmp_path))
    with RunLock(tmp_path, beat_s=60, sleep=lambda _: pytest.fail("waited")):
        pass
    killed(start(tmp_path)).wait()
    with RunLock(tmp_path, beat_s=60, sleep=lambda _: pytest.fail("waited")):
        pass


def test_a_process_id_used_again_is_not_the_holder(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        content = json.loads((tmp_path / "run.lock").read_text())
    assert content["started"].isdigit()
    (tmp_path / "run.lock").write_text(json.dumps({**content, "started": "1"}))
    with RunLock(tmp_path, sleep=lambda _: pytest.fail("waited")):
        pass


def test_a_killed_run_is_taken_over_from_another_machine_after_three_beats_without_a_move(
    tmp_path: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    killed(start(tmp_path))
    waits: list[float] = []
    with RunLock(tmp_path, machine="another", beat_s=7, sleep=waits.append):
        pass
    assert waits == [7, 7, 7]
    assert "watching for 21 s" in capsys.readouterr().out


@pytest.mark.parametrize("beats", [1, 2, 3])
def test_one_move_within_three_beats_is_life(tmp_path: Path, beats: int) -> None:
    lock, waits = tmp_path / "run.lock", []
    with RunLock(tmp_path):
        content = json.loads(lock.read_text())

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == beats:
            lock.write_text(json.dumps({**content, "beat": 1}))

    lock.write_text(json.dumps(content))
    with pytest.raises(RunFailed, match="in use by process"), RunLock(tmp_path, machine="another", sleep=sleep):
        pass
    assert len(waits) == beats


def test_a_lock_released_while_it_is_watched_is_taken(tmp_path: Path) -> None:
    lock = tmp_path / "run.lock"
    lock.write_text("")  # torn
    with RunLock(tmp_path, sleep=lambda _: lock.unlink()):
        assert holder(tmp_path)


def test_a_frozen_run_that_was_taken_over_ends_itself_and_leaves_the_new_lock(tmp_path: Path, start: Start) -> None:
    frozen = start(tmp_path)
    frozen.send_signal(signal.SIGSTOP)
    second = start(tmp_path, "another")
    assert holder(tmp_path) == second.pid
    frozen.send_signal(signal.SIGCONT)
    _, err = frozen.communicate(timeout=BEAT_S + 2)
    assert frozen.returncode == 1
    assert f"process {second.pid} on" in err and "has taken over" in err
    time.sleep(3 * BEAT_S)
    assert second.poll() is None and holder(tmp_path) == second.pid
    assert [path.name for path in tmp_path.iterdir() if "lock" in path.name] == ["run.lock"]


def test_a_check_before_a_save_notices_what_the_next_beat_would(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from llip_jax.training.run_lock import RunLock\n"
        "workdir = Path(sys.argv[1])\n"
        "with RunLock(workdir, beat_s=60) as lock:\n"
        "    lock.check(); print('own')\n"
        "    record = (workdir / 'run.lock').read_bytes()\n"
        "    for size in range(0, len(record), 50): (workdir / 'run.lock').write_bytes(record[:size]); lock.check()\n"
        "    print('torn')\n"
        "    (workdir / 'run.lock').unlink(); lock.check(); print('none')\n"
        "    from llip_jax.parallel import processes\n"
        "    processes.report = lambda *told: (print(*told, flush=True), time.sleep(60))  # a store that is gone\n"
        "    other = RunLock(workdir).__enter__(); lock.check(); print('written')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    *seen, told = done.stdout.splitlines()
    assert seen == ["own", "torn", "none"]
    assert told.startswith("1 error: process") and "has taken over" in told
    assert "has taken over" in done.stderr and (tmp_path / "run.lock").exists()


def test_the_record_stays_as_long_whatever_its_number(tmp_path: Path) -> None:
    sizes, beat = set(), 0
    with RunLock(tmp_path, beat_s=1e-3):
        while beat < 101:
            content = (tmp_path / "run.lock").read_bytes()
            sizes.add(len(content))
            beat = int(re.findall(rb'"beat": (\d+)', content)[0])
    assert len(sizes) == 1


def test_of_many_newcomers_at_a_stale_lock_one_gets_it(tmp_path: Path, start: Start) -> None:
    killed(start(tmp_path))
    newcomers = [start(tmp_path, expect="") for _ in range(5)]
    deadline = time.monotonic() + 60
    while len(alive := [each for each in newcomers if each.poll() is None]) > 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(3 * BEAT_S)
    assert [process.pid for process in alive if process.poll() is None] == [holder(tmp_path)]


def test_of_two_newcomers_at_the_same_moment_exactly_one_gets_the_lock(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        stale = json.dumps({**json.loads((tmp_path / "run.lock").read_text()), "started": "1"})

    def enter(_: int) -> RunLock | None:
        lock = RunLock(tmp_path)
        barrier.wait()
        try:
            return lock.__enter__()
        except RunFailed:
            return None

    barrier = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(20):
            (tmp_path / "run.lock").write_text(stale)
            (winner,) = filter(None, pool.map(enter, range(2)))
            winner.__exit__()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workdir", ["file", "file/run"])
def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path, workdir: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--workdir: cannot write to"), RunLock(tmp_path / workdir):
        pass
