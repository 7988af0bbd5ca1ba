"""From a trained model to a fine-tuned Llip and out again, as a user does it: files, commands, what is kept."""

import functools
import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import pytest
from flax import traverse_util
from oracles import import_open_clip
from PIL import Image
from run_helpers import ROOT, TINY, metrics, run, temporary_folder, words
from run_helpers import train as train_run

from llip_jax.config import ConfigError, resolve, to_dict
from llip_jax.config_files import read
from llip_jax.convert import convert
from llip_jax.inference import load
from llip_jax.interop import formats, parity
from llip_jax.training.loop import check
from llip_jax.training.run_directory import read_config
from llip_jax.training.start import completed, fine_tuning, read_weights

FINE_TUNING = str(ROOT / "configs" / "finetune.py")
WITHOUT_OTHERS = "sys.modules.update(dict.fromkeys(['torch', 'tensorflow', 'open_clip', 'transformers', 'timm'], None))"
SIGLIP = {"model.pooler": "class_token", "model.mixture_tokens": 1, "model.patch_dropout": 0.0, "eval.every_steps": 4}
SHORT = {
    "train.steps": 4,
    "train.batch_size": 8,
    "train.log_every_steps": 1,
    "eval.batch_size": 8,
    "model.mixture_tokens": 4,
    "model.mixer_heads": 4,
    "data.augment.crop_scale": (1.0, 1.0),
}


@functools.cache
def source_run() -> Path:
    """A tiny SigLIP, trained for four steps without what training must not need. Not to be changed: copy it."""
    workdir = temporary_folder() / "source"
    done = train_run(workdir, SIGLIP | {"train.steps": 4}, hook=WITHOUT_OTHERS)
    assert done.returncode == 0, done.stderr
    return workdir


@functools.cache
def clip_run() -> Path:
    """A tiny CLIP with CLIP's own vocabulary, trained for a step. Not to be changed."""
    workdir = temporary_folder() / "clip"
    fields = {"model.logit_bias": None, "model.activation": "gelu", "objective.sigmoid": None, "objective.softmax": {}}
    fields |= {"data.tokenizer.name": "clip", "data.tokenizer.vocabulary_size": 49408, "train.steps": 1}
    done = train_run(workdir, SIGLIP | fields)
    assert done.returncode == 0, done.stderr
    return workdir


@functools.cache
def pictures() -> Path:
    """A folder of pictures with captions."""
    folder, rng = temporary_folder() / "pictures", np.random.default_rng(0)
    folder.mkdir()
    lines = []
    for i in range(24):
        Image.fromarray(rng.integers(256, size=(20, 20, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        split = "val" if i % 4 == 0 else "train"
        lines.append(json.dumps({"image": f"{i}.png", "captions": [f"picture number {i}"], "split": split}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


def fine_tune(
    workdir: Path, source: Path, fields: Mapping[str, Any] = MappingProxyType({}), variant: str = ""
) -> subprocess.CompletedProcess[str]:
    """launch/train.py with configs/finetune.py."""
    given = {"init.from": source, "data.path": pictures(), **SHORT, **fields}
    return run(["launch/train.py", "--config", FINE_TUNING + variant, "--workdir", str(workdir), *words(given)])


def flat(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return traverse_util.flatten_dict(tree, sep="/")


@functools.cache
def fine_tuned() -> Path:
    """A Llip made of :func:`source_run` and trained on :func:`pictures`. Not to be changed."""
    workdir = temporary_folder() / "fine_tuned"
    done = fine_tune(workdir, source_run())
    assert done.returncode == 0, done.stderr
    assert "4 copies of the class token" in done.stdout
    return workdir


def test_a_llip_begins_with_the_loss_of_its_source(tmp_path: Path) -> None:
    done = fine_tune(tmp_path / "run", source_run(), {"train.steps": 1, "model.mixture_tokens": 1}, ":as_is")
    assert done.returncode == 0, done.stderr
    as_it_is, llip = (metrics(workdir)[0]["loss"] for workdir in (tmp_path / "run", fine_tuned()))
    assert llip == pytest.approx(as_it_is, rel=1e-5)


def test_the_run_keeps_the_tokenizer_and_says_what_it_came_to() -> None:
    assert (fine_tuned() / "tokenizer.json").read_bytes() == (source_run() / "tokenizer.json").read_bytes()
    config = read_config(fine_tuned())
    assert config.model.vision.token_weight == 1 / 4 and config.model.mixer_key_bias
    assert config.model.vision.width == TINY["model.vision.width"]
    assert config.train.steps == 4 and config.optimizer.layer_decay == 0.75


@pytest.mark.slow
def test_a_run_goes_on_bit_by_bit_and_without_its_source(tmp_path: Path) -> None:
    source = shutil.copytree(source_run(), tmp_path / "source")
    first = fine_tune(tmp_path / "run", source, {"checkpoint.every_steps": 2, "train.steps": 2})
    assert first.returncode == 0, first.stderr
    shutil.rmtree(source)
    second = fine_tune(tmp_path / "run", source, {"checkpoint.every_steps": 2, "train.steps": 4})
    assert second.returncode == 0, second.stderr
    assert "going on from step 2" in second.stdout


@pytest.mark.slow
def test_a_locked_tower_stays_bit_by_bit_what_it_was(tmp_path: Path) -> None:
    done = fine_tune(tmp_path / "run", source_run(), {"model.mixture_tokens": 1}, ":locked")
    assert done.returncode == 0, done.stderr
    before, after = (flat(read_weights(path).params) for path in (source_run(), tmp_path / "run"))
    for path, x in before.items():
        assert np.array_equal(x, after[path]) == path.startswith("vision/"), path


def test_fine_tuned_weights_are_read_at_any_saved_step(tmp_path: Path) -> None:
    weights = read_weights(fine_tuned())
    step = read_weights(fine_tuned() / "checkpoints" / "4")
    assert weights.tokenizer == fine_tuned() / "tokenizer.json"
    jax.tree.map(np.testing.assert_array_equal, weights.params, step.params)
    jax.tree.map(np.testing.assert_array_equal, weights.params, load(fine_tuned() / "checkpoints").params)
    with pytest.raises(ConfigError, match=r"no checkpoint 3; there are: \[4\]"):
        read_weights(fine_tuned() / "checkpoints" / "3")


def test_what_is_loaded_scores_as_the_run_evaluated(tmp_path: Path) -> None:
    """Recall of what llip_jax.load scores, counted here, against eval/4.json."""
    model = load(fine_tuned())
    records = [json.loads(line) for line in (pictures() / "captions.jsonl").read_text().splitlines()]
    held_out = [record for record in records if record["split"] == "val"]
    scores = model.score([pictures() / r["image"] for r in held_out], [r["captions"][0] for r in held_out])
    hits = np.mean(scores.argmax(axis=1) == np.arange(len(held_out)))
    evaluated = json.loads((fine_tuned() / "eval" / "4.json").read_text())
    assert evaluated["retrieval"]["image_to_text_recall_at_1"] == pytest.approx(hits)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved").score(
        [pictures() / r["image"] for r in held_out], [r["captions"][0] for r in held_out]
    )
    np.testing.assert_array_equal(scores, again)


def test_what_is_left_out_follows_the_data_and_what_is_said_stays() -> None:
    overrides = [f"init.from={source_run()}", f"data.path={pictures()}", "optimizer.learning_rate=0.5"]
    config = resolve(completed(read(FINE_TUNING, overrides), None))
    assert config.train.batch_size == 8 and config.train.steps == fine_tuning(18)["train"]["steps"] == 68
    assert config.optimizer.learning_rate == 0.5 and config.optimizer.weight_decay == 0.05
    assert config.data.tokenizer.name == str(source_run() / "tokenizer.json")


@pytest.mark.parametrize(
    ("samples", "batch", "steps"),
    [(1, 8, 50), (200, 16, 375), (2_000, 128, 332), (20_000, 256, 525), (200_000, 256, 1658)],
)
def test_small_data_is_seen_more_often_in_smaller_batches(samples: int, batch: int, steps: int) -> None:
    """The table of docs/weights.md."""
    assert fine_tuning(samples)["train"] == {"batch_size": batch, "steps": steps}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["init.from=nowhere"], "nowhere: no such file or folder"),
        (["init.from={source}"], r"data\.path: '' is not valid: expected the data to train on"),
        (["init.from={source}", "data.path={pictures}", "train.frozen=vison/*"], r"train\.frozen: .*vison/\*"),
        (["init.from={source}", "data.path={pictures}", "model.text.layers=2"], "do not fit the configuration"),
    ],
)
def test_what_cannot_start_says_so_and_leaves_no_run(overrides: list[str], message: str, tmp_path: Path) -> None:
    fields = [word.format(source=source_run(), pictures=pictures()) for word in overrides]
    with pytest.raises(ConfigError, match=message):
        check(resolve(completed(read(f"{FINE_TUNING}:as_is", fields), tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_mistakes_are_told_without_a_traceback(tmp_path: Path) -> None:
    done = fine_tune(tmp_path / "run", tmp_path / "nowhere")
    assert done.returncode == 2
    assert "nowhere: no such file or folder" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("format", ["open_clip", "huggingface"])
@pytest.mark.slow
def test_a_clip_goes_out_and_comes_back_bit_by_bit(
    format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_open_clip()  # so that torchvision can be imported, which transformers does too
    workdir = clip_run()
    assert convert(workdir, tmp_path / "out", format) == 0
    assert f"{tmp_path / 'out'}: ours against {format}: images" in capsys.readouterr().out
    assert convert(tmp_path / "out", tmp_path / "back", "llip_jax") == 0
    before, after = (flat(read_weights(path).params) for path in (workdir, tmp_path / "back"))
    assert before.keys() == after.keys()
    for path, x in before.items():
        np.testing.assert_array_equal(x, after[path])


def test_a_source_that_is_a_llip_stays_what_it_is_and_learns_at_one_rate() -> None:
    overrides = [f"init.from={fine_tuned()}", f"data.path={pictures()}"]
    config = resolve(completed(read(FINE_TUNING, overrides), None))
    assert config.model.mixture_tokens == 4 and config.optimizer.rates == {}
    surgery = resolve(completed(read(FINE_TUNING, [f"init.from={source_run()}", overrides[1]]), None))
    assert surgery.model.mixture_tokens == 16 and surgery.optimizer.rates["vision/tokens"] == 30
    locked = [f"init.from={source_run()}", overrides[1], "train.frozen=vision/*"]
    assert "vision/tokens" not in resolve(completed(read(FINE_TUNING, locked), None)).optimizer.rates


def test_a_given_length_shapes_the_schedule() -> None:
    overrides = [f"init.from={source_run()}", f"data.path={pictures()}", "train.steps=20"]
    config = resolve(completed(read(FINE_TUNING, overrides), None))
    assert (config.train.steps, config.optimizer.warmup_steps) == (20, 2)


def test_a_run_that_goes_on_takes_new_rates_whole_and_its_source_by_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source_run().parent)
    overrides = [f"init.from={source_run().name}", f"data.path={pictures()}", "optimizer.rates={'text/*': 0.5}"]
    config = resolve(completed(read(FINE_TUNING, overrides), fine_tuned()))
    assert config.optimizer.rates == {"text/*": 0.5}
    assert config.init.source == str(source_run())


def test_the_model_card_tells_the_history(tmp_path: Path) -> None:
    assert convert(source_run(), tmp_path / "llip", "llip_jax", ["model.pooler=mixer", "model.mixer_heads=4"]) == 0
    load(tmp_path / "llip").save_pretrained(tmp_path / "copy")
    card = (tmp_path / "copy" / "README.md").read_text()
    assert "- Trained by llip_jax for 4 steps of 16 images." in card
    assert "- Changed: model.pooler=mixer, model.mixer_heads=4." in card
    assert read_weights(fine_tuned()).history == ("Trained by llip_jax for 4 steps of 8 images from source.",)


def test_given_weights_are_evaluated_before_they_change() -> None:
    before, after = (json.loads((fine_tuned() / "eval" / f"{step}.json").read_text()) for step in (0, 4))
    assert before["step"] == 0 and before["retrieval"].keys() == after["retrieval"].keys()


def test_a_finished_run_says_so() -> None:
    done = fine_tune(fine_tuned(), source_run())
    assert done.returncode == 0, done.stderr
    assert "complete at step 4; with a higher train.steps it goes on" in done.stdout


def test_a_source_without_the_tokenizer_it_learned_with_is_refused(tmp_path: Path) -> None:
    source = shutil.copytree(source_run(), tmp_path / "source")
    (source / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.json is missing"):
        read_weights(source)


def test_a_folder_of_weights_is_no_run_directory_and_loses_nothing(tmp_path: Path) -> None:
    load(source_run()).save_pretrained(tmp_path / "weights")
    before = sorted(path.name for path in (tmp_path / "weights").iterdir())
    done = fine_tune(tmp_path / "weights", tmp_path / "weights")
    assert done.returncode == 2
    assert "holds weights (model.safetensors); expected a folder for the run alone" in done.stderr
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == before


def test_mixture_tokens_without_a_mixer_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.mixture_tokens=4 has no effect with model\.pooler='class_token'"):
        convert(source_run(), Path("nowhere"), "llip_jax", ["model.mixture_tokens=4"])


def test_another_tokenizer_is_written_where_one_is_named(tmp_path: Path) -> None:
    other = json.loads((source_run() / "tokenizer.json").read_text())
    other["normalizer"] = None
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert convert(source_run(), tmp_path / "out", "llip_jax", [f"data.tokenizer.name={tmp_path / 'other.json'}"]) == 0
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == other


def test_comparisons_are_made_in_float32_whatever_the_model_is_trained_in() -> None:
    weights = read_weights(source_run())
    config = resolve(weights.config)
    half = replace(config, model=replace(config.model, dtype="bfloat16"))
    inputs = parity.random_inputs(weights)
    one, other = (parity.ours(c, weights.params, inputs) for c in (config, half))
    assert parity.differences(one, other) == {"images": 0, "texts": 0, "logits": 0}


def test_a_llip_has_no_place_in_other_libraries(tmp_path: Path) -> None:
    for format in ("open_clip", "huggingface", "big_vision"):
        with pytest.raises(ConfigError, match="mixer"):
            convert(fine_tuned(), tmp_path / "out.npz", format)
    assert not (tmp_path / "out.npz").exists()
    with pytest.raises(
        ConfigError, match=r"--to: out is not valid: big_vision's weights are a file; expected out\.npz"
    ):
        convert(fine_tuned(), Path("out"), "big_vision")


def test_conversion_makes_a_llip_and_refuses_to_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["model.pooler=mixer", "model.mixture_tokens=4", "model.mixer_heads=4"]
    assert convert(source_run(), tmp_path / "llip", "llip_jax", overrides) == 0
    printed = capsys.readouterr().out
    assert "vision/tokens" in printed and "4 copies of the class token" in printed
    change = float(printed.rpartition("first scores against those of the source: ")[2].split()[0])
    assert change < 1e-5
    with pytest.raises(ConfigError, match="there is something already"):
        convert(source_run(), tmp_path / "llip", "llip_jax")
    assert convert(source_run(), tmp_path / "llip", "llip_jax", overwrite=True) == 0
    assert formats.read(tmp_path / "llip").config["model"]["pooler"] == "class_token"
    with pytest.raises(ConfigError, match=r"--format: no format named 'openclip'\. Did you mean 'open_clip'\?"):
        convert(source_run(), tmp_path / "x", "openclip")


def test_the_command_converts_and_explains(tmp_path: Path) -> None:
    command = ["launch/convert.py", "--from", str(source_run()), "--to", str(tmp_path / "out")]
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert f"written: {tmp_path / 'out'} (llip_jax)" in done.stdout
    done = run(["launch/convert.py", "--from", str(tmp_path / "outt"), "--to", str(tmp_path / "x")])
    assert done.returncode == 2
    assert "no such file or folder. Did you mean 'out'?" in done.stderr


def test_training_needs_neither_torch_nor_tensorflow() -> None:
    """The source was trained with their imports blocked (and a blocked import does fail)."""
    assert len(metrics(source_run())) == 4
    done = run(["-c", f"import sys; {WITHOUT_OTHERS}; import torch"])
    assert "ModuleNotFoundError" in done.stderr


def test_configurations_name_every_field_of_the_source() -> None:
    assert to_dict(read_config(fine_tuned()))["init"] == {
        "from": str(source_run()),
        "tokens": "copies",
        "token_noise": 0.0,
    }
