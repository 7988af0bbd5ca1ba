"""The processes of a run: how they find each other, agree, and end together.

They run the same program in lock step. None of them can go on without the others, so an error of one ends all: it is
told through the key-value store of jax's coordination service, which lives in process 0. When a process is gone or
frozen without a word, that service ends the others after ``faults.process_s`` (by SIGABRT).
"""

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src.distributed import global_state  # The key-value store has no public name; Orbax takes it from here too.
from jax.experimental import multihost_utils

from llip_jax.command_line import EXIT_FAILED, end_process, explain
from llip_jax.config import ConfigError

LAUNCHERS = {
    "SLURM_STEP_NODELIST": ("SLURM_NTASKS", "SLURM_PROCID"),
    "OMPI_COMM_WORLD_SIZE": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "PMI_SIZE": ("PMI_SIZE", "PMI_RANK"),
}
"""Slurm's srun, Open MPI, other MPIs, by a variable that each sets: how many processes there are, and which this is."""

_WITH_ADDRESS = ("SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri")
"""Variables from which jax knows where process 0 is."""

_STORE = "llip_jax/"
_FAILURES = f"{_STORE}failures/"
_POLL_S = 1.0
_LINGER_S = 3.0
"""How long process 0, in which the store lives, and a process that fails wait for the others to read why."""

_SHARED_S = 10.0
"""How long a file may take to be seen on other hosts."""

_EVER_MS = 7 * 24 * 3600 * 1000
"""A process that is waited for and does not come is the business of the coordination service and the watchdog."""

_REPORT_CHARACTERS = 8000

_agreements = count()


@dataclass(frozen=True)
class ProcessFlags:
    """What the command line says about processes.

    coordinator: HOST:PORT of process 0.
    processes: how many there are; 1: this one alone, whatever the environment says.
    process: which one this is, from 0.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


def start(flags: ProcessFlags, environment: Mapping[str, str], process_s: float, patience_s: float = 300.0) -> None:
    """Joins the other processes of the run, where there are any. Comes before anything that asks jax for devices.

    Ends the process (exit code 1) when not all have come within ``patience_s``.

    Args:
        flags: these come first.
        environment: of this process; what launchers say there.
        process_s: seconds without a sign of life from a process after which the others end.
        patience_s: how long to wait for the others.

    Raises:
        ConfigError: flags and environment do not say how many processes there are, which one this is and where the
            first one is, or contradict each other.
    """
    arguments = initialize_arguments(flags, environment)
    if (devices := jax.config.jax_num_cpu_devices) > 1 or arguments is not None:  # type: ignore[attr-defined]
        # Devices simulated on a CPU wait for each other in threads of one pool: with as many as cores they may wait for
        # ever, and so they may when programs run as they come, several at once.
        os.environ.setdefault("NPROC", str(max(2 * devices, os.cpu_count() or 1)))
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    if arguments is None:
        return
    if arguments.get("process_id") == 0:
        _check_free(arguments["coordinator_address"])
    # It would take SIGTERM from Python, and the processes agree on stops by themselves.
    jax.config.update("jax_enable_preemption_service", False)
    # jax itself would abort, without a word about who is missing.
    timer = threading.Timer(patience_s, _give_up, (patience_s,))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=round(2 * patience_s),
            heartbeat_timeout_seconds=round(process_s),
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"this process could not join the others: {error}; expected --coordinator HOST:PORT --processes N "
            "--process I, or --processes 1 for one alone"
        ) from error
    finally:
        timer.cancel()
    print(
        f"process {global_state.process_id} of {global_state.num_processes} on {socket.gethostname()}: all have met at "
        f"{global_state.coordinator_address}",
        flush=True,
    )


def initialize_arguments(flags: ProcessFlags, environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of ``jax.distributed.initialize``, which finds those that are missing; None for a process alone.

    Raises:
        ConfigError: see :func:`start`.
    """
    if flags.processes == 1:
        return None
    size, rank = next((names for sign, names in LAUNCHERS.items() if sign in environment), ("", ""))
    launched = int(environment.get(size, 1))
    address = flags.coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
    if address is not None or flags.processes is not None or flags.process is not None:
        processes, process = flags.processes, flags.process
        if processes is None and process is None and launched > 1:
            processes, process = launched, int(environment[rank])
        return _explicit(address, processes, process)
    if launched > 1:
        if not any(name in environment for name in _WITH_ADDRESS):
            raise ConfigError(
                f"{size}={launched}, but nothing says where process 0 is: expected --coordinator HOST:PORT"
            )
        # jax gives a process one device where several may share a host; alone on its host it is to have them all.
        return {"local_device_ids": []} if _one_a_host(environment) else {}
    if _on_tpu_pod(environment) or "JOB_COMPLETION_INDEX" in environment:  # an indexed job of Kubernetes
        return {}
    return None


def _explicit(address: str | None, processes: int | None, process: int | None) -> dict[str, Any]:
    given = {"--coordinator": address, "--processes": processes, "--process": process}
    if missing := [name for name, value in given.items() if value is None]:
        there = " ".join(f"{name} {value}" for name, value in given.items() if value is not None)
        raise ConfigError(f"{there}: {' and '.join(missing)} missing, expected all three (or --processes 1)")
    assert address is not None and processes is not None and process is not None
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"--coordinator: {address!r} is not valid, expected HOST:PORT of process 0")
    if processes < 1:
        raise ConfigError(f"--processes: {processes} is not valid, expected at least 1")
    if not 0 <= process < processes:
        raise ConfigError(
            f"--process: {process} is not valid with --processes {processes}, expected 0 to {processes - 1}"
        )
    return {
        "coordinator_address": address,
        "num_processes": processes,
        "process_id": process,
        "cluster_detection_method": "deactivate",
    }


def _one_a_host(environment: Mapping[str, str]) -> bool:
    if "SLURM_STEP_NODELIST" in environment:
        alone = environment["SLURM_NTASKS"] == environment.get("SLURM_STEP_NUM_NODES")
    else:
        alone = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    # Or the launcher has given it a GPU of its own already.
    return alone or "," not in environment.get("CUDA_VISIBLE_DEVICES", ",")


def _on_tpu_pod(environment: Mapping[str, str]) -> bool:
    # jax sets the first where it finds TPU chips, and the second where it does not.
    if environment.get("TPU_ML_PLATFORM") != "JAX" or "tpu" not in environment.get("JAX_PLATFORMS", "tpu"):
        return False
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    if hosts is not None:
        return "," in hosts or int(environment.get("MEGASCALE_NUM_SLICES", 1)) > 1
    return "TPU_SKIP_MDS_QUERY" not in environment


def _check_free(address: str) -> None:
    # jax crashes on a port in use, or shares it with another run's process 0.
    port = int(address.rpartition(":")[2])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise ConfigError(f"--coordinator: process 0 cannot use port {port} of this host: {error}") from error


def _give_up(patience_s: float) -> NoReturn:
    address = global_state.coordinator_address or "an address not yet known"
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
        found = f"process 0 is at {address}, but not all have come; the logs of the others say why"
    except (OSError, ValueError) as error:
        found = f"nobody answers at {address}, where process 0 should be ({error})"
    end_process(
        EXIT_FAILED, f"error: process {global_state.process_id} has waited {patience_s:g} s for the others: {found}"
    )


def any_of(flag: bool) -> bool:
    """Whether ``flag`` is set in any process; all of them call it at the same point."""
    return bool(np.any(_flags(flag)))


def same(value: Any) -> Any:
    """What process 0 gives here, anything JSON can hold; all processes call it at the same point."""
    if global_state.num_processes == 1:
        return value
    key = f"{_STORE}same/{next(_agreements)}"
    if global_state.process_id == 0:
        _client().key_value_set(key, json.dumps(value))
    return json.loads(_client().blocking_key_value_get(key, _EVER_MS))


def check_shared(workdir: Path) -> None:
    """Creates the run directory; all processes call it at the same point.

    Raises:
        ConfigError: not all processes see it.
    """
    if global_state.num_processes == 1:
        return
    name = ""
    if global_state.process_id == 0:
        name = f".shared-{secrets.token_hex(8)}"
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            (workdir / name).touch()
        except OSError as error:
            raise ConfigError(f"{workdir} cannot be written: {error}") from error
    # A fresh name: file systems remember for a while that a name was not there.
    file, deadline = workdir / same(name), time.monotonic() + _SHARED_S
    while not (seen := file.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = np.flatnonzero(_flags(not seen))
    if global_state.process_id == 0:
        file.unlink(missing_ok=True)
    if blind.size:
        raise ConfigError(
            f"{workdir}: what process 0 writes there is not seen by process {', '.join(map(str, blind))}; expected a "
            "directory that all hosts share (NFS, Lustre, a mounted bucket)"
        )


def _flags(flag: bool) -> np.ndarray:
    if global_state.num_processes == 1:
        return np.array([flag])
    return multihost_utils.process_allgather(np.array(flag))


class ErrorBoard:
    """The first error inside the ``with`` block of any process is printed by all, and ends them with its exit code.

    The process in which it happens prints it and waits for the others to read it. Their main threads may be waiting for
    it for ever: a thread looks about every second, and ends the process. Without an error all leave the block together.
    In a process alone it does nothing.
    """

    def __init__(self) -> None:
        self._left = threading.Event()
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="error board", daemon=True)

    def __enter__(self) -> "ErrorBoard":
        if global_state.num_processes > 1:
            self._thread.start()
            if (processes := same(global_state.num_processes)) != global_state.num_processes:
                self._fail(
                    ConfigError(f"--processes: {global_state.num_processes} here, but {processes} where process 0 runs")
                )
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        if global_state.num_processes == 1:
            return
        if error is None:
            try:
                _client().wait_at_barrier(f"{_STORE}left", _EVER_MS)
            except RuntimeError as lost:
                error = lost
        if error is not None:
            # Not by way of the interpreter's exit: there, jax waits for processes that may be waiting for this one.
            self._fail(error)
        self._left.set()
        self._thread.join()

    def _fail(self, error: BaseException) -> NoReturn:
        code, text = explain(error)
        if isinstance(error, jax.errors.JaxRuntimeError):
            text += "\n(Where another process has just ended without a word, this follows from it.)"
        with self._ending:
            print(text, file=sys.stderr, flush=True)
            report(code, text)
            first = _first_failure()
            if first is None or first["text"] == text[-_REPORT_CHARACTERS:]:
                end_process(code)
            end_process(first["code"], _told(first))

    def _watch(self) -> None:
        while not self._left.wait(_POLL_S):
            if (first := _first_failure()) is None:
                continue
            with self._ending:
                if global_state.process_id == 0:
                    time.sleep(_LINGER_S)
                end_process(first["code"], _told(first))


def report(code: int, text: str) -> None:
    """Tells all processes why they are to end, from any thread, and waits for them to read it; the first report counts.

    The caller ends this process.
    """
    if global_state.num_processes == 1:
        return
    failure = {
        "process": global_state.process_id,
        "host": socket.gethostname(),
        "code": code,
        "text": text[-_REPORT_CHARACTERS:],
    }
    with suppress(RuntimeError):  # There is a report, or process 0 is gone.
        _client().key_value_set(f"{_FAILURES}first", json.dumps(failure))
    time.sleep(_LINGER_S)


def _client() -> Any:
    return global_state.client


def _first_failure() -> dict[str, Any] | None:
    with suppress(RuntimeError):
        for _, failure in _client().key_value_dir_get(_FAILURES):
            return json.loads(failure)
    return None


def _told(failure: Mapping[str, Any]) -> str:
    return (
        f"process {failure['process']} of {global_state.num_processes} ({failure['host']}) failed (exit code "
        f"{failure['code']}): {failure['text']}"
    )
