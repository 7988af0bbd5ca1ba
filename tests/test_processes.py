"""Several real processes: how they find each other, agree, and all end when one fails, dies or freezes."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from run_helpers import ended, free_port, start_processes

from llip_jax.command_line import run
from llip_jax.config import ConfigError
from llip_jax.parallel import processes
from llip_jax.parallel.processes import ProcessFlags, initialize_arguments

PROGRAM = [str(Path(__file__))]
HEARTBEAT_S = 5.0
SLURM = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_NUM_NODES": "2"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
TPU = {"TPU_ML_PLATFORM": "JAX"}


def explicit(address: str, processes: int, process: int) -> dict[str, object]:
    return {
        "coordinator_address": address,
        "num_processes": processes,
        "process_id": process,
        "cluster_detection_method": "deactivate",
    }


# Who is meant, by flags and environment.


@pytest.mark.parametrize(
    ("flags", "environment", "arguments"),
    [
        (ProcessFlags(), {}, None),
        (ProcessFlags(processes=1), SLURM, None),
        (ProcessFlags(), SLURM | {"SLURM_NTASKS": "1"}, None),
        (ProcessFlags(), {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, None),  # a batch script without srun
        (ProcessFlags("h:1234", 4, 3), SLURM, explicit("h:1234", 4, 3)),
        (ProcessFlags("[fe80::1]:1234", 2, 0), {}, explicit("[fe80::1]:1234", 2, 0)),
        (ProcessFlags(processes=4, process=3), {"JAX_COORDINATOR_ADDRESS": "h:1"}, explicit("h:1", 4, 3)),
        (ProcessFlags("h:1234"), OPEN_MPI, explicit("h:1234", 8, 3)),
        (ProcessFlags("h:1234"), {"PMI_SIZE": "2", "PMI_RANK": "1"}, explicit("h:1234", 2, 1)),
        # A process alone on its host has all its devices, where jax would give it one.
        (ProcessFlags(), SLURM, {"local_device_ids": []}),
        (ProcessFlags(), SLURM | {"SLURM_NTASKS": "8"}, {}),
        (ProcessFlags(), SLURM | {"SLURM_NTASKS": "8", "CUDA_VISIBLE_DEVICES": "5"}, {"local_device_ids": []}),
        (ProcessFlags(), OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:5"}, {}),
        (ProcessFlags(), TPU, {}),
        (ProcessFlags(), TPU | {"TPU_SKIP_MDS_QUERY": "1"}, None),
        (ProcessFlags(), TPU | {"JAX_PLATFORMS": "cpu"}, None),
        (ProcessFlags(), TPU | {"TPU_WORKER_HOSTNAMES": "a"}, None),
        (ProcessFlags(), TPU | {"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        (ProcessFlags(), TPU | {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, {}),
        (ProcessFlags(), {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        (ProcessFlags(), {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, {}),
    ],
)
def test_flags_come_first_then_what_launchers_say(
    flags: ProcessFlags, environment: Mapping[str, str], arguments: object
) -> None:
    assert initialize_arguments(flags, environment) == arguments


@pytest.mark.parametrize(
    ("flags", "environment", "parts"),
    [
        (ProcessFlags("h:1"), {}, ["--coordinator h:1", "--processes and --process missing"]),
        (ProcessFlags(processes=2, process=0), {}, ["--coordinator missing"]),
        (ProcessFlags("h", 2, 0), {}, ["--coordinator: 'h'", "HOST:PORT"]),
        (ProcessFlags("h:99999", 2, 0), {}, ["--coordinator: 'h:99999'", "HOST:PORT"]),
        (ProcessFlags("h:1", 2, 2), {}, ["--process: 2", "expected 0 to 1"]),
        (ProcessFlags("h:1", 0, 0), {}, ["--processes: 0", "at least 1"]),
        (ProcessFlags(), {"PMI_SIZE": "2", "PMI_RANK": "1"}, ["PMI_SIZE=2", "--coordinator HOST:PORT"]),
    ],
)
def test_what_is_missing_or_contradicts_is_told(
    flags: ProcessFlags, environment: Mapping[str, str], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        initialize_arguments(flags, environment)
    for part in parts:
        assert part in str(caught.value)


def test_a_process_alone_agrees_with_itself(tmp_path: Path) -> None:
    assert processes.any_of(True) and not processes.any_of(False)
    assert processes.same({"step": 3}) == {"step": 3}
    processes.check_shared(tmp_path / "not made")
    with pytest.raises(ZeroDivisionError), processes.ErrorBoard():
        raise ZeroDivisionError


# Real processes. This file is their program; what they do is the word after its name.


def main(argv: list[str]) -> int:
    what, _, address, _, number, _, index = argv
    processes.start(ProcessFlags(address, int(number), int(index)), {}, HEARTBEAT_S, patience_s=6.0)
    last = int(index) == int(number) - 1
    with processes.ErrorBoard():
        if what == "early" and last:
            raise ConfigError("mesh.data=3: of one process")  # while the others wait for its devices
        if what == "blind":
            processes.check_shared(Path(f"/proc/self/nowhere-{index}") if last else Path(os.environ["WORKDIR"]))
        agree(int(index))
        print("AT WORK", flush=True)
        if what == "finish":
            if last:
                time.sleep(1)
            return 75
        if what == "late":
            if last:
                time.sleep(1)
                raise OSError("no space left")
            return 0
        for step in range(10**9):
            processes.any_of(False)
            if step == 3 and last:
                if what == "config":
                    raise ConfigError("data.path: 'x' is not there")
                if what == "crash":
                    raise KeyError("a bug")
                if what == "watchdog":
                    processes.report(3, "error: hung")
                    os._exit(3)
            if what == "all" and step == 3:
                raise ConfigError("the same for all")
    raise AssertionError


def agree(index: int) -> None:
    assert processes.same([index, "x"]) == [0, "x"]
    assert processes.any_of(index == 1) and not processes.any_of(False)
    if "WORKDIR" in os.environ:
        workdir = Path(os.environ["WORKDIR"])
        processes.check_shared(workdir)
        assert workdir.is_dir()


def ends(what: str, number: int = 3, **environment: str) -> list[subprocess.CompletedProcess[str]]:
    return ended(start_processes([*PROGRAM, what], number, 2, environment), timeout=90)


def told_once(done: subprocess.CompletedProcess[str], text: str) -> None:
    assert done.stderr.count(text) == 1, done.stderr


def test_they_agree_and_leave_together_with_the_same_exit_code(tmp_path: Path) -> None:
    done = ends("finish", WORKDIR=str(tmp_path / "a" / "run"))
    assert [process.returncode for process in done] == [75] * 3, done
    assert list((tmp_path / "a" / "run").iterdir()) == []
    assert re.search(r"process 1 of 3 on \S+: all have met at 127.0.0.1:\d+", done[1].stdout)


@pytest.mark.parametrize(
    ("what", "code", "text"),
    [
        ("config", 2, "error: data.path: 'x' is not there"),
        pytest.param("crash", 1, "KeyError: 'a bug'", marks=pytest.mark.slow),
        pytest.param("late", 1, "OSError: no space left", marks=pytest.mark.slow),
        pytest.param("early", 2, "error: mesh.data=3: of one process", marks=pytest.mark.slow),
    ],
)
def test_the_error_of_one_ends_all_with_its_exit_code(what: str, code: int, text: str) -> None:
    done = ends(what)
    assert [process.returncode for process in done] == [code] * 3, done
    for process in done:
        told_once(process, text)
    for process in done[:2]:
        assert re.search(rf"process 2 of 3 \(.+\) failed \(exit code {code}\): ", process.stderr)


@pytest.mark.slow
def test_what_all_say_is_said_once_by_each() -> None:
    done = ends("all")
    assert [process.returncode for process in done] == [2] * 3, done
    for process in done:
        told_once(process, "error: the same for all")


@pytest.mark.slow
def test_a_report_from_elsewhere_ends_the_others() -> None:
    done = ends("watchdog")
    assert [process.returncode for process in done] == [3] * 3, done
    for process in done[:2]:
        told_once(process, "process 2 of 3")


@pytest.mark.slow
def test_a_run_directory_that_one_does_not_see_is_refused(tmp_path: Path) -> None:
    done = ends("blind", 2, WORKDIR=str(tmp_path))
    assert [process.returncode for process in done] == [2] * 2, done
    assert "is not seen by process 1; expected a directory that all hosts share" in done[0].stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sign", "victim"),
    [
        ("SIGSTOP", 2),
        pytest.param("SIGSTOP", 0, marks=pytest.mark.slow),
        pytest.param("SIGKILL", 2, marks=pytest.mark.slow),
        pytest.param("SIGKILL", 0, marks=pytest.mark.slow),
    ],
)
def test_a_process_that_dies_or_freezes_ends_the_others(sign: str, victim: int) -> None:
    started = start_processes([*PROGRAM, "work"], 3, 2)
    others = [process for index, process in enumerate(started) if index != victim]
    try:
        for process in started:
            assert process.stdout is not None
            while "AT WORK" not in process.stdout.readline():
                assert process.poll() is None
        started[victim].send_signal(signal.Signals[sign])
        # Heartbeats come at half that time, and this machine is slow.
        done = ended(others, timeout=HEARTBEAT_S + 25)
        assert all(process.returncode in (1, -signal.SIGABRT) for process in done), done
    finally:
        started[victim].kill()
        started[victim].communicate()


# Those that never meet.


def test_nobody_at_the_address_is_told() -> None:
    address = f"127.0.0.1:{free_port()}"
    done = alone(address, 2, 1)
    assert done.returncode == 1
    assert f"error: process 1 has waited 6 s for the others: nobody answers at {address}" in done.stderr


@pytest.mark.slow
def test_some_that_do_not_come_are_told() -> None:
    done = alone(f"127.0.0.1:{free_port()}", 2, 0)
    assert done.returncode == 1
    assert "but not all have come" in done.stderr


def test_a_port_in_use_is_told() -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        done = alone(f"127.0.0.1:{port}", 2, 0)
    assert done.returncode == 2
    assert f"--coordinator: process 0 cannot use port {port}" in done.stderr


def test_another_number_of_processes_than_process_0_has_is_told() -> None:
    address = f"127.0.0.1:{free_port()}"
    started = [
        subprocess.Popen(
            [sys.executable, *command(address, number, index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, number in enumerate((2, 3))
    ]
    done = ended(started, timeout=60)
    assert [process.returncode for process in done] == [2, 2], done
    for process in done:
        assert "--processes: 3 here, but 2 where process 0 runs" in process.stderr


def alone(address: str, number: int, index: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command(address, number, index)], capture_output=True, text=True, timeout=60, check=False
    )


def command(address: str, number: int, index: int) -> list[str]:
    words = ["work", "--coordinator", address, "--processes", str(number), "--process", str(index)]
    return [*PROGRAM, *words]


if __name__ == "__main__":
    sys.exit(run(main))
