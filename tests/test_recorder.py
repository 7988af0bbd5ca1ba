"""Step times and data waits, with a clock that the test turns; what becomes of steps whose numbers are wrong."""

import copy
import itertools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import pytest
from run_helpers import tiny_config

from llip_jax.config import Config, ConfigError
from llip_jax.data.records import REASONS
from llip_jax.training.goodput import Goodput
from llip_jax.training.progress import Progress
from llip_jax.training.recorder import Diverged, Recorder, Rewind


class Bar:
    """A progress bar that nobody sees."""

    def __init__(self) -> None:
        self.written: list[str] = []

    def write(self, text: str) -> None:
        self.written.append(text)

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


def new_recorder(
    config: Config,
    lines: Lines | None = None,
    clock: Callable[[], float] | None = None,
    replaced: Mapping[str, int] = MappingProxyType({}),
) -> Recorder:
    clock = itertools.count(1.0).__next__ if clock is None else clock
    goodput = Goodput(None, batch_size=16, ideal_step_s=None, clock=lambda: 0.0, wall_clock=lambda: 0.0)
    progress = Progress(0, 0.0, dict(replaced), "")
    lines = Lines() if lines is None else lines
    return Recorder(config, lines, Bar(), clock, goodput, 0.5, 0, progress)  # type: ignore[arg-type]


def metrics(loss: float = 1.0, replaced: int = 1, **flags: int) -> dict[str, Any]:
    return {
        **{name: jnp.int32(flags.get(name, 0)) for name in ("stop", "save", "spike", "skipped")},
        "sample_hash": jnp.uint32(7),
        "loss": jnp.float32(loss),
        "grad_norm": jnp.float32(1),
        "finite": jnp.isfinite(jnp.float32(loss)),
        "replaced": jnp.zeros(len(REASONS), jnp.int32).at[1].set(replaced).at[3].set(1),
    }


def test_times_are_from_end_to_end_and_pauses_do_not_count() -> None:
    now, lines = 0.0, Lines()
    config = tiny_config(train={"log_every_steps": 2})
    recorder = new_recorder(config, lines, lambda: now, {"unreadable": 5})
    # (begun, waited for data, handed over): each step is settled when the next one has been handed over.
    for step, (begun, waited, handed_over) in enumerate([(0, 1, 2), (2, 0.5, 6), (6, 0.5, 9)], start=1):
        now = handed_over
        recorder.add(step, metrics(), begun, waited)
    assert [line["step"] for line in lines] == [2]
    assert lines[0]["step_time_s"] == pytest.approx(9 / 2)
    assert lines[0]["data_wait_fraction"] == pytest.approx(2 / 9)
    assert lines[0]["examples_per_second"] == pytest.approx(16 / 4.5)
    assert lines[0]["mfu"] == pytest.approx(0.5 / 4.5)
    now = 10
    recorder.flush()
    now = 1000  # an evaluation
    recorder.add(4, metrics(), begun=1000, waited=0)
    now = 1003
    recorder.flush()
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[1]["step_time_s"] == pytest.approx((1 + 3) / 2)
    assert [line["replaced_samples"] for line in lines] == [9, 13]
    assert lines[1]["replaced_by_reason"] == {"unreadable": 5, REASONS[1]: 4, REASONS[3]: 4}


def test_too_many_replaced_samples_stop_the_run_with_the_reasons() -> None:
    config = tiny_config(train={"batch_size": 400}, data={"limits.replaced_share": 0.02})
    recorder = new_recorder(config)
    for step, replaced in ((1, 19), (2, 0), (3, 2), (4, 7)):  # 2.5 % of 800 samples is too early to tell, 2 % allowed
        recorder.add(step, metrics(replaced=replaced), 0, 0)
    recorder.flush()
    recorder.add(5, metrics(replaced=40), 0, 0)
    message = f"replaced_share=0.02: 73 of the 2000 samples up to step 5 .* .68 {REASONS[1]}, 5 {REASONS[3]}."
    with pytest.raises(ConfigError, match=message):
        recorder.flush()


def test_a_step_that_is_not_finite_is_named_one_step_later() -> None:
    recorder = new_recorder(tiny_config())
    recorder.add(1, metrics(), 0, 0)
    recorder.add(2, metrics(float("nan")), 0, 0)
    with pytest.raises(Diverged, match=r"step 2: loss nan"):
        recorder.flush()


def test_what_any_process_asks_for_is_known_one_step_later() -> None:
    recorder = new_recorder(tiny_config())
    recorder.add(1, metrics(stop=16), 0, 0)
    assert not recorder.stop_asked and not recorder.save_asked
    recorder.add(2, metrics(save=8), 0, 0)
    assert recorder.stop_asked and not recorder.save_asked
    recorder.flush()
    assert recorder.stop_asked and recorder.save_asked


@pytest.mark.parametrize(
    ("policy", "flags", "error"),
    [
        ({"not_finite": "rewind"}, {}, Rewind),
        ({"not_finite": "stop"}, {}, Diverged),
        # The update was left out, and what is kept is not finite either.
        ({"not_finite": "skip"}, {"skipped": 1}, Diverged),
    ],
)
def test_a_step_that_is_not_finite_ends_as_the_policy_says(
    policy: dict[str, str], flags: dict[str, int], error: type[Exception]
) -> None:
    recorder = new_recorder(tiny_config(faults=policy))
    recorder.add(1, metrics(), 0, 0)
    recorder.add(2, metrics(float("nan"), **flags), 0, 0)
    with pytest.raises(error, match="step 2") as raised:
        recorder.add(3, metrics(), 0, 0)
    assert not isinstance(raised.value, Rewind) or raised.value.step == 2


@pytest.mark.parametrize(("policy", "error"), [("rewind", Rewind), ("stop", Diverged), ("log", None), ("skip", None)])
def test_a_spike_is_told_and_ends_as_the_policy_says(policy: str, error: type[Exception] | None) -> None:
    config = tiny_config(faults={"spike": policy, "spike_factor": 2.0, "spike_window": 10})
    recorder = new_recorder(config, lines := Lines())
    for step in range(1, 13):
        recorder.add(step, metrics(loss=1 + 0.1 * (step % 3)), 0, 0)
    assert recorder.loss_ceiling(13) == pytest.approx(2.2)  # steps 2 to 11: three to four each of 1.0, 1.1 and 1.2
    recorder.add(13, metrics(loss=9.0, spike=1, skipped=policy == "skip"), 0, 0)
    if error is not None:
        with pytest.raises(error, match=r"step 13: loss 9 is above 2 times the median of late, 2\.2"):
            recorder.flush()
        return
    recorder.flush()
    assert lines[-1]["skipped_updates"] == (policy == "skip")
    assert [line for line in recorder._bar.written if "step 13" in line]
    assert recorder.progress(13, 1.0, "", 0).skipped == (policy == "skip")


def test_too_many_updates_left_out_in_a_row_stop_the_run() -> None:
    recorder = new_recorder(tiny_config(faults={"not_finite": "skip", "limit": 2}))
    kept = metrics(float("nan"), skipped=1) | {"finite": jnp.bool_(True)}
    for step, values in enumerate([kept, kept, metrics(), kept, kept], start=1):
        recorder.add(step, values, 0, 0)
    recorder.add(6, kept, 0, 0)
    with pytest.raises(Diverged, match=r"step 6: .* 3 in a row"):
        recorder.flush()
