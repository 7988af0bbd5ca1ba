"""Where the time of a run went."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from llip_jax.report.figures import number, percent
from llip_jax.sessions import PHASES, Figures, Session, duration, restarts_in_words, summary


class Part(NamedTuple):
    """What a part of the time was spent on; ``phase``: its name in PHASES."""

    phase: str
    label: str
    time: str
    share: float


class TimeUse(NamedTuple):
    """Figures by name, and the parts of the whole time, which is ``total``."""

    facts: Mapping[str, str]
    parts: Sequence[Part]
    total: str
    note: str


def time_use(sessions: Sequence[Session]) -> TimeUse | None:
    """What the sessions add up to; None where they have not lasted any time."""
    figures = summary(sessions)
    if not figures.total_s:
        return None
    parts = [
        Part(phase, PHASES[phase].capitalize(), duration(spent), spent / figures.total_s)
        for phase, spent in figures.seconds.items()
    ]
    pauses = "1 pause" if figures.idle_unknown == 1 else f"{figures.idle_unknown} pauses"
    note = f"Not in these figures: {pauses} between sessions of unknown length, as the clocks disagree."
    return TimeUse(_facts(figures), parts, duration(figures.total_s), note if figures.idle_unknown else "")


def _facts(figures: Figures) -> dict[str, str]:
    """Those that are known."""
    restarts = f" ({restarts_in_words(figures)})" if figures.restarts else ""
    known = {
        "Goodput": percent(figures.goodput),
        "Sessions": f"{number(figures.sessions)}{restarts}",
        "Steps done again": number(figures.lost_steps) if figures.lost_steps else "",
        "Time of a step": _seconds(figures.step_time_s),
        "Images a second": number(figures.examples_per_second) if figures.examples_per_second else "",
        "Use of the chips' peak (MFU)": "",
        "Most memory in use on a device": "",
    }
    if figures.mfu is not None and figures.mfu_overall is not None:
        of_all = percent(figures.mfu_overall)
        known["Use of the chips' peak (MFU)"] = f"{percent(figures.mfu)} while training, {of_all} over all time"
    if figures.peak_bytes is not None:
        known["Most memory in use on a device"] = f"{number(figures.peak_bytes / 2**30)} GiB"
    return {name: text for name, text in known.items() if text}


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{number(value)} s"
