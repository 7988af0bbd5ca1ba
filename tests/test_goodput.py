"""Stories with an injected clock; every figure is worked out by hand in the test."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llip_jax.config import ConfigError
from llip_jax.sessions import FILE, Session, duration, parse_sessions, read_sessions, summary, table
from llip_jax.training.goodput import Goodput


class World:
    """A run directory, and clocks that somebody else moves. ``skew``: how far the wall clock is off."""

    def __init__(self, workdir: Path):
        self.workdir = workdir
        self.now = 1_000_000.0
        self.skew = 0.0

    def session(self, ideal_step_s: float | None = 1.0) -> Goodput:
        return Goodput(
            self.workdir,
            batch_size=8,
            ideal_step_s=ideal_step_s,
            clock=lambda: self.now - 999_000,
            wall_clock=lambda: self.now + self.skew,
        )

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def start(self, goodput: Goodput, step: int) -> None:
        """16 s: 3 of start, 8 for the compiler, 5 to restore."""
        with goodput.phase("start"):
            self.sleep(3)
        with goodput.phase("restore"):
            self.sleep(5)
        goodput.resumed(step)
        with goodput.phase("compile"):
            self.sleep(8)

    def steps(self, goodput: Goodput, first: int, last: int) -> None:
        """2.5 s each, of which half a second for data."""
        for step in range(first, last + 1):
            self.sleep(2.5)
            goodput.step(step, 2.5, 0.5)
            goodput.log()

    @property
    def sessions(self) -> list[Session]:
        return read_sessions(self.workdir / FILE)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_session_without_troubles(world: World) -> None:
    goodput = world.session()
    world.start(goodput, 0)
    world.steps(goodput, 1, 10)
    with goodput.phase("save"):
        world.sleep(1)
    with goodput.phase("evaluation"):
        world.sleep(4)
        with goodput.phase("save"):
            world.sleep(2)
        world.sleep(3)
    world.sleep(1)
    text = goodput.end("finished")
    figures = summary(world.sessions)
    # 16 + 10 x 2.5 + 1 + 9 + 1 = 52 s.
    assert figures.seconds == pytest.approx(
        {"step": 20, "data": 5, "start": 3, "restore": 5, "compile": 8, "save": 3, "evaluation": 7, "other": 1}
    )
    assert figures.total_s == pytest.approx(52)
    assert figures.goodput == pytest.approx(20 / 52)
    assert figures.step_time_s == pytest.approx(2.5)
    assert figures.examples_per_second == pytest.approx(8 / 2.5)
    assert figures.mfu == pytest.approx(1 / 2.5)
    assert figures.mfu_overall == pytest.approx(10 / 52)
    assert (figures.kept_steps, figures.lost_steps, figures.restarts) == (10, 0, {})
    [session] = world.sessions
    assert (session.first, session.last, session.end) == (0, 10, "finished")
    assert text.splitlines()[0] == "time: 52.0 s in 1 session; goodput 38.5%"
    assert "  waiting for data                5.0 s    9.6%" in text.splitlines()
    assert text.endswith("  2.5 s a step, 3.2 images/s, MFU 40.0% while training, 19.2% over all time")


def test_killed_in_the_middle_of_a_step_and_seven_steps_done_again(world: World) -> None:
    goodput = world.session()
    world.start(goodput, 0)
    world.steps(goodput, 1, 17)
    world.sleep(2)  # of step 18; then it is killed, and starts again after an hour
    world.sleep(3600)
    goodput = world.session()
    world.start(goodput, 10)
    world.steps(goodput, 11, 20)
    text = goodput.end("finished")
    figures = summary(world.sessions)
    assert (figures.kept_steps, figures.lost_steps) == (20, 7)
    # Step 18 is in no figure of the first session: its 2 s count as time between sessions.
    assert figures.seconds == pytest.approx(
        {"step": 40, "lost": 14, "data": 13.5, "start": 6, "restore": 10, "compile": 16, "idle": 3602}
    )
    assert figures.goodput == pytest.approx(40 / 3701.5)
    assert figures.mfu == pytest.approx(27 / 67.5)
    assert figures.mfu_overall == pytest.approx(20 / 3701.5)
    assert figures.restarts == {"killed": 1}
    assert text.startswith("time: 1 h 1 min in 2 sessions (1 restart: 1 killed); goodput 1.1%\n")
    assert "  steps done again later         14.0 s    0.4%  (7 steps)" in text.splitlines()


def test_killed_in_a_save(world: World) -> None:
    goodput = world.session()
    world.start(goodput, 0)
    world.steps(goodput, 1, 4)
    saving = goodput.phase("save")
    saving.__enter__()
    world.sleep(60)
    assert world.sessions[-1].phase == "save"
    goodput = world.session()
    world.start(goodput, 0)
    world.steps(goodput, 1, 4)
    goodput.end("stopped")
    figures = summary(world.sessions)
    assert (figures.kept_steps, figures.lost_steps) == (4, 4)
    assert figures.seconds["idle"] == pytest.approx(60)
    assert figures.total_s == pytest.approx(16 + 10 + 60 + 16 + 10)
    assert figures.goodput == pytest.approx(8 / 112)


def test_a_clock_that_went_back_leaves_the_pause_unknown(world: World) -> None:
    goodput = world.session()
    world.start(goodput, 0)
    world.steps(goodput, 1, 4)
    goodput.end("stopped")
    world.sleep(100)
    world.skew = -5000
    goodput = world.session()
    world.start(goodput, 4)
    world.steps(goodput, 5, 8)
    text = goodput.end("stopped")
    world.sleep(50)
    goodput = world.session()
    world.start(goodput, 8)
    goodput.end("failed")
    figures = summary(world.sessions)
    assert figures.idle_unknown == 1
    assert figures.seconds["idle"] == pytest.approx(50)
    assert figures.total_s == pytest.approx(2 * 26 + 16 + 50)
    assert figures.restarts == {"stopped": 2}
    assert "  and 1 between sessions of unknown length: the clocks disagree" in text.splitlines()


def test_a_clock_set_back_while_running_changes_no_measured_time(world: World) -> None:
    goodput = world.session()
    world.start(goodput, 0)
    world.skew = -90_000
    world.steps(goodput, 1, 4)
    goodput.end("stopped")
    world.sleep(30)
    goodput = world.session()
    world.start(goodput, 4)
    goodput.end("finished")
    figures = summary(world.sessions)
    assert figures.total_s == pytest.approx(26 + 30 + 16)
    assert figures.idle_unknown == 0


def test_each_return_behind_earlier_steps_loses_them_once(world: World) -> None:
    # 0 -> 10; 8 -> 12 (2 lost); 8 -> 9, killed before its save (4 lost); back to 4 as 8 is damaged: 5 of 8 and 9 lost.
    for first, last in ((0, 10), (8, 12), (8, 9)):
        goodput = world.session()
        goodput.resumed(first)
        world.steps(goodput, first + 1, last)
    goodput = world.session()
    goodput.resumed(4)
    world.steps(goodput, 5, 20)
    goodput.end("finished")
    figures = summary(world.sessions)
    assert figures.kept_steps == 20
    assert figures.lost_steps == (10 + 4 + 1 + 16) - 20
    assert figures.seconds["step"] == pytest.approx(40) and figures.seconds["lost"] == pytest.approx(22)


def test_a_rewind_loses_steps_of_its_own_and_of_earlier_sessions(world: World) -> None:
    goodput = world.session()
    goodput.resumed(0)
    world.steps(goodput, 1, 10)
    goodput.end("stopped")
    goodput = world.session()
    goodput.resumed(10)
    world.steps(goodput, 11, 15)
    goodput.resumed(12)
    world.steps(goodput, 13, 14)
    goodput.resumed(8)
    world.steps(goodput, 9, 20)
    goodput.end("finished")
    figures = summary(world.sessions)
    assert (figures.kept_steps, figures.lost_steps) == (20, 29 - 20)
    assert world.sessions[-1].first == 8


def test_random_histories_keep_each_step_once(world: World) -> None:
    rng = np.random.default_rng()
    sessions, owner, done = [], {}, 0
    for number in range(30):
        first = int(rng.integers(0, max(owner, default=0) + 1))
        last = first + int(rng.integers(0, 12))
        owner = {step: who for step, who in owner.items() if step <= first}
        owner |= dict.fromkeys(range(first + 1, last + 1), number)
        done += last - first
        seconds: dict[Any, float] = {"step": 3.0 * (last - first), "data": 0.0}
        sessions.append(
            Session(began=0, seen=0, batch_size=1, first=first, last=last, steps=last - first, seconds=seconds)
        )
    figures = summary(sessions)
    assert (figures.kept_steps, figures.lost_steps) == (len(owner), done - len(owner))
    assert figures.seconds.get("step", 0) == pytest.approx(3 * len(owner))


def test_time_after_a_finished_run_is_nobodys(world: World) -> None:
    goodput = world.session()
    goodput.resumed(0)
    world.steps(goodput, 1, 4)
    goodput.end("finished")
    world.sleep(1e6)
    goodput = world.session()
    goodput.resumed(4)
    world.steps(goodput, 5, 8)
    goodput.end("finished")
    figures = summary(world.sessions)
    assert figures.total_s == pytest.approx(20) and figures.restarts == {} and figures.goodput == pytest.approx(0.8)


def test_a_session_killed_before_its_first_step_counts_as_a_restart(world: World) -> None:
    goodput = world.session(ideal_step_s=None)
    starting = goodput.phase("compile")
    starting.__enter__()
    world.sleep(20)
    goodput = world.session(ideal_step_s=None)
    goodput.resumed(0)
    text = goodput.end("failed")
    figures = summary(world.sessions)
    assert figures.restarts == {"killed": 1} and figures.seconds == {"idle": 20} and figures.goodput == 0
    assert figures.step_time_s is None and figures.mfu is None
    assert "MFU" not in text


def test_mfu_is_unknown_where_that_of_any_session_with_steps_is(world: World) -> None:
    for ideal, first in ((1.0, 0), (None, 4)):
        goodput = world.session(ideal)
        goodput.resumed(first)
        world.steps(goodput, first + 1, first + 4)
        goodput.end("stopped")
    figures = summary(world.sessions)
    assert figures.mfu is None and figures.mfu_overall is None and figures.step_time_s == pytest.approx(2.5)


def test_figures_are_written_at_phases_and_at_most_once_a_second_at_log_lines(world: World) -> None:
    goodput = world.session()
    goodput.resumed(0)
    for step in range(1, 11):
        world.sleep(0.3)
        goodput.step(step, 0.3, 0)
        goodput.log()
    assert world.sessions[-1].last == 8
    with goodput.phase("evaluation"):
        assert world.sessions[-1].last == 10
    assert not [path for path in world.workdir.iterdir() if path.name != FILE]


def test_a_session_that_had_nothing_to_do_leaves_no_trace(world: World) -> None:
    for _ in range(2):
        goodput = world.session()
        world.start(goodput, 0)
        goodput.discard()
        assert list(world.workdir.iterdir()) == []
    goodput = world.session()
    world.start(goodput, 0)
    goodput.end("finished")
    before = (world.workdir / FILE).read_bytes()
    goodput = world.session()
    world.start(goodput, 0)
    assert len(world.sessions) == 2
    goodput.discard()
    assert (world.workdir / FILE).read_bytes() == before


def test_processes_but_the_first_measure_and_write_nothing(world: World) -> None:
    goodput = Goodput(None, batch_size=8, ideal_step_s=None, clock=lambda: world.now, wall_clock=lambda: world.now)
    goodput.resumed(0)
    world.steps(goodput, 1, 4)
    assert "goodput 80.0%" in goodput.end("finished")
    assert list(world.workdir.iterdir()) == []


def test_a_directory_that_is_gone_does_not_end_the_run(world: World) -> None:
    world.workdir = world.workdir / "gone"
    goodput = world.session()
    world.start(goodput, 0)
    assert "goodput" in goodput.end("finished")


def test_a_run_without_sessions_has_none_and_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    assert read_sessions(tmp_path / FILE) == []
    (tmp_path / FILE).mkdir()
    with pytest.raises(ConfigError, match=FILE):
        read_sessions(tmp_path / FILE)


def test_damaged_lines_are_kept_named_and_do_not_end_the_run(world: World) -> None:
    (world.workdir / FILE).write_text('{"began": 0\n')
    goodput = world.session()
    assert f"{FILE}:1: expected a session" in goodput.end("finished")
    assert (world.workdir / FILE).read_text().startswith('{"began": 0\n')
    with pytest.raises(ConfigError, match=rf"{FILE}:1: expected a session"):
        assert world.sessions


@pytest.mark.parametrize(
    ("name", "value"), [("began", None), ("steps", -1), ("seconds", {"sleep": 3}), ("end", "well"), ("seen", 1e999)]
)
def test_wrong_values_are_named(name: str, value: Any) -> None:
    line = {"began": 0, "seen": 1, "batch_size": 8, name: value}
    with pytest.raises(ConfigError, match=f"sessions:1: expected a session: {name}:"):
        parse_sessions(json.dumps(line).encode(), "sessions")


def test_lines_of_a_session_need_little() -> None:
    [session] = parse_sessions(b'{"began": 0, "seen": 1, "batch_size": 8}\n', "")
    assert table(summary([session])) == "time: 0.0 s in 1 session; goodput 0.0%"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 0 min"),
        (86399, "23 h 59 min"),
        (90000, "1 d 1 h"),
        (8e6, "92 d 14 h"),
    ],
)
def test_durations_in_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text
