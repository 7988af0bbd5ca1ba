"""What the programs under launch/ share: ``--config.FIELD=VALUE`` words, and errors turned into exit codes."""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from llip_jax.config import ConfigError

EXIT_FINISHED, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_STOPPED = 0, 1, 2, 75


class RunFailed(Exception):
    """A run cannot go on, for a reason that the message tells."""


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Command-line words without the ``--config.FIELD=VALUE`` ones, and those as ``FIELD=VALUE``.

    Raises:
        ConfigError: an override without ``=``.
    """
    prefix = "--config."
    overrides = [word[len(prefix) :] for word in argv if word.startswith(prefix)]
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"{prefix}{override}: expected {prefix}{override}=VALUE")
    return [word for word in argv if not word.startswith(prefix)], overrides


def run(main: Callable[[list[str]], int]) -> int:
    """Calls ``main`` with the command-line words; its exit code.

    Bad input (ConfigError) becomes a message and exit code 2; other errors that explain themselves a message and 1.
    """
    try:
        return main(sys.argv[1:])
    except (ConfigError, RunFailed) as error:
        code, text = explain(error)
        print(text, file=sys.stderr)
        return code


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and text of an error: its message where it explains itself, else its traceback."""
    if isinstance(error, ConfigError):
        return EXIT_BAD_INPUT, f"error: {error}"
    if isinstance(error, RunFailed):
        return EXIT_FAILED, f"error: {error}"
    return EXIT_FAILED, "".join(traceback.format_exception(error)).rstrip()


def end_process(code: int, text: str = "") -> NoReturn:
    """Ends this process and its data workers from any thread, whatever the others are in, without any clean-up."""
    try:
        if text:
            print(text, file=sys.stderr)
        for worker in multiprocessing.active_children():
            worker.kill()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
