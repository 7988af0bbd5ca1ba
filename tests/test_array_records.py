"""ArrayRecord shards: exact round trips, and everything that may be wrong with files and records."""

import datetime
import decimal
import io
import json
import os
import pickle
import random
import secrets
from concurrent.futures import ThreadPoolExecutor

import msgpack
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image

from llip_jax.config import ConfigError
from llip_jax.data.files import StoredFile
from llip_jax.data.formats import array_records
from llip_jax.data.formats.array_records import (
    ArrayRecordRows,
    ArrayRecordSource,
    Shard,
    decode_row,
    dump_manifest,
    encode_record,
)
from llip_jax.data.records import BadSample, Record


def random_record(rng: random.Random, number: int = 0) -> Record:
    captions = tuple(f"{rng.choice('aäß字🎈')}{rng.random()}\u2028 \0" for _ in range(rng.randint(1, 5)))
    return Record(
        image=rng.randbytes(rng.randint(0, 5000)),
        captions=captions,
        kinds=tuple(rng.choice(("txt", "json.rewrites")) for _ in captions),
        specific=rng.randint(0, len(captions)),
        image_group=f"content:{rng.random()}",
        name=f"größe/{number}.png",
        fields={
            "number": rng.randint(-(2**63), 2**64 - 1),
            "nested": {"list": [1, 2.5, None, True, "x", rng.randbytes(9)], "empty": {}},
        },
    )


def store(path, rows) -> StoredFile:
    writer = ArrayRecordWriter(str(path), array_records.WRITER_OPTIONS)
    for row in rows:
        writer.write(row)
    writer.close()
    return stored(path)


def stored(path) -> StoredFile:
    return StoredFile(str(path), path.stat().st_size, "")


@pytest.fixture
def rng() -> random.Random:
    seed = secrets.randbits(32)
    print("seed", seed)
    return random.Random(seed)


def test_records_come_back_exactly_over_shards_threads_and_pickling(tmp_path, rng):
    records = [random_record(rng, number) for number in range(60)]
    files = [
        store(tmp_path / f"{shard}.array_record", map(encode_record, records[start:stop]))
        for shard, (start, stop) in enumerate([(0, 20), (20, 20), (20, 21), (21, 60)])
    ]
    source = ArrayRecordSource(ArrayRecordRows(files))
    assert len(source) == 60
    assert [source[i] for i in range(60)] == records
    again = pickle.loads(pickle.dumps(source))
    order = [rng.randrange(60) for _ in range(2000)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(again.__getitem__, order)) == [records[i] for i in order]
    for index in (-1, 60):
        with pytest.raises(IndexError):
            source[index]


def test_a_stored_record_is_a_plain_msgpack_map(rng):
    record = random_record(rng)
    row = msgpack.unpackb(encode_record(record))
    assert row == vars(record) | {"captions": list(record.captions), "kinds": list(record.kinds)}
    assert decode_row(encode_record(record)) == row


def test_pixels_are_stored_without_loss(rng):
    pixels = np.frombuffer(rng.randbytes(17 * 9 * 3), np.uint8).reshape(17, 9, 3)
    row = decode_row(encode_record(Record(pixels, ("a",), ("txt",), 1, "", "x")))
    with Image.open(io.BytesIO(row["image"])) as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)


def test_fields_become_plain_data(rng):
    fields = {
        "boxes": np.array([[1, 2], [3, 4]], np.float32),
        "label": np.int64(7),
        "pair": ({"a": (1,)}, None),
        3: "number as name",
        "date": datetime.date(2024, 2, 29),
        "price": decimal.Decimal("1.10"),
        "huge": 2**70,
    }
    assert decode_row(encode_record(Record(b"", ("a",), ("txt",), 1, "", "x", fields)))["fields"] == {
        "boxes": [[1.0, 2.0], [3.0, 4.0]],
        "label": 7,
        "pair": [{"a": [1]}, None],
        "3": "number as name",
        "date": "2024-02-29",
        "price": "1.10",
        "huge": str(2**70),
    }


def test_what_cannot_be_stored_is_a_bad_sample():
    deep: dict = {}
    for _ in range(100_000):
        deep = {"a": deep}
    for fields in ({"text": "\ud800"}, deep):
        with pytest.raises(BadSample, match="cannot be stored") as caught:
            encode_record(Record(b"", ("a",), ("txt",), 1, "", "x", fields))
        assert caught.value.reason == "bad_metadata"


def good_row(**changes):
    row = {"image": b"", "captions": ["a"], "kinds": ["txt"], "specific": 1, "image_group": "", "name": "x"}
    return row | {"fields": {}} | changes


class Exploit:
    def __reduce__(self):
        return os.abort, ()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff" * 100,
        b"\x91" * 100_000,
        b"\x81\xa1a" * 100_000,
        b"\xa2\xff\xff",
        pickle.dumps(Exploit()),
        msgpack.packb([1, 2]),
        msgpack.packb(good_row()) + b"\0",
        msgpack.packb(good_row())[:-1],
        msgpack.packb({1: 2}),
        msgpack.packb({name: value for name, value in good_row().items() if name != "kinds"}),
        msgpack.packb(good_row(extra=1)),
        msgpack.packb(good_row(fields={"a": msgpack.ExtType(3, b"x")})),
        msgpack.packb(good_row(fields={1: 2})),
        msgpack.packb(good_row(fields=[])),
        msgpack.packb(good_row(image="text")),
        msgpack.packb(good_row(specific=True)),
        msgpack.packb(good_row(specific=2)),
        msgpack.packb(good_row(specific=-1)),
        msgpack.packb(good_row(captions="a")),
        msgpack.packb(good_row(captions=[b"a"])),
        msgpack.packb(good_row(captions=[" "])),
        msgpack.packb(good_row(captions=[], kinds=[], specific=0)),
        msgpack.packb(good_row(kinds=[])),
    ],
)
def test_anything_but_a_record_is_a_bad_sample(data):
    assert decode_row(msgpack.packb(good_row())) == good_row()
    with pytest.raises(BadSample) as caught:
        decode_row(data)
    assert caught.value.reason == "bad_metadata"


def test_damaged_records_never_raise_anything_else(rng):
    reasons = set()
    for _ in range(3000):
        data = bytearray(encode_record(random_record(rng))[:400])
        for _ in range(rng.randint(0, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            decode_row(bytes(data))
        except BadSample as error:
            reasons.add(error.reason)
    assert reasons == {"bad_metadata"}


def test_a_damaged_spot_costs_its_own_record_only(tmp_path, rng):
    rows = [encode_record(random_record(rng, number)) for number in range(40)]
    file = store(tmp_path / "a.array_record", rows)
    path = tmp_path / "a.array_record"
    content = bytearray(path.read_bytes())
    damaged = rng.randrange(40)
    content[content.index(rows[damaged][-200:]) + 100] ^= 0xFF
    path.write_bytes(content)
    source = ArrayRecordSource(ArrayRecordRows([file]))
    for index in range(40):
        if index != damaged:
            assert encode_record(source[index]) == rows[index]
    with pytest.raises(BadSample, match=rf"a.array_record, record {damaged}: .*hash mismatch") as caught:
        source[damaged]
    assert caught.value.reason == "unreadable"


def test_files_that_are_no_array_record_are_refused_at_the_start(tmp_path, rng):
    whole = tmp_path / "whole"
    store(whole, [rng.randbytes(1000) for _ in range(200)])
    bad = {
        "empty": b"",
        "short": whole.read_bytes()[:1000],
        "cut": whole.read_bytes()[:-1],
        "half": whole.read_bytes()[: whole.stat().st_size // 2],
        "noise": rng.randbytes(200_000),
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        if name == "cut":
            continue  # the last byte is padding
        with pytest.raises(ConfigError, match=f"{name}: cannot be read as ArrayRecord"):
            ArrayRecordRows([stored(tmp_path / name)])
    with pytest.raises(ConfigError, match=r"missing: cannot be read as ArrayRecord.*No such file"):
        ArrayRecordRows([StoredFile(str(tmp_path / "missing"), 5, "")])


def test_a_shard_lost_after_the_start_gives_bad_samples(tmp_path, rng):
    path = tmp_path / "a.array_record"
    rows = ArrayRecordRows([store(path, [encode_record(random_record(rng)) for _ in range(5)])])
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(BadSample) as caught:
        rows[3]
    assert caught.value.reason == "unreadable"
    path.unlink()
    with pytest.raises(BadSample, match="No such file"):
        rows[3]


def test_other_records_are_told_from_ours(tmp_path):
    rows = ArrayRecordRows([store(tmp_path / "a", [b"\x0a\x05hello"])])
    with pytest.raises(BadSample, match="a, record 0: not a record of llip_jax"):
        rows[0]


def test_remote_shards_are_refused_with_the_remedy():
    with pytest.raises(ConfigError, match=r"'gs://bucket/a' is not a local file.*; mount the bucket"):
        ArrayRecordRows([StoredFile("gs://bucket/a", 5, "")])


def test_with_a_manifest_no_shard_is_opened_at_the_start(tmp_path, rng, monkeypatch):
    files = [store(tmp_path / f"{n}.array_record", [encode_record(random_record(rng))] * n) for n in (3, 4)]
    opened = ArrayRecordRows(files)
    shards = {f.name: Shard(samples=n, bytes=f.size, sha256=f"{n}" * 64) for n, f in zip((3, 4), files, strict=True)}
    (tmp_path / "shards.json").write_bytes(dump_manifest(shards))
    monkeypatch.setattr(array_records, "_open", None)
    rows = ArrayRecordRows(files)
    assert len(rows) == len(opened) == 7
    assert rows.identity() == {
        f.name: f"{n} samples, {f.size} bytes, sha256 {str(n) * 16}" for n, f in zip((3, 4), files, strict=True)
    }


def test_a_manifest_that_does_not_fit_is_not_believed(tmp_path, rng):
    file = store(tmp_path / "a.array_record", [encode_record(random_record(rng))] * 3)
    manifest = tmp_path / "shards.json"
    manifest.write_bytes(dump_manifest({file.name: Shard(samples=99, bytes=file.size + 1, sha256="0" * 64)}))
    assert len(ArrayRecordRows([file])) == 3
    for content in ("{", "[]", json.dumps({file.name: {"samples": "many", "bytes": 3, "sha256": ""}})):
        manifest.write_text(content)
        with pytest.raises(ConfigError, match=r"shards.json: not a manifest"):
            ArrayRecordRows([file])


def test_identity_changes_with_the_data_and_not_with_the_place(tmp_path, rng):
    rows = [encode_record(random_record(rng)) for _ in range(5)]
    identities = []
    for folder, content in (("a", rows), ("b", rows), ("c", [*rows[:4], rows[4][:-1] + b"\xff"])):
        (tmp_path / folder).mkdir()
        identities.append(ArrayRecordRows([store(tmp_path / folder / "x.array_record", content)]).identity())
    assert identities[0] == identities[1] != identities[2]
    assert identities[0]["x.array_record"].startswith("5 samples, ")


def test_few_shards_are_open_at_once(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(array_records, "_READERS_KEPT", 10)
    records = [random_record(rng, number) for number in range(80)]
    files = [store(tmp_path / f"{number:03}", [encode_record(record)]) for number, record in enumerate(records)]
    before = len(os.listdir("/proc/self/fd"))
    source = ArrayRecordSource(ArrayRecordRows(files))
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    order = [rng.randrange(80) for _ in range(500)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.__getitem__, order)) == [records[i] for i in order]
    assert len(os.listdir("/proc/self/fd")) <= before + 10


def test_shards_are_written_for_random_access(tmp_path):
    store(tmp_path / "a", [b"x"])
    assert "group_size:1," in ArrayRecordReader(str(tmp_path / "a")).writer_options_string()
