"""A folder of weights takes its place whole or not at all."""

import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from llip_jax.config import ConfigError


@contextmanager
def replacing_folder(path: Path, overwrite: bool = False, files: Collection[str] = ()) -> Iterator[Path]:
    """A path beside ``path``, to be made a folder (or a file), that takes its place when the block ends.

    Where the block fails it goes, and what was there stays as it was. With ``overwrite`` the old one lies beside
    between two renames, and goes when the new one is in its place.

    Args:
        path: the place. A link stays one, and what it leads to is replaced.
        overwrite: whether a file, or a folder that holds ``files`` alone, may be replaced.
        files: names that such a folder may hold.

    Raises:
        ConfigError: something is there that is not to be replaced, or the place cannot be written to.
    """
    path = Path(os.path.realpath(path))  # with a name, and one that does not depend on where the process is
    check_replaceable(path, overwrite, files)
    mark = uuid.uuid4().hex
    temporary, old = (path.with_name(f".{mark}.{kind}{path.suffix}") for kind in ("new", "old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
        _remove(old)
    except ConfigError as error:
        raise ConfigError(str(error).replace(str(temporary), str(path))) from error
    except OSError as error:
        if old.exists() and not path.exists():
            os.rename(old, path)
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        _remove(temporary)


def check_replaceable(path: Path, overwrite: bool, files: Collection[str]) -> None:
    """What :func:`replacing_folder` refuses before it begins.

    Raises:
        ConfigError: something is there that is not to be replaced.
    """
    there = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else [path.name] if path.exists() else []
    if there and not overwrite:
        raise ConfigError(f"{path}: there is something already; expected a new name, or --overwrite (overwrite=True)")
    others = [name for name in there if path.is_dir() and name not in files]
    if others:
        raise ConfigError(f"{path}: is not overwritten, as it holds more than weights: {', '.join(others[:5])}")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
