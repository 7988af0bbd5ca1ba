"""Running commands, or only printing them."""

import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from llip_jax.config import ConfigError


class CommandFailed(RuntimeError):
    """A command that did not succeed, with what it said."""


@dataclass(frozen=True)
class Done:
    """What came of a command."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Shell:
    """The only place where commands are run. A dry run prints each instead, quoted for a shell."""

    dry_run: bool = False

    def tell(self, outcome: str) -> None:
        """Prints what came of commands; in a dry run nothing did."""
        if not self.dry_run:
            print(outcome, flush=True)

    def run(self, command: Sequence[str], *, check: bool = True, show: bool = False, assumed: str = "") -> Done:
        """Runs a command to its end.

        Args:
            command: its words.
            check: whether failing is an error.
            show: its output goes to the terminal as it comes, and is not returned.
            assumed: what a dry run takes for its output.

        Raises:
            CommandFailed: it failed, and ``check``.
            ConfigError: there is no such program.
        """
        if self.dry_run:
            print(shlex.join(command), flush=True)
            return Done(0, assumed, "")
        try:
            done = subprocess.run(command, text=True, capture_output=not show, stdin=subprocess.DEVNULL, check=False)
        except FileNotFoundError:
            raise ConfigError(f"{command[0]} is not installed, or not on the PATH (docs/pods.md)") from None
        if check and done.returncode != 0:
            said = (done.stderr or "").strip() or "see above"
            raise CommandFailed(f"{shlex.join(command)} failed with exit code {done.returncode}: {said}")
        return Done(done.returncode, done.stdout or "", done.stderr or "")
