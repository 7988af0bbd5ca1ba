"""Turns each step's device metrics into log lines, one step late."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from llip_jax.command_line import RunFailed
from llip_jax.config import Config, ConfigError
from llip_jax.data.records import REASONS
from llip_jax.training.goodput import Goodput
from llip_jax.training.metrics import MetricsWriter
from llip_jax.training.progress import Progress
from llip_jax.training.spikes import LossHistory


class Diverged(RunFailed):
    """Loss or gradient became infinite or NaN, or the loss too high; the last checkpoint is from before that."""


class Rewind(Exception):
    """The run has to go back to before a step whose numbers are wrong.

    step: the one that went wrong.
    """

    def __init__(self, step: int, reason: str):
        super().__init__(reason)
        self.step = step


_FEWEST_SAMPLES = 1000
"""Before so many the share of replaced samples is not judged."""


class _Pending(NamedTuple):
    step: int
    metrics: Mapping[str, Array]


class Recorder:
    """Checks every step's metrics and logs those that are due.

    The host reads the numbers of step n only after step n + 1 has been handed to the device, so that the device never
    waits for the host. ``step`` in a log line is the number of updates done; its loss is that of the parameters before
    the last of them.

    stop_asked, save_asked: some process was told to stop, or finds it time to save. What one process knows travels with
        its rows of a batch, so that all learn it after the same step.
    """

    def __init__(
        self,
        config: Config,
        writer: MetricsWriter,
        bar: Any,
        clock: Callable[[], float],
        goodput: Goodput,
        ideal_step_s: float | None,
        step: int,
        progress: Progress,
    ):
        """Args:
        ideal_step_s: what a step would take at the chips' peak, None where that is unknown.
        step, progress: from where the run goes on.
        """
        self._config, self._writer, self._bar, self._clock, self._goodput = config, writer, bar, clock, goodput
        self._ideal_s = ideal_step_s
        self._pending: _Pending | None = None
        self._replaced = dict(progress.replaced)
        self._skipped, self._skipped_in_a_row = progress.skipped, 0
        faults = config.faults
        self._losses = LossHistory(faults.spike_window, faults.spike_factor, step=step, losses=progress.losses)
        self._settled_at: float | None = None
        self._steps, self._busy_s, self._waited_s, self._waited_for_step_s = 0, 0.0, 0.0, 0.0
        self.stop_asked = self.save_asked = False

    def loss_ceiling(self, step: int) -> float:
        """The loss above which that of ``step``, the next one, is a spike."""
        return self._losses.ceiling(step)

    def progress(self, step: int, elapsed_s: float, data_fingerprint: str, shift: int) -> Progress:
        """What a checkpoint of ``step``, which is settled, has to know."""
        return Progress(
            examples_seen=step * self._config.train.batch_size,
            elapsed_s=elapsed_s,
            replaced=dict(self._replaced),
            data_fingerprint=data_fingerprint,
            shift=shift,
            losses=tuple(self._losses.state()),
            skipped=self._skipped,
        )

    def add(self, step: int, metrics: Mapping[str, Array], begun: float, waited: float) -> None:
        """Takes the metrics of a step just dispatched, begun at clock time ``begun`` with ``waited`` s for its batch.

        Raises:
            Diverged, Rewind: the step before this one is not finite or has too high a loss, by ``faults``.
            ConfigError: more samples had to be replaced than ``data.limits`` allow.
        """
        if self._settled_at is None:
            self._settled_at = begun
        self._waited_for_step_s += waited  # within the time that settling is about to count
        self._settle()
        self._pending = _Pending(step, metrics)

    def flush(self) -> None:
        """Waits for the last step added and logs it if due; the time until the next step begins is no step's time.

        Raises:
            Diverged, Rewind, ConfigError: as in :meth:`add`.
        """
        self._settle()
        self._settled_at = None

    def _settle(self) -> None:
        if self._pending is None or self._settled_at is None:
            return
        (step, metrics), self._pending = self._pending, None
        host = jax.device_get(dict(metrics))
        sample_hash = int(host.pop("sample_hash"))
        replaced = dict(zip(REASONS, host.pop("replaced").tolist(), strict=True))
        values = {name: float(value) for name, value in host.items()}
        # A step's time is from the end of the step before it to its own end, as the host sees them.
        now = self._clock()
        seconds, self._settled_at = now - self._settled_at, now
        self._goodput.step(step, seconds, self._waited_for_step_s)
        self._steps, self._busy_s = self._steps + 1, self._busy_s + seconds
        self._waited_s, self._waited_for_step_s = self._waited_s + self._waited_for_step_s, 0.0
        self.stop_asked |= values.pop("stop") > 0
        self.save_asked |= values.pop("save") > 0
        ceiling = self._losses.ceiling(step)
        self._losses.add(step, values["loss"])
        self._judge(step, values, ceiling)
        self._count(step, replaced)
        self._bar.update(1)
        self._bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
        if step % self._config.train.log_every_steps == 0 or step == self._config.train.steps:
            self._write(step, values, sample_hash)
            self._goodput.log()

    def _judge(self, step: int, values: dict[str, float], ceiling: float) -> None:
        """Does what ``faults`` says about a step whose numbers are wrong."""
        faults = self._config.faults
        finite, spike, skipped = (values.pop(name) > 0 for name in ("finite", "spike", "skipped"))
        loss, norm = values["loss"], values["grad_norm"]
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        self._skipped += skipped
        if finite and not spike and not skipped:
            return
        if spike:
            policy, field = faults.spike, "spike"
            what = (
                f"step {step}: loss {loss:.4g} is above {faults.spike_factor:g} times the median of late, {ceiling:.4g}"
            )
        else:
            policy, field = faults.not_finite, "not_finite"
            what = (
                f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}: these or the new parameters are not finite. "
                "Checkpoints are from before this step"
            )
        if policy == "rewind":
            raise Rewind(step, f"{what} (faults.{field}='rewind')")
        if policy == "stop" or not finite:
            raise Diverged(f"{what}. A lower optimizer.learning_rate or a longer warm-up often helps.")
        if self._skipped_in_a_row > faults.limit:
            raise Diverged(f"{what}. Updates left out: {self._skipped_in_a_row} in a row (faults.limit={faults.limit})")
        self._bar.write(f"{what}{': the update was left out' if skipped else ''} (faults.{field}={policy!r})")

    def _count(self, step: int, replaced: Mapping[str, int]) -> None:
        for reason, count in replaced.items():
            if count:
                self._replaced[reason] = self._replaced.get(reason, 0) + count
        total, seen = sum(self._replaced.values()), step * self._config.train.batch_size
        allowed = self._config.data.limits.replaced_share
        if seen >= _FEWEST_SAMPLES and total > allowed * seen:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self._replaced.items()))
            raise ConfigError(
                f"data.limits.replaced_share={allowed}: {total} of the {seen} samples up to step {step} had to be "
                f"replaced ({reasons}). Some are named above; launch/prepare_data.py makes shards of the good ones and "
                "a page about the others. Or allow more"
            )

    def _write(self, step: int, numbers: dict[str, float], sample_hash: int) -> None:
        step_time = self._busy_s / self._steps
        # An update that was left out may have been because of these.
        values = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        line = {
            "loss": values.pop("loss"),
            "examples_seen": step * self._config.train.batch_size,
            "examples_per_second": self._config.train.batch_size / step_time,
            "step_time_s": step_time,
            "data_wait_fraction": self._waited_s / self._busy_s,
            "mfu": None if self._ideal_s is None else self._ideal_s / step_time,
            "logit_bias": None,
            **values,
            "replaced_samples": sum(self._replaced.values()),
            "replaced_by_reason": self._replaced,
            "skipped_updates": self._skipped,
            "sample_hash": sample_hash,
        }
        self._writer.write(step, line)
        self._writer.scalars(step, self._replaced, prefix="replaced/")
        self._steps, self._busy_s, self._waited_s = 0, 0.0, 0.0
