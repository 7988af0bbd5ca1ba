"""What a run will take, before it starts: its exact step compiled for devices that are not there."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pydantic

from llip_jax.config import Config, ConfigError, to_dict
from llip_jax.planning.hlo import CollectiveTotal
from llip_jax.planning.roofline import Estimate
from llip_jax.planning.target import Target, resolved_for

ROOM = 0.02
"""Share of a chip's memory that an estimate without a compiler leaves free."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    kept: what the towers keep for the backward pass, by the model's shapes; part of ``temporaries``.
    kept_in_host: the same in the memory of the host (``model.remat='offload'``).
    temporaries, peak: of the compiler, or an estimate; None where the compiler gives up before it knows.
    capacity: what a program may use; None for simulated devices.
    """

    parameters: int
    optimizer: int
    average: int
    batch: int
    kept: int
    kept_in_host: int
    temporaries: int | None
    peak: int | None
    capacity: int | None


@dataclass(frozen=True)
class Work:
    """What one device does in a step. FLOPs are those of matrix products."""

    flops: float
    hbm_bytes: int
    traffic: tuple[CollectiveTotal, ...]
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Change:
    """A setting that would lower the peak, by an estimate, to ``peak`` bytes."""

    setting: str
    peak: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What a configuration takes on a target.

    specs: how each parameter is divided.
    fits: None where that is not known: simulated devices, or a compiler that failed for another reason.
    model_flops: of one step over all devices.
    time: of a step; None for simulated devices, and where there is no program.
    failure: the compiler's words, where it made no program.
    uncounted: why work and time are not known of a program that was compiled.
    """

    topology: str
    chip: str
    chips: int
    devices: int
    hosts: int
    config: dict[str, Any]
    mesh: dict[str, int]
    parameters: int
    specs: dict[str, str]
    memory: Memory
    fits: bool | None
    model_flops: float
    work: Work | None = None
    time: Estimate | None = None
    changes: tuple[Change, ...] = ()
    largest: tuple[str, ...] = ()
    failure: str = ""
    uncounted: str = ""
    compile_s: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def batch_size(self) -> int:
        """Images a step over all devices."""
        return self.config["train"]["batch_size"]

    @property
    def images_per_second(self) -> float | None:
        """By the estimated step."""
        return None if self.time is None else self.batch_size / self.time.seconds

    @property
    def days(self) -> float | None:
        """Of ``train.steps`` steps without evaluations, saves and stops."""
        return None if self.time is None else self.config["train"]["steps"] * self.time.seconds / 86_400

    @property
    def chip_hours(self) -> float | None:
        """Of all chips for as long."""
        return None if self.days is None else self.days * 24 * self.chips


_LINES = 15
"""Of a compiler's last words."""

_PLAN = pydantic.TypeAdapter(Plan)

_QUIET = {
    "JAX_PLATFORMS": "cpu",  # whatever this machine has is left alone
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def plan(config: Config, target: Target, hlo: Path | None = None) -> Plan:
    """Compiles the step of ``config`` for ``target``, in a process of its own: a compiler may crash.

    Allocates nothing on a device, opens no data. ``hlo``: where to put the compiled program's text.

    Raises:
        ConfigError: the configuration does not fit the devices (mesh, batch), or the TPU compiler is not installed.
    """
    if target.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"--topology: {target.name} needs the TPU's compiler, libtpu, which runs without a TPU: "
            "pip install -e '.[tpu]'"
        )
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        request.write_text(json.dumps({"topology": target.name, "config": to_dict(resolved_for(config, target))}))
        command = [sys.executable, "-m", "llip_jax.planning.compiler", str(request), str(answer)]
        done = subprocess.run(
            command if hlo is None else [*command, str(hlo.absolute())],
            env=os.environ | _QUIET | {"JAX_NUM_CPU_DEVICES": str(target.devices)},
            capture_output=True,
            text=True,
            check=False,
        )
        if not answer.exists():
            raise RuntimeError(f"planning failed (exit code {done.returncode}):\n{done.stderr}")
        said = json.loads(answer.read_text())
    if "config_error" in said:
        raise ConfigError(said["config_error"])
    found = from_json(said)
    if done.returncode:
        end = f" (exit code {done.returncode}):\n" + "\n".join(done.stderr.strip().splitlines()[-_LINES:])
        if found.uncounted:
            found = replace(found, uncounted=found.uncounted + end)
        else:
            found = replace(found, failure=found.failure + end)
    return found


def to_json(plan: Plan, price: float | None = None) -> dict[str, Any]:
    """Everything that a plan knows, derived figures too; ``price`` is that of a chip for an hour, in dollars."""
    run = {"images_per_second": plan.images_per_second, "days": plan.days, "chip_hours": plan.chip_hours}
    if price is not None and plan.chip_hours is not None:
        run["price_usd"] = plan.chip_hours * price
    return {**_PLAN.dump_python(plan, mode="json"), "run": run}


def from_json(value: dict[str, Any]) -> Plan:
    """A plan as :func:`to_json` gave it."""
    return _PLAN.validate_python({name: part for name, part in value.items() if name != "run"})


def summary(plan: Plan) -> dict[str, Any]:
    """What changes of the code should leave alone: where parameters live, what is sent, how much memory it takes."""
    traffic = () if plan.work is None else plan.work.traffic
    return {
        "mesh": plan.mesh,
        "parameters": plan.parameters,
        "specs": plan.specs,
        "traffic": sorted(f"{t.kind} among {t.group}: {t.count} x, {t.bytes / 2**20:.1f} MiB" for t in traffic),
        "peak_gib": None if plan.memory.peak is None else round(plan.memory.peak / 2**30, 2),
    }
