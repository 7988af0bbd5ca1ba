"""Turns each step's device metrics into log lines, one step late."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int

from llip_jax.config import Config, ConfigError
from llip_jax.data.records import REASONS
from llip_jax.training.metrics import MetricsWriter


class Diverged(FloatingPointError):
    """Loss or gradient became infinite or NaN; the last checkpoint is from before that."""


_FEWEST_SAMPLES = 1000
"""Before so many the share of replaced samples is not judged."""


class _Pending(NamedTuple):
    step: int
    metrics: Mapping[str, Array]
    sample_hash: int


class Recorder:
    """Checks every step's metrics and logs those that are due.

    The host reads the numbers of step n only after step n + 1 has been handed to the device, so that the device never
    waits for the host. ``step`` in a log line is the number of updates done; its loss is that of the parameters before
    the last of them.
    """

    def __init__(
        self,
        config: Config,
        writer: MetricsWriter,
        bar: Any,
        clock: Callable[[], float],
        ideal_step_s: float | None,
        replaced: Mapping[str, int],
    ):
        """Args:
        ideal_step_s: what a step would take at the chips' peak, None where that is unknown.
        replaced: how many samples had been replaced, by reason, when the run was last saved.
        """
        self._config, self._writer, self._bar, self._clock = config, writer, bar, clock
        self._ideal_s = ideal_step_s
        self._pending: _Pending | None = None
        self.replaced = dict(replaced)
        self._settled_at: float | None = None
        self._steps, self._busy_s, self._waited_s = 0, 0.0, 0.0

    def add(
        self, step: int, metrics: Mapping[str, Array], sample_id: Int[np.ndarray, "B"], begun: float, waited: float
    ) -> None:
        """Takes the metrics of a step just dispatched, begun at clock time ``begun`` with ``waited`` s for its batch.

        Raises:
            Diverged: the step before this one is not finite.
            ConfigError: more samples had to be replaced than ``data.limits`` allow.
        """
        if self._settled_at is None:
            self._settled_at = begun
        self._waited_s += waited  # within the time that settling is about to count
        self._settle()
        self._pending = _Pending(step, metrics, zlib.crc32(sample_id.tobytes()))

    def flush(self) -> None:
        """Waits for the last step added and logs it if due; the time until the next step begins is no step's time.

        Raises:
            Diverged, ConfigError: as in :meth:`add`.
        """
        self._settle()
        self._settled_at = None

    def _settle(self) -> None:
        if self._pending is None or self._settled_at is None:
            return
        (step, metrics, sample_hash), self._pending = self._pending, None
        host = jax.device_get(dict(metrics))
        replaced = dict(zip(REASONS, host.pop("replaced").tolist(), strict=True))
        values = {name: float(value) for name, value in host.items()}
        # A step's time is from the end of the step before it to its own end, as the host sees them.
        now = self._clock()
        self._busy_s, self._settled_at, self._steps = self._busy_s + now - self._settled_at, now, self._steps + 1
        if not values.pop("finite"):
            raise Diverged(
                f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}: these or the new parameters "
                "are not finite. The newest checkpoint is from before this step. A lower optimizer.learning_rate or a "
                "longer warm-up often helps."
            )
        self._count(step, replaced)
        self._bar.update(1)
        self._bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
        if step % self._config.train.log_every_steps == 0 or step == self._config.train.steps:
            self._write(step, values, sample_hash)

    def _count(self, step: int, replaced: Mapping[str, int]) -> None:
        for reason, count in replaced.items():
            if count:
                self.replaced[reason] = self.replaced.get(reason, 0) + count
        total, seen = sum(self.replaced.values()), step * self._config.train.batch_size
        allowed = self._config.data.limits.replaced_share
        if seen >= _FEWEST_SAMPLES and total > allowed * seen:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.replaced.items()))
            raise ConfigError(
                f"data.limits.replaced_share={allowed}: {total} of the {seen} samples up to step {step} had to be "
                f"replaced ({reasons}). Some are named above; launch/prepare_data.py makes shards of the good ones and "
                "a page about the others. Or allow more"
            )

    def _write(self, step: int, values: dict[str, float], sample_hash: int) -> None:
        step_time = self._busy_s / self._steps
        line = {
            "loss": values.pop("loss"),
            "examples_seen": step * self._config.train.batch_size,
            "examples_per_second": self._config.train.batch_size / step_time,
            "step_time_s": step_time,
            "data_wait_fraction": self._waited_s / self._busy_s,
            "mfu": None if self._ideal_s is None else self._ideal_s / step_time,
            "logit_bias": None,
            **values,
            "replaced_samples": sum(self.replaced.values()),
            "replaced_by_reason": self.replaced,
            "sample_hash": sample_hash,
        }
        self._writer.write(step, line)
        self._writer.scalars(step, self.replaced, prefix="replaced/")
        self._steps, self._busy_s, self._waited_s = 0, 0.0, 0.0
