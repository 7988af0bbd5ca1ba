"""The device mesh: axes ``data``, ``fsdp`` and ``tensor``."""

import math

import jax
from jax.sharding import AxisType, Mesh

from llip_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "tensor")


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Mesh over ``devices`` (default: all devices of all processes).

    All axes are of type Auto: the compiler propagates shardings between the places where parallel.sharding pins them.

    Raises:
        ConfigError: the axis sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    fixed = math.prod(n for n in sizes if n != -1)
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if math.prod(sizes) != len(devices):
        asked = " x ".join(f"{axis}={n}" for axis, n in zip(AXES, sizes, strict=True))
        raise ConfigError(
            f"mesh: {asked} does not fill {len(devices)} device(s); set one axis to -1 to take what is left"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_shards(mesh: Mesh) -> int:
    """Into how many pieces the mesh divides the global batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
