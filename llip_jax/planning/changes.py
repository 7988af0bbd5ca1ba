"""What would make a run fit that does not: by the model's shapes, so about."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping

from llip_jax.config import Config
from llip_jax.models.sizes import model_shape
from llip_jax.planning.memory import held_of_an_image, pair_sides
from llip_jax.planning.plan import Change, Memory
from llip_jax.planning.search import REMATS, Remat

_FACTORS = (2, 4, 8, 16)


def changes(config: Config, mesh: Mapping[str, int], memory: Memory) -> tuple[Change, ...]:
    """Settings that lower the peak, those that are enough first; of each kind the first that is, or the last.

    Temporaries, but for gradients and what pairs are computed from, are taken to shrink as activations do.
    """
    if memory.peak is None or memory.capacity is None:
        return ()
    found = []
    for kind in _kinds(config, mesh, memory):
        tried = [Change(setting, round(peak), peak <= memory.capacity) for setting, peak in kind]
        found += next(([change] for change in tried if change.fits), tried[-1:])
    return tuple(sorted((change for change in found if change.peak < memory.peak), key=lambda change: not change.fits))


def _kinds(config: Config, mesh: Mapping[str, int], memory: Memory) -> Iterator[list[tuple[str, float]]]:
    """(setting, estimated peak), kind by kind, the mildest of each kind first."""
    shards, pieces, now = mesh["data"] * mesh["fsdp"], config.train.microbatches, config.model.remat
    images = config.train.batch_size // shards
    state = memory.parameters + memory.optimizer + memory.average
    assert memory.peak is not None
    # Gradients are as large as parameters; pairs are of the whole batch, however many pieces it has.
    fixed = state + memory.batch + memory.parameters + pair_sides(config, images)
    shrinking = max(0, memory.peak - fixed)

    @functools.cache
    def held(remat: Remat) -> int:
        model = dataclasses.replace(config.model, remat=remat)
        return held_of_an_image(dataclasses.replace(config, model=model), mesh["tensor"])

    def peak(remat: Remat, factor: int = 1) -> float:
        return fixed + shrinking * held(remat) / held(now) / factor

    yield [(f"model.remat={remat}", peak(remat)) for remat in REMATS[REMATS.index(now) + 1 :]]
    for remat in dict.fromkeys((now, max(now, "layer", key=REMATS.index))):
        words = "" if remat == now else f"model.remat={remat} "
        yield [
            (f"{words}train.microbatches={pieces * n}", peak(remat, n)) for n in _FACTORS if images % (pieces * n) == 0
        ]
    shape = model_shape(config.model)
    fsdp = math.gcd(shards, shape.vision.width, shape.text.width)
    if fsdp > mesh["fsdp"]:
        less = (state + memory.parameters) * (1 - mesh["fsdp"] / fsdp)
        yield [(f"mesh.data={shards // fsdp} mesh.fsdp={fsdp}", memory.peak - less)]
    yield [(f"{n} times the chips", memory.peak / n) for n in _FACTORS if images % (pieces * n) == 0]
