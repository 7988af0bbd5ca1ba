import json
import math

import numpy as np
import pytest

from llip_jax.training.spikes import LossHistory


def losses(count: int) -> list[float]:
    """Some of them not finite."""
    rng = np.random.default_rng()
    return [
        float(rng.choice([math.nan, math.inf])) if rng.random() < 0.1 else float(rng.lognormal()) for _ in range(count)
    ]


def expected(all_losses: list[float], step: int, window: int, factor: float) -> float:
    """By the definition: losses[i] is that of step i + 1."""
    last = [loss for i, loss in enumerate(all_losses, start=1) if step - 2 - window < i <= step - 2]
    finite = [loss for loss in last if np.isfinite(loss)]
    return factor * float(np.median(finite)) if len(last) >= 10 and finite else math.inf


@pytest.mark.parametrize("window", [10, 17, 100])
def test_ceiling_is_a_multiple_of_the_median_of_the_window_two_steps_back(window: int) -> None:
    known, history = losses(250), LossHistory(window, 3.0)
    for step, loss in enumerate(known, start=1):
        # As in the loop: when a step is handed over, the one before it is not yet settled.
        assert history.ceiling(step + 1) == expected(known, step + 1, window, 3.0)
        history.add(step, loss)
        assert history.ceiling(step + 1) == expected(known, step + 1, window, 3.0)
    assert math.isfinite(history.ceiling(251))


def test_losses_that_are_not_finite_leave_the_ceiling_to_the_others() -> None:
    history = LossHistory(10, 2.0)
    for step in range(1, 31):
        history.add(step, 3.0 if step < 15 else math.nan)
        finite = step - 1 <= 23 and step >= 11
        assert history.ceiling(step + 1) == (6.0 if finite else math.inf)


def test_a_restart_at_any_step_changes_no_ceiling() -> None:
    known, whole = losses(120), LossHistory(20, 2.5)
    restarted = LossHistory(20, 2.5)
    for step, loss in enumerate(known, start=1):
        whole.add(step, loss)
        restarted.add(step, loss)
        if np.random.default_rng().random() < 0.4:
            # What a checkpoint keeps, through its JSON.
            restarted = LossHistory(20, 2.5, step=step, losses=json.loads(json.dumps(restarted.state())))
        assert restarted.ceiling(step + 1) == whole.ceiling(step + 1)
        assert len(restarted.state()) <= 21


def test_no_loss_is_a_spike_without_a_factor_or_while_fewer_than_ten_are_known() -> None:
    without, few = LossHistory(50, None), LossHistory(50, 2.0)
    for step in range(1, 12):
        assert few.ceiling(step) == math.inf
        without.add(step, 1.0)
        few.add(step, 1.0)
    assert few.ceiling(12) == 2.0
    assert without.ceiling(12) == math.inf


def test_a_loss_left_out_or_counted_twice_and_a_ceiling_out_of_reach_are_errors() -> None:
    history = LossHistory(10, 2.0, step=7, losses=[1.0])
    for step in (7, 9):
        with pytest.raises(ValueError, match=f"step {step} after step 7"):
            history.add(step, 1.0)
    for step in (7, 10):
        with pytest.raises(ValueError, match=f"step {step} after step 7"):
            history.ceiling(step)
