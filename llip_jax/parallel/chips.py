"""Accelerators that runs are planned for and measured on: what their makers state about one chip.

- TPU: peak, rate of memory, links and chips of a host from cloud.google.com/tpu/docs (system architecture of each
  version; tpu7x: its page's table of v5p, v6e and tpu7x); v4's links from its paper, arXiv:2304.01433.
  Memory is what the compiler (libtpu 0.0.42.1) lets a program use, less than what is soldered on. Rates to the host are
  those of "How to Scale Your Model" (jax-ml.github.io/scaling-book/tpus); tpu7x is assumed to be no slower than v6e.
  Vector units have 8 x 128 lanes of 4 ALUs a core, by the same book for v5p; v6e and tpu7x are taken to have no more;
  of v4 the pages of ayaka14732.github.io/pallas-tpu-tutorial/chapter01 show 2.
- GPU: NVIDIA's data sheets, dense bf16. Memory is nominal less 1 GiB for the driver's context.
"""

from dataclasses import dataclass

_GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One chip. Rates are bytes or FLOPs a second."""

    name: str
    device_kinds: tuple[str, ...]
    """What ``jax.Device.device_kind`` calls it."""
    peak_bf16: float
    hbm_bytes: int
    hbm_rate: float
    link_rate: float
    """Of one link in one direction. A GPU's links of NVLink are counted as one."""
    host_rate: float
    """To the memory of its host, in one direction."""
    chips_per_host: int
    torus: int = 0
    """Dimensions of the torus that a slice is cut from, with two links each; 0: each chip reaches each other."""
    full_ring: int = 0
    """A side of a slice is a ring where this divides it, otherwise a line."""
    devices_per_chip: int = 1
    """As jax counts them at run time."""
    mxu: int = 128
    """Side of the systolic array, to which matrices are padded; of a GPU, of the tiles of a matrix product."""
    clock: float | None = None
    """Cycles a second, as its peak and its systolic arrays have it: none of the makers' pages says."""
    vector_rate: float | None = None
    """Elementwise operations a second of TPUs."""


_TPUS = (
    Chip(
        "v4",
        ("TPU v4",),
        peak_bf16=275e12,
        hbm_bytes=int(30.5 * _GIB),
        hbm_rate=1228e9,
        link_rate=50e9,
        host_rate=16e9,
        chips_per_host=4,
        torus=3,
        full_ring=4,
        clock=1.05e9,
        vector_rate=4.3e12,
    ),
    Chip(
        "v5e",
        ("TPU v5 lite", "TPU v5e"),
        peak_bf16=197e12,
        hbm_bytes=int(15.75 * _GIB),
        hbm_rate=819e9,
        link_rate=50e9,
        host_rate=16e9,
        chips_per_host=4,
        torus=2,
        full_ring=16,
        clock=1.5e9,
        vector_rate=6.14e12,
    ),
    Chip(
        "v5p",
        ("TPU v5", "TPU v5p"),
        peak_bf16=459e12,
        hbm_bytes=int(95.74 * _GIB),
        hbm_rate=2765e9,
        link_rate=100e9,
        host_rate=16e9,
        chips_per_host=4,
        torus=3,
        full_ring=4,
        clock=1.75e9,
        vector_rate=14.3e12,
    ),
    Chip(
        "v6e",
        ("TPU v6 lite", "TPU v6e"),
        peak_bf16=918e12,
        hbm_bytes=int(31.25 * _GIB),
        hbm_rate=1638e9,
        link_rate=100e9,
        host_rate=32e9,
        chips_per_host=4,
        torus=2,
        full_ring=16,
        mxu=256,
        clock=1.75e9,
        vector_rate=7.17e12,
    ),
    Chip(
        "tpu7x",
        ("TPU7x",),
        peak_bf16=2307e12,
        hbm_bytes=int(189.5 * _GIB),
        hbm_rate=7380e9,
        link_rate=100e9,
        host_rate=32e9,
        chips_per_host=4,
        torus=3,
        full_ring=4,
        devices_per_chip=2,
        mxu=256,
        clock=2.2e9,
        vector_rate=18e12,
    ),
)

_GPUS = (
    Chip(
        "a100",
        ("NVIDIA A100-SXM4-80GB",),
        peak_bf16=312e12,
        hbm_bytes=79 * _GIB,
        hbm_rate=2039e9,
        link_rate=300e9,
        host_rate=32e9,
        chips_per_host=8,
    ),
    Chip(
        "a100-40gb",
        ("NVIDIA A100-SXM4-40GB",),
        peak_bf16=312e12,
        hbm_bytes=39 * _GIB,
        hbm_rate=1555e9,
        link_rate=300e9,
        host_rate=32e9,
        chips_per_host=8,
    ),
    Chip(
        "h100",
        ("NVIDIA H100 80GB HBM3",),
        peak_bf16=989e12,
        hbm_bytes=79 * _GIB,
        hbm_rate=3352e9,
        link_rate=450e9,
        host_rate=64e9,
        chips_per_host=8,
    ),
    Chip(
        "h200",
        ("NVIDIA H200",),
        peak_bf16=989e12,
        hbm_bytes=140 * _GIB,
        hbm_rate=4800e9,
        link_rate=450e9,
        host_rate=64e9,
        chips_per_host=8,
    ),
    Chip(
        "b200",
        ("NVIDIA B200",),
        peak_bf16=2250e12,
        hbm_bytes=179 * _GIB,
        hbm_rate=8000e9,
        link_rate=900e9,
        host_rate=64e9,
        chips_per_host=8,
    ),
)

CHIPS = {chip.name: chip for chip in (*_TPUS, *_GPUS)}
"""By name."""


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a ``jax.Device``; None where it is not in the table."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.device_kinds), None)
