"""Profiler traces of some steps (``--profile FIRST:LAST``), for XProf and TensorBoard."""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from llip_jax.config import ConfigError


def parse_profile(text: str) -> range:
    """The steps of ``FIRST:LAST``, both included; step 1 is the first update.

    Raises:
        ConfigError: anything else.
    """
    found = re.fullmatch(r"(\d{1,12}):(\d{1,12})", text, re.ASCII)
    steps = range(int(found[1]), int(found[2]) + 1) if found else range(0)
    if not steps or steps[0] < 1:
        raise ConfigError(f"--profile: {text!r} is not valid: expected FIRST:LAST, steps from 1 on, as in 100:104")
    return steps


class Profile:
    """Traces the steps asked for into WORKDIR/profile, once.

    All processes trace their own devices, and XProf shows the traces as one run. A session that starts among the steps
    traces the rest of them, one that ends among them those it has done.
    """

    def __init__(self, steps: range, workdir: Path, flush: Callable[[], None]):
        """Args:
        steps: which to trace; an empty range: none.
        workdir: the run directory.
        flush: waits until all steps handed to the devices are done, so that a trace is of whole steps.
        """
        self._steps, self._folder, self._flush = steps, workdir / "profile", flush
        self._first: int | None = None
        self._last = 0

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around all that belongs to the ``step``-th update, the wait for its batch included."""
        if step not in self._steps:
            yield
            return
        if self._first is None:
            self._flush()
            jax.profiler.start_trace(self._own_folder)
            self._first = step
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        self._last = step
        if step == self._steps[-1]:
            self._flush()
            self._stop(self._first)

    def close(self) -> None:
        """Ends a trace that is not finished; says so where none was begun."""
        if self._first is not None:
            self._stop(self._first)
        elif self._steps:
            _say(f"no profile: steps {_named(self._steps)} were not among those of this session")

    def _stop(self, first: int) -> None:
        """Writes the trace; if that fails, the run goes on without."""
        self._first, self._steps = None, range(0)
        steps = range(first, self._last + 1)
        run = self._folder / "plugins" / "profile" / f"steps_{steps.start}-{self._last}"
        try:
            jax.profiler.stop_trace()
            run.mkdir(parents=True, exist_ok=True)
            # jax names files by host and second: processes of one host would overwrite each other's, and those of
            # several would be several runs.
            for path in self._own_folder.glob("plugins/profile/*/*"):
                host, _, kind = path.name.partition(".")
                os.replace(path, run / f"{host}{self._suffix}.{kind}")
            shutil.rmtree(self._own_folder)
        except (OSError, RuntimeError) as error:
            _say(f"no profile: {error}")
            return
        _say(f"profile of steps {_named(steps)} in {self._folder}: xprof {self._folder}, or TensorBoard with xprof")

    @property
    def _suffix(self) -> str:
        return f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""

    @property
    def _own_folder(self) -> Path:
        return self._folder / f".unfinished{self._suffix}"


def _named(steps: range) -> str:
    return f"{steps[0]} to {steps[-1]}" if steps else "(none)"


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(f"\n{text}", flush=True)
