"""Finding and reading files, on disk and in fsspec's memory file system."""

import multiprocessing
import os
import pickle
import random
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest

from llip_jax.config import ConfigError
from llip_jax.data import files as files_module
from llip_jax.data.files import StoredFile, find_files, read_range, unique_names


@pytest.fixture
def memory():
    """A folder of its own in the memory file system."""
    storage = fsspec.filesystem("memory")
    folder = f"/{uuid4().hex}"
    yield storage, folder
    storage.rm(folder, recursive=True)


def make(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def found(root: Path, pattern: str, within: str = "*") -> list[str]:
    paths = ",".join(f"{root}/{part}" for part in pattern.split("|"))
    return [os.path.relpath(file.url, root) for file in find_files(paths, "data.path", within)]


def test_braces_are_those_of_bash(tmp_path):
    make(tmp_path, *(f"{a}/{b}{n:03d}.tar" for a, b, n in product("pq", ("x", "yy"), range(12))))
    for pattern in (
        "p/x{000..011}.tar",
        "{p,q}/{x,yy}{003..007}.tar",
        "q/{yy{001,01{0..1}},x000}.tar",
        "p/x{005..002}.tar",
    ):
        expected = subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True, check=True)
        assert found(tmp_path, pattern) == expected.stdout.split()


def test_globs_are_those_of_pathlib_and_sorted(tmp_path):
    make(
        tmp_path,
        *(f"{a}/{b}{n}.tar" for a, b, n in product(("one", "two"), "ab", range(12))),
        "one/.a1.tar",
        "one/x.json",
    )
    for pattern in ("*/*.tar", "o?e/a[0-3].tar", "*/[!a]*.tar", "two/*1*"):
        expected = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob(pattern) if path.name[0] != ".")
        assert found(tmp_path, pattern) == expected


def test_several_patterns_keep_their_order_and_a_folder_stands_for_its_files(tmp_path):
    make(tmp_path, "b/2.tar", "b/1.tar", "b/sub/3.tar", "b/stats.json", "a.tar")
    assert found(tmp_path, "b/2.tar|a.tar|b/1.tar") == ["b/2.tar", "a.tar", "b/1.tar"]
    assert found(tmp_path, "b", "*.tar") == found(tmp_path, "b/", "*.tar") == ["b/1.tar", "b/2.tar"]


def test_relative_paths_and_file_urls_become_absolute(tmp_path, monkeypatch):
    make(tmp_path, "a.tar")
    monkeypatch.chdir(tmp_path)
    for pattern in ("a.tar", "./*.tar", f"file://{tmp_path}/a.tar", " a.tar ,"):
        (file,) = find_files(pattern, "data.path")
        assert file.url == f"{tmp_path}/a.tar" and file.size == 5 and file.name == "a.tar"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "{root}/00{{0..9}}.tar",
            r"data.path: there is no file '.*/002.tar' \(8 of 10 paths\).* nearest .*'00[01].tar'",
        ),
        ("{root}/01.tr", "there is no file '.*/01.tr'.* nearest name there is '001.tar'"),
        ("{root}/nowhere/*.tar", "there is nothing in '.*/nowhere'"),
        ("{root}/*.parquet", "there is no file '.*parquet'"),
        ("{root}/000.tar,{root}/*.tar", "names '.*/000.tar' 2 times"),
        ("{root}/{{0..3.tar", "brace"),
        (" , ", "expected a path"),
        ("gs://bucket/*.tar", "gcsfs"),
        ("s3://bucket/*.tar", "s3fs"),
        ("nosuch://bucket/*.tar", "nosuch"),
    ],
)
def test_mistakes_are_told_with_field_and_nearest_name(tmp_path, pattern, message, monkeypatch):
    for package in ("gcsfs", "s3fs"):  # as where they are not installed
        monkeypatch.setitem(sys.modules, package, None)
    make(tmp_path, "000.tar", "001.tar")
    with pytest.raises(ConfigError, match=f"(?i)^data.path.*{message}" if "data" not in message else message):
        find_files(pattern.format(root=tmp_path), "data.path")


def test_remote_folders_are_listed_once_and_files_never_asked_for(memory, monkeypatch):
    storage, folder = memory
    for part, number in product("ab", range(500)):
        storage.pipe(f"{folder}/{part}/{number:05d}.tar", bytes(number))
    calls: Counter[str] = Counter()
    for name in ("ls", "info", "_open", "cat_file"):
        original = getattr(type(storage), name)
        monkeypatch.setattr(
            type(storage),
            name,
            lambda self, path, *a, _f=original, _n=name, **k: (calls.update([_n]), _f(self, path, *a, **k))[1],
        )
    listed = find_files(f"memory:/{folder}/{{a,b}}/{{00000..00499}}.tar", "data.path")
    assert calls == {"ls": 2}
    assert [file.size for file in listed] == [*range(500), *range(500)]
    assert listed == find_files(f"memory:/{folder}/*/*.tar", "data.path")


def test_stamp_changes_with_the_content(tmp_path, memory):
    storage, folder = memory
    for url, write in (
        (f"{tmp_path}/a", (tmp_path / "a").write_bytes),
        (f"memory:/{folder}/a", lambda data: storage.pipe(f"{folder}/a", data)),
    ):
        write(b"one")
        before = find_files(url, "data.path")
        assert find_files(url, "data.path") == before
        if "://" not in url:
            os.utime(url, ns=(0, 12345))
        write(b"two")
        assert find_files(url, "data.path") != before


def test_ranges_are_read_by_many_threads_through_few_descriptors(tmp_path, memory):
    storage, folder = memory
    data = random.randbytes(5000)
    count = files_module._OPEN_FILES + 50
    for number in range(count):
        (tmp_path / f"{number:03d}").write_bytes(data)
    storage.pipe(f"{folder}/x", data)
    files = [*find_files(f"{tmp_path}/*", "data.path"), *find_files(f"memory:/{folder}/x", "data.path")]

    def read(seed: int) -> bool:
        generator = random.Random(seed)
        start = generator.randrange(5000)
        length = generator.randrange(5001 - start)
        return read_range(generator.choice(files), start, length) == data[start : start + length]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(4000)))
    assert len(os.listdir("/proc/self/fd")) < count


def test_short_reads_and_missing_files_are_os_errors(tmp_path, memory):
    storage, folder = memory
    make(tmp_path, "abc")
    storage.pipe(f"{folder}/abc", b"abc")
    for url in (f"{tmp_path}/abc", f"memory:/{folder}/abc"):
        (file,) = find_files(url, "data.path")
        assert read_range(file, 1, 2) == (b"bc")
        with pytest.raises(OSError, match="ends at byte 3"):
            read_range(file, 1, 3)
        with pytest.raises(OSError):
            read_range(StoredFile(f"{url}d", 3, ""), 0, 1)


def test_files_can_be_read_after_fork_and_pickling(tmp_path):
    make(tmp_path, "abc")
    (file,) = find_files(f"{tmp_path}/abc", "data.path")
    assert read_range(file, 0, 3) == b"abc"
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(read_range, (pickle.loads(pickle.dumps(file)), 1, 2)) == b"bc"


def test_names_take_as_much_of_the_path_as_tells_them_apart():
    def names(*urls: str) -> tuple[str, ...]:
        return unique_names([StoredFile(url, 0, "") for url in urls])

    assert names("/x/a.tar", "/x/b.tar") == ("a.tar", "b.tar")
    assert names("/x/y/a.tar", "gs://x/z/a.tar", "/x/y/b.tar") == ("y/a.tar", "z/a.tar", "y/b.tar")
