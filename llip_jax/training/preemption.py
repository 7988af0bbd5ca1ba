"""Signals: SIGTERM and SIGINT end a run that is starting up at once; later they ask the loop to save and stop."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, NoReturn

from llip_jax.command_line import EXIT_STOPPED, end_process

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A stop was asked for while something that can be done again was going on."""


class StopRequest:
    """Remembers the first SIGTERM or SIGINT received inside the ``with`` block; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous: dict[int, Any] = {}
        self._start, self._beginning = ExitStack(), False

    def __enter__(self) -> "StopRequest":
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        self.started()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Sets the handlers; to be called again after ``jax.distributed`` and the devices have started.

        jax's preemption service and libtpu put handlers of their own in place, and Python's would never be called.
        """
        for number in _SIGNALS:
            previous = signal.signal(number, self._on_signal)
            self._previous.setdefault(number, previous)

    def begin(self) -> None:
        """From here to :meth:`started` a signal ends the process at once, see :meth:`at_once`."""
        if not self._beginning:
            self._beginning = True
            self._start.enter_context(self.at_once())

    def started(self) -> None:
        """From here on there may be something to save, and a signal waits to be asked for."""
        self._start.close()
        self._beginning = False

    def check(self) -> None:
        """Raises Stopped once a signal has arrived."""
        if self.signal_name is not None:
            raise Stopped(self.signal_name)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """While it lasts, a signal ends the process at once with exit code 75: for a start-up, with nothing to save.

        Python runs handlers between two of the main thread's instructions, and that may be in the compiler for minutes.
        So the number of the signal goes to a thread, written to a pipe by Python's C code when the signal arrives.
        """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        thread = threading.Thread(target=_end_at_signal, args=(reader,), name="stop", daemon=True)
        thread.start()
        previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        try:
            if self.signal_name is not None:  # it came before
                _end_stopped(self.signal_name)
            yield
        finally:
            signal.set_wakeup_fd(previous)
            os.write(writer, b"\0")
            thread.join()
            os.close(writer)
            os.close(reader)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.signal_name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name


def _end_at_signal(reader: int) -> None:
    """Waits for the numbers of signals; 0 says that there will be no more."""
    while number := os.read(reader, 1)[0]:
        if number in _SIGNALS:
            _end_stopped(signal.Signals(number).name)


def _end_stopped(signal_name: str) -> NoReturn:
    try:
        print(f"\nstopped by {signal_name} before the first step: nothing to save")
    finally:
        end_process(EXIT_STOPPED)
