"""Command lines of gcloud for a TPU slice that is asked for through the queue; pure."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llip_jax.launching.slices import Slice

Capacity = Literal["on-demand", "spot", "reserved"]

ACTIVE = "ACTIVE"
PENDING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
"""States before a slice is there; only ACTIVE ones cost money. All others mean that it will not come or is going."""

_WORKER = "llip_jax/launch/tpu_worker.sh"
"""On the hosts, from the home directory."""


@dataclass(frozen=True)
class Request:
    """What slice to ask for, and how."""

    slice: Slice
    capacity: Capacity = "on-demand"
    flags: tuple[str, ...] = ()
    """Further flags of ``gcloud compute tpus queued-resources create``; they win over ours."""


@dataclass(frozen=True)
class QueuedResource:
    """A queued resource of one slice; the slice has the same name."""

    name: str
    zone: str
    project: str | None = None

    def create(self, request: Request) -> list[str]:
        """Puts the request into the queue."""
        capacity = [] if request.capacity == "on-demand" else [f"--{request.capacity}"]
        return [
            *self._gcloud("queued-resources", "create", self.name),
            f"--node-id={self.name}",
            f"--accelerator-type={request.slice.accelerator_type}",
            f"--runtime-version={request.slice.runtime_version}",
            *capacity,
            *request.flags,
        ]

    def state(self) -> list[str]:
        """Prints its state and, after a tab, the accelerator type of its slice."""
        return [*self.describe(), "--format=value(state.state,tpu.nodeSpec[0].node.acceleratorType)"]

    def describe(self) -> list[str]:
        """Prints all that is known of it."""
        return self._gcloud("queued-resources", "describe", self.name)

    def delete(self) -> list[str]:
        """Deletes the request and its slice."""
        return [*self._gcloud("queued-resources", "delete", self.name), "--force"]

    def upload(self, file: Path) -> list[str]:
        """Copies a file to the home directory of all hosts."""
        return [*self._gcloud("tpu-vm", "scp", str(file), f"{self.name}:"), "--worker=all"]

    def unpack(self, file: Path) -> list[str]:
        """Puts the uploaded code in place of older code."""
        return self.ssh(f"rm -rf llip_jax && mkdir llip_jax && tar -xzf {file.name} -C llip_jax")

    def worker(self, *words: str, host: str = "all") -> list[str]:
        """Calls launch/tpu_worker.sh on hosts."""
        return self.ssh(shlex.join(["bash", _WORKER, *words]), host)

    def ssh(self, command: str, host: str = "all") -> list[str]:
        """Runs a shell command on hosts: a number, a range or all."""
        return [*self._gcloud("tpu-vm", "ssh", self.name), f"--worker={host}", f"--command={command}"]

    def ours(self, action: str) -> str:
        """The command of launch/tpu.py that does ``action``."""
        return shlex.join(["python", "launch/tpu.py", action, self.name, *self._where()])

    def _gcloud(self, *words: str) -> list[str]:
        return ["gcloud", "compute", "tpus", *words, *self._where(), "--quiet"]

    def _where(self) -> list[str]:
        return [f"--zone={self.zone}", *([f"--project={self.project}"] if self.project else [])]
