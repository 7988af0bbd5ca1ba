"""Step times and data waits, with a clock that the test turns."""

import copy
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from run_helpers import tiny_config

from llip_jax.config import ConfigError
from llip_jax.data.records import REASONS
from llip_jax.training.recorder import Diverged, Recorder


class Bar:
    """A progress bar that nobody sees."""

    def update(self, steps: int) -> None:
        pass

    def set_postfix(self, **_: Any) -> None:
        pass


class Lines(list[dict[str, Any]]):
    """Takes the place of the metrics file."""

    def write(self, step: int, values: dict[str, Any]) -> None:
        self.append({"step": step, **copy.deepcopy(values)})

    def scalars(self, *_: Any, **__: Any) -> None:
        pass


def metrics(loss: float = 1.0, replaced: int = 1) -> dict[str, Any]:
    return {
        "loss": jnp.float32(loss),
        "grad_norm": jnp.float32(1),
        "finite": jnp.isfinite(jnp.float32(loss)),
        "replaced": jnp.zeros(len(REASONS), jnp.int32).at[1].set(replaced).at[3].set(1),
    }


def test_times_are_from_end_to_end_and_pauses_do_not_count() -> None:
    now, lines = 0.0, Lines()
    config = tiny_config(train={"log_every_steps": 2})
    recorder = Recorder(config, lines, Bar(), lambda: now, 0.5, {"unreadable": 5})  # type: ignore[arg-type]
    # (begun, waited for data, handed over): each step is settled when the next one has been handed over.
    for step, (begun, waited, handed_over) in enumerate([(0, 1, 2), (2, 0.5, 6), (6, 0.5, 9)], start=1):
        now = handed_over
        recorder.add(step, metrics(), np.arange(16), begun, waited)
    assert [line["step"] for line in lines] == [2]
    assert lines[0]["step_time_s"] == pytest.approx(9 / 2)
    assert lines[0]["data_wait_fraction"] == pytest.approx(2 / 9)
    assert lines[0]["examples_per_second"] == pytest.approx(16 / 4.5)
    assert lines[0]["mfu"] == pytest.approx(0.5 / 4.5)
    now = 10
    recorder.flush()
    now = 1000  # an evaluation
    recorder.add(4, metrics(), np.arange(16), begun=1000, waited=0)
    now = 1003
    recorder.flush()
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[1]["step_time_s"] == pytest.approx((1 + 3) / 2)
    assert [line["replaced_samples"] for line in lines] == [9, 13]
    assert lines[1]["replaced_by_reason"] == {"unreadable": 5, REASONS[1]: 4, REASONS[3]: 4}


def test_too_many_replaced_samples_stop_the_run_with_the_reasons() -> None:
    config = tiny_config(train={"batch_size": 400}, data={"limits.replaced_share": 0.02})
    recorder = Recorder(config, Lines(), Bar(), itertools.count(1.0).__next__, None, {})  # type: ignore[arg-type]
    for step, replaced in ((1, 19), (2, 0), (3, 2), (4, 7)):  # 2.5 % of 800 samples is too early to tell, 2 % allowed
        recorder.add(step, metrics(replaced=replaced), np.arange(400), 0, 0)
    recorder.flush()
    recorder.add(5, metrics(replaced=40), np.arange(400), 0, 0)
    message = f"replaced_share=0.02: 73 of the 2000 samples up to step 5 .* .68 {REASONS[1]}, 5 {REASONS[3]}."
    with pytest.raises(ConfigError, match=message):
        recorder.flush()


def test_a_step_that_is_not_finite_is_named_one_step_later() -> None:
    recorder = Recorder(tiny_config(), Lines(), Bar(), itertools.count(1.0).__next__, None, {})  # type: ignore[arg-type]
    recorder.add(1, metrics(), np.arange(16), 0, 0)
    recorder.add(2, metrics(float("nan")), np.arange(16), 0, 0)
    with pytest.raises(Diverged, match=r"step 2: loss nan"):
        recorder.flush()
