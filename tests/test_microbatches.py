"""A batch in pieces: the same loss and the same gradients as at once, in less memory."""

import functools
import sys
import types
from typing import Any

import numpy as np
import pytest
from big_vision_stand_in import PATCH, VISION, Vit
from oracles import above, relative_error
from run_helpers import call_on_devices, tiny_config
from step_helpers import Stepper, gradients, random_batch

from llip_jax.config import Config, ConfigError
from llip_jax.objectives.microbatches import check_microbatches

TOLERANCE = 1e-5
SEED = int(np.random.default_rng().integers(2**31))
SLOW = pytest.mark.slow

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "mixer": {"objective": {"sigmoid.duplicates": "positive", "softmax.weight": 0.5}},
    "class_token": {
        "model": {"pooler": "class_token", "logit_bias": None, "vision.pooling": "attention"},
        "objective": {"sigmoid": None, "softmax.weight": 1.0},
    },
    "average": {"model": {"pooler": "average"}, "pair_scores": {"implementation": "dense"}},
    "frozen tower": {"train": {"frozen": ("vision/*",)}},
    "remat": {"model": {"remat": "layer", "scan_layers": True, "vision.layers": 2}},
    "big_vision": {
        "model": {
            "image_size": 2 * PATCH,
            "vision.patch": PATCH,
            "vision.width": VISION["width"],
            "vision.big_vision": {"name": "vit", "arguments": VISION | {"patch_size": (PATCH, PATCH)}},
        }
    },
}


@pytest.fixture(autouse=True)
def vit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for big_vision's."""
    for name in ("big_vision", "big_vision.models", "big_vision.models.vit"):
        module = types.ModuleType(name)
        module.__path__, module.Model = [], Vit  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)


def config_of(case: str, pieces: int, **sections: dict[str, Any]) -> Config:
    """Two caption slots, half of the patches dropped, gradients as they are."""
    fields: dict[str, dict[str, Any]] = {
        "model": {"patch_dropout": 0.5},
        "train": {"batch_size": 32, "microbatches": pieces},
        "data": {"captions.slots": 2},
        "optimizer": {"clip_norm": None, "warmup_steps": 0},
    }
    for section, own in (*CASES[case].items(), *sections.items()):
        fields[section] = fields.get(section, {}) | own
    return tiny_config(**fields)


@functools.cache
def stepper(case: str, pieces: int, devices: int = 1) -> Stepper:
    mesh = {"data": 4, "fsdp": 2} if devices == 8 else {}
    return Stepper(config_of(case, pieces, mesh=mesh), devices)


def errors(case: str, pieces: int, devices: int = 1) -> dict[str, float]:
    """Of loss and gradients of the first step in pieces, each as a share of the largest entry at once."""
    whole, cut = (_first_step(stepper(case, m, devices)) for m in (1, pieces))
    assert whole.keys() == cut.keys()
    # A bias of all keys changes no attention: its gradient is zero but for rounding.
    names = [name for name in whole if not name.endswith("key/bias")]
    found = {f"{name} (batch {SEED})": relative_error(cut[name], whole[name]) for name in names}
    # A sum over all pairs whose terms, near 1 together, may cancel.
    found[f"log_scale (batch {SEED})"] *= min(1, abs(float(whole["log_scale"])) / 0.1)
    return found


def _first_step(stepper: Stepper) -> dict[str, np.ndarray]:
    state, metrics = stepper.step(stepper.start, random_batch(stepper.config, SEED))
    losses = {name: np.asarray(x) for name, x in metrics.items() if name.startswith("loss")}
    return losses | gradients(state, stepper.config)


@pytest.mark.parametrize(
    ("case", "pieces"),
    [
        pytest.param(case, pieces, marks=() if (case, pieces) == ("class_token", 4) else SLOW)
        for case in CASES
        for pieces in (2, 4)
    ],
)
def test_loss_and_every_gradient_are_those_of_the_whole_batch(case: str, pieces: int) -> None:
    assert above(errors(case, pieces), TOLERANCE) == {}


def errors_on_eight_devices() -> dict[str, dict[str, float]]:
    return {case: errors(case, pieces, 8) for case, pieces in (("mixer", 4), ("class_token", 2))}


def test_the_same_on_eight_devices() -> None:
    for case, found in call_on_devices(errors_on_eight_devices, devices=8).items():
        assert above(found, TOLERANCE) == {}, case


def test_dropout_matters_to_the_gradients() -> None:
    """Or equal ones would show nothing about it: another step drops other patches."""
    own = stepper("class_token", 4)
    state, batch = own.start, random_batch(own.config, SEED)
    first, other = (
        gradients(own.step(state._replace(step=state.step + n), batch)[0], own.config)["vision/patch_kernel"]
        for n in (0, 1)
    )
    assert relative_error(other, first) > 1000 * TOLERANCE


def test_temporaries_fall() -> None:
    one, two, four = (
        stepper("class_token", pieces).compiled.memory_analysis().temp_size_in_bytes for pieces in (1, 2, 4)
    )
    assert two < 0.65 * one
    assert four < 0.65 * two


@pytest.mark.parametrize(("pieces", "shards", "nearest"), [(3, 1, 2), (3, 8, 2), (8, 8, 4), (64, 1, 32)])
def test_pieces_that_do_not_come_out_even_are_refused(pieces: int, shards: int, nearest: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"microbatches={pieces} does not divide the {32 // shards} images.*nearest: {nearest}"
    ):
        check_microbatches(config_of("mixer", pieces), shards)
    check_microbatches(config_of("mixer", nearest), shards)


def test_a_tower_that_draws_for_all_images_at_once_is_refused() -> None:
    theirs = {"name": "vit", "arguments": {"dropout": 0.1}}
    config = config_of("big_vision", 2, model={"vision.big_vision": theirs})
    with pytest.raises(ConfigError, match=r"train.microbatches=2: big_vision's 'vit' draws dropout for all images"):
        check_microbatches(config, 1)
    check_microbatches(config_of("big_vision", 1, model={"vision.big_vision": theirs}), 1)
