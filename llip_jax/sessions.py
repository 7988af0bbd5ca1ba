"""Where the time of a run went, by its sessions (sessions.jsonl): pure arithmetic, for training and for reports.

A session is one process's part of a run, from its start until it ends or is killed.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args

import pydantic

from llip_jax.config import ConfigError

FILE = "sessions.jsonl"
"""In the run directory."""
Phase = Literal["step", "data", "start", "restore", "compile", "save", "evaluation", "other"]
End = Literal["finished", "stopped", "failed"]

PHASES = {
    "step": "training steps",
    "lost": "steps done again later",
    "data": "waiting for data",
    "start": "starting up",
    "restore": "restoring a checkpoint",
    "compile": "waiting for the compiler",
    "save": "saving",
    "evaluation": "evaluating",
    "other": "other",
    "idle": "between sessions",
}
"""Everything that time is spent on, in words."""

_Seconds = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
_Count = Annotated[int, pydantic.Field(ge=0)]


@dataclass(kw_only=True)
class Session:
    """A line of sessions.jsonl, as it was last written.

    began, seen: wall clock at the start and at the last writing, seconds since 1970.
    seconds: by phase, which together are the session's whole time.
    first, last: updates done at its start (or at the lowest step it went back to) and now; None: not yet known.
    steps: updates done in it, those included that it went back behind.
    ideal_step_s: what a step would take at the chips' peak; None: unknown.
    peak_bytes: most memory in use on one device; None: unknown.
    phase: what it was doing at the last writing.
    end: how it ended; None: it runs still, or was killed.
    """

    began: _Seconds
    seen: _Seconds
    batch_size: _Count
    ideal_step_s: _Seconds | None = None
    first: _Count | None = None
    last: _Count | None = None
    steps: _Count = 0
    seconds: dict[Phase, _Seconds] = field(default_factory=lambda: dict.fromkeys(get_args(Phase), 0.0))
    peak_bytes: _Count | None = None
    phase: Phase = "other"
    end: End | None = None


class Figures(NamedTuple):
    """What the sessions of a run add up to.

    seconds: by name in PHASES, those of which there are any; together ``total_s``.
    goodput: share of the whole time that went into steps whose result was kept.
    idle_unknown: pauses between sessions whose length the clocks do not tell; they are in no other figure.
    restarts: how the sessions ended that others had to go on from: 'killed', 'stopped' or 'failed', with counts.
    step_time_s: mean from the end of a step to the end of the next, waiting for data included.
    mfu: model FLOPs of all steps in their time, waiting for data included, against the chips' peak; mfu_overall: those
        of kept steps in the whole time. None: unknown.
    """

    sessions: int
    seconds: Mapping[str, float]
    total_s: float
    goodput: float
    idle_unknown: int
    restarts: Mapping[str, int]
    kept_steps: int
    lost_steps: int
    step_time_s: float | None
    examples_per_second: float | None
    mfu: float | None
    mfu_overall: float | None
    peak_bytes: int | None


_SESSION = pydantic.TypeAdapter(Session)


def parse_sessions(content: bytes, name: str) -> list[Session]:
    """The sessions in a file's content, one JSON object a line.

    Raises:
        ConfigError: a damaged line of the file ``name``.
    """
    sessions = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            sessions.append(_SESSION.validate_json(line))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = "".join(f" {part}:" for part in first["loc"])
            raise ConfigError(f"{name}:{number}: expected a session:{where} {first['msg']}") from None
    return sessions


def read_sessions(path: Path) -> list[Session]:
    """The sessions in a file; none where it is missing.

    Raises:
        ConfigError: the file is damaged or cannot be read.
    """
    try:
        return parse_sessions(path.read_bytes(), str(path))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{path}: {error}") from None


def summary(sessions: Sequence[Session]) -> Figures:
    """Figures of at least one session, the oldest first.

    A step is lost when its session, or a later one, goes on from a step before it. A lost step took as long as the
    others of its session. What a killed session did after its last writing counts as time between sessions.
    """
    seconds = dict.fromkeys(PHASES, 0.0)
    ideal_s: float | None = 0.0
    kept_ideal_s, done, kept_steps, examples, gone_on_from = 0.0, 0, 0, 0, math.inf
    for session in reversed(sessions):
        kept = 0
        if session.first is not None and session.last is not None:
            kept = int(max(0, min(session.last, gone_on_from) - session.first))
            gone_on_from = min(gone_on_from, session.first)
        for phase, spent in session.seconds.items():
            seconds[phase] += spent
        if session.steps:
            lost_s = session.seconds["step"] * (1 - kept / session.steps)
            seconds["step"] -= lost_s
            seconds["lost"] += lost_s
            ideal_s = None if ideal_s is None or session.ideal_step_s is None else ideal_s
            if ideal_s is not None and session.ideal_step_s is not None:
                ideal_s += session.ideal_step_s * session.steps
                kept_ideal_s += session.ideal_step_s * kept
        done, kept_steps = done + session.steps, kept_steps + kept
        examples += session.steps * session.batch_size
    # A finished run waits for nothing: what follows is somebody's wish to train it longer.
    gone_on = [(before, after) for before, after in pairwise(sessions) if before.end != "finished"]
    pauses = [after.began - before.seen for before, after in gone_on]
    seconds["idle"] = sum(pause for pause in pauses if pause >= 0)
    total_s, training_s = sum(seconds.values()), seconds["step"] + seconds["lost"] + seconds["data"]
    return Figures(
        sessions=len(sessions),
        seconds={phase: spent for phase, spent in seconds.items() if spent > 1e-6},
        total_s=total_s,
        goodput=seconds["step"] / total_s if total_s else 0.0,
        idle_unknown=sum(pause < 0 for pause in pauses),
        restarts=Counter(before.end or "killed" for before, _ in gone_on),
        kept_steps=kept_steps,
        lost_steps=done - kept_steps,
        step_time_s=training_s / done if done else None,
        examples_per_second=examples / training_s if training_s else None,
        mfu=ideal_s / training_s if ideal_s and training_s else None,
        mfu_overall=kept_ideal_s / total_s if ideal_s and total_s else None,
        peak_bytes=max((session.peak_bytes for session in sessions if session.peak_bytes), default=None),
    )


def table(figures: Figures) -> str:
    """The figures for people, a few lines."""
    restarts = f" ({restarts_in_words(figures)})" if figures.restarts else ""
    count = "1 session" if figures.sessions == 1 else f"{figures.sessions} sessions{restarts}"
    lines = [f"time: {duration(figures.total_s)} in {count}; goodput {figures.goodput:.1%}"]
    for phase, spent in figures.seconds.items():
        note = f"  ({figures.lost_steps:,} steps)" if phase == "lost" else ""
        lines.append(f"  {PHASES[phase]:<25}{duration(spent):>12}{spent / figures.total_s:>8.1%}{note}")
    if figures.idle_unknown:
        lines.append(f"  and {figures.idle_unknown} between sessions of unknown length: the clocks disagree")
    known = []
    if figures.step_time_s is not None and figures.examples_per_second is not None:
        known += [f"{figures.step_time_s:.4g} s a step", f"{figures.examples_per_second:,.4g} images/s"]
    if figures.mfu is not None and figures.mfu_overall is not None:
        known.append(f"MFU {figures.mfu:.1%} while training, {figures.mfu_overall:.1%} over all time")
    if figures.peak_bytes is not None:
        known.append(f"at most {figures.peak_bytes / 2**30:.2f} GiB in use on a device")
    return "\n".join([*lines, *([f"  {', '.join(known)}"] if known else [])])


def restarts_in_words(figures: Figures) -> str:
    """'2 restarts: 1 killed, 1 stopped'."""
    total = sum(figures.restarts.values())
    each = ", ".join(f"{count} {how}" for how, count in sorted(figures.restarts.items()))
    return f"{total} {'restart' if total == 1 else 'restarts'}{f': {each}' if each else ''}"


def duration(seconds: float) -> str:
    """A time in its two largest units."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, unit, smaller_size, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller_size} {smaller}"
    raise AssertionError(seconds)
