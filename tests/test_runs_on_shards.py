"""Whole runs on tar shards: several caption slots, worker processes, dirt, and data that changes between runs."""

import json
import signal
from pathlib import Path

import pytest
from data_formats import samples, write_tars
from run_helpers import metrics, numbers, train

KILL_AT_FIRST_STEP = """
import os, signal
from llip_jax.training import recorder
recorder.Recorder.add = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_run_on_dirty_shards_goes_on_with_other_workers_and_tells_what_changed(tmp_path: Path) -> None:
    clean = samples(90)
    dirty = tuple(
        sample if index % 7 else type(sample)(sample.key, sample.image[:50], sample.captions, sample.label)
        for index, sample in enumerate(clean)
    )
    fields = {
        "data.source": "webdataset",
        "data.path": write_tars(tmp_path / "tars", dirty, each=30),
        "data.index_dir": tmp_path / "index",
        "data.fields.captions": "('json.caption',)",
        "data.label_field": "json.label",
        "data.captions.slots": 2,
        "data.limits.replaced_share": 0.5,
        "train.steps": 6,
    }
    reference, run = tmp_path / "reference", tmp_path / "run"
    done = train(reference, fields)
    assert done.returncode == 0, done.stderr
    lines = metrics(reference)
    assert lines[-1]["replaced_samples"] > 0 and set(lines[-1]["replaced_by_reason"]) <= {
        "truncated_image",
        "not_an_image",
    }
    assert sum(lines[-1]["replaced_by_reason"].values()) == lines[-1]["replaced_samples"]
    assert json.loads((reference / "eval/6.json").read_text())["unreadable_images"] > 0

    # Threads first, then two worker processes: the same numbers.
    assert train(run, fields | {"train.steps": 4}).returncode == 0
    done = train(run, fields | {"data.workers": 2})
    assert done.returncode == 0, done.stderr
    ahead = [line for line in numbers(run) if line["step"] > 4]
    assert [line["sample_hash"] for line in numbers(run)] == [line["sample_hash"] for line in numbers(reference)]
    assert [line["replaced_by_reason"] for line in ahead] == [line["replaced_by_reason"] for line in lines[4:]]

    (before,) = json.loads((run / "data.json").read_text()).values()
    assert list(before) == ["00000.tar", "00001.tar", "00002.tar", "held out", "tokenizer"]
    write_tars(tmp_path / "tars", dirty[:-4], each=30)
    refused = train(run, fields | {"train.steps": 8})
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "data: the training data has changed since checkpoint 6" in refused.stderr
    assert "  00002.tar: 30 samples" in refused.stderr and "-> 26 samples" in refused.stderr
    assert "00001.tar" not in refused.stderr
    assert list(json.loads((run / "data.json").read_text()).values()) == [before]

    # Killed before anything is saved, it has not begun with the new data.
    accept = fields | {"train.steps": 8, "data.changed": "accept"}
    assert train(run, accept, hook=KILL_AT_FIRST_STEP).returncode == -signal.SIGKILL
    refused = train(run, fields | {"train.steps": 8})
    assert refused.returncode == 2 and "  00002.tar: 30 samples" in refused.stderr

    accepted = train(run, accept)
    assert accepted.returncode == 0, accepted.stderr
    assert "data has changed since checkpoint 6, accepted" in accepted.stdout
    # From here on this is the run's data.
    assert train(run, fields | {"train.steps": 10}).returncode == 0


@pytest.mark.slow
def test_too_much_dirt_stops_the_run_with_the_reasons(tmp_path: Path) -> None:
    rows = tuple(
        type(sample)(sample.key, sample.image if index % 2 else b"no image", sample.captions, sample.label)
        for index, sample in enumerate(samples(90))
    )
    fields = {
        "data.source": "webdataset",
        "data.path": write_tars(tmp_path / "tars", rows),
        "data.index_dir": tmp_path / "index",
        "data.label_field": None,
        "train.steps": 80,
        "checkpoint.every_steps": 100,
        "eval.every_steps": 100,
    }
    done = train(tmp_path / "run", fields)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "data.limits.replaced_share=0.1: " in done.stderr and " not_an_image)" in done.stderr
    assert done.stderr.count("is replaced by the next one") <= 12
    assert metrics(tmp_path / "run")[-1]["step"] >= 1000 // 16 - 2
