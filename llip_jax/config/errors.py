"""What every part of the configuration needs: the strict mode, and errors that help."""

import difflib
from typing import Any

import pydantic

STRICT = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def listed(value: Any) -> Any:
    """A single string, or a list, as a tuple; for fields of several strings."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


class ConfigError(ValueError):
    """Bad configuration or input: the message is meant for the user, without a traceback (exit code 2)."""


def nearest(name: str, valid: list[str]) -> str:
    """' Did you mean X?' for the closest valid name, or the list of valid names when none is close."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else f" Valid names: {', '.join(sorted(valid))}."
