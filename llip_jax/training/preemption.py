"""Signals: SIGTERM and SIGINT ask the loop to save and stop after the step it is in."""

import signal
from types import FrameType
from typing import Any


class Stopped(Exception):
    """A stop was asked for while something that can be done again was going on."""


class StopRequest:
    """Remembers the first SIGTERM or SIGINT received inside the ``with`` block; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises Stopped once a signal has arrived."""
        if self.signal_name is not None:
            raise Stopped(self.signal_name)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.signal_name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
