"""What a plan is for: a slice of TPUs, GPUs or simulated devices, by a name such as v5e:16x16."""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Literal

from llip_jax.config import Config, ConfigError, nearest
from llip_jax.parallel.chips import CHIPS, Chip

Platform = Literal["tpu", "gpu", "cpu"]


@dataclass(frozen=True)
class Target:
    """The devices of a run.

    name: as the TPU compiler calls it.
    sides: chips along each side of a slice of TPUs; otherwise how many there are.
    chip: None for simulated devices on a CPU, of which nothing is known.
    """

    name: str
    platform: Platform
    sides: tuple[int, ...]
    chip: Chip | None

    @property
    def chips(self) -> int:
        """Of all hosts."""
        return math.prod(self.sides)

    @property
    def devices(self) -> int:
        """What jax counts; some chips are two devices."""
        return self.chips * (1 if self.chip is None else self.chip.devices_per_chip)

    @property
    def hosts(self) -> int:
        """Machines, each running one process."""
        return 1 if self.chip is None else math.ceil(self.chips / self.chip.chips_per_host)


def parse_target(text: str) -> Target:
    """``v5e:16x16`` (TPU and the sides of its grid), ``gpu:h100x8``, ``cpu:8``.

    Raises:
        ConfigError: nothing of that kind; names the nearest chip.
    """
    kind, _, size = text.partition(":")
    if kind == "cpu" and re.fullmatch(r"[1-9]\d*", size):
        return Target(text, "cpu", (int(size),), None)
    if kind == "gpu" and (found := re.fullmatch(r"(\w+?)x([1-9]\d*)", size)):
        return Target(text, "gpu", (int(found[2]),), _chip(found[1], torus=False))
    if kind not in ("cpu", "gpu") and re.fullmatch(r"\d+(x\d+){1,2}", size):
        chip, sides = _chip(kind, torus=True), tuple(int(side) for side in size.split("x"))
        if chip.torus != len(sides):
            example = "x".join("4" * chip.torus)
            raise ConfigError(
                f"--topology: {text!r}: {kind} slices have {chip.torus} sides; expected one like {kind}:{example}"
            )
        return Target(text, "tpu", sides, chip)
    if re.fullmatch(r"[a-z]+\d\w*", kind):
        _chip(kind, torus=True)
    raise ConfigError(f"--topology: {text!r} is not valid: expected one like v5e:16x16, v5p:8x8x4, gpu:h100x8 or cpu:8")


def resolved_for(config: Config, target: Target) -> Config:
    """The configuration with every 'auto' as the target's devices, not this machine's, will have it."""
    model, accelerator = config.model, target.platform != "cpu"
    dtype: Literal["float32", "bfloat16"] = "bfloat16" if accelerator else "float32"
    model = dataclasses.replace(
        model,
        dtype=dtype if model.dtype == "auto" else model.dtype,
        scan_layers=accelerator if model.scan_layers == "auto" else model.scan_layers,
    )
    return dataclasses.replace(config, model=model)


def _chip(name: str, *, torus: bool) -> Chip:
    known = {chip_name: chip for chip_name, chip in CHIPS.items() if (chip.torus > 0) == torus}
    if name not in known:
        raise ConfigError(f"--topology: no {'TPU' if torus else 'GPU'} named {name!r}.{nearest(name, list(known))}")
    return known[name]
