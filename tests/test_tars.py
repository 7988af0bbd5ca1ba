"""Tar shards compared with tarfile's and WebDataset's own readers; damaged and hostile archives; the index."""

import io
import json
import multiprocessing
import os
import pickle
import random
import re
import struct
import tarfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest

from llip_jax.config import ConfigError
from llip_jax.data.files import StoredFile, find_files
from llip_jax.data.formats import tars
from llip_jax.data.formats.tars import TarRows
from llip_jax.data.records import BadSample

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def member(name: str, data: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def archive(members: Iterable[tuple[tarfile.TarInfo, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as writer:
        for info, data in members:
            writer.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def samples(count: int, prefix: str = "") -> list[tuple[tarfile.TarInfo, bytes]]:
    """Members of ordinary samples: a picture, a text and metadata."""
    members = []
    for number in range(count):
        key = f"{prefix}{number:05d}"
        members += [
            member(f"{key}.jpg", random.randbytes(random.randrange(1500)), mtime=random.random() * 1e9),
            member(f"{key}.txt", f"text {number}".encode()),
            member(f"{key}.json", json.dumps({"caption": number}).encode()),
        ]
    return members


@pytest.fixture
def open_tar(tmp_path):
    """Opens the bytes of an archive as ``TarRows``, each time with an index of its own."""

    def opened(data: bytes) -> TarRows:
        folder = tmp_path / uuid4().hex
        folder.mkdir()
        (folder / "shard.tar").write_bytes(data)
        return TarRows(find_files(str(folder / "shard.tar"), "data.path"), folder / "index")

    return opened


def contents(rows: TarRows) -> list[tuple[str, dict[str, bytes]]]:
    return [(name.partition(".tar/")[2], dict(columns)) for name, columns in (rows[i] for i in range(len(rows)))]


def webdataset_contents(*paths: Path) -> list[tuple[str, dict[str, bytes]]]:
    import webdataset  # late, as processes that tests start import this file too

    reader = webdataset.WebDataset([str(path) for path in paths], shardshuffle=False)
    return [
        (sample["__key__"], {name: value for name, value in sample.items() if not name.startswith("__")})
        for sample in reader
    ]


def random_name(format: str) -> str:
    letters = "abcXYZ012_-" + ("" if format == "ustar" else "äß図 ")
    parts = ["".join(random.choices(letters, k=random.choice((1, 5, 30)))) for _ in range(random.randrange(1, 5))]
    if format != "ustar" and random.random() < 0.2:
        parts[-1] *= 12
    return random.choice(("", "", "./", "a.b/")) + "/".join(parts)


@pytest.mark.parametrize("format", FORMATS)
def test_samples_are_those_that_webdataset_reads(tmp_path, format):
    paths = []
    for shard in range(4):
        members = []
        for number in range(60):
            key = f"{random_name(format)}{number}"  # never equal to the one before
            extensions = random.sample(["jpg", "PNG", "txt", "json", "seg.png", "A.b.C", ""], random.randrange(1, 5))
            members += [member(f"{key}.{e}", random.randbytes(random.choice((0, 10, 512, 3000)))) for e in extensions]
            if random.random() < 0.3:  # what is no part of a sample, also in the middle of one
                odd = random.choice(("._a.jpg", "__meta__", "__x__/a.jpg", "README", "d/README"))
                members.insert(len(members) - random.randrange(2), member(odd, b"x" * random.randrange(700)))
            if random.random() < 0.3:
                members.append(member("folder.jpg", type=tarfile.DIRTYPE))
            if format == "pax" and random.random() < 0.3:
                members[-1][0].pax_headers = {"comment": "path=no", "mtime": "1.5"}
        paths.append(tmp_path / f"{shard}.tar")
        paths[-1].write_bytes(archive(members, FORMATS[format]))
    rows = TarRows(find_files(f"{tmp_path}/*.tar", "data.path"), tmp_path / "index")
    assert contents(rows) == webdataset_contents(*paths)
    assert not rows.damaged


def test_samples_that_webdataset_writes(tmp_path):
    written = [
        {"__key__": f"{i:09d}", "jpg": random.randbytes(999), "txt": b"a text", "json": b'{"caption": "c"}'}
        for i in range(50)
    ]
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "00012.tar"), encoder=False) as writer:
        for sample in written:
            writer.write(sample)
    rows = TarRows(find_files(f"{tmp_path}/00012.tar", "data.path"), tmp_path / "index")
    for index in random.sample(range(50), 50):
        expected = dict(written[index])
        assert rows[index] == (f"00012.tar/{expected.pop('__key__')}", expected)


def test_old_and_rare_headers_are_read_as_tarfile_does(open_tar):
    data = bytearray(
        archive([member("a.jpg", b"one"), member("b.jpg", b"two"), member("c.jpg", b"three")], FORMATS["ustar"])
    )

    def patch(position: int, **fields: tuple[int, bytes]) -> None:
        for start, value in fields.values():
            data[position + start : position + start + len(value)] = value
        data[position + 148 : position + 156] = b" " * 8
        data[position + 148 : position + 156] = b"%06o\0 " % sum(data[position : position + 512])

    patch(0, v7=(257, bytes(255)), kind=(156, b"\0"))
    patch(1024, size=(124, b"\x80" + (3).to_bytes(11, "big")))  # base-256
    patch(2048, size=(124, b"          5 "), kind=(156, b"7"))
    expected = [("a", {"jpg": b"one"}), ("b", {"jpg": b"two"}), ("c", {"jpg": b"three"})]
    with tarfile.open(fileobj=io.BytesIO(data)) as reader:
        assert [(m.name, reader.extractfile(m).read()) for m in reader] == [(f"{k}.jpg", c["jpg"]) for k, c in expected]
    assert contents(open_tar(bytes(data))) == expected


def test_pax_headers_override_name_and_size(open_tar):
    body = b"hello" + bytes(507)
    info, _ = member("short.x")
    info.pax_headers = {"path": "long/name.jpg", "size": "5"}
    data = archive([(info, b""), member("next.jpg", b"n")])
    data = data[:1536] + body + data[1536:]  # the header's own size is 0
    with tarfile.open(fileobj=io.BytesIO(data)) as reader:
        assert [(m.name, m.size) for m in reader] == [("long/name.jpg", 5), ("next.jpg", 1)]
    assert contents(open_tar(data)) == [("long/name", {"jpg": b"hello"}), ("next", {"jpg": b"n"})]


def test_links_devices_and_outside_names_are_never_followed(open_tar, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    data = archive(
        [
            member("a.txt", type=tarfile.SYMTYPE, linkname=str(secret)),
            member("a.json", type=tarfile.LNKTYPE, linkname="../secret.txt"),
            member("a.dev", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
            member("a.pipe", type=tarfile.FIFOTYPE),
            member("a.jpg", b"picture"),
            member("/etc/passwd.txt", b"absolute"),
            member("../../up.txt", b"up"),
            member("b.odd", b"data of an unknown kind", type=b"Z"),
        ]
    )
    before = sorted(tmp_path.iterdir())
    rows = open_tar(data)
    assert contents(rows) == [
        ("a", {"jpg": b"picture"}),
        ("/etc/passwd", {"txt": b"absolute"}),
        ("../../up", {"txt": b"up"}),
    ]
    assert len(sorted(tmp_path.iterdir())) == len(before) + 1 and not rows.damaged


def test_first_of_equal_names_counts_and_hidden_files_are_passed_over(open_tar):
    members = [("d/._a.jpg", b"mac"), ("d/a.jpg", b"1"), ("d/._a.txt", b"mac"), ("d/a.JPG", b"2"), ("d/a.txt", b"t")]
    assert contents(open_tar(archive(member(*m) for m in members))) == [("d/a", {"jpg": b"1", "txt": b"t"})]


def hostile() -> dict[str, bytes]:
    """What follows a good sample, by what is wrong with it."""

    def header(kind: bytes, size: bytes, name: bytes = b"z.jpg") -> bytes:
        block = bytearray(name.ljust(100, b"\0") + bytes(24) + size.ljust(12, b"\0") + bytes(20) + kind + bytes(355))
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        return bytes(block)

    def pax(*records: bytes) -> bytes:
        body = b"".join(records)
        return header(b"x", b"%o" % len(body)) + body.ljust(512, b"\0") + header(b"0", b"0") + bytes(1024)

    return {
        "garbage": random.randbytes(2000),
        "size past the end": header(b"0", b"77777777777"),
        "enormous size": header(b"0", b"\x80" + b"\xff" * 11),
        "negative size": header(b"0", b"\xff" * 12),
        "negative octal size": header(b"0", b"-10"),
        "enormous long name": header(b"L", b"77777777777"),
        "long name past the end": header(b"L", b"7777"),
        "headers without a member": header(b"L", b"5") * 3000,
        "chain of headers": (header(b"x", b"1") + b"1".ljust(512, b"\0")) * 3000,
        "PAX length 0": pax(b"0 path=a\n"),
        "PAX length negative": pax(b"-9 path=a\n"),
        "PAX length too large": pax(b"99999999 path=a\n"),
        "PAX size of words": pax(b"13 size=many\n"),
        "PAX size past the end": pax(b"21 size=999999999999\n"),
        "PAX digits": pax(b"1" * 400 + b" path="),
        "global PAX name": pax(b"10 path=a\n").replace(b"x", b"g", 1),
        "sparse": header(b"S", b"0"),
        "PAX sparse": pax(b"22 GNU.sparse.major=1\n"),
    }


@pytest.mark.parametrize("kind", hostile())
def test_what_precedes_hostile_members_is_kept(open_tar, caplog, kind):
    good = archive([*samples(3), member("marker", b"")])
    good = good[: good.rindex(b"marker") // 512 * 512]
    tail = hostile()[kind]
    rows = open_tar(good + tail)
    expected = contents(open_tar(good + bytes(1024)))
    assert contents(rows) in (expected, expected[:-1])
    assert re.search(rf"shard.tar is damaged at byte \d+ .*; its first {len(rows)} samples", caplog.text)
    assert list(rows.damaged) == ["shard.tar"]


def test_truncated_anywhere_gives_the_samples_before(open_tar):
    whole = archive(samples(4))
    rows = open_tar(whole)
    expected, first_end = contents(rows), rows._positions[1]
    end = whole.rindex(b"}") // 512 * 512 + 512
    for cut in sorted({*range(0, end + 1024, 512), *random.sample(range(end + 1024), 60)}):
        try:
            rows = open_tar(whole[:cut])
        except ConfigError:  # no sample is whole
            assert cut < first_end + 3 * 512  # within the headers that follow it
            continue
        got = contents(rows)
        (reason,) = rows.damaged.values() or ("",)
        assert bool(reason) == (cut < end + 512)
        if "no end-of-archive" in reason:  # cut between members: what there is of the last sample
            assert got[:-1] == expected[: len(got) - 1]
            assert got[-1][1].items() <= expected[len(got) - 1][1].items()
        else:
            assert got == expected[: len(got)]


def test_flipped_bytes_leave_other_samples_unchanged_or_are_reported(open_tar):
    count = 8
    whole = archive(samples(count), random.choice(list(FORMATS.values())))
    original = open_tar(whole)
    expected = contents(original)
    starts = original._positions.tolist()
    for _ in range(300):
        mutated = bytearray(whole)
        place = (
            random.randrange(starts[-1])
            if random.random() < 0.3
            else random.choice(
                [p + random.randrange(512) for p in range(0, starts[-1], 512) if whole[p + 257 : p + 262] == b"ustar"]
            )
        )
        mutated[place] ^= random.randrange(1, 256)
        touched = max(i for i in range(count) if starts[i] <= place)
        try:
            rows = open_tar(bytes(mutated))
        except ConfigError:
            assert touched <= 1
            continue
        got = contents(rows)
        if rows.damaged:
            assert got == expected[: len(got)] and touched - 1 <= len(got) <= touched + 1
        else:
            assert len(got) == count and all(got[i] == expected[i] for i in range(count) if i != touched)


def test_compressed_shards_are_refused_with_advice(tmp_path):
    for mode, kind in (("gz", "gzip"), ("bz2", "bzip2"), ("xz", "xz")):
        path = tmp_path / f"{kind}.tar"
        with tarfile.open(path, f"w:{mode}") as writer:
            writer.addfile(member("a.jpg", b"x")[0], io.BytesIO(b"x"))
        with pytest.raises(ConfigError, match=rf"{kind}.tar is compressed \({kind}\).* decompress"):
            TarRows(find_files(str(path), "data.path"), tmp_path / "index")


def test_empty_shards_are_passed_over_and_none_but_empty_ones_are_an_error(tmp_path):
    for name, count in (("0", 0), ("1", 2), ("2", 0), ("3", 1), ("4", 0)):
        (tmp_path / f"{name}.tar").write_bytes(archive(samples(count, name)))
    rows = TarRows(find_files(f"{tmp_path}/*.tar", "data.path"), tmp_path / "index")
    assert [rows[i][0] for i in range(3)] == ["1.tar/100000", "1.tar/100001", "3.tar/300000"]
    for index in (-1, 3):
        with pytest.raises(IndexError):
            rows[index]
    with pytest.raises(ConfigError, match="no sample"):
        TarRows(find_files(f"{tmp_path}/{{0,2}}.tar", "data.path"), tmp_path / "index")


def test_large_samples_are_not_read(open_tar, monkeypatch):
    rows = open_tar(archive([member("a.jpg", bytes(100)), member("b.jpg", bytes(5000))]))
    monkeypatch.setattr(tars, "MAX_SAMPLE_BYTES", 3000)
    assert rows[0][1] == {"jpg": bytes(100)}
    monkeypatch.setattr(tars, "read_range", None)
    with pytest.raises(BadSample) as error:
        rows[1]
    assert error.value.reason == "image_too_large"


def test_a_shard_that_changes_after_indexing_is_unreadable(tmp_path):
    path = tmp_path / "a.tar"
    whole = archive(samples(20))
    path.write_bytes(whole)
    rows = TarRows(find_files(str(path), "data.path"), tmp_path / "index")
    expected = contents(rows)
    reasons = set()
    for _ in range(20):
        path.write_bytes(random.choice((archive(samples(20, "q")), random.randbytes(len(whole)), bytes(len(whole)))))
        for index in range(20):
            with suppress(OSError):
                try:
                    name, columns = rows[index]
                except BadSample as error:
                    reasons.add(error.reason)
                else:
                    assert name.startswith("a.tar/q") and set(columns) <= {"jpg", "txt", "json"}
    assert reasons == {"unreadable"}
    path.write_bytes(whole[:2000])
    with pytest.raises(OSError):
        rows[19]
    path.write_bytes(whole)
    assert contents(rows) == expected


@pytest.fixture
def shards(tmp_path) -> tuple[StoredFile, ...]:
    for number in range(5):
        (tmp_path / f"{number}.tar").write_bytes(archive(samples(7, str(number))))
    return find_files(f"{tmp_path}/*.tar", "data.path")


def scanned(monkeypatch) -> list[str]:
    """The names of shards as they are scanned from now on."""
    names: list[str] = []
    original = tars._scan
    monkeypatch.setattr(tars, "_scan", lambda file: (names.append(file.name), original(file))[1])
    return names


def test_the_index_is_used_again_without_reading_any_shard(shards, tmp_path, monkeypatch):
    first = TarRows(shards, tmp_path / "index")
    kept = set(os.listdir(tmp_path / "index"))
    assert len(kept) == 3
    with monkeypatch.context() as context:
        context.setattr(tars, "read_range", None)
        second = TarRows(shards, tmp_path / "index")
    assert contents(second) == contents(first) and second.identity() == first.identity()
    assert set(os.listdir(tmp_path / "index")) == kept


def test_an_interrupted_scan_goes_on_where_it_stopped(shards, tmp_path, monkeypatch):
    original = tars._scan

    def interrupted(file: StoredFile):
        if file.name == "3.tar":
            raise KeyboardInterrupt
        return original(file)

    with monkeypatch.context() as context:
        context.setattr(tars, "_scan", interrupted)
        with pytest.raises(KeyboardInterrupt):
            TarRows(shards, tmp_path / "index")
    names = scanned(monkeypatch)
    TarRows(shards, tmp_path / "index")
    assert names == ["3.tar", "4.tar"]


def test_a_changed_shard_is_indexed_anew(shards, tmp_path, monkeypatch):
    before = TarRows(shards, tmp_path / "index").identity()
    (tmp_path / "2.tar").write_bytes(archive(samples(9, "2")))
    names = scanned(monkeypatch)
    after = TarRows(find_files(f"{tmp_path}/*.tar", "data.path"), tmp_path / "index")
    assert len(after) == 37 and "2.tar" in names
    assert [name for name in before if before[name] != after.identity()[name]] == ["2.tar"]


def test_a_damaged_index_is_built_anew(shards, tmp_path, monkeypatch):
    expected = contents(TarRows(shards, tmp_path / "index"))
    (positions,) = (tmp_path / "index").glob("*.int64")
    entries = positions.with_suffix(".json")
    for path in (positions, entries):
        good = path.read_bytes()
        flipped = bytearray(good)
        flipped[random.randrange(len(good))] ^= 1
        for bad in (b"", good[:-1], good + bytes(8), bytes(len(good)), bytes(flipped), None):
            path.unlink()
            if bad is not None:
                path.write_bytes(bad)
            if path == positions or bad != bytes(flipped):
                with monkeypatch.context() as context:
                    names = scanned(context)
                    assert contents(TarRows(shards, tmp_path / "index")) == expected
                    assert len(names) == 5
            assert contents(TarRows(shards, tmp_path / "index")) == expected
            path.write_bytes(good)


def test_an_index_folder_that_cannot_be_written_is_a_mistake_of_the_user(shards, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"data\.index_dir"):
        TarRows(shards, tmp_path / "file" / "index")


def open_and_read(shards: tuple[StoredFile, ...], index_dir: Path) -> list[tuple[str, dict[str, bytes]]]:
    tars._ALONE_SECONDS = 0  # scan in further processes
    return contents(TarRows(shards, index_dir))


def test_processes_that_index_at_once_and_pickled_rows_read_the_same(shards, tmp_path):
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        both = [pool.submit(open_and_read, shards, tmp_path / "index") for _ in range(2)]
        expected = webdataset_contents(*(Path(file.url) for file in shards))
        assert both[0].result() == both[1].result() == expected
        rows = TarRows(shards, tmp_path / "index")
        rows[0]
        assert pool.submit(contents, pickle.loads(pickle.dumps(rows))).result() == expected
    assert len(os.listdir(tmp_path / "index")) == 3


def test_threads_read_the_same(shards, tmp_path):
    rows = TarRows(shards, tmp_path / "index")
    order = random.choices(range(len(rows)), k=2000)
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(rows.__getitem__, order))
    expected = [rows[i] for i in range(len(rows))]
    assert got == [expected[i] for i in order]


def test_shards_in_remote_storage(tmp_path, monkeypatch):
    storage, folder = fsspec.filesystem("memory"), f"/{uuid4().hex}"
    monkeypatch.setattr(tars, "_REMOTE_STRETCH", 2000)
    for number in range(3):
        data = archive(samples(10, str(number)))
        storage.pipe(f"{folder}/{number}/x.tar", data)
        (tmp_path / f"{number}.tar").write_bytes(data)
    rows = TarRows(find_files(f"memory:/{folder}/*/x.tar", "data.path"), tmp_path / "index")
    assert contents(rows) == webdataset_contents(*(tmp_path / f"{number}.tar" for number in range(3)))
    assert list(rows.identity()) == ["0/x.tar", "1/x.tar", "2/x.tar"]
    storage.rm(folder, recursive=True)
    with pytest.raises(OSError):
        rows[0]


def test_identity_tells_what_the_data_is_but_not_where(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
    (tmp_path / "a/x.tar").write_bytes(archive(samples(3)))
    (tmp_path / "b/x.tar").write_bytes((tmp_path / "a/x.tar").read_bytes())
    here, there = (
        TarRows(find_files(f"{tmp_path}/{f}/*.tar", "data.path"), tmp_path / "index").identity() for f in "ab"
    )
    assert here == there
    assert re.fullmatch(r"3 samples, \d+ bytes, [0-9a-f]{16}", here["x.tar"])


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def write_sparse_index(index_dir: Path, files: tuple[StoredFile, ...], samples_each: int) -> Path:
    """An index of as many samples in every shard, with zeros, which take no space, for positions."""
    path = tars._index_file(files, index_dir)
    index_dir.mkdir()
    path.with_suffix(".json").write_text(
        json.dumps([{"samples": samples_each, "digest": "0" * 16, "damage": ""}] * len(files))
    )
    with path.open("wb") as stream:
        stream.truncate(8 * len(files) * (samples_each + 1))
    return path


def test_a_billion_samples_are_opened_and_read_in_little_memory(tmp_path, caplog):
    each = 100_000
    files = tuple(StoredFile(f"{tmp_path}/{number:05d}.tar", 10**9, "") for number in range(10_000))
    path = write_sparse_index(tmp_path / "index", files, each)
    probes = random.sample(range(len(files) * each), 20)
    with path.open("r+b") as stream:
        for probe in probes:
            Path(files[probe // each].url).write_bytes(archive([member(f"{probe}.txt", b"here")], FORMATS["ustar"]))
            stream.seek(8 * (probe + probe // each))
            stream.write(struct.pack("<qq", 0, 1024))
    before = resident_bytes()
    rows = TarRows(files, tmp_path / "index")
    assert len(rows) == 10**9
    for probe in probes:
        assert rows[probe] == (f"{files[probe // each].name}/{probe}", {"txt": b"here"})
    assert resident_bytes() - before < 64 * 2**20
    with pytest.raises(BadSample):
        rows[next(i for i in range(100) if i not in probes and i - 1 not in probes)]


@pytest.mark.parametrize("size", ["9" * 5000, "-1", "1e3", "\u0663"])
def test_sizes_that_are_no_numbers_are_damage(tmp_path, size):
    data = archive([member("a.txt"), member("b.txt"), member("c.txt", b"y", pax_headers={"size": size})])
    (tmp_path / "x.tar").write_bytes(data)
    rows = TarRows(find_files(str(tmp_path / "x.tar"), "data.path"), tmp_path / "index")
    assert rows.damaged and len(rows) == 1
