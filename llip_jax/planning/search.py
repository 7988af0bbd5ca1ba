"""Looks for the fastest setting that fits: mesh, then what is recomputed, pieces of the batch, blocks of pairs."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from llip_jax.config import Config, ConfigError, MeshConfig
from llip_jax.models.sizes import model_shape
from llip_jax.planning import memory
from llip_jax.planning.plan import Plan
from llip_jax.planning.target import Target, resolved_for

Remat = Literal["none", "offload", "dots", "layer"]
REMATS: tuple[Remat, ...] = ("none", "dots", "layer", "offload")
"""From what keeps most on the device to what keeps least."""
PIECES = (1, 2, 4, 8)
TEXT_BLOCKS = (128, 512)
TENSORS = (1, 2, 4)


class Setting(NamedTuple):
    """What a search changes of a configuration."""

    batch_size: int
    mesh: tuple[int, int, int]
    remat: Remat
    microbatches: int
    text_block: int | None

    def __str__(self) -> str:
        data, fsdp, tensor = self.mesh
        words = f"mesh.data={data} mesh.fsdp={fsdp}" + (f" mesh.tensor={tensor}" if tensor > 1 else "")
        words += f" model.remat={self.remat}"
        words += f" train.microbatches={self.microbatches}" if self.microbatches > 1 else ""
        return words + (f" pair_scores.text_block={self.text_block}" if self.text_block else "")

    def applied(self, config: Config) -> Config:
        """The configuration with this setting."""
        data, fsdp, tensor = self.mesh
        return dataclasses.replace(
            config,
            mesh=MeshConfig(data=data, fsdp=fsdp, tensor=tensor),
            model=dataclasses.replace(config.model, remat=self.remat),
            train=dataclasses.replace(config.train, batch_size=self.batch_size, microbatches=self.microbatches),
            pair_scores=dataclasses.replace(config.pair_scores, text_block=self.text_block),
        )


@dataclass
class Search:
    """What a search has tried.

    plans: in order of trial.
    left_out: mesh splits that cannot be, and why.
    """

    plans: list[tuple[Setting, Plan]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def ranked(self) -> list[tuple[Setting, Plan]]:
        """What fits first, the fastest first; of what does not, the one that lacks least."""

        def key(tried: tuple[Setting, Plan]) -> tuple[bool, float, float]:
            plan = tried[1]
            return plan.fits is False or plan.failure != "", -(plan.images_per_second or 0), plan.memory.peak or 0

        return sorted(self.plans, key=key)

    @property
    def best(self) -> Plan:
        """The first of the ranking."""
        return self.ranked[0][1]

    def fitting(self) -> Setting | None:
        """The best setting, if it fits."""
        if not self.plans:
            return None
        setting, plan = self.ranked[0]
        return None if plan.fits is False or plan.failure else setting


def mesh_splits(config: Config, devices: int, batch_size: int) -> tuple[list[tuple[int, int, int]], list[str]]:
    """Splits (data, fsdp, tensor) of so many devices that divide the model and the batch; others, and why not."""
    shape = model_shape(config.model)
    towers = {"vision": shape.vision, "text": shape.text}
    splits, left_out = [], []
    for tensor in TENSORS:
        if devices % tensor:
            continue
        whole = [f"{name} heads {t.heads}" for name, t in towers.items() if t.heads % tensor]
        whole += [f"{name} mlp {t.mlp}" for name, t in towers.items() if t.mlp % tensor]
        if whole:
            left_out.append(f"mesh.tensor={tensor}: {', '.join(whole)} does not divide by {tensor}")
            continue
        shards = devices // tensor
        if batch_size % shards or config.eval.batch_size % shards:
            left_out.append(f"mesh.tensor={tensor}: batches do not divide over {shards} devices")
            continue
        for fsdp in (n for n in range(1, shards + 1) if shards % n == 0):
            whole = [f"{name} width {t.width}" for name, t in towers.items() if t.width % fsdp]
            if not whole:
                splits.append((shards // fsdp, fsdp, tensor))
            elif tensor == 1:
                left_out.append(f"mesh.fsdp={fsdp}: {', '.join(whole)} does not divide by {fsdp}")
    return splits, left_out


def search(
    config: Config,
    target: Target,
    trials: int,
    compile_plan: Callable[[Config, Target], Plan],
    bar: Any,
) -> Search:
    """At most so many compilations: first the mesh, then on the best mesh what costs less time and more memory.

    Where nothing fits, the same with half the batch. ``bar`` is a tqdm.

    Raises:
        ConfigError: no split of the mesh divides model and batch.
    """
    config = resolved_for(config, target)
    found, batch_size = Search(), config.train.batch_size

    @functools.cache  # tracing a large model takes a second
    def image_bytes(remat: Remat, tensor: int) -> int:
        own = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
        return memory.kept(own, 1, tensor).device

    while True:
        splits, left_out = mesh_splits(config, target.devices, batch_size)
        found.left_out += [line for line in left_out if line not in found.left_out]
        if not splits and not found.plans:
            raise ConfigError(f"--search: no mesh of {target.devices} devices divides:\n" + "\n".join(left_out))
        for setting in _stages(config, found, splits, batch_size, image_bytes):
            if len(found.plans) == trials:
                return found
            if all(setting != tried for tried, _ in found.plans):
                bar.set_postfix_str(str(setting))
                try:
                    found.plans.append((setting, compile_plan(setting.applied(config), target)))
                except ConfigError as error:
                    found.left_out.append(f"{setting}: {error}")
                bar.update(1)
        batch_size //= 2
        if not splits or not found.plans or found.fitting() is not None:
            return found


def _stages(
    config: Config,
    found: Search,
    splits: list[tuple[int, int, int]],
    batch_size: int,
    image_bytes: Callable[[Remat, int], int],
) -> Iterator[Setting]:
    """Settings to try, each stage from the best of those before: it looks at what ``found`` has learned in between.

    ``image_bytes``: of activations that an image keeps on a device, by policy and ``tensor``.
    """
    model, train = config.model, config.train
    first = Setting(batch_size, splits[0], model.remat, train.microbatches, config.pair_scores.text_block)
    # The more fsdp, the less memory; tensor costs exchanges in every layer. Each goes on while it pays.
    for tensor in TENSORS:
        for split in sorted((s for s in splits if s[2] == tensor), key=lambda split: -split[1]):
            yield (setting := first._replace(mesh=split))
            if found.fitting() not in (None, setting):
                break
        if found.fitting() is not None and found.fitting() != setting:
            break
    for pieces in PIECES:
        for remat in REMATS[-2:]:
            if found.plans and found.fitting() is None:
                setting = found.ranked[0][0]._replace(remat=remat, microbatches=pieces)
                if _possible(found, setting, image_bytes):
                    yield setting
    for remat in REMATS:
        for pieces in PIECES:
            if (best := found.fitting()) is None:
                return
            setting = best._replace(remat=remat, microbatches=pieces)
            if _possible(found, setting, image_bytes):
                yield setting
                if found.plans[-1][1].fits:
                    break
    if (best := found.fitting()) is not None and config.pair_scores.implementation != "dense":
        for block in TEXT_BLOCKS:
            yield best._replace(text_block=block)


def _possible(found: Search, setting: Setting, image_bytes: Callable[[Remat, int], int]) -> bool:
    """Whether pieces divide a device's images, and state and activations alone do not overflow it."""
    known = found.plans[-1][1].memory
    data, fsdp, tensor = setting.mesh
    images, rest = divmod(setting.batch_size, data * fsdp * setting.microbatches)
    if rest:
        return False
    needed = known.parameters + known.optimizer + images * image_bytes(setting.remat, tensor)
    return known.capacity is None or needed <= known.capacity
