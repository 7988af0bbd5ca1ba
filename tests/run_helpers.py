"""A tiny run, and launch/train.py as a process of its own."""

import atexit
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llip_jax.config import Config
from llip_jax.config_files import load

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "configs" / "llip_demo.py"
COMPILATIONS = ROOT / ".pytest_cache" / "d" / "compilations"
"""Kept between test sessions; ``pytest --cache-clear`` removes it."""

TINY: dict[str, Any] = {
    "model.vision.layers": 1,
    "model.vision.width": 32,
    "model.vision.heads": 2,
    "model.vision.mlp": 64,
    "model.text.layers": 1,
    "model.text.width": 32,
    "model.text.heads": 2,
    "model.text.mlp": 64,
    "model.text.length": 12,
    "model.embed_dim": 32,
    "model.mixture_tokens": 4,
    "model.image_size": 16,
    "model.patch_dropout": 0.25,
    "data.toyworld.train_size": 200,
    "data.toyworld.eval_size": 24,
    "data.tokenizer.vocabulary_size": 300,
    "train.batch_size": 16,
    "train.steps": 8,
    "train.log_every_steps": 1,
    "optimizer.warmup_steps": 2,
    "checkpoint.every_steps": 2,
    "eval.every_steps": 3,
    "eval.batch_size": 16,
}
"""Compiles and trains in seconds. Steps 2, 4, 6 and 8 are saved; 3, 6 and 8 evaluated."""

TIMINGS = ("examples_per_second", "step_time_s", "data_wait_fraction", "mfu")
"""Fields of metrics.jsonl that depend on the clock; two equal runs agree in all others."""

_WITH_HOOK = """
import os, runpy, signal, sys
sys.argv[0] = "launch/train.py"
{hook}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def words(fields: Mapping[str, Any]) -> list[str]:
    """Command-line words that set configuration fields."""
    return [f"--config.{name}={value}" for name, value in fields.items()]


def tiny_config(**sections: Mapping[str, Any]) -> Config:
    """TINY with changes: ``tiny_config(train={"steps": 3})``."""
    changes = {f"{section}.{name}": value for section, fields in sections.items() for name, value in fields.items()}
    return load(str(DEMO), [f"{name}={value}" for name, value in (TINY | changes).items()])


def run(
    command: list[str],
    *,
    devices: int = 1,
    keep_compilations: bool = True,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.CompletedProcess[str]:
    """A Python command in the repository's root with simulated devices; its exit code and what it printed."""
    # A signal that kills gives a negative exit code; the caller judges all of them.
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=_environment(devices, keep_compilations, environment),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def _environment(devices: int, keep_compilations: bool, more: Mapping[str, str]) -> dict[str, str]:
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        # Threads in which simulated devices wait for each other.
        "NPROC": str(max(2 * devices, os.cpu_count() or 1)),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        # Halves the time; a run and its continuation agree at any level.
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        **more,
    }
    if keep_compilations:
        settings |= {
            "JAX_COMPILATION_CACHE_DIR": str(COMPILATIONS),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
    return os.environ | settings


def train(
    workdir: Path,
    fields: Mapping[str, Any] = MappingProxyType({}),
    *,
    hook: str = "",
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """launch/train.py on TINY with ``fields`` changed. ``hook`` is Python that runs in the process beforehand."""
    return run(train_command(workdir, fields, hook), **options)


def train_command(workdir: Path, fields: Mapping[str, Any], hook: str) -> list[str]:
    program = ["-c", _WITH_HOOK.format(hook=hook)] if hook else ["launch/train.py"]
    return [*program, "--config", str(DEMO), "--workdir", str(workdir), *words(TINY | dict(fields))]


def start_processes(
    command: Sequence[str], processes: int, devices: int, environment: Mapping[str, str] = MappingProxyType({})
) -> list[subprocess.Popen[str]]:
    """A Python command in several processes, each with so many devices, and its words --coordinator and so on."""
    address = f"127.0.0.1:{free_port()}"
    return [
        subprocess.Popen(
            [
                *(sys.executable, *command, "--coordinator", address),
                *("--processes", str(processes), "--process", str(index)),
            ],
            cwd=ROOT,
            env=_environment(devices, True, environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]


def ended(started: Sequence[subprocess.Popen[str]], timeout: float = 240.0) -> list[subprocess.CompletedProcess[str]]:
    """Waits for processes; their exit codes and what they printed. One that does not end in time is an error."""

    def wait(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
        out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    try:
        with ThreadPoolExecutor(len(started)) as threads:
            return list(threads.map(wait, started))
    finally:
        for process in started:
            process.kill()


def train_on_processes(
    workdir: Path,
    fields: Mapping[str, Any] = MappingProxyType({}),
    *,
    processes: int = 2,
    devices: int = 4,
    hook: str = "",
) -> list[subprocess.CompletedProcess[str]]:
    """As :func:`train`, by several processes with so many devices each; in ``hook``, ``sys.argv[-1]`` says which."""
    return ended(start_processes(train_command(workdir, fields, hook), processes, devices))


def free_port() -> int:
    """A port of this machine that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def call_on_devices(function: Callable[[], Any], devices: int) -> Any:
    """What a function of a test module returns (anything JSON can hold) in a process with so many devices."""
    call = f"import json, {function.__module__} as m; print('RESULT' + json.dumps(m.{function.__name__}()))"
    done = run(["-c", call], devices=devices)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("RESULT")[2])


_PROCESS = """
import json, sys, jax
jax.config.update("jax_num_cpu_devices", {devices})
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], {processes}, int(sys.argv[2]))
import {module} as m
print("RESULT" + json.dumps(m.{name}()))
"""


def call_on_processes(function: Callable[[], Any], processes: int, devices: int) -> list[Any]:
    """What a function of a test module returns in each of several processes, each with so many devices, on one mesh."""
    address = f"127.0.0.1:{free_port()}"
    code = _PROCESS.format(
        devices=devices, processes=processes, module=function.__module__, name=getattr(function, "__name__", "")
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, address, str(index)],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]
    results = []
    try:
        for process in started:
            out, err = process.communicate(timeout=240)
            assert process.returncode == 0, err
            results.append(json.loads(out.rpartition("RESULT")[2]))
    finally:
        # One that waits for another that has failed would wait for long.
        for process in started:
            process.kill()
    return results


def temporary_folder() -> Path:
    """A folder that goes with this process, for what several tests share."""
    folder = Path(tempfile.mkdtemp(prefix="llip_jax_test_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def finished_run() -> Path:
    """Run directory of TINY, made once, uninterrupted, by its own compilation. Not to be changed: copy it."""
    workdir = temporary_folder() / "run"
    done = train(workdir, keep_compilations=False)
    assert done.returncode == 0, done.stderr
    return workdir


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def numbers(workdir: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what depends on the clock."""
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in metrics(workdir)]
