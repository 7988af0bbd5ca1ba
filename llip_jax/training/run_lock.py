"""One run at a time in a run directory, also where several machines share it and their clocks differ."""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llip_jax.command_line import EXIT_FAILED, RunFailed, end_process
from llip_jax.config import ConfigError
from llip_jax.parallel import processes
from llip_jax.training.last_words import within

_PATIENCE = 3
"""Beats, a minute in all: as long as a network file system may show a file as it was (NFS, gcsfuse)."""

_RECORD_BYTES = 1024
"""Always as many: a record is written over the one before, and a longer number must not change the file's size."""

_TELL_S = 1.5
"""The other processes look about every second, and what this one is saving must not go on for much longer."""


class RunLock:
    """Holds WORKDIR/run.lock within the ``with`` block; WORKDIR is created where missing.

    A thread counts up a number in the file. A newcomer on the holder's machine sees whether that process lives; on any
    other it watches whether the number moves. A holder whose lock another run has taken over, as it was frozen, ends
    itself at the next beat or :meth:`check`; what its threads were saving until then may still reach the disk.

    Args:
        machine: within which process ids are unique; "" where the system does not tell.
        beat_s: seconds from one number to the next.
        sleep: waits so many seconds.

    Raises:
        RunFailed: another run holds the lock.
        ConfigError: WORKDIR cannot be written.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        machine: str | None = None,
        beat_s: float = 20.0,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._path = workdir / "run.lock"
        self._machine = _this_machine() if machine is None else machine
        self._beat_s, self._sleep = beat_s, sleep
        self._token = uuid.uuid4().hex
        since = datetime.now(UTC).isoformat(" ", "seconds")
        self._content = {
            "holder": f"process {os.getpid()} on {socket.gethostname()} (since {since})",
            "machine": self._machine,
            "pid": os.getpid(),
            "started": _start_of(os.getpid()),
            "token": self._token,
        }
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="run lock", daemon=True)

    def __enter__(self) -> "RunLock":
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if (found := self._read()) is not None and self._is_stale(found):
                self._remove(found)
            self._file = self._create()
            self._write(0)
        except OSError as error:
            raise ConfigError(f"--workdir: cannot write to {self._path.parent}: {error.strerror}") from None
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._thread.join()
        with suppress(OSError):
            if _parsed(self._read())["token"] == self._token:
                self._path.unlink()
        os.close(self._file)

    def check(self) -> None:
        """Ends the process with exit code 1 if another run has taken over; to be called before a save begins."""
        try:
            content = self._read()
        except OSError:  # not to be seen for the moment
            return
        if content is None or (found := _parsed(content))["token"] in ("", self._token):
            return
        text = (
            f"error: {found['holder']} has taken over {self._path.parent}, as this run gave no sign of life for a "
            "while, and ends itself"
        )
        try:
            print(f"\n{text}", file=sys.stderr, flush=True)
            within(_TELL_S, processes.report, EXIT_FAILED, text)
        finally:
            end_process(EXIT_FAILED)

    def _keep(self) -> None:
        beat = 0
        while not self._released.wait(self._beat_s):
            beat += 1
            # Into the file that this run made, which is no longer run.lock once another run has taken over.
            with suppress(OSError):
                self._write(beat)
            self.check()

    def _create(self) -> int:
        try:
            return os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        except FileExistsError:
            # No mistake of configuration: a launcher that starts a run again may meet the one before, still saving.
            raise RunFailed(
                f"--workdir: {self._path.parent} is in use by {_parsed(self._read())['holder']}; stop that run or use "
                "another directory. (The lock of a run that is gone is taken over by itself.)"
            ) from None

    def _write(self, beat: int) -> None:
        os.pwrite(self._file, json.dumps({**self._content, "beat": beat}).encode().ljust(_RECORD_BYTES), 0)
        os.fsync(self._file)

    def _read(self) -> bytes | None:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None

    def _is_stale(self, content: bytes) -> bool:
        found = _parsed(content)
        if self._machine and found["machine"] == self._machine:
            return _start_of(found["pid"]) != found["started"]
        patience = f"watching for {_PATIENCE * self._beat_s:g} s whether that lives"
        print(f"{self._path.parent} was last used by {found['holder']}: {patience}", flush=True)
        for _ in range(_PATIENCE):
            self._sleep(self._beat_s)
            if self._read() != content:
                return False
        return True

    def _remove(self, stale: bytes) -> None:
        """Renamed first, which one of several newcomers can do; creating the file anew decides between them."""
        aside = self._path.with_name(f"run.lock.{self._token}")
        with suppress(FileNotFoundError):
            self._path.rename(aside)
            if aside.read_bytes() == stale:
                aside.unlink()
            else:  # that of a faster newcomer
                aside.rename(self._path)


def _this_machine() -> str:
    """A boot of a machine, and the space of process ids in it that this process sees."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        return ""


def _start_of(pid: int) -> str:
    """When a process was started, as ids are used again; "" where there is none, or a dead one not yet waited for."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    state, *fields = status.rpartition(") ")[2].split()  # after the name, which may hold anything
    return "" if state in "ZX" else fields[18]


def _parsed(content: bytes | None) -> dict[str, Any]:
    """Without a token where it is no whole record: not written yet, or seen in part."""
    try:
        return json.loads(content or b"")
    except ValueError:
        return {"holder": "another run", "machine": "", "token": ""}
