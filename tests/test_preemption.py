"""Signals while a run starts up: the process ends at once, whatever its main thread is doing."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from run_helpers import ROOT

from llip_jax.training.preemption import StopRequest
from llip_jax.training.run_lock import _start_of

PROGRAM = """
import hashlib, os, signal, threading, time
from llip_jax.training.preemption import StopRequest
{before}
with StopRequest() as stop:
    {between}
    with stop.at_once():
        print("ready", flush=True)
        {busy}
    print("started", flush=True)
    {after}
"""
LONG_C_CALL = 'hashlib.pbkdf2_hmac("sha256", b"word", b"salt", 200_000_000)'


def start(busy: str = "pass", *, before: str = "", between: str = "pass", after: str = "pass") -> subprocess.Popen[str]:
    program = PROGRAM.format(before=before, between=between, busy=busy, after=after)
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    if between == "pass":
        assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize(
    "busy",
    [
        LONG_C_CALL,
        "time.sleep(60)",
        "threading.Lock().acquire() and (lock := threading.Lock()).acquire() and lock.acquire()",
        "while True: pass",
    ],
    ids=["c call", "sleep", "lock", "loop"],
)
def test_a_signal_during_start_up_ends_the_process_within_a_second(busy: str, name: str) -> None:
    process = start(busy)
    time.sleep(0.1)
    sent = time.monotonic()
    process.send_signal(signal.Signals[name])
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - sent < 1
    assert process.returncode == 75, err
    assert f"stopped by {name} before the first step: nothing to save" in out


def test_a_signal_before_start_up_ends_the_process_when_start_up_begins() -> None:
    process = start(between="os.kill(os.getpid(), signal.SIGTERM)")
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "stopped by SIGTERM" in out and "started" not in out


def test_other_signals_and_those_after_start_up_do_not_end_the_process() -> None:
    process = start(
        "os.kill(os.getpid(), signal.SIGUSR1)",
        before="signal.signal(signal.SIGUSR1, lambda *_: print('seen'))",
        after="os.kill(os.getpid(), signal.SIGTERM); print(stop.signal_name)",
    )
    assert process.stdout is not None
    assert process.stdout.read().splitlines() == ["seen", "started", "SIGTERM"]
    assert process.wait(30) == 0


def test_workers_end_with_a_process_that_is_stopped_at_once() -> None:
    process = start(
        "worker = multiprocessing.get_context('spawn').Process(target=time.sleep, args=(60,)); worker.start(); "
        "print(worker.pid, flush=True); time.sleep(60)",
        before="import multiprocessing",
    )
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 75
    deadline = time.monotonic() + 5
    while _start_of(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _start_of(worker), "the worker must not outlive the process"


def test_handlers_put_in_place_by_others_are_replaced_again() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stop.install()
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal_name == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


def test_start_up_gives_back_the_wakeup_descriptor_and_its_thread() -> None:
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with StopRequest() as stop:
        for _ in range(3):
            with stop.at_once():
                pass
            assert signal.set_wakeup_fd(-1) == -1
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, files)
