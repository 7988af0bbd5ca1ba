"""launch/prepare_data.py and what it is made of: exact shards and counts, whoever writes them and however often."""

import html.parser
import io
import json
import multiprocessing
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from sample_sources import HOSTILE, Samples

from launch import prepare_data
from llip_jax.config import ConfigError, DataConfig, LimitsConfig, ToyWorldConfig
from llip_jax.data.files import find_files
from llip_jax.data.formats.array_records import ArrayRecordRows, ArrayRecordSource
from llip_jax.data.images import open_picture
from llip_jax.data.preparation import statistics
from llip_jax.data.preparation.beam import write_with_beam
from llip_jax.data.preparation.local import write_locally
from llip_jax.data.preparation.shards import Preparation, alone, begin, finish, write_shard
from llip_jax.data.preparation.statistics import Histogram, Statistics, content_hash, find_repetition, save_hashes
from llip_jax.data.records import BadSample, Record
from llip_jax.data.sources import build_source
from llip_jax.data.toyworld import ToyWorld

ROOT = Path(__file__).resolve().parents[1]


def good(source: Samples) -> tuple[list[Record], Counter[str]]:
    """Records whose pictures Pillow can read, and what is wrong with the others."""
    records, reasons = [], Counter()
    for index in range(len(source)):
        try:
            record = source[index]
            with Image.open(io.BytesIO(record.image)) as image:
                image.load()
                if min(image.size) < LimitsConfig().image_side:
                    raise BadSample("image_too_small", "")
        except BadSample as error:
            reasons[error.reason] += 1
        except Image.UnidentifiedImageError:
            reasons["not_an_image"] += 1
        except OSError as error:
            reasons["unreadable" if "gone" in str(error) else "truncated_image"] += 1
        else:
            records.append(record)
    return records, reasons


def plan(out: Path, source, shards: int = 4, **settings) -> Preparation:
    return Preparation(source=source, split="train", out=out, shards=shards, limits=LimitsConfig(), **settings)


def prepare(preparation: Preparation) -> Statistics:
    for shard in begin(preparation, DataConfig()):
        write_shard(preparation, shard)
    return finish(preparation)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def written(out: Path) -> ArrayRecordSource:
    return ArrayRecordSource(ArrayRecordRows(find_files(f"{out}/*.array_record", "path")))


@pytest.fixture
def source() -> Samples:
    seed = secrets.randbits(32)
    print("seed", seed)
    return Samples(seed, 150)


def test_every_sample_is_kept_as_it_is_or_counted(tmp_path, source):
    result = prepare(plan(tmp_path / "out", source))
    records, reasons = good(source)
    stored = written(tmp_path / "out")
    assert [stored[i] for i in range(len(stored))] == records
    assert result.failed == reasons
    assert result.kept + sum(result.failed.values()) == len(source)
    assert all(re.search(r"(sample[ /]\d+): ", message) for found in result.failures.values() for message in found)
    manifest = json.loads((tmp_path / "out/shards.json").read_text())
    assert list(manifest) == [f"train-{shard:05}-of-00004.array_record" for shard in range(4)]
    for name, shard in manifest.items():
        file = tmp_path / "out" / name
        assert shard["bytes"] == file.stat().st_size
        assert subprocess.run(["sha256sum", file], stdout=subprocess.PIPE).stdout.split()[0].decode() == shard["sha256"]
    assert sum(shard["samples"] for shard in manifest.values()) == len(records)


def test_statistics_are_those_of_the_kept_samples(tmp_path, source):
    prepare(plan(tmp_path / "out", source))
    records, reasons = good(source)
    found = json.loads((tmp_path / "out/statistics.json").read_text())
    assert (found["samples"], found["kept"], found["failed"]) == (len(source), len(records), reasons)
    opened = [Image.open(io.BytesIO(record.image)) for record in records]
    assert found["formats"] == Counter(image.format for image in opened)
    captions = [caption for record in records for caption in record.captions]
    for name, values in {
        "width": [image.width for image in opened],
        "short_side": [min(image.size) for image in opened],
        "pixels": [image.width * image.height for image in opened],
        "image_bytes": [len(record.image) for record in records],
        "captions": [len(record.captions) for record in records],
        "words": [len(caption.split()) for caption in captions],
        "characters": [len(caption) for caption in captions],
    }.items():
        histogram = found["histograms"][name]
        assert (histogram["minimum"], histogram["maximum"]) == (min(values), max(values))
        assert histogram["mean"] == pytest.approx(np.mean(values))
        assert histogram["median"] == pytest.approx(np.sort(values)[(len(values) - 1) // 2], rel=1 / 64)
    for name, contents_, key in (
        ("repeated_captions", captions, "caption"),
        ("repeated_images", [record.image for record in records], "name"),
    ):
        counts = Counter(contents_)
        assert found[name]["distinct"] == len(counts)
        assert found[name]["share"] == pytest.approx(1 - len(counts) / len(contents_))
        most = found[name]["most"]
        assert [entry["count"] for entry in most] == [n for _, n in counts.most_common(len(most)) if n > 1]
        by_name = {record.name: record.image for record in records}
        assert all(counts[entry[key] if key == "caption" else by_name[entry[key]]] == entry["count"] for entry in most)


def test_tokens_are_counted_with_the_tokenizer(tmp_path, source):
    class Words:
        vocabulary_size = 9

        def encode(self, texts, length):
            mask = np.zeros((len(texts), length), np.int32)
            for row, text in enumerate(texts):
                mask[row, : len(text.split()) + 2] = 1
            return mask, mask

    result = prepare(plan(tmp_path / "out", source, tokenizer=Words()))
    words, tokens = (result.histograms[name] for name in ("words", "tokens"))
    assert tokens.bins == {value + 2: count for value, count in words.bins.items()}
    assert tokens.total == words.total + 2 * words.count


def test_large_images_are_shrunk_and_others_left_alone(tmp_path, source):
    prepare(plan(tmp_path / "out", source, short_side=30))
    stored, (records, _) = written(tmp_path / "out"), good(source)
    assert len(stored) == len(records)
    shrunk = 0
    for index, record in enumerate(records):
        with Image.open(io.BytesIO(record.image)) as before, Image.open(io.BytesIO(stored[index].image)) as after:
            if min(before.size) <= 30:
                assert stored[index] == record
                continue
            shrunk += 1
            assert (after.format, after.size) == ("JPEG", (30, 30))
            expected = np.asarray(ImageOps.fit(before.convert("RGB"), (30, 30)), np.float32)
            assert np.abs(np.asarray(after, np.float32) - expected).mean() < 12
    assert shrunk > 10


def test_generated_pixels_are_kept_without_loss(tmp_path):
    world = ToyWorld(ToyWorldConfig(train_size=12), "train", 32)
    prepare(plan(tmp_path / "out", world, shards=2))
    stored = written(tmp_path / "out")
    for index in range(12):
        np.testing.assert_array_equal(open_picture(stored[index].image).decode(1.0), world[index].image)
        assert stored[index].captions == world[index].captions
        assert stored[index].image_group == world[index].image_group
        assert stored[index].fields["boxes"] == world[index].fields["boxes"].tolist()


def test_shards_do_not_depend_on_processes_stops_or_runner(tmp_path, source):
    pytest.importorskip("apache_beam")
    prepare(plan(tmp_path / "alone", source))
    expected = contents(tmp_path / "alone")
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()  # the page's title is the folder's name

    processes = plan(tmp_path / "a/alone", source)
    told = []
    missing = begin(processes, DataConfig())
    assert write_locally(processes, missing, 2, told.append, lambda: False)
    assert sum(told) == len(source)
    finish(processes)
    assert contents(processes.out) == expected

    stopped = plan(tmp_path / "b/alone", source)
    write_shard(stopped, begin(stopped, DataConfig())[2])
    assert not write_locally(stopped, [0, 1, 3], 1, told.append, lambda: True)

    class Died(BaseException):
        pass

    def die():
        raise Died

    with pytest.raises(Died):
        write_shard(stopped, 1, die)
    (stopped.out / "unfinished/killed").touch()
    missing = begin(stopped, DataConfig())
    assert missing == [0, 1, 3]
    for shard in missing:
        write_shard(stopped, shard)
    finish(stopped)
    assert contents(stopped.out) == expected

    beam = plan(tmp_path / "c/alone", source)
    write_with_beam(beam, begin(beam, DataConfig()), ["--runner=DirectRunner"])
    finish(beam)
    assert contents(beam.out) == expected


def test_a_finished_folder_is_not_written_again_but_repaired(tmp_path, source):
    preparation = plan(tmp_path / "out", source)
    prepare(preparation)
    expected = contents(tmp_path / "out")
    assert begin(preparation, DataConfig()) == []
    (tmp_path / "out" / preparation.name(1)).write_bytes(b"cut off")
    (tmp_path / "out/finished/train-00003-of-00004.json").write_text("{")
    assert begin(preparation, DataConfig()) == [1, 3]
    prepare(preparation)
    assert contents(tmp_path / "out") == expected


def test_a_folder_of_something_else_is_refused_and_the_difference_told(tmp_path, source):
    prepare(plan(tmp_path / "out", source))
    expected = contents(tmp_path / "out")
    with pytest.raises(ConfigError) as caught:
        prepare(plan(tmp_path / "out", Samples(source.seed, 151), shards=5, short_side=9))
    for line in ("samples: 150 -> 151", "shards: 4 -> 5", "short_side: None -> 9", "identity of samples: 150 of seed"):
        assert line in str(caught.value)
    with pytest.raises(ConfigError, match=r"data.eval_samples: 5000 -> 7"):
        begin(plan(tmp_path / "out", source), DataConfig(eval_samples=7))
    assert begin(plan(tmp_path / "out", source), DataConfig(path="elsewhere", workers=7)) == []
    assert contents(tmp_path / "out") == expected
    (tmp_path / "other").mkdir()
    (tmp_path / "other/photo.jpg").touch()
    with pytest.raises(ConfigError, match="is not empty and not made by this program"):
        begin(plan(tmp_path / "other", source), DataConfig())


def test_a_source_without_a_usable_sample_still_gets_its_counts(tmp_path):
    class Broken(Samples):
        def __getitem__(self, index):
            raise BadSample("bad_metadata", f"\ud800 {HOSTILE}")

    result = prepare(plan(tmp_path / "out", Broken(0, 7), shards=3))
    assert (result.kept, result.failed) == (0, {"bad_metadata": 7})
    assert len(written(tmp_path / "out")) == 0


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, source):
    preparation = plan(tmp_path / "out", source)
    begin(preparation, DataConfig())
    (tmp_path / "out/unfinished").rmdir()
    with pytest.raises(ConfigError, match=r"--out: cannot write .*train-00000-of-00004.*No such file"):
        write_shard(preparation, 0)
    assert preparation.finished(0) is None


def test_a_dead_worker_is_an_error_and_not_a_wait(tmp_path):
    preparation = plan(tmp_path / "out", Samples(0, 100_000), shards=1)
    missing = begin(preparation, DataConfig())

    def kill_children(samples: int) -> None:
        if samples:
            for child in multiprocessing.active_children():
                child.kill()

    with pytest.raises(RuntimeError, match="a worker process died"):
        write_locally(preparation, missing, 1, kill_children, lambda: False)


def test_the_page_shows_captions_as_text_and_loads_nothing(tmp_path, source):
    prepare(plan(tmp_path / HOSTILE.replace("/", ""), source))
    page = (tmp_path / HOSTILE.replace("/", "") / "index.html").read_text()
    texts, pictures = [], []

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            assert tag not in ("script", "link", "iframe", "object", "embed", "a", "base", "form")
            for name, value in attrs:
                assert not name.startswith("on")
                if name == "src":
                    assert re.fullmatch(r"data:image/jpeg;base64,[\w+/=]+", value)
                    pictures.append(value)
                else:
                    assert name not in ("href", "srcset", "background", "xlink:href", "action")

        def handle_data(self, data):
            texts.append(data)

    Parser().feed(page)
    assert "url(" not in page and "@import" not in page
    assert any(text.startswith(HOSTILE + "caption") for text in texts)
    assert len(pictures) >= 48


def test_histograms_are_exact_in_total_and_close_in_rank():
    rng = np.random.default_rng()
    values = [int(value) for value in np.exp(rng.uniform(0, 20, 3000))] + [0, 127, 128]
    whole, parts = Histogram(), [Histogram() for _ in range(3)]
    for index, value in enumerate(values):
        whole.add(value)
        parts[index % 2].add(value)
    merged = Histogram()
    for part in parts:
        merged.merge(part)
    assert merged == whole
    assert (whole.count, whole.total) == (len(values), sum(values))
    assert (whole.minimum, whole.maximum) == (min(values), max(values))
    ordered = np.sort(values)
    for share in (0, 0.3, 0.5, 0.99, 1):
        exact = ordered[int(share * (len(values) - 1))]
        assert exact * 63 / 64 <= whole.quantile(share) <= exact
    assert Histogram().quantile(0.5) == 0


def test_repetition_is_found_over_all_parts_of_the_range(tmp_path, monkeypatch):
    rng = random.Random(seed := secrets.randbits(32))
    print("seed", seed)
    words = [[f"word {int(rng.paretovariate(0.7))}" for _ in range(400)] for _ in range(5)] + [[]]
    paths = [tmp_path / f"{shard}.npy" for shard in range(6)]
    for path, shard in zip(paths, words, strict=True):
        save_hashes(path, [(content_hash(word.encode()), sample) for sample, word in enumerate(shard)])
    counts = Counter(word for shard in words for word in shard)
    whole = find_repetition(paths, 10)
    assert (whole.total, whole.distinct) == (2000, len(counts))
    assert [repeat.count for repeat in whole.most] == [count for _, count in counts.most_common(10)]
    for repeat in whole.most:
        assert counts[words[repeat.shard][repeat.sample]] == repeat.count
    monkeypatch.setattr(statistics, "_HASHES_AT_ONCE", 150)
    assert find_repetition(paths, 10) == whole


def test_beam_that_is_not_installed_is_named(tmp_path, source, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(ConfigError, match=r"pip install 'llip_jax\[beam\]'"):
        write_with_beam(plan(tmp_path, source), [0], [])


def command(*words: object) -> list[str]:
    toy = ["--config.data.source=toyworld", "--config.data.toyworld.eval_size=40", "--config.model.image_size=16"]
    return ["--config", str(ROOT / "configs/llip_demo.py"), *toy, "--split", "eval", *map(str, words)]


def test_the_program_prepares_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_data, "_write_locally", in_this_process)
    assert prepare_data.main(command("--out", tmp_path / "out", "--shard_size", 15)) == 0
    config = DataConfig(source="array_record", path=str(tmp_path / "out"), eval_path=str(tmp_path / "out"))
    assert len(build_source(config, "eval", 16)) == 40
    assert [file.name for file in sorted((tmp_path / "out").glob("*.array_record"))] == [
        f"eval-0000{shard}-of-00003.array_record" for shard in range(3)
    ]
    assert "40 samples: 40 kept in 3 shards" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="shards: 3 -> 2"):
        prepare_data.main(command("--out", tmp_path / "out", "--shards", 2))
    with pytest.raises(ConfigError, match="words after -- are for --runner beam"):
        prepare_data.main(command("--out", tmp_path / "out", "--", "--runner=DirectRunner"))


def in_this_process(preparation: Preparation, missing: list[int], workers: int) -> bool:
    for shard in missing:
        write_shard(preparation, shard)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_finished_shards_and_the_command_goes_on(tmp_path, number):
    words = command("--out", tmp_path / "out", "--shards", 60, "--workers", 2)
    words = [sys.executable, str(ROOT / "launch/prepare_data.py"), *words, "--config.data.toyworld.eval_size=6000"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    kill = threading.Timer(120, process.kill)
    kill.start()
    while not list((tmp_path / "out").glob("finished/*.json")) and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, number)  # as a terminal or a scheduler does
    out, error = process.communicate()
    kill.cancel()
    assert process.returncode == 75, error
    assert f"stopped by {number.name}" in out and "the same command goes on" in out
    assert "Traceback" not in error
    finished = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.array_record")}
    assert 0 < len(finished) < 60
    again = subprocess.run(words, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "6,000 samples: 6,000 kept in 60 shards" in again.stdout
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in finished.items())


def test_what_limits_allow_is_shown_and_what_jpeg_cannot_hold_is_kept(tmp_path):
    """A picture of one pixel's side, and one too long to be stored as a smaller JPEG."""
    rng = np.random.default_rng(5)
    (tmp_path / "data").mkdir()
    for name, shape in (("thin.png", (5, 1, 3)), ("long.png", (30, 70_000, 3))):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(tmp_path / "data" / name)
    lines = [{"image": name, "captions": ["a"], "split": "train"} for name in ("thin.png", "long.png")]
    (tmp_path / "data/captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = DataConfig(path=str(tmp_path / "data"), limits=LimitsConfig(image_side=1))
    out = tmp_path / "out"
    preparation = Preparation(build_source(config, "train", 16), "train", out, 1, config.limits, short_side=29)
    out.mkdir()
    for shard in begin(preparation, config):
        write_shard(preparation, shard)
    assert finish(preparation).kept == 2 and (out / "index.html").exists()


def test_two_runs_do_not_write_to_the_same_folder(tmp_path):
    with (
        alone(tmp_path / "out"),
        pytest.raises(ConfigError, match="another run is writing to"),
        alone(tmp_path / "out"),
    ):
        pass
    with alone(tmp_path / "out"):
        pass


def test_attempts_at_the_same_shard_do_not_disturb_each_other(tmp_path):
    config = DataConfig(source="toyworld", toyworld=ToyWorldConfig(train_size=20))
    preparation = Preparation(build_source(config, "train", 16), "train", tmp_path / "out", 1, config.limits)
    begin(preparation, config)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: write_shard(preparation, 0), range(8)))
    assert finish(preparation).kept == 20
