"""What is done with a queued resource, step by step; every step can be done again."""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from llip_jax.command_line import EXIT_STOPPED
from llip_jax.config import ConfigError
from llip_jax.launching.queued_resources import ACTIVE, PENDING, QueuedResource, Request
from llip_jax.launching.shell import CommandFailed, Shell

_STATE = "== state ==\n"
"""What tpu_worker.sh prints between new lines of the log and the state of the training."""

UNKNOWN = "UNKNOWN"
"""The state where Google does not answer."""

_FINISHED = f"{_STATE}SubState=exited\nExecMainCode=1\nExecMainStatus=0\n"


class SliceLost(RuntimeError):
    """The slice was taken back, will not come, or does not answer. ``state``: of the queued resource."""

    def __init__(self, message: str, state: str | None):
        super().__init__(message)
        self.state = state


class Unanswered(CommandFailed):
    """Google does not say what the state is, as without a network here: nothing follows from that."""


class Ended(NamedTuple):
    """How training ended on the slice: the exit code of its first host, and whether ``stop`` was called."""

    code: int
    asked: bool


@dataclass(frozen=True)
class Pod:
    """A slice and how often to look at it. ``sleep`` is for tests."""

    resource: QueuedResource
    shell: Shell
    poll_s: float = 30.0
    patience: int = 10
    """Times in a row that the first host may fail to answer; also how often copying code is tried on a new slice."""
    sleep: Callable[[float], None] = time.sleep

    def state(self) -> str | None:
        """State of the queued resource, or None where there is none; in a dry run ACTIVE.

        Raises:
            Unanswered: it is not known.
            ConfigError: gcloud has no project.
        """
        state, _, _ = self._describe(ACTIVE).partition("\t")
        return state or None

    def _describe(self, assumed: str) -> str:
        done = self.shell.run(self.resource.state(), check=False, assumed=assumed)
        if done.code == 0:
            return done.out.strip()
        if "property [project] is not" in done.err:
            raise ConfigError("--project: gcloud has none; gcloud config set project PROJECT, or --project=PROJECT")
        if "NOT_FOUND" in done.err or "not found" in done.err.lower():
            return ""
        raise Unanswered(f"the state of {self.resource.name} is not known: {done.err.strip()}")

    def look(self) -> str | None:
        """The same, or UNKNOWN after saying why."""
        try:
            return self.state()
        except Unanswered as error:
            print(error, flush=True)
            return UNKNOWN

    def check(self, request: Request) -> str | None:
        """The state, of what may be there already; in a dry run None.

        Raises:
            ConfigError: it is of another topology.
            Unanswered: it is not known.
        """
        state, _, kind = self._describe(assumed="").partition("\t")
        asked = request.slice.accelerator_type
        if kind not in ("", asked) and not any(flag.startswith("--accelerator-type") for flag in request.flags):
            raise ConfigError(
                f"--topology is {request.slice.topology!r}, {asked}, but {self.resource.name} is there already as"
                f" {kind}: take another name, or delete it: {self.resource.ours('delete')}"
            )
        return state or None

    def create(self, request: Request) -> None:
        """Asks for the slice unless that has been done.

        Raises:
            ConfigError: that has been done for another topology.
        """
        state = self.check(request)
        if state is not None:
            print(f"{self.resource.name} is there already ({state})", flush=True)
            return
        self.shell.run(self.resource.create(request))
        self.shell.tell(f"{self.resource.name}: asked for {request.slice.topology} ({request.slice.chips} chips)")

    def wait(self) -> None:
        """Waits until the slice is there.

        Raises:
            SliceLost: it will not come.
            Unanswered: its state is not known from the start.
        """
        shown = ""
        state = self.state()
        while state != ACTIVE:
            if state not in (*PENDING, UNKNOWN):
                raise SliceLost(f"{self.resource.name} is {state or 'not there'}", state)
            if state not in (shown, UNKNOWN):
                print(f"{self.resource.name} is {state}", flush=True)
                shown = state
            self.sleep(self.poll_s)
            state = self.look()

    def running(self) -> bool:
        """Whether the first host says that training is running."""
        done = self.shell.run(self.resource.worker("state", host="0"), check=False)
        return "SubState=running\n" in done.out

    def setup(self, root: Path, storage: str) -> None:
        """Copies the commit checked out at ``root`` to all hosts, installs it, and mounts the storage.

        Raises:
            CommandFailed: a host that cannot be reached, or where something does not install.
        """
        changed = self.shell.run(["git", "-C", str(root), "status", "--porcelain"]).out
        if changed:
            print(
                f"{len(changed.splitlines())} uncommitted changes stay here: the hosts get the last commit", flush=True
            )
        with tempfile.TemporaryDirectory() as folder:
            code = Path(folder) / "llip_jax.tar.gz"
            self.shell.run(["git", "-C", str(root), "archive", f"--output={code}", "HEAD"])
            for attempt in range(self.patience):
                # A slice is ACTIVE a little before its hosts take connections.
                done = self.shell.run(self.resource.upload(code), check=attempt == self.patience - 1)
                if done.code == 0:
                    break
                self.sleep(self.poll_s)
            # Not earlier: a host that does not answer may be training.
            if self.running():
                print(f"training is running on {self.resource.name}: its code stays as it is", flush=True)
                return
            self.shell.run(self.resource.unpack(code))
        self.shell.run(self.resource.worker("setup", storage), show=True)

    def start(self, words: Sequence[str]) -> None:
        """Starts training on all hosts, unless it is running."""
        if self.running():
            print(f"training is running on {self.resource.name}: going on to watch it", flush=True)
            return
        self.shell.run(self.resource.worker("start", *words))

    def watch(self) -> Ended:
        """Prints the first host's log until its training ends; a failure anywhere ends all processes.

        Raises:
            SliceLost: taken back, or out of reach.
        """
        unanswered = 0
        while unanswered < self.patience:
            done = self.shell.run(self.resource.worker("poll", host="0"), check=False, assumed=_FINISHED)
            if done.code == 0:
                unanswered = 0
                log, _, state = done.out.rpartition(_STATE)
                print(log, end="", flush=True)
                if ended := _ended(state):
                    return ended
            else:
                unanswered += self._still_there()
            self.sleep(self.poll_s)
        raise SliceLost(
            f"{self.resource.name} is {ACTIVE}, but its first host does not answer: {done.err.strip()}", ACTIVE
        )

    def _still_there(self) -> bool:
        """False where it cannot be known.

        Raises:
            SliceLost: it is not.
        """
        state = self.look()
        if state not in (ACTIVE, UNKNOWN):
            raise SliceLost(f"{self.resource.name} is {state or 'not there'}", state)
        return state == ACTIVE

    def delete(self) -> None:
        """Deletes slice and request, where they are.

        Raises:
            CommandFailed: it is not known to be gone after many tries.
        """
        for _ in range(self.patience):
            done = self.shell.run(self.resource.delete(), check=False)
            if self.shell.dry_run or self.look() is None:
                self.shell.tell(f"{self.resource.name} is deleted")
                return
            self.sleep(self.poll_s)
        raise CommandFailed(f"{self.resource.name} is not deleted and may cost money: {done.err.strip()}")


def _ended(state: str) -> Ended | None:
    """From lines of ``systemctl show``; None while training runs."""
    fields = dict(line.split("=", 1) for line in state.splitlines() if "=" in line)
    asked = fields.get("Stopped") == "yes"
    match fields.get("SubState"):
        case "exited" | "failed":
            # CLD_EXITED; otherwise the status is the number of the signal that ended it.
            shift = 0 if fields["ExecMainCode"] == "1" else 128
            return Ended(shift + int(fields["ExecMainStatus"]), asked)
        case "dead":  # the host was restarted, and knows of no training
            return Ended(EXIT_STOPPED, asked)
        case _:
            return None
