"""A process that waits too long for something says where it is and ends, instead of holding its machines for ever."""

import faulthandler
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from llip_jax.command_line import EXIT_FAILED, end_process
from llip_jax.parallel import processes
from llip_jax.training.last_words import within

_STDERR = 2
_POLL_S = 0.25
_GRACE_S = 1.0
_TELL_S = 5.0


class _Awaited(NamedTuple):
    expires: float
    seconds: float
    what: str


class Watchdog:
    """Ends the process (exit code 1) with the stack traces of all threads when no ``beat`` comes in time.

    The traces go to standard error and into WORKDIR/hangs. A thread of Python's writes them; where that cannot, because
    the interpreter's lock is held or the file system hangs, faulthandler's C thread does to standard error alone, a
    second later. The other processes are told, but for the case of that lock.
    """

    def __init__(self, workdir: Path, process_index: int):
        self._folder = workdir / "hangs"
        self._process_index = process_index
        self._awaited: _Awaited | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.beat(None, "")
        self._closed.set()
        self._thread.join()

    def beat(self, seconds: float | None, what: str) -> None:
        """Takes the place of the deadline before; about 25 microseconds.

        Args:
            seconds: from now to the next beat at most; None: no deadline.
            what: what is waited for, for people: "step 12".
        """
        if seconds is None:
            self._awaited = None
            faulthandler.cancel_dump_traceback_later()
        else:
            self._awaited = _Awaited(time.monotonic() + seconds, seconds, what)
            faulthandler.dump_traceback_later(seconds + _GRACE_S, exit=True, file=_STDERR)

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_S):
            awaited = self._awaited
            if awaited is not None and time.monotonic() > awaited.expires:
                self._end(awaited)

    def _end(self, awaited: _Awaited) -> None:
        path = self._folder / f"{time.strftime('%Y%m%d-%H%M%S')}-process{self._process_index}.txt"
        reason = (
            f"error: process {self._process_index} has waited more than {awaited.seconds:g} s for {awaited.what}, and "
            "ends itself"
        )
        message = (
            f"{reason}. Where its threads are stands below, the latest call first. The same command goes on from the "
            "newest checkpoint; if so long a time is usual, raise faults.step_s (before the first step: "
            "faults.start_s).\n"
        )
        try:
            faulthandler.dump_traceback_later(_TELL_S + 2 * _GRACE_S, exit=True, file=_STDERR)
            print(f"\n{message}It is kept in {path}.\n", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(_STDERR, all_threads=True)
            within(_GRACE_S, _keep, path, message)
            within(_TELL_S, processes.report, EXIT_FAILED, f"{reason}; {path} says where its threads were")
        finally:
            end_process(EXIT_FAILED)


def _keep(path: Path, message: str) -> None:
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        with path.open("w") as file:
            print(message, file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)
