"""What the programs under launch/ share: ``--config.FIELD=VALUE`` words, and errors turned into exit codes."""

import sys
from collections.abc import Callable, Sequence

from llip_jax.config import ConfigError

EXIT_FINISHED, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_STOPPED = 0, 1, 2, 75


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
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
