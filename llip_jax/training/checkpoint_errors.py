"""What is wrong with a checkpoint, or on the way to it."""

from collections.abc import Mapping
from pathlib import Path

import jax

_BLOCK_BYTES = 2**24


def proves_damage(error: Exception, folder: Path) -> bool:
    """Whether an error of reading comes from what is written there, and not from the way to it."""
    if isinstance(error, OSError | MemoryError | jax.errors.JaxRuntimeError):
        return isinstance(error, FileNotFoundError)
    try:  # TensorStore's errors are all of one kind, its file system's too.
        for file in (path for path in folder.rglob("*") if path.is_file()):
            with file.open("rb") as stream:
                while stream.read(_BLOCK_BYTES):
                    pass
    except OSError:
        return False
    return True


def reason_of(error: Exception) -> str:
    """One line, never empty. TensorStore begins with what it was doing and ends with the cause."""
    while isinstance(error.__context__, Exception):  # What followed, such as waiting in vain for a process that failed.
        error = error.__context__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:100]} ... {text[-200:]}"


def differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Arrays that only one tree has, or whose shape or type differ, one line each."""
    lines = [f"  only in the checkpoint:    {path} {old[path]}" for path in sorted(old.keys() - new.keys())]
    lines += [f"  only in the configuration: {path} {new[path]}" for path in sorted(new.keys() - old.keys())]
    lines += [
        f"  differs: {path} is {old[path]} in the checkpoint, {new[path]} in the configuration"
        for path in sorted(old.keys() & new.keys())
        if old[path] != new[path]
    ]
    return lines
