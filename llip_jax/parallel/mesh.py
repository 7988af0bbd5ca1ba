"""The device mesh: axes ``data``, ``fsdp`` and ``tensor``."""

import math

import jax
from jax.experimental import mesh_utils
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
    if (config.data, config.fsdp) == (-1, -1) and len(devices) % config.tensor == 0:
        sizes[1] = math.gcd(len(devices) // config.tensor, config.fsdp_limit)
    fixed = math.prod(n for n in sizes if n != -1)
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if math.prod(sizes) != len(devices):
        asked = " x ".join(f"{axis}={n}" for axis, n in zip(AXES, sizes, strict=True))
        raise ConfigError(
            f"mesh: {asked} does not fill {len(devices)} device(s); set one axis to -1 to take what is left"
        )
    # 2 x 128 on a slice of 16 x 16 chips splits one of its sides; without leave TPUs but v5e refuse.
    return Mesh(
        mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
    )


def neighbour_ring(mesh: Mesh) -> tuple[int, ...] | None:
    """Positions of the mesh's devices (row-major) in an order in which each chip is next to the one before it.

    The last is beside the first. Where a ring hops over chips, the TPU compiler does not run its transfers beside
    computation (v5e from 32 chips on, libtpu 0.0.52). None where the devices are no grid of two dimensions with an even
    side.
    """
    devices = list(mesh.devices.flat)
    places = [tuple(getattr(device, "coords", ())) for device in devices]
    if any(len(place) != 3 or place[2] for place in places) or len(set(places)) < len(places):
        return None
    width, height = (1 + max(place[axis] for place in places) for axis in (0, 1))
    if width * height != len(places) or min(width, height) < 2:
        return None
    # Up and down the columns, sparing row 0 for the way back: needs an even number of columns.
    if width % 2:
        if height % 2:
            return None
        places, width, height = [(y, x, z) for x, y, z in places], height, width
    snake = [(x, y) for x in range(width) for y in (range(1, height) if x % 2 == 0 else range(height - 1, 0, -1))]
    cycle = snake + [(x, 0) for x in reversed(range(width))]
    position = {place[:2]: i for i, place in enumerate(places)}
    return tuple(position[place] for place in cycle)


def batch_shards(mesh: Mesh) -> int:
    """Into how many pieces the mesh divides the global batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
