"""A step whose numbers are wrong: what is said of it, and a state that stays as it was where the update is skipped."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest
from run_helpers import tiny_config
from step_helpers import Columns, Stepper, random_batch

from llip_jax.config import FaultsConfig
from llip_jax.training.optimizer import learning_rate_schedule
from llip_jax.training.state import TrainState
from llip_jax.training.step import NOTICE_SAVE, NOTICE_STOP

MODEL = {"pooler": "class_token", "mixture_tokens": 1, "logit_bias": None}
EMA_DECAY = 0.05


@functools.cache
def stepper(**faults: Any) -> Stepper:
    train = {"ema_decay": EMA_DECAY, "steps": 8}
    config = tiny_config(model=MODEL, objective={"sigmoid": None, "softmax.weight": 1.0}, train=train)
    return Stepper(dataclasses.replace(config, faults=FaultsConfig(**faults)))


def batch(seed: int) -> Columns:
    return random_batch(stepper().config, seed)


def spoiled(seed: int, weight: float = np.inf) -> Columns:
    """A batch with a caption of that weight: infinite, its loss is not a number; not a number, its gradient."""
    columns = batch(seed)
    columns["caption_weight"][3] = weight
    return columns


def differing(state: TrainState, other: TrainState) -> set[str]:
    """Leaves that are not equal bit by bit."""
    leaves, others = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (state, other))
    assert leaves.keys() == others.keys()
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, x in leaves.items()
        if np.asarray(x).tobytes() != np.asarray(others[path]).tobytes()
    }


def trained(steps: int, **faults: Any) -> TrainState:
    """Some steps from the start: moments and counters are not zero any more."""
    state = stepper(**faults).start
    for seed in range(steps):
        state, _ = stepper(**faults).step(state, batch(seed))
    return state


@pytest.mark.parametrize(("weight", "spoils"), [(np.inf, "loss"), (np.nan, "grad_norm")])
def test_a_spoiled_batch_changes_nothing_but_the_step(weight: float, spoils: str) -> None:
    before = trained(3, not_finite="skip")
    after, metrics = stepper(not_finite="skip").step(before, spoiled(9, weight))
    assert differing(before, after) == {"step"}
    assert int(after.step) == int(before.step) + 1
    assert not np.isfinite(metrics[spoils])
    assert metrics["skipped"] and metrics["finite"] and not metrics["spike"]


def test_it_spoils_the_state_where_nothing_is_skipped() -> None:
    before = trained(3)
    after, metrics = stepper().step(before, spoiled(9))
    assert not metrics["finite"] and not metrics["skipped"]
    assert any(path.startswith("params/") for path in differing(before, after))
    assert not np.isfinite(optax.global_norm(after.params))


def test_a_good_batch_is_the_same_step_with_and_without_the_policy() -> None:
    states = [trained(3, **faults) for faults in ({}, {"not_finite": "skip"})]
    assert differing(*states) == set()


def test_a_state_that_is_spoiled_already_is_not_called_fine() -> None:
    start = stepper(not_finite="skip").start
    bad = start._replace(params=start.params | {"log_scale": start.params["log_scale"] * np.nan})
    _, metrics = stepper(not_finite="skip").step(bad, batch(0))
    assert metrics["skipped"] and not metrics["finite"]


def test_after_a_skip_schedule_and_average_go_on_from_the_last_update() -> None:
    """As if the spoiled batch had not been there, but for the dropped patches, which belong to the step."""
    skipping, state = stepper(not_finite="skip"), trained(3, not_finite="skip")
    rates = []
    for own in (spoiled(9), batch(4), batch(5)):
        state, metrics = skipping.step(state, own)
        rates.append(float(metrics["learning_rate"]))
    schedule = learning_rate_schedule(skipping.config.optimizer, skipping.config.train.steps)
    assert rates == pytest.approx([float(schedule(n)) for n in (3, 3, 4)])
    assert int(state.step) == 6
    assert {int(count) for _, count in optax.tree.get_all_with_path(state.opt_state, "count")} == {5}


@pytest.mark.parametrize("policy", ["skip", "log"])
def test_a_spike_is_a_finite_loss_above_the_ceiling(policy: str) -> None:
    own, before = stepper(spike=policy, spike_factor=2.0), trained(2, spike=policy, spike_factor=2.0)
    loss = float(own.step(before, batch(7))[1]["loss"])
    for ceiling, spike in ((np.nextafter(np.float32(loss), np.float32(0)), True), (loss, False), (np.inf, False)):
        after, metrics = own.step(before, batch(7), loss_ceiling=float(ceiling))
        assert bool(metrics["spike"]) == spike
        assert bool(metrics["skipped"]) == (spike and policy == "skip")
        assert (differing(before, after) == {"step"}) == bool(metrics["skipped"])
        assert metrics["finite"]
    _, metrics = own.step(before, spoiled(9), loss_ceiling=0.0)
    assert not metrics["spike"] and not metrics["skipped"] and not metrics["finite"], "not_finite decides about those"


@pytest.mark.parametrize(("notice", "stop", "save"), [(0, 0, 0), (1, 1, 0), (2, 0, 1), (3, 1, 1)])
def test_a_notice_reaches_the_metrics(notice: int, stop: int, save: int) -> None:
    assert notice == stop * NOTICE_STOP + save * NOTICE_SAVE
    own, rows = stepper(), stepper().config.train.batch_size
    _, metrics = own.step(own.start, batch(0), notice=notice)
    assert (int(metrics["stop"]), int(metrics["save"])) == (rows * stop, rows * save)
