"""Traces are made in processes of their own: the profiler is one for a process, and so are its devices."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from run_helpers import ROOT

from llip_jax.config import ConfigError
from llip_jax.training.profiling import parse_profile

_SESSIONS = """
import contextlib, json, sys
from pathlib import Path
import jax, jax.numpy as jnp
from llip_jax.training.profiling import Profile, parse_profile

sessions, *processes = sys.argv[1:]
if processes:
    jax.distributed.initialize(processes[0], 2, int(processes[1]))
multiply = jax.jit(lambda x: x @ x / 64)
for session in json.loads(sessions):
    workdir, x, flushes = Path(session["workdir"]), multiply(jnp.ones((64, 64))), 0

    def flush():
        global flushes
        flushes += 1
        x.block_until_ready()

    with (
        (workdir / f"said-{jax.process_index()}").open("w") as said,
        contextlib.redirect_stdout(said),
        contextlib.suppress(FloatingPointError),
        contextlib.closing(Profile(parse_profile(session["steps"]), workdir, flush)) as profile,
    ):
        for step in [*range(session["first"], session["last"] + 1), *session["again"]]:
            with profile.step(step):
                if step == session["failing"]:
                    raise FloatingPointError("diverged")
                x = multiply(x)
        print("flushes", flushes)
"""


def session(
    workdir: Path, steps: str, first: int, last: int, *, failing: int = 0, again: tuple[int, ...] = ()
) -> dict[str, Any]:
    """Steps ``first`` to ``last`` of a run, the profile being of ``steps``; then those it does ``again``."""
    workdir.mkdir(exist_ok=True)
    return {"workdir": str(workdir), "steps": steps, "first": first, "last": last, "failing": failing, "again": again}


def start(sessions: list[dict[str, Any]], *process: str) -> subprocess.Popen[str]:
    """A process that goes through them."""
    command = [sys.executable, "-c", _SESSIONS, json.dumps(sessions), *process]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def traces(workdir: Path) -> dict[str, list[int]]:
    """Steps in every trace, read by jax from the files that XProf reads."""
    return {
        str(path.relative_to(workdir / "profile" / "plugins" / "profile")): sorted(_steps(path))
        for path in workdir.rglob("*.xplane.pb")
    }


def _steps(path: Path) -> Iterator[int]:
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                if event.name == "train":
                    yield dict(event.stats)["step_num"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs, each with one session, all done by one process."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "unwritable").mkdir()
    (folder / "unwritable" / "profile").write_text("in the way")
    sessions = [
        session(folder / "whole", "3:5", 1, 9),
        session(folder / "begins_late", "3:5", 4, 9),
        session(folder / "ends_early", "3:5", 1, 4),
        session(folder / "fails", "3:5", 1, 9, failing=5),
        session(folder / "too_late", "3:5", 6, 8),
        session(folder / "one", "2:2", 1, 3),
        session(folder / "goes_back", "2:3", 1, 5, again=(2, 3, 4)),
        session(folder / "unwritable", "3:5", 1, 8),  # the last: jax goes on believing in its trace
    ]
    end(start(sessions))
    return folder


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("whole", [3, 4, 5]),
        ("begins_late", [4, 5]),
        ("ends_early", [3, 4]),
        ("fails", [3, 4]),
        ("one", [2]),
        ("goes_back", [2, 3]),
    ],
)
def test_those_steps_are_traced_that_were_asked_for_and_done(folder: Path, name: str, steps: list[int]) -> None:
    workdir = folder / name
    [(trace, traced)] = traces(workdir).items()
    assert trace.startswith(f"steps_{steps[0]}-{steps[-1]}/")
    # The step that fails is in the trace too.
    assert traced == steps + [5] * (name == "fails")
    said = (workdir / "said-0").read_text()
    assert f"profile of steps {steps[0]} to {steps[-1]} in {workdir}/profile" in said
    assert not list(workdir.rglob(".unfinished*"))


def test_a_trace_begins_and_ends_when_the_devices_have_nothing_else_to_do(folder: Path) -> None:
    assert "flushes 2" in (folder / "whole" / "said-0").read_text()
    assert "flushes 0" in (folder / "too_late" / "said-0").read_text()


def test_steps_that_a_session_does_not_reach_are_named(folder: Path) -> None:
    said = (folder / "too_late" / "said-0").read_text()
    assert "no profile: steps 3 to 5 were not among those of this session" in said
    assert not (folder / "too_late" / "profile").exists()


def test_a_trace_that_cannot_be_written_does_not_end_the_run(folder: Path) -> None:
    said = (folder / "unwritable" / "said-0").read_text()
    assert "no profile: " in said and "flushes 2" in said


def test_processes_of_one_host_keep_their_traces_apart_in_one_run(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [start([session(tmp_path, "2:3", 1, 4)], address, str(process)) for process in range(2)]
    for process in processes:
        end(process)
    said = [(tmp_path / f"said-{process}").read_text() for process in range(2)]
    assert "profile of steps 2 to 3" in said[0] and "profile" not in said[1]
    found = traces(tmp_path)
    assert list(found.values()) == [[2, 3]] * 2
    assert {name.partition("/")[0] for name in found} == {"steps_2-3"}
    assert {name.partition("_process_")[2] for name in found} == {"0.xplane.pb", "1.xplane.pb"}


def test_steps_are_both_included() -> None:
    assert parse_profile("100:110") == range(100, 111)
    assert parse_profile("1:1") == range(1, 2)


@pytest.mark.parametrize("text", ["", "5", "5:", ":5", "0:3", "7:3", "-1:3", "1:2:3", "a:b", "1.0:2", " 1:2", "٣:٤"])
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--profile: .* expected FIRST:LAST, .* as in 100:104"):
        parse_profile(text)
