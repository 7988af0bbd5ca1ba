"""The training order, batches under any division of the work, replacement of bad images, evaluation, builders."""

import dataclasses
import errno
import io
import itertools
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from PIL import Image
from run_helpers import ROOT

from llip_jax.config import (
    AugmentConfig,
    CaptionConfig,
    ConfigError,
    DataConfig,
    LimitsConfig,
    TokenizerConfig,
    ToyWorldConfig,
)
from llip_jax.data import pipeline
from llip_jax.data.captions import choose_captions, generator
from llip_jax.data.images import resize_for_eval, training_view
from llip_jax.data.order import epochs
from llip_jax.data.pipeline import RateLimit, build_tokenizer, eval_blocks, group_hash, read_patiently, train_batches
from llip_jax.data.records import REASONS, Record
from llip_jax.data.sources import Mixture, Part, build_source
from llip_jax.data.tokenizers import ClipTokenizer

CONFIG = DataConfig(
    augment=AugmentConfig(crop_scale=(0.5, 1.0), flip=True, color=0.2),
    captions=CaptionConfig(slots=3, specific_probability=0.7),
    threads=2,
)
SIZE, LENGTH = 8, 12


@dataclass(frozen=True)
class PictureSource:
    """Random pictures: even samples encoded, odd ones as pixels; those in ``damaged`` cannot be decoded, and those in
    ``missing`` cannot be read."""

    size: int = 23
    damaged: frozenset[int] = field(default_factory=frozenset)
    missing: frozenset[int] = field(default_factory=frozenset)

    def __len__(self):
        return self.size

    def pixels(self, index):
        return np.random.default_rng(index).integers(0, 256, (10, 12, 3), np.uint8)

    def __getitem__(self, index):
        if index in self.missing:
            raise FileNotFoundError(f"no file for sample {index}")
        image = self.pixels(index)
        if index % 2 == 0 or index in self.damaged:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            image = buffer.getvalue()
            image = image[: len(image) // 2] if index in self.damaged else image
        captions = tuple(f"Picture {index} caption {i}" for i in range(1 + index % 5))
        kinds = tuple("ab"[i % 2] for i in range(len(captions)))
        return Record(image, captions, kinds, (len(captions) + 1) // 2, f"group {index // 2}", f"picture {index}")

    def identity(self):
        return {"pictures": str(self.size)}


def single(source, config=CONFIG):
    return Mixture((Part("", source, 1.0, config.captions),))


def batches(source=None, config=CONFIG, *, start=0, stop=9, batch_size=8, seed=4, **processes):
    iterator = train_batches(
        source if isinstance(source, Mixture) else single(source or PictureSource(), config),
        ClipTokenizer(),
        config,
        image_size=SIZE,
        text_length=LENGTH,
        seed=seed,
        batch_size=batch_size,
        start_step=start,
        stop_step=stop,
        **processes,
    )
    result = list(iterator)
    iterator.close()
    return result


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_order_visits_every_sample_once_an_epoch(size):
    order = epochs(size, seed=5)
    visits = [[order[epoch * size + i] for i in range(size)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(size)) for epoch in visits)
    if size > 7:
        others = [[epochs(size, seed)[i] for i in range(size)] for seed in (4, 6)]
        assert len({tuple(epoch) for epoch in visits + others}) == 6


def test_neighbouring_seeds_share_no_epoch():
    visits = {tuple(epochs(50, seed)[50 * epoch + i] for i in range(50)) for seed in range(4) for epoch in range(4)}
    assert len(visits) == 16


def test_order_far_ahead():
    order = epochs(1000, seed=0)
    start = 10**9
    assert sorted(order[start + i] for i in range(1000)) == list(range(1000))


def test_batches_visit_every_sample_once_an_epoch():
    ids = np.concatenate([batch["sample_id"] for batch in batches(stop=23)])
    for epoch in ids.reshape(8, 23):
        assert sorted(epoch) == list(range(23))


def test_shapes_and_types():
    for batch in batches(batch_size=6, stop=2):
        shapes = {key: (value.shape, value.dtype.name) for key, value in batch.items()}
        assert shapes == {
            "image": ((6, SIZE, SIZE, 3), "uint8"),
            "text": ((6, 3, LENGTH), "int32"),
            "text_mask": ((6, 3, LENGTH), "int32"),
            "caption_weight": ((6, 3), "float32"),
            "caption_source": ((6, 3), "int32"),
            "image_group": ((6,), "int32"),
            "text_group": ((6, 3), "int32"),
            "sample_id": ((6,), "int64"),
            "replaced": ((6,), "int32"),
        }


def test_rows_from_their_parts():
    source, tokenizer, seed = PictureSource(), ClipTokenizer(), 4
    order = epochs(len(source), seed)
    for step, batch in enumerate(batches(source, seed=seed, stop=6)):
        for row in range(8):
            position = step * 8 + row
            index = order[position]
            record = source[index]
            assert batch["sample_id"][row] == index and batch["replaced"][row] == 0
            image = source[index].image
            view = training_view(image, SIZE, CONFIG.augment, generator(seed, "augment", position))
            np.testing.assert_array_equal(batch["image"][row], view)
            choices = choose_captions(
                record.captions, record.kinds, record.specific, CONFIG.captions, 3, seed, position
            )
            chosen = [choice.caption for choice in choices]
            filled = min(3, len(record.captions))
            assert len(chosen) == filled
            assert batch["caption_source"][row].tolist() == [*chosen, *[-1] * (3 - filled)]
            assert batch["caption_weight"][row] == pytest.approx([1 / filled] * filled + [0] * (3 - filled))
            texts, mask = tokenizer.encode([record.captions[i] for i in chosen], LENGTH)
            np.testing.assert_array_equal(batch["text"][row, :filled], texts)
            np.testing.assert_array_equal(batch["text_mask"][row, :filled], mask)
            assert not batch["text"][row, filled:].any() and not batch["text_mask"][row, filled:].any()
            assert batch["image_group"][row] == group_hash(record.image_group)
            groups = [group_hash(record.captions[i].lower()) for i in chosen]
            assert batch["text_group"][row].tolist() == [*groups, *[-1] * (3 - filled)]


def test_groups():
    seen = {}
    for batch in batches(stop=12):
        for index, group in zip(batch["sample_id"], batch["image_group"], strict=True):
            assert seen.setdefault(int(index), int(group)) == group
    assert len(seen) == 23 and len(set(seen.values())) == 12
    assert all((seen[a] == seen[b]) == (a // 2 == b // 2) for a, b in itertools.combinations(seen, 2))
    hashes = [group_hash(f"text {i}") for i in range(5000)]
    assert len(set(hashes)) == 5000 and min(hashes) >= 0 and 2**30 < max(hashes) < 2**31
    # The same in another process, whatever its PYTHONHASHSEED.
    code = "from llip_jax.data.pipeline import group_hash; print(group_hash('text 7'))"
    assert int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) == hashes[7]


def test_equal_captions_share_a_group():
    class One(PictureSource):
        def __getitem__(self, index):
            return dataclasses.replace(
                super().__getitem__(index), captions=("A red  cat ", "a RED cat", "a cat"), kinds=("a", "a", "a")
            )

    for batch in batches(One()):
        for sources, groups in zip(batch["caption_source"], batch["text_group"], strict=True):
            of = dict(zip(sources.tolist(), groups.tolist(), strict=True))
            assert of[0] == of[1] != of[2]


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_global_batch(count):
    whole = batches()
    parts = [batches(process_index=index, process_count=count) for index in range(count)]
    joined = [
        {key: np.concatenate([part[key] for part in step]) for key in step[0]} for step in zip(*parts, strict=True)
    ]
    assert_equal(joined, whole)


def test_restart_at_any_step():
    whole = batches()
    for start in range(10):
        assert_equal(batches(start=start), whole[start:])


def test_seeds_differ():
    left, right = batches(seed=4)[0], batches(seed=5)[0]
    assert not np.array_equal(left["sample_id"], right["sample_id"])


def test_threads_and_workers_give_the_same():
    expected = batches(config=DataConfig(augment=CONFIG.augment, captions=CONFIG.captions, threads=1))
    threads = DataConfig(augment=CONFIG.augment, captions=CONFIG.captions, threads=4, prefetch_batches=3)
    assert_equal(batches(config=threads), expected)
    workers = DataConfig(augment=CONFIG.augment, captions=CONFIG.captions, threads=2, workers=2)
    assert_equal(batches(config=workers), expected)


def test_unreadable_samples_are_replaced_by_the_next(caplog):
    source = PictureSource(damaged=frozenset({3, 4, 22}), missing=frozenset({5, 10}))
    stands_in = {3: 6, 4: 6, 5: 6, 10: 11, 22: 0}
    order = epochs(23, seed=4)
    clean = batches(stop=23)
    counts = Counter()
    for step, (batch, original) in enumerate(zip(batches(source, stop=23), clean, strict=True)):
        for row in range(8):
            planned = order[step * 8 + row]
            assert batch["sample_id"][row] == stands_in.get(planned, planned)
            reason = "unreadable" if planned in source.missing else "truncated_image"
            assert batch["replaced"][row] == (1 + REASONS.index(reason) if planned in stands_in else 0)
            counts[planned] += batch["replaced"][row] > 0
            if planned not in stands_in:
                for key in batch:
                    np.testing.assert_array_equal(batch[key][row], original[key][row])
            else:
                assert batch["image_group"][row] == group_hash(f"group {stands_in[planned] // 2}")
    assert {index: count for index, count in counts.items() if count} == dict.fromkeys(stands_in, 8)
    assert "sample 3 is replaced by the next one: truncated_image: picture 3: cannot decode image: " in caplog.text
    assert "sample 10 is replaced by the next one: unreadable: no file for sample 10" in caplog.text


def test_bad_samples_are_told_at_a_bounded_rate(caplog):
    source = PictureSource(size=300, missing=frozenset(range(0, 300, 2)))
    batches(source, stop=20)
    assert len(caplog.records) == 10
    times = (1.0, 2.0, 3.0, 61.0, 62.5, 63.0, 70.0, 123.0)
    limit = RateLimit(2, 60.0, iter(times).__next__)
    assert [limit.admit() for _ in times] == [0, 0, None, None, 2, None, None, 2]


def test_passing_failures_are_waited_out():
    class Flaky(PictureSource):
        failures = 2

        def __getitem__(self, index):
            if self.failures:
                object.__setattr__(self, "failures", self.failures - 1)
                raise OSError(errno.EIO, "the network is down")
            return super().__getitem__(index)

    slept = []
    assert read_patiently(Flaky(), 3, slept.append).name == "picture 3"
    assert slept == [0.1, 1.0]
    with pytest.raises(FileNotFoundError):
        read_patiently(PictureSource(missing=frozenset({3})), 3, slept.append)
    source = Flaky()
    object.__setattr__(source, "failures", 9)
    with pytest.raises(OSError, match="the network is down"):
        read_patiently(source, 3, slept.append)
    assert slept == [0.1, 1.0, 0.1, 1.0, 10.0]


def test_groups_of_half_characters():
    assert group_hash("\ud800") != group_hash("\ud801")


def test_long_captions_are_cut():
    class Long(PictureSource):
        def __getitem__(self, index):
            record = super().__getitem__(index)
            return dataclasses.replace(record, captions=("x" * 50_000,), kinds=("a",), specific=1)

    config = dataclasses.replace(CONFIG, limits=LimitsConfig(caption_characters=6))
    (batch,) = batches(Long(), config, stop=1)
    expected = ClipTokenizer().encode(["xxxxxx"], LENGTH)[0]
    assert (batch["text"][:, 0] == expected).all()


def test_unreadable_without_end():
    source = PictureSource(size=150, missing=frozenset(range(20, 121)))
    order = epochs(150, seed=4)
    step = next(g for g in itertools.count() if order[g] == 20)
    message = "100 samples in a row, from sample 20 on, cannot be used; the last one: no file for sample 119"
    with pytest.raises(ConfigError, match=message):
        batches(source, batch_size=1, start=step, stop=step + 1)
    fits = PictureSource(size=150, missing=frozenset(range(20, 120)) - {20})
    (batch,) = batches(PictureSource(150, missing=frozenset(range(21, 120))), batch_size=1, start=step, stop=step + 1)
    assert batch["sample_id"] == [20]
    step = next(g for g in itertools.count() if order[g] == 21)
    (batch,) = batches(fits, batch_size=1, start=step, stop=step + 1)
    assert batch["sample_id"] == [120] and batch["replaced"] == [1 + REASONS.index("unreadable")]


def test_other_errors_are_not_hidden():
    class Broken(PictureSource):
        def __getitem__(self, index):
            raise KeyError("a defect of the source")

    with pytest.raises(KeyError, match="a defect of the source"):
        batches(Broken())


def test_batch_size_and_processes():
    with pytest.raises(ConfigError, match=r"train.batch_size: 9 is not a multiple of the 2 processes"):
        batches(batch_size=9, process_count=2)


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 2, 12, 23, 24, 25])
def test_processes_share_the_evaluation_blocks(size, processes):
    """Every sample once, in order, whatever the number of processes; the rest is padding."""
    source = PictureSource(size, damaged=frozenset({0, 9} - {size - 1}), missing=frozenset({1, 22} - {size - 1}))
    usable = [i for i in range(size) if i == size - 1 or i not in (0, 1, 9, 22)]
    expected = np.zeros((-(-size // 12), 12, SIZE, SIZE, 3), np.uint8)
    for i in usable:
        expected[divmod(i, 12)] = resize_for_eval(source.pixels(i), SIZE)
    parts = [list(eval_blocks(source, SIZE, 12, 3, LimitsConfig(), process, processes)) for process in range(processes)]
    images, seen = (
        np.stack(
            [np.concatenate(rows) for rows in zip(*([block[column] for block in part] for part in parts), strict=True)]
        )
        for column in (0, 1)
    )
    assert images.dtype == np.uint8 and seen.dtype == bool
    assert np.flatnonzero(seen).tolist() == usable
    np.testing.assert_array_equal(images, expected)


def test_evaluation_blocks_of_uneven_shares_are_refused():
    assert list(eval_blocks(PictureSource(0), SIZE, 4, 1)) == []
    with pytest.raises(ConfigError, match=r"eval.batch_size: 4 is not a multiple of the 3 processes"):
        eval_blocks(PictureSource(), SIZE, 4, 1, process_count=3)


def test_unreadable_evaluation_images_are_told_at_a_bounded_rate(caplog):
    source = PictureSource(60, missing=frozenset(range(50)))
    usable = np.concatenate([usable for _, usable in eval_blocks(source, SIZE, 16, 2)])
    assert np.flatnonzero(usable).tolist() == list(range(50, 60))
    assert 1 <= caplog.text.count("is left out: unreadable: no file for sample") <= 10


def test_build_source(tmp_path):
    world = build_source(DataConfig(source="toyworld", toyworld=ToyWorldConfig(eval_size=7)), "eval", 32)
    assert len(world) == 7
    with pytest.raises(ConfigError, match=r"data.path: is empty, expected the folder that holds captions.jsonl, or a"):
        build_source(DataConfig(), "train", 32)
    with pytest.raises(ConfigError, match=r"captions.jsonl does not exist"):
        build_source(DataConfig(path=str(tmp_path)), "train", 32)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "captions.jsonl").write_text('{"image": "a.png", "captions": ["a"], "split": "train"}\n')
    assert build_source(DataConfig(path=str(tmp_path)), "train", 32)[0].captions == ("a",)


def test_build_tokenizer(tmp_path, monkeypatch):
    source, path = PictureSource(), tmp_path / "run" / "tokenizer.json"
    assert isinstance(build_tokenizer(TokenizerConfig(), source, path, LENGTH), ClipTokenizer)
    assert not path.exists()
    with pytest.raises(
        ConfigError, match="vocabulary_size: 49407 is too small for the tokenizer 'clip', which has 49408"
    ):
        build_tokenizer(TokenizerConfig(vocabulary_size=49407), source, path, LENGTH)

    trained = build_tokenizer(TokenizerConfig(name="trained", vocabulary_size=400), source, path, LENGTH)
    assert 259 < trained.vocabulary_size <= 400
    saved = path.read_bytes()
    # A tokenizer of an earlier start is used as it is, whatever the source says now.
    again = build_tokenizer(TokenizerConfig(name="trained", vocabulary_size=500), PictureSource(2), path, LENGTH)
    assert path.read_bytes() == saved
    by_path = build_tokenizer(TokenizerConfig(name=str(path)), source, tmp_path / "unused.json", LENGTH)
    texts = ["Picture 7 caption 2"]
    for other in (again, by_path):
        np.testing.assert_array_equal(other.encode(texts, 9), trained.encode(texts, 9))
    with pytest.raises(ConfigError, match=r"neither 'clip' nor 'trained' nor an existing .*Did you mean 'clip'?"):
        build_tokenizer(TokenizerConfig(name="clipp"), source, path, LENGTH)

    seen = []
    monkeypatch.setattr(pipeline, "TOKENIZER_CAPTIONS", 30)
    monkeypatch.setattr(
        pipeline, "train_tokenizer", lambda texts, size, path: seen.extend(texts) or path.write_bytes(saved)
    )
    missing = frozenset(range(0, 1000, 3))
    build_tokenizer(
        TokenizerConfig(name="trained"), PictureSource(1000, missing=missing), tmp_path / "other.json", LENGTH
    )
    assert len(seen) == 30
    numbers = {int(text.split()[1]) for text in seen}
    assert not numbers & missing
    assert min(numbers) < 500 < max(numbers)


DATA_MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "llip_jax" / "data").rglob("*.py")
    if path.name != "__init__.py"
)
WITH_GRAIN = ("order", "sources", "evaluation_sets", "pipeline", "shards", "local", "beam")


@pytest.mark.parametrize("module", DATA_MODULES)
def test_jax_is_not_needed(module):
    """Grain imports jax for profiling where it finds it, and does without where it does not."""
    code = f"import sys; sys.modules['jax'] = sys.modules['flax'] = None; import {module}"
    subprocess.run([sys.executable, "-c", code], check=True)
    if not module.endswith(WITH_GRAIN):
        code = f"import sys, {module}; assert not {{'jax', 'flax', 'torch'}} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True)
