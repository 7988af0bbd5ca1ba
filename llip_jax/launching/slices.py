"""Slices of TPUs by topology, ``v5e:16x16``, and what Cloud TPU calls them."""

import math
import re
from dataclasses import dataclass

from llip_jax.config import ConfigError, nearest

_SIDES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Generation:
    """How Cloud TPU names slices of one kind of chip (cloud.google.com/tpu/docs/runtimes, .../tpu/docs/v5p, ...).

    prefix: of the accelerator type; the number after it counts ``units`` a chip (v4 and v5p: TensorCores).
    runtime: the image of its hosts for JAX.
    axes: of its torus.
    """

    prefix: str
    units: int
    runtime: str
    axes: int


GENERATIONS = {
    "v4": Generation("v4", 2, "tpu-ubuntu2204-base", 3),
    "v5e": Generation("v5litepod", 1, "v2-alpha-tpuv5-lite", 2),
    "v5p": Generation("v5p", 2, "v2-alpha-tpuv5", 3),
    "v6e": Generation("v6e", 1, "v2-alpha-tpuv6e", 2),
}


@dataclass(frozen=True)
class Slice:
    """A slice to ask for."""

    topology: str
    chips: int
    accelerator_type: str
    runtime_version: str


def parse_topology(text: str) -> Slice:
    """The slice that ``v5e:16x16`` names.

    Raises:
        ConfigError: not a topology, or one that Cloud TPU would give another shape or none at all.
    """
    name, _, shape = text.partition(":")
    if name == "tpu7x":
        raise ConfigError(f"--topology is {text!r}: tpu7x is rented through GKE only (docs/pods.md, GKE)")
    if name not in GENERATIONS:
        near = nearest(name, list(GENERATIONS))
        raise ConfigError(f"--topology is {text!r}, expected one of {', '.join(GENERATIONS)} before the colon.{near}")
    generation = GENERATIONS[name]
    if not re.fullmatch("x".join([r"[1-9]\d*"] * generation.axes), shape):
        example = "x".join(["4"] * generation.axes)
        raise ConfigError(f"--topology is {text!r}, expected {generation.axes} sides, as in {name}:{example}")
    sides = [int(side) for side in shape.split("x")]
    chips = math.prod(sides)
    _check_shape(text, sides, chips)
    return Slice(text, chips, f"{generation.prefix}-{chips * generation.units}", generation.runtime)


def _check_shape(text: str, sides: list[int], chips: int) -> None:
    """Accelerator types count chips only: a power of two gets the most cubic shape."""
    if len(sides) == 2 and (sides[0] > sides[1] or sides[1] > 2 * sides[0] or not set(sides) <= set(_SIDES)):
        raise ConfigError(
            f"--topology is {text!r}, expected sides of 1, 2, 4, 8 or 16, equal or the second twice the first"
        )
    if len(sides) == 3 and chips & (chips - 1) == 0:
        bits = chips.bit_length() - 1
        given = sorted(2 ** ((bits + extra) // 3) for extra in range(3))
        if sorted(sides) != given:
            raise ConfigError(f"--topology is {text!r}; of {chips} chips Cloud TPU makes {'x'.join(map(str, given))}")
