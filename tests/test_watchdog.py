"""Hangs, in real processes: each ends in time and says where it was."""

import faulthandler
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_helpers import ROOT, ended, start_processes

from llip_jax.training.watchdog import Watchdog

DEADLINE_S = 0.5

PROGRAM = """
import re, sys, threading, time
from pathlib import Path
from llip_jax.training.watchdog import Watchdog
{before}
def stuck_here():
    {hang}
with Watchdog(Path(sys.argv[1]), 3) as watchdog:
    watchdog.beat(3600, "the first step")
    watchdog.beat({deadline}, "step 12")
    print("ready", flush=True)
    {call}
"""


def hang(workdir: Path, what: str, before: str = "", call: str = "stuck_here()") -> tuple[float, int, str]:
    """Seconds until the process ended, its exit code, and what it wrote to standard error."""
    program = PROGRAM.format(hang=what, before=before, call=call, deadline=DEADLINE_S)
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(workdir)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    begun = time.monotonic()
    _, err = process.communicate(timeout=30)
    return time.monotonic() - begun, process.returncode, err


@pytest.mark.parametrize(
    "what",
    [
        "time.sleep(60)",
        "lock = threading.Lock(); lock.acquire(); lock.acquire()",
        "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 200_000_000)",
    ],
    ids=["sleep", "lock", "c call"],
)
def test_a_hang_ends_in_time_and_says_where_and_what_to_do(what: str, tmp_path: Path) -> None:
    seconds, code, err = hang(tmp_path, what)
    assert code == 1
    assert DEADLINE_S <= seconds < DEADLINE_S + 2
    (kept,) = (tmp_path / "hangs").glob("*-process3.txt")
    for text in (err, kept.read_text()):
        assert "in stuck_here" in text
        assert f"process 3 has waited more than {DEADLINE_S} s for step 12" in text
        assert "faults.step_s" in text


def test_a_hang_of_another_thread_than_the_main_one_is_shown_as_well(tmp_path: Path) -> None:
    _, code, err = hang(tmp_path, "time.sleep(60)", call="t = threading.Thread(target=stuck_here); t.start(); t.join()")
    assert code == 1
    assert "in stuck_here" in err and "in join" in err


def test_a_hang_that_holds_the_interpreter_lock_ends_in_time(tmp_path: Path) -> None:
    seconds, code, err = hang(tmp_path, "re.match(r'(a+)+$', 'a' * 60 + 'b')")
    assert code == 1
    assert DEADLINE_S <= seconds < DEADLINE_S + 2
    assert "in stuck_here" in err


def test_the_other_processes_are_told_after_the_traces_are_kept(tmp_path: Path) -> None:
    before = (
        "from llip_jax.parallel import processes\n"
        "def report(code, text):\n"
        "    print(f'REPORT {code} {text}', len(list(Path(sys.argv[1], 'hangs').iterdir())), file=sys.stderr)\n"
        "    time.sleep(60)  # a store that is gone\n"
        "processes.report = report"
    )
    seconds, code, err = hang(tmp_path, "time.sleep(60)", before)
    assert code == 1
    assert seconds < DEADLINE_S + 7
    (told,) = [line for line in err.splitlines() if line.startswith("REPORT")]
    assert told.startswith("REPORT 1 error: process 3 has waited more than") and told.endswith(" were 1")
    assert err.count("Current thread") == 1


@pytest.mark.slow
def test_a_hang_of_one_process_is_printed_by_the_others(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path\n"
        "from llip_jax.parallel import processes; from llip_jax.training.watchdog import Watchdog\n"
        "flags = dict(zip(sys.argv[1::2], sys.argv[2::2])); index = int(flags['--process'])\n"
        "processes.start(processes.ProcessFlags(flags['--coordinator'], 2, index), {}, 30.0)\n"
        f"with processes.ErrorBoard(), Watchdog(Path({str(tmp_path)!r}), index) as watchdog:\n"
        "    watchdog.beat(0.5 if index else None, 'step 12'); time.sleep(60)\n"
    )
    done = ended(start_processes(["-c", program], 2, 1), timeout=50)
    assert [process.returncode for process in done] == [1, 1], done
    assert "process 1 of 2" in done[0].stderr and "has waited more than 0.5 s for step 12" in done[0].stderr
    (kept,) = (tmp_path / "hangs").glob("*-process1.txt")
    assert "most recent call first" in kept.read_text()


def test_a_run_directory_that_hangs_does_not_keep_the_process(tmp_path: Path) -> None:
    """Opening a file in it never returns, as on a server that is gone."""
    before = "def opened(*_): time.sleep(60)\nPath.open = opened"
    seconds, code, err = hang(tmp_path, "time.sleep(60)", before)
    assert code == 1
    assert seconds < DEADLINE_S + 2
    assert "in stuck_here" in err and "step 12" in err


def test_a_run_directory_that_is_gone_does_not_keep_the_traces_from_standard_error(tmp_path: Path) -> None:
    _, code, err = hang(tmp_path / "gone" / "run", "time.sleep(60)")
    assert code == 1
    assert "in stuck_here" in err and "step 12" in err


def test_beats_in_time_no_deadline_and_the_end_keep_the_process_alive(tmp_path: Path) -> None:
    steps = "[(watchdog.beat(0.3, 'a step'), time.sleep(0.1)) for _ in range(8)]"
    program = PROGRAM.format(
        hang="pass",
        before="",
        deadline=DEADLINE_S,
        call=f"{steps}; watchdog.beat(None, ''); time.sleep(1.4); watchdog.beat(0.3, 'the end')",
    )
    done = subprocess.run(
        [sys.executable, "-c", program + "\ntime.sleep(1.4)", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert not (tmp_path / "hangs").exists()


def test_a_beat_is_cheap(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0) as watchdog:
        begun = time.perf_counter()
        for step in range(1000):
            watchdog.beat(600, f"step {step}")
        assert (time.perf_counter() - begun) / 1000 < 1e-3
    faulthandler.cancel_dump_traceback_later()
