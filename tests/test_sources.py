"""Every format gives the same records, and batches that depend on nothing but seed and position."""

import dataclasses
import errno
import multiprocessing
import pickle
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_formats import SIZE, data_configs, samples, write_parquet, write_tars
from test_pipeline import assert_equal

from llip_jax.config import (
    AugmentConfig,
    CaptionConfig,
    CaptionRules,
    ConfigError,
    DataConfig,
    FieldsConfig,
    PartConfig,
    TfdsConfig,
)
from llip_jax.data.formats.parquet import ParquetRows
from llip_jax.data.images import resize_for_eval
from llip_jax.data.order import SampleOrder, epochs, interleave
from llip_jax.data.pipeline import train_batches
from llip_jax.data.records import BadSample, fingerprint
from llip_jax.data.sources import HeldOut, Mixture, build_source
from llip_jax.data.tokenizers import ClipTokenizer

FORMATS = ("toyworld", "folder", "csv", "tsv", "webdataset", "huggingface", "img2dataset", "array_record", "tfds")
STEPS, BATCH = 9, 8
FIRST_CAPTIONS_ONLY = ("csv", "tsv")
NO_LABELS = ("csv", "tsv", "img2dataset", "webdataset")


def config_of(name):
    """With everything random turned on."""
    augment = AugmentConfig(crop_scale=(0.5, 1.0), flip=True, color=0.2)
    config = data_configs()[name]
    return DataConfig(
        **{field: getattr(config, field) for field in vars(config) if not field.startswith("_")}
        | {"augment": augment, "captions": CaptionConfig(slots=2)}
    )


def batches(config, start=0, stop=STEPS, process=0, processes=1):
    iterator = train_batches(
        build_source(config, "train", 16),
        ClipTokenizer(),
        config,
        image_size=16,
        text_length=10,
        seed=3,
        batch_size=BATCH,
        start_step=start,
        stop_step=stop,
        process_index=process,
        process_count=processes,
    )
    result = list(iterator)
    iterator.close()
    return result


def joined(config, processes, start=0, stop=STEPS):
    """Global batches out of those of several processes."""
    parts = [batches(config, start, stop, process, processes) for process in range(processes)]
    return [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]} for step in zip(*parts, strict=True)
    ]


@pytest.mark.parametrize("name", FORMATS[1:])
def test_every_format_gives_the_same_records(name):
    config = data_configs()[name]
    train, held_out = (build_source(config, split, 16) for split in ("train", "eval"))
    if name == "tfds":  # which shuffles what it writes, and has splits of its own
        assert len(train) == SIZE and len(held_out) == 7
        of = {record.captions[0]: record for record in (train[i] for i in range(SIZE))}
        records = [of[sample.captions[0]] for sample in samples()]
    elif name in ("folder", "csv", "tsv"):
        records = [train[i] for i in range(SIZE)]
    else:
        assert len(held_out) == 5 and len(train) == SIZE - 5
        left = iter([train[i] for i in range(len(train))])
        records = [held_out[i // 10] if i % 10 == 0 else next(left) for i in range(SIZE)]
    for record, sample in zip(records, samples(), strict=True):
        assert record.image == sample.image
        assert record.captions == (sample.captions[:1] if name in FIRST_CAPTIONS_ONLY else sample.captions)
        assert len(record.kinds) == len(record.captions) == record.specific
        if name not in NO_LABELS:
            assert record.fields["label"] == sample.label


@pytest.mark.parametrize("name", [*FORMATS, "mixture"])
def test_batches_are_the_same_on_any_number_of_hosts_and_from_any_step(name):
    config = config_of(name)
    whole = batches(config)
    assert len({batch["image"].tobytes() for batch in whole}) == STEPS
    for processes in (2, 4):
        assert_equal(joined(config, processes), whole)
    for start in range(1, STEPS):
        assert_equal(batches(config, start), whole[start:])
    # Two hosts stop at step 4; four go on.
    assert_equal(joined(config, 2, stop=4) + joined(config, 4, start=4), whole)


def test_four_real_processes_share_the_global_batches_and_two_of_them_began():
    config = config_of("mixture")
    parts = [(config, 0, 4, process, 2) for process in range(2)] + [
        (config, 4, STEPS, process, 4) for process in range(4)
    ]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        made = pool.starmap(batches, parts)
    found = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for hosts in (made[:2], made[2:])
        for step in zip(*hosts, strict=True)
    ]
    assert_equal(found, batches(config))


@pytest.mark.parametrize("name", ["webdataset", "huggingface", "array_record", "tfds", "mixture"])
def test_sources_go_to_worker_processes(name):
    source = build_source(data_configs()[name], "train", 16)
    expected = [source[i].captions for i in range(len(source))]
    again = pickle.loads(pickle.dumps(source))
    assert [again[i].captions for i in range(len(again))] == expected
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_captions, (source,)) == expected


def _captions(source):
    return [source[i].captions for i in range(len(source))]


def test_workers_read_the_mixture_as_threads_do():
    config = config_of("mixture")
    workers = DataConfig(
        mixture=config.mixture, index_dir=config.index_dir, augment=config.augment, captions=config.captions, workers=2
    )
    assert_equal(batches(workers, stop=4), batches(config, stop=4))


def test_images_of_a_batch_are_those_of_its_sample_ids():
    config = DataConfig(
        mixture=config_of("mixture").mixture,
        index_dir=data_configs()["mixture"].index_dir,
        augment=AugmentConfig(crop_scale=(1.0, 1.0)),
    )
    source = build_source(config, "train", 16)
    seen = Counter()
    for batch in batches(config):
        for row, index in enumerate(batch["sample_id"]):
            record = source[int(index)]
            if not isinstance(record.image, bytes):
                np.testing.assert_array_equal(batch["image"][row], resize_for_eval(record.image, 16))
            assert record.captions[batch["caption_source"][row, 0]]
            seen[record.name.split("/")[0]] += 1
    assert len(seen) >= 3


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.5, 0.5), (0.013, 1.0, 7.77, 2.0)])
def test_shares_of_a_mixture(weights):
    order = SampleOrder(tuple("abcd"[: len(weights)]), (50, 1000, 7, 10**9)[: len(weights)], weights, seed=5)
    for start in (0, 10**12 + 7):
        positions = [order[start + i] for i in range(20_000)]
        counts = np.bincount([source for source, _ in positions], minlength=len(weights))
        shares = np.array(weights) / sum(weights)
        # Far better than the three standard deviations of independent draws.
        assert (np.abs(counts - 20_000 * shares) <= len(weights)).all()
        assert (np.abs(counts - 20_000 * shares) <= 3 * np.sqrt(20_000 * shares * (1 - shares))).all()
        # Evenly spread: in every short stretch too.
        for first in range(0, 2000, 37):
            stretch = np.bincount([source for source, _ in positions[first : first + 100]], minlength=len(weights))
            assert (np.abs(stretch - 100 * shares) <= len(weights)).all()


def test_each_part_of_a_mixture_is_visited_in_epochs_of_its_own():
    order = SampleOrder(("a", "b"), (20, 9), (2.0, 1.0), seed=1)
    visits = {0: [], 1: []}
    for position in range(600):
        source, index = order[position]
        visits[source].append(index)
    for source, size in enumerate((20, 9)):
        visited = np.array(visits[source][: len(visits[source]) // size * size]).reshape(-1, size)
        assert (np.sort(visited, 1) == np.arange(size)).all() and len({tuple(epoch) for epoch in visited}) == len(
            visited
        )
    alone = SampleOrder(("b", "c"), (9, 5), (1.0, 1.0), seed=1)
    first = [alone[p][1] for p in range(200) if alone[p][0] == 0]
    assert visits[1][: len(first)] == first[: len(visits[1])]


def test_parts_of_equal_size_are_not_visited_in_step():
    order = SampleOrder(("a", "b"), (40, 40), (1.0, 1.0), seed=1)
    visits = [order[position] for position in range(80)]
    assert [index for source, index in visits if source == 0] != [index for source, index in visits if source == 1]


@pytest.mark.parametrize("size", [1, 2, 2**16 - 1, 2**16, 2**16 + 1, 2**16 + 2, 2**17 + 1])
def test_small_and_large_sources_are_permuted(size):
    order = epochs(size, seed=9)
    first, second = ([order[epoch * size + i] for i in range(size)] for epoch in (0, 7))
    assert sorted(first) == sorted(second) == list(range(size))
    assert size < 3 or first != second


def test_holding_out_other_samples_is_other_data():
    config = data_configs()["webdataset"]
    whole = DataConfig(source="webdataset", path=config.path, eval_path=config.path, index_dir=config.index_dir)
    held = DataConfig(source="webdataset", path=config.path, index_dir=config.index_dir)
    before, after = (build_source(c, "train", 16).identity() for c in (held, whole))
    assert fingerprint(before) != fingerprint(after) and before["held out"] == "every 10-th, train split"


def test_kinds_that_no_caption_has_are_refused():
    config = data_configs()["webdataset"]
    for rules, setting in (
        (CaptionConfig(first="json.captoin"), "first"),
        (CaptionConfig(weights={"json.captoin": 1.0}), "weights"),
        (CaptionConfig(sentences={"json.captoin": (1, 2)}), "sentences"),
    ):
        with pytest.raises(
            ConfigError, match=f"data.captions.{setting}: .*'json.captoin'. Did you mean 'json.caption'"
        ):
            build_source(dataclasses.replace(config, captions=rules), "train", 16)


def test_kinds_that_no_part_of_a_mixture_has_are_refused():
    config = data_configs()["mixture"]
    assert build_source(dataclasses.replace(config, captions=CaptionConfig(first="json.caption")), "train", 16)
    rules = CaptionConfig(weights={"json.captoin": 1.0})
    with pytest.raises(ConfigError, match=r"data.captions.weights: .*'json.captoin'. Did you mean 'json.caption'"):
        build_source(dataclasses.replace(config, captions=rules), "train", 16)


def test_failures_of_the_storage_are_not_the_samples_fault(tmp_path, monkeypatch):
    source = build_source(DataConfig(source="parquet", path=write_parquet(tmp_path, "huggingface")), "train", 16)

    def fails(*_):
        raise OSError(errno.EIO, "the network is down")

    monkeypatch.setattr(ParquetRows, "_open", fails)
    with pytest.raises(OSError, match="the network is down"):
        source[len(source) - 1]  # of a row group that has not been read


def test_damaged_tfds_records_are_bad_samples(tmp_path):
    config = data_configs()["tfds"]
    shutil.copytree(config.tfds.data_dir, tmp_path / "tfds")
    (shard,) = (tmp_path / "tfds").rglob("*train*array_record*")
    data = bytearray(shard.read_bytes())
    for place in range(len(data) // 3, len(data) // 2, 400):
        data[place] ^= 0xFF
    shard.write_bytes(data)
    source = build_source(dataclasses.replace(config, tfds=TfdsConfig(data_dir=str(tmp_path / "tfds"))), "train", 16)
    outcomes = Counter()
    for index in range(len(source)):
        try:
            outcomes[bool(source[index].captions)] += 1
        except BadSample as error:
            outcomes[error.reason] += 1
    assert outcomes.total() == SIZE and outcomes["unreadable"] > 0


def test_columns_of_parquet_that_python_cannot_hold_do_no_harm(tmp_path):
    chosen = samples()[:12]
    odd = {
        "t": pa.array([2**62] * 12, pa.timestamp("us")),
        "d": pa.array([2**30] * 12, pa.date32()),
        "z": pa.array([0] * 12, pa.timestamp("s", tz="Mars/X")),
        "bytes": pa.array([b"\xff"] * 12).cast(pa.binary()).view(pa.string()),
        "json": pa.array([None] * 12, pa.string()),
    }
    texts = pa.array([b"fine"] * 11 + [b"\xff\xfe"]).view(pa.string())
    pq.write_table(pa.table({"jpg": [s.image for s in chosen], "caption": texts, **odd}), tmp_path / "a.parquet")
    source = build_source(DataConfig(source="parquet", path=str(tmp_path), eval_path=str(tmp_path)), "train", 16)
    assert [source[i].captions for i in range(11)] == [("fine",)] * 11
    with pytest.raises(BadSample) as caught:
        source[11]
    assert caught.value.reason == "caption_not_utf8"


def test_splits_of_tfds_may_be_added():
    config = data_configs()["tfds"]
    both = TfdsConfig(data_dir=config.tfds.data_dir, train_split="train[:10]+validation")
    assert len(build_source(dataclasses.replace(config, tfds=both), "train", 16)) == 17


def test_interleaving_counts_what_came_before():
    rng = np.random.default_rng(0)
    for _ in range(20):
        shares = [int(n) for n in rng.integers(1, 50, rng.integers(1, 6))]
        counts = Counter()
        for position in range(500):
            source, before = interleave(position, shares)
            assert before == counts[source]
            counts[source] += 1


def test_caption_rules_of_a_part_override_the_common_ones():
    parts = dict(config_of("mixture").mixture)
    rules = CaptionRules(sentences={"caption": (1, 1)})
    parts["table"] = PartConfig(**(vars(parts["table"]) | {"captions": rules}))
    source = build_source(DataConfig(mixture=parts, index_dir=config_of("mixture").index_dir), "train", 16)
    assert {part.name: part.rules for part in source.parts} == {
        "table": rules,
        "tars": CaptionConfig(),
        "toys": CaptionConfig(),
    }


def test_files_of_several_splits_are_refused(tmp_path):
    write_parquet(tmp_path, "huggingface")
    (tmp_path / "0.parquet").rename(tmp_path / "train-00000-of-00001.parquet")
    (tmp_path / "1.parquet").rename(tmp_path / "validation-00000-of-00001.parquet")
    (tmp_path / "stats.json").write_text("{}")
    for path in (tmp_path, tmp_path / "*", tmp_path / "*.parquet"):
        config = DataConfig(source="parquet", path=str(path))
        with pytest.raises(
            ConfigError, match=r"several splits \(train-.*, validation-.*\); name those .* data.eval_path"
        ):
            build_source(config, "train", 16)
    train, held_out = f"{tmp_path}/train-*", f"{tmp_path}/validation-*"
    config = DataConfig(source="parquet", path=train, eval_path=held_out)
    assert [len(build_source(config, split, 16)) for split in ("train", "eval")] == [20, 25]
    with pytest.raises(ConfigError, match=r"names no .tar file but 'train-.*'; expected another data.source"):
        build_source(DataConfig(source="webdataset", path=train, index_dir=str(tmp_path)), "train", 16)


def test_parts_of_no_weight_are_left_out():
    config = data_configs()["mixture"]
    parts = {
        name: dataclasses.replace(part, weight=0.0 if name == "toys" else 1.0) for name, part in config.mixture.items()
    }
    source = build_source(dataclasses.replace(config, mixture=parts), "train", 16)
    assert [part.name for part in source.parts] == ["table", "tars"]
    assert source.summary() == "80 samples (table: 40, drawn with 0.5; tars: 40, drawn with 0.5)"
    misspelled = config.mixture | {"tarz": PartConfig(weight=2.0)}
    with pytest.raises(ConfigError, match=r"data.mixture.tarz: has no path. .*Did you mean 'tars'"):
        build_source(dataclasses.replace(config, mixture=misspelled), "train", 16)


def test_held_out_samples_are_the_rest():
    class Numbers:
        def __init__(self, size):
            self.size = size

        def __len__(self):
            return self.size

        def __getitem__(self, index):
            assert 0 <= index < self.size
            return index

    for size in (1, 2, 9, 10, 11, 100, 1234):
        for wanted in (1, 7, 100, 5000):
            split = {name: HeldOut(Numbers(size), wanted, name) for name in ("train", "eval")}
            found = {name: [part[i] for i in range(len(part))] for name, part in split.items()}
            assert sorted(found["train"] + found["eval"]) == list(range(size))
            assert 1 <= len(found["eval"]) <= max(1, min(wanted, -(-size // 10)))
            assert len(set(np.diff(found["eval"]))) <= 1


def test_identity_names_what_changed(tmp_path):
    config = DataConfig(source="webdataset", path=write_tars(tmp_path / "a"), index_dir=str(tmp_path / "index"))

    def identity():
        return build_source(config, "train", 16).identity()

    before = identity()
    assert identity() == before and list(before) == ["00000.tar", "00001.tar", "00002.tar", "held out"]
    # Elsewhere it is the same data.
    moved = DataConfig(source="webdataset", path=write_tars(tmp_path / "b"), index_dir=str(tmp_path / "index"))
    assert build_source(moved, "train", 16).identity() == before
    write_tars(tmp_path / "a", samples()[:-1])
    after = identity()
    assert fingerprint(after) != fingerprint(before)
    assert [name for name in after if after[name] != before[name]] == ["00002.tar"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "webdataset"}, "data.path: is empty, expected tar shards, such as"),
        ({"source": "webdataset", "path": "/nowhere/{0..3}.tar"}, "data.path: there is no file"),
        (
            {"source": "tfds", "path": "tiny_caption"},
            "data.path: 'tiny_caption' is not in .*, nor is there code for it",
        ),
        ({"source": "tfds", "path": "tiny_captions", "split": "trian"}, "has no split 'trian'. Did you mean 'train'?"),
        (
            {"source": "tfds", "path": "coco_captions"},
            "Once, with tensorflow installed .*: tfds build coco_captions --file_format=array_record --data_dir=",
        ),
        (
            {"source": "parquet", "path": "{tars}"},
            "names no .parquet file but '00000.tar'; expected another data.source",
        ),
        (
            {"source": "webdataset", "path": "{tars}", "captions": ("text",)},
            "data.fields.captions: none of the first samples has a column 'text'; they have: .*json.caption.*txt",
        ),
        (
            {"source": "webdataset", "path": "{tars}", "image": ("bmp",)},
            "data.fields.image: none of the first samples has a column 'bmp'; they have: .*jpg",
        ),
        ({"mixture": "{tars}x"}, "data.mixture.web.path: there is no file"),
    ],
)
def test_mistakes_are_told(tmp_path, fields, message):
    tars = str(data_configs()["webdataset"].path)
    path = fields.get("path", "").replace("{tars}", tars)
    data_dir = data_configs()["tfds"].tfds.data_dir
    columns = FieldsConfig(image=fields.get("image", ()), captions=fields.get("captions", ()))
    mixture = (
        {"web": PartConfig(source="webdataset", path=fields["mixture"].replace("{tars}", tars))}
        if "mixture" in fields
        else {}
    )
    config = DataConfig(
        source=fields.get("source", "folder"),
        path=path,
        fields=columns,
        mixture=mixture,
        tfds=TfdsConfig(data_dir=data_dir, train_split=fields.get("split", "train")),
        index_dir=str(tmp_path),
    )
    with pytest.raises(ConfigError, match=message):
        build_source(config, "train", 16)


def test_large_row_groups_are_told(tmp_path, caplog, monkeypatch):
    path = write_parquet(tmp_path, "huggingface")
    build_source(DataConfig(source="parquet", path=path), "train", 16)
    assert not caplog.text
    monkeypatch.setattr("llip_jax.data.formats.parquet._LARGE_ROW_GROUP", 1000)
    build_source(DataConfig(source="parquet", path=path), "train", 16)
    assert "every sample reads a whole one" in caplog.text


def test_a_single_source_is_a_mixture_of_one():
    source = build_source(data_configs()["folder"], "train", 16)
    assert isinstance(source, Mixture) and len(source.parts) == 1
    assert list(source.identity()) == ["captions.jsonl train"]
