"""Files by path or URL: finding those that a pattern stands for, and reading parts of them.

URLs (gs://, s3://, memory://, ...) go through fsspec, which needs a package for each kind of storage.
"""

import difflib
import fnmatch
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import fsspec
from braceexpand import braceexpand
from fsspec.implementations.local import LocalFileSystem

from llip_jax.config import ConfigError

_OPEN_FILES = 256
"""Local files that a process keeps open."""

_STAMPS = ("etag", "ETag", "md5Hash", "crc32c", "generation", "mtime", "LastModified", "updated", "created")
"""What listings of remote files call that which changes with the content."""


@dataclass(frozen=True)
class StoredFile:
    """A file as it was listed.

    url: absolute path of a local file, or the URL of a remote one.
    size: in bytes.
    stamp: changes when the content does, as far as a listing tells; "" where it does not.
    """

    url: str
    size: int
    stamp: str

    @property
    def name(self) -> str:
        """The last component of the path."""
        return self.url.rpartition("/")[2]


def find_files(pattern: str, field: str, within: str = "*") -> tuple[StoredFile, ...]:
    """The files that a pattern stands for, in the order in which it names them; those of a glob sorted by name.

    Every remote folder is listed once, so that thousands of files do not take as many requests.

    Args:
        pattern: a path or URL, with ``{0000..0099}``, ``{a,b}`` and, in each component, ``*``, ``?`` and ``[...]``;
            or several after commas.
        field: the configuration field the pattern comes from, for errors.
        within: the glob that chooses files where a path is that of a folder.

    Raises:
        ConfigError: something named is not there or there twice, or cannot be listed.
    """
    try:
        # As the list of an enclosing brace, so that commas within braces do not separate.
        paths = [stripped for path in braceexpand(f"{{{pattern},}}", escape=False) if (stripped := path.strip())]
    except ValueError:
        raise ConfigError(f"{field}: {pattern!r} has a brace without its counterpart") from None
    if not paths:
        raise ConfigError(f"{field} is {pattern!r}, expected a path, a URL or a pattern")

    listings = _Listings(field)
    found: list[StoredFile] = []
    missing: list[str] = []
    for path in paths:
        files = listings.find(path, within)
        found += files
        if not files:
            missing.append(path)
    if missing:
        number = f" ({len(missing)} of {len(paths)} paths)" if len(paths) > 1 else ""
        raise ConfigError(f"{field}: there is no file {missing[0]!r}{number}.{listings.hint(missing[0])}")
    url, times = Counter(file.url for file in found).most_common(1)[0]
    if times > 1:
        raise ConfigError(f"{field}: {pattern!r} names {url!r} {times} times, expected each file once")
    return tuple(found)


def files_in(folder: str, field: str) -> dict[str, StoredFile]:
    """The files directly in a folder, by name; none where there is no such folder.

    Raises:
        ConfigError: it cannot be listed.
    """
    entries = _Listings(field).entries(*filesystem(folder, field))
    return {name: file for name, file in entries.items() if file is not None}


def filesystem(url: str, field: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path as that calls it.

    Raises:
        ConfigError: no such kind of storage, or its package is not installed; the message names it.
    """
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{field}: {url!r} cannot be opened: {error}") from error


def unique_names(files: Sequence[StoredFile]) -> tuple[str, ...]:
    """As few last components of the files' paths as tell all of them apart."""
    parts = [file.url.split("/") for file in files]
    depth = 1
    while len({tuple(part[-depth:]) for part in parts}) < len({file.url for file in files}):
        depth += 1
    return tuple("/".join(part[-depth:]) for part in parts)


def read_range(file: StoredFile, start: int, length: int) -> bytes:
    """Bytes ``start`` to ``start + length``. May be called by several threads at once.

    Raises:
        OSError: the file cannot be read, or ends before.
    """
    if not length:
        return b""  # which storage need not know how to ask for
    if _is_local(file.url):
        opened = _open(file)
        data = os.pread(opened.descriptor, length, start)
        while 0 < len(data) < length and (more := os.pread(opened.descriptor, length - len(data), start + len(data))):
            data += more  # Linux reads at most 2 GiB at once
    else:
        try:
            storage, path = fsspec.core.url_to_fs(file.url)
            data = storage.cat_file(path, start=start, end=start + length)
        except OSError:
            raise
        except Exception as error:  # each kind of storage has errors of its own
            raise OSError(f"{file.url}: {error}") from error
    if len(data) != length:
        raise OSError(f"{file.url} ends at byte {start + len(data)}; expected {length} bytes from {start}")
    return data


def _is_local(url: str) -> bool:
    return "://" not in url


class _OpenFile:
    """Closes itself when the last thread that reads from it has let go."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@lru_cache(_OPEN_FILES)
def _open(file: StoredFile) -> _OpenFile:
    return _OpenFile(file.url)


class _Listings:
    """What lies in folders, each listed once: name -> file, or None for a folder."""

    def __init__(self, field: str):
        self._field = field
        self._folders: dict[tuple[Any, str], dict[str, StoredFile | None]] = {}

    def find(self, pattern: str, within: str) -> list[StoredFile]:
        storage, path = filesystem(pattern, self._field)
        folder, slash, name = path.rpartition("/")
        if not slash or not name:  # a bucket, or the root
            return self._matching(storage, path, within)
        found: list[StoredFile] = []
        for place in self._expand(storage, folder):
            if _is_glob(name):
                found += self._matching(storage, place, name)
                continue
            entries = self.entries(storage, place)
            entry = entries.get(name)
            if entry is not None:
                found.append(entry)
            elif name in entries:
                found += self._matching(storage, f"{place}/{name}", within)
        return found

    def hint(self, pattern: str) -> str:
        """The nearest name in the folder where a file is missing."""
        storage, path = filesystem(pattern, self._field)
        folder, _, name = path.rpartition("/")
        if _is_glob(folder):
            return ""
        names = list(self.entries(storage, folder))
        if not names:
            return f" There is nothing in {folder!r}."
        return f" The nearest name there is {difflib.get_close_matches(name, names, n=1, cutoff=0)[0]!r}."

    def _expand(self, storage: Any, folder: str) -> Iterator[str]:
        """The folders that a path with globs stands for."""
        if not _is_glob(folder):
            yield folder
            return
        parent, _, name = folder.rpartition("/")
        for place in self._expand(storage, parent):
            entries = self.entries(storage, place)
            names = (name,) if not _is_glob(name) else _select(entries, name)
            yield from (f"{place}/{name}" for name in names if name in entries and entries[name] is None)

    def _matching(self, storage: Any, folder: str, glob: str) -> list[StoredFile]:
        entries = self.entries(storage, folder)
        return [file for name in _select(entries, glob) if (file := entries[name]) is not None]

    def entries(self, storage: Any, folder: str) -> dict[str, StoredFile | None]:
        if (storage, folder) not in self._folders:
            try:
                entries = _local_entries(folder) if isinstance(storage, LocalFileSystem) else _entries(storage, folder)
            except (FileNotFoundError, NotADirectoryError):
                entries = {}
            except Exception as error:  # each kind of storage has errors of its own
                raise ConfigError(f"{self._field}: {folder!r} cannot be listed: {error}") from error
            self._folders[storage, folder] = entries
        return self._folders[storage, folder]


def _local_entries(folder: str) -> dict[str, StoredFile | None]:
    entries: dict[str, StoredFile | None] = {}
    with os.scandir(folder or "/") as listing:
        for entry in listing:
            if entry.is_dir():
                entries[entry.name] = None
            elif entry.is_file():  # no device, pipe, or symbolic link to nothing
                with suppress(FileNotFoundError):  # removed since
                    status = entry.stat()
                    entries[entry.name] = StoredFile(f"{folder}/{entry.name}", status.st_size, str(status.st_mtime_ns))
    return entries


def _entries(storage: Any, folder: str) -> dict[str, StoredFile | None]:
    storage.invalidate_cache(folder)
    entries: dict[str, StoredFile | None] = {}
    for info in storage.ls(folder, detail=True):
        name = info["name"].rstrip("/").rpartition("/")[2]
        if info["type"] == "directory":
            entries[name] = None
        else:
            stamp = next((str(info[key]) for key in _STAMPS if info.get(key)), "")
            entries[name] = StoredFile(storage.unstrip_protocol(info["name"]), info["size"], stamp)
    return entries


def _is_glob(path: str) -> bool:
    return re.search(r"[*?[]", path) is not None


def _select(names: dict[str, StoredFile | None], glob: str) -> list[str]:
    """As in a shell: sorted, and a leading dot is matched by a dot only."""
    return sorted(
        name for name in names if fnmatch.fnmatchcase(name, glob) and (glob.startswith(".") or not name.startswith("."))
    )
