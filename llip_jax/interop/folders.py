"""A folder of weights takes its place whole or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llip_jax.config import ConfigError


@contextmanager
def replacing_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A path beside ``path``, to be made a folder (or a file), that takes its place when the block ends.

    Where the block fails it goes, and what was there stays as it was. With ``overwrite`` the old one lies beside
    between two renames, and goes when the new one is in its place.

    Raises:
        ConfigError: something is there and ``overwrite`` is not given, or it is no folder of mere files; or the place
            cannot be written to.
    """
    path = Path(os.path.abspath(path))  # with a name, and one that does not depend on where the process is
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise ConfigError(f"{path}: there is something already; expected a new folder, or to be told to overwrite")
        if any(entry.is_dir() for entry in path.iterdir()):
            raise ConfigError(f"{path}: holds folders, so it is not one of weights and is not overwritten")
    elif path.is_file() and not overwrite:
        raise ConfigError(f"{path}: there is a file already; expected a new name, or to be told to overwrite")
    mark = uuid.uuid4().hex
    temporary, old = (path.with_name(f".{mark}.{kind}{path.suffix}") for kind in ("new", "old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
        _remove(old)
    except OSError as error:
        if old.exists() and not path.exists():
            os.rename(old, path)
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
