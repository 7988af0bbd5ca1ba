"""Where the time of a run goes: measured here, kept in sessions.jsonl, added up in llip_jax/sessions.py."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import jax

from llip_jax.config import ConfigError
from llip_jax.interop.files import replacing
from llip_jax.sessions import FILE, End, Phase, Session, parse_sessions, summary, table

_LOG_S = 1.0
"""Between two writings at log lines, at least: object stores take no more of one file."""


class Goodput:
    """The clock of one session.

    The time of the main thread belongs to the innermost :meth:`phase`, and to 'other' outside of them; :meth:`step`
    moves a step's time out of 'other'. So the phases add up to the whole, as long as steps are settled outside of them.
    """

    def __init__(
        self,
        workdir: Path | None,
        *,
        batch_size: int,
        ideal_step_s: float | None,
        clock: Callable[[], float] = time.perf_counter,
        wall_clock: Callable[[], float] = time.time,
    ):
        """Args:
        workdir: the run directory; None in all processes but the first, which measure but do not write.
        batch_size: images a step.
        ideal_step_s: what a step would take at the chips' peak, None where that is unknown.
        clock, wall_clock: seconds that only go up, and seconds since 1970.
        """
        self._path = None if workdir is None else workdir / FILE
        self._before = self._path.read_bytes() if self._path is not None and self._path.exists() else b""
        self._clock, self._wall_clock = clock, wall_clock
        self._mark, self._written = clock(), -float("inf")
        now = wall_clock()
        self._session = Session(began=now, seen=now, batch_size=batch_size, ideal_step_s=ideal_step_s)

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """What the time until the end of the block goes into, but for phases within it."""
        outer = self._session.phase
        self._change(name)
        try:
            yield
        finally:
            self._change(outer)

    def resumed(self, step: int) -> None:
        """Training goes on from ``step`` updates done: at the start, and again whenever it is rewound."""
        first = self._session.first
        self._session.first, self._session.last = step if first is None else min(step, first), step
        self._charge()
        self._write()

    def step(self, step: int, seconds: float, waited: float) -> None:
        """``step`` updates are done: the last took ``seconds``, of which ``waited`` without a batch to work on."""
        self._charge()
        self._session.steps, self._session.last = self._session.steps + 1, step
        spent, waited = self._session.seconds, min(waited, seconds)
        spent["step"] += seconds - waited
        spent["data"] += waited
        spent["other"] = max(0.0, spent["other"] - seconds)

    def log(self) -> None:
        """Writes the figures so far, at most once a second; a killed session leaves those."""
        self._charge()
        if self._mark - self._written >= _LOG_S:
            self._write()

    def end(self, how: End) -> str:
        """Writes how the session ended; the table of the whole run."""
        self._charge()
        self._session.end = how
        self._write()
        try:
            earlier = parse_sessions(self._before, str(self._path))
        except ConfigError as error:
            return f"no summary of the run's time: {error}"
        return table(summary([*earlier, self._session]))

    def discard(self) -> None:
        """Takes the session back, for one that found nothing to do or was refused."""
        if self._path is None:
            return
        with contextlib.suppress(OSError):
            if self._before:
                with replacing(self._path) as temporary:
                    temporary.write_bytes(self._before)
            else:
                self._path.unlink(missing_ok=True)

    def _change(self, phase: Phase) -> None:
        self._charge()
        self._session.phase = phase
        self._write()

    def _charge(self) -> None:
        """Gives the time since the last call to the phase it was spent in."""
        now = self._clock()
        self._session.seconds[self._session.phase] += now - self._mark
        self._mark = now

    def _write(self) -> None:
        if self._path is None:
            return
        self._written = self._mark
        self._session.seen, self._session.peak_bytes = self._wall_clock(), peak_memory()
        # No run ends for want of its accounts: a disk that is full is told where checkpoints are saved.
        with contextlib.suppress(OSError), replacing(self._path) as temporary:
            temporary.write_bytes(self._before + json.dumps(asdict(self._session)).encode() + b"\n")


def peak_memory() -> int | None:
    """Most bytes in use so far on one of this process's devices; None where the devices do not tell."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one), default=None)
