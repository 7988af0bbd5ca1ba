"""What loss counts as a spike: pure, and the same after a restart."""

import math
from collections import deque
from collections.abc import Sequence
from statistics import median

_FEWEST = 10
"""Losses, finite or not, that must be known before one can be a spike."""


class LossHistory:
    """The last losses of a run.

    A step's ceiling is needed before the step is handed to the device, and metrics come one step late: it is made of
    the losses up to two steps before, even where a later one happens to be known. So it does not depend on when a run
    was saved or started again.
    """

    def __init__(self, window: int, factor: float | None, *, step: int = 0, losses: Sequence[float] = ()):
        """Args:
        window: steps whose losses count.
        factor: times their median is the ceiling; None: no loss is a spike.
        step: updates done.
        losses: what :meth:`state` gave after that step.
        """
        self._window, self._factor, self._step = window, factor, step
        self._losses = deque(losses, maxlen=window + 1)

    def add(self, step: int, loss: float) -> None:
        """The loss of the next step, finite or not.

        Raises:
            ValueError: ``step`` is not the one after the last.
        """
        if step != self._step + 1:
            raise ValueError(f"step {step} after step {self._step}: every loss counts once")
        self._step = step
        self._losses.append(loss)

    def ceiling(self, step: int) -> float:
        """Above which the loss of ``step`` is a spike: ``factor`` x the median of the finite ones among the ``window``
        losses up to that of ``step`` - 2; infinity where fewer than 10 are known, or none is finite.

        Raises:
            ValueError: ``step`` is neither the next one nor the one after it.
        """
        if step not in (self._step + 1, self._step + 2):
            raise ValueError(f"step {step} after step {self._step}: its losses are not known, or not any more")
        if self._factor is None:
            return math.inf
        known = list(self._losses)[: len(self._losses) - (self._step + 2 - step)][-self._window :]
        finite = [loss for loss in known if math.isfinite(loss)]
        return self._factor * median(finite) if finite and len(known) >= _FEWEST else math.inf

    def state(self) -> list[float]:
        """The last ``window`` + 1 losses, the newest last: all that the ceilings of later steps are made of."""
        return list(self._losses)
