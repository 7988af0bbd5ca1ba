"""The table of chips against what JAX and the TPU compiler know of them."""

import importlib.util
import json
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from run_helpers import run

from llip_jax.parallel.chips import CHIPS, chip_of
from llip_jax.training.flops import peak_flops

TPUS = {
    "v4": ("v4:2x2x1", pltpu.ChipVersion.TPU_V4),
    "v5e": ("v5e:2x2", pltpu.ChipVersion.TPU_V5E),
    "v5p": ("v5p:2x2x1", pltpu.ChipVersion.TPU_V5P),
    "v6e": ("v6e:2x2", pltpu.ChipVersion.TPU_V6E),
    "tpu7x": ("tpu7x:2x2x1", pltpu.ChipVersion.TPU_7X),
}


def test_every_kind_of_device_names_one_chip() -> None:
    kinds = [kind for chip in CHIPS.values() for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))
    assert all(chip_of(kind) is chip for chip in CHIPS.values() for kind in chip.device_kinds)
    assert all(name == chip.name for name, chip in CHIPS.items())
    assert chip_of("cpu") is None
    assert set(TPUS) == {name for name, chip in CHIPS.items() if chip.torus}


@pytest.mark.parametrize("name", TPUS)
def test_rates_are_those_that_jax_knows(name: str) -> None:
    chip, version = CHIPS[name], TPUS[name][1]
    cores = version.num_physical_tensor_cores_per_chip
    core = pltpu.get_tpu_info_for_chip(version, 1)
    assert chip.peak_bf16 == pytest.approx(cores * core.bf16_ops_per_second, rel=0.01)
    assert chip.hbm_rate == pytest.approx(cores * core.mem_bw_bytes_per_second, rel=0.15)
    assert 0.85 < chip.hbm_bytes / (cores * core.hbm_capacity_bytes) < 1
    assert chip.mxu == core.mxu_column_size
    # Each cell of the arrays multiplies and adds once a cycle, twice from the sixth generation on.
    assert chip.clock is not None
    passes = 2 if core.generation >= 6 else 1
    alus = 2 if name == "v4" else 4
    assert chip.vector_rate == pytest.approx(cores * core.num_sublanes * core.num_lanes * alus * chip.clock, rel=0.01)
    assert chip.peak_bf16 == pytest.approx(cores * core.num_mxus * chip.mxu**2 * 2 * passes * chip.clock, rel=0.01)


def test_the_peak_of_devices_counts_chips_of_two_devices_once() -> None:
    def devices(kind: str, count: int) -> list[Any]:
        return [SimpleNamespace(device_kind=kind)] * count

    assert peak_flops(devices("TPU v5 lite", 3)) == 3 * 197e12
    assert peak_flops(devices("TPU7x", 4)) == 2 * 2307e12
    assert peak_flops(devices("NVIDIA H200", 2)) == 2 * 989e12
    assert peak_flops([*devices("TPU v4", 1), *devices("abacus", 1)]) is None


def on_tpu(topology: str) -> list[Any]:
    """(kind of device, devices of a chip, what the compiler says to a program that cannot fit)."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    whole = NamedSharding(Mesh(np.array(devices), ("x",)), PartitionSpec())
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jax.jit(lambda x: -x, in_shardings=whole, out_shardings=whole).lower(
            jax.ShapeDtypeStruct((400, 2**28), np.float32)
        ).compile()
    return [devices[0].device_kind, len(devices) // len({tuple(d.coords) for d in devices}), str(error.value)]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed")
def test_kinds_of_device_and_memory_are_those_of_the_tpu_compiler() -> None:
    names = [topology for topology, _ in TPUS.values()]
    program = f"import json, {__name__} as m; print('RESULT' + json.dumps([m.on_tpu(name) for name in {names}]))"
    environment = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = run(["-c", program], keep_compilations=False, environment=environment)
    assert done.returncode == 0, done.stderr
    for name, (kind, devices, said) in zip(TPUS, json.loads(done.stdout.rpartition("RESULT")[2]), strict=True):
        chip = CHIPS[name]
        assert chip_of(kind) is chip
        # A v4 is one device where it runs; the compiler's topologies have its two cores apart.
        assert devices == (2 if name == "v4" else chip.devices_per_chip)
        assert f"({chip.hbm_bytes / devices / 2**30:.2f}G)" in said
