"""Command lines: exit code 2 and a message that names the field for every mistake, without a traceback."""

import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image
from run_helpers import DEMO, TINY, finished_run, run, words

from launch import evaluate as evaluate_program
from launch import train as train_program
from llip_jax import command_line
from llip_jax.training import loop

Called = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Called:
    """Runs a program's main() in this process: exit code, standard output and error."""

    def called(program: Callable[[list[str]], int], *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
        code = command_line.run(program)
        return code, *capsys.readouterr()

    return called


def refused(result: tuple[int, str, str], *parts: str) -> None:
    code, _, error = result
    assert code == 2, error
    assert error.startswith("error: ")
    assert "Traceback" not in error
    for part in parts:
        assert part in error


def tiny(workdir: Path | None, config: str = str(DEMO), **changes: object) -> list[str]:
    fields = TINY | {name.replace("__", "."): value for name, value in changes.items()}
    return ["--config", config, *(["--workdir", str(workdir)] if workdir else []), *words(fields)]


def test_split_overrides() -> None:
    argv = ["--config", "a.py", "--config.x.y=1", "--check", "--config.z=a=b", "--config.t="]
    assert command_line.split_overrides(argv) == (["--config", "a.py", "--check"], ["x.y=1", "z=a=b", "t="])


# Mistakes that are found before anything is compiled, in this process.


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--config.train.step=3"], ["train.step: no such field.", "Did you mean 'steps'?"]),
        (["--config.train.steps=soon"], ["train.steps: 'soon' is not valid", "integer"]),
        (["--config.model.size=B16"], ["model.size: no size named 'B16'.", "Did you mean 'B/16'?"]),
        (["--config.model.pooler=mixed"], ["model.pooler: 'mixed' is not valid", "'mixer'"]),
        (["--config.train.steps"], ["--config.train.steps: expected --config.train.steps=VALUE"]),
        (["--config.mesh.data=3"], ["mesh: data=3 x fsdp=1 x tensor=1 does not fill 1 device(s)"]),
        (
            ["--config.model.image_size=30"],
            ["model.image_size=30 is not a multiple of model.vision.patch=4", "30 = 7 x 4 + 2"],
        ),
        (["--config.model.vision.heads=3"], ["model.vision.width=32 is not a multiple of model.vision.heads=3"]),
        (["--config.model.mixer_heads=5"], ["model.embed_dim=32 is not a multiple of model.mixer_heads=5"]),
    ],
)
@pytest.mark.parametrize("check", [True, False])
def test_bad_fields(call: Called, tmp_path: Path, words: list[str], parts: list[str], check: bool) -> None:
    workdir = tmp_path / "run"
    refused(call(train_program.main, *tiny(workdir), *words, *(["--check"] if check else [])), *parts)
    assert not (workdir / "config.json").exists(), "a refused run must not bind its directory"


def test_all_mistakes_in_one_go(call: Called, tmp_path: Path) -> None:
    result = call(train_program.main, *tiny(tmp_path, train__step=3, seed="x"))
    refused(result, "train.step: no such field.", "seed: 'x' is not valid")


def test_unknown_variant(call: Called, tmp_path: Path) -> None:
    refused(call(train_program.main, *tiny(tmp_path, f"{DEMO}:siglib")), "no variant named 'siglib'", "'siglip'")


def test_missing_config_file(call: Called, tmp_path: Path) -> None:
    result = call(train_program.main, *tiny(tmp_path, str(DEMO.parent / "llip_dem.py")))
    refused(result, "--config: no file", "llip_dem.py", "Did you mean 'llip_demo.py'?")
    refused(call(train_program.main, *tiny(tmp_path, str(tmp_path / "no" / "where.py"))), "no file", "where.py")


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("def get_config(arg=None):\n    return 1 / 0\n", ["ZeroDivisionError: division by zero"]),
        ("def get_config(:\n", ["SyntaxError"]),
        ("import nothing_of_this_name\n", ["ModuleNotFoundError", "nothing_of_this_name"]),
        ("x = 1\n", ["get_config"]),
        ("def get_config(arg=None):\n    return None\n", ["NoneType"]),
    ],
)
def test_config_file_that_fails(call: Called, tmp_path: Path, source: str, parts: list[str]) -> None:
    (tmp_path / "own.py").write_text(source)
    result = call(train_program.main, *tiny(tmp_path / "run", str(tmp_path / "own.py")))
    refused(result, str(tmp_path / "own.py"), *parts)


def test_workdir_that_cannot_be_written(call: Called, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for workdir, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "run", "Not a directory")):
        refused(call(train_program.main, *tiny(workdir)), f"--workdir: cannot write to {workdir}: {reason}")


def test_no_workdir(call: Called) -> None:
    refused(call(train_program.main, *tiny(None)), "--workdir: expected a directory")


def test_flags_that_do_not_exist(call: Called, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--config", str(DEMO), "--wokdir", "x"]):
        with pytest.raises(SystemExit) as caught:
            call(train_program.main, *arguments)
        assert caught.value.code == 2
        assert "usage:" in capsys.readouterr().err


# A folder of images.


def folder(root: Path, lines: Sequence[object]) -> Path:
    root.mkdir(exist_ok=True)
    for number in range(4):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(root / f"{number}.png")
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (root / "captions.jsonl").write_text("\n".join(texts) + "\n" if texts else "")
    return root


def record(number: int, **fields: object) -> dict[str, object]:
    return {"image": f"{number}.png", "captions": [f"picture {number}"], "split": "val" if number else "train"} | fields


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        ([], ["captions.jsonl is empty"]),
        ([record(0), '{"image": "1.png", '], ["captions.jsonl, line 2: not valid JSON"]),
        ([record(0), record(1, image="9.png")], ["captions.jsonl, line 2: image '9.png' is not a file"]),
        (
            [record(0), record(1), record(2, captions="a dog")],
            ["line 3: captions is 'a dog', expected a list of strings"],
        ),
        ([record(0), record(1, captions=[])], ["line 2: captions is an empty list"]),
        ([record(0), {"image": "1.png", "captons": ["a"]}], ["line 2: field 'captions' is missing.", "'captons'"]),
        ([record(1), record(2)], ["no record is in the train split 'train'", "'val' (2 records)"]),
    ],
)
def test_folder_with_mistakes(call: Called, tmp_path: Path, lines: Sequence[object], parts: list[str]) -> None:
    fields = {"data__source": "folder", "data__path": folder(tmp_path / "data", lines), "data__label_field": None}
    refused(call(train_program.main, *tiny(tmp_path / "run", **fields)), *parts)
    assert not (tmp_path / "run" / "config.json").exists(), "a refused run must not bind its directory"


def test_missing_folder(call: Called, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "nowhere", f"data.path: '{tmp_path / 'nowhere'}' is neither a folder nor a file"),
        (tmp_path / "empty", "captions.jsonl does not exist"),
        ("", "data.path: is empty, expected the folder that holds captions.jsonl"),
    ):
        refused(call(train_program.main, *tiny(tmp_path / "run", data__source="folder", data__path=path)), message)


# Looking without training.


def test_check_prints_the_parameter_table_and_leaves_nothing(call: Called, tmp_path: Path) -> None:
    by_flag = call(train_program.main, *tiny(tmp_path / "run"), "--check")
    by_steps = call(train_program.main, *tiny(None, train__steps=0))
    assert by_flag[0] == by_steps[0] == 0
    assert by_flag[1] == by_steps[1]
    assert not (tmp_path / "run").exists()
    table, data, held_out = by_flag[1].rsplit("\n", 3)[:3]
    assert table + "\n" == (finished_run() / "model.txt").read_text()
    assert data == "data to train on: 200 samples" and held_out == "data to evaluate: 24 samples"


def test_parameter_table_of_the_demo(call: Called) -> None:
    code, table, _ = call(train_program.main, "--config", DEMO, "--check")
    assert code == 0
    (row,) = re.findall(r"^text/embedding +\[512, 128\] .*$", table, re.MULTILINE)
    assert "0.25 MiB" in row  # 512 x 128 x 4 bytes
    total = int(re.findall(r"^parameters: ([\d,]+)", table, re.MULTILINE)[0].replace(",", ""))
    parts = [int(n.replace(",", "")) for n in re.findall(r"^  (?:vision|text|pooler): ([\d,]+)$", table, re.MULTILINE)]
    assert total == sum(parts) + 2  # logit scale and bias


# Run directories that belong to another configuration.


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A finished run to go on with."""
    return shutil.copytree(finished_run(), tmp_path / "run")


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("seed", 1, "seed: 0 -> 1"),
        ("train.batch_size", 8, "train.batch_size: 16 -> 8"),
        ("data.toyworld.train_size", 100, "data.toyworld.train_size: 200 -> 100"),
        ("model.text.length", 13, "model.text.length: 12 -> 13"),
    ],
)
def test_other_sample_order_is_refused(call: Called, finished: Path, field: str, value: object, line: str) -> None:
    before = (finished / "config.json").read_text()
    refused(
        call(train_program.main, *tiny(finished), f"--config.{field}={value}"),
        "cannot go on with another configuration",
        line,
    )
    assert (finished / "config.json").read_text() == before


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """For mistakes that are found while the compiler works, which takes most of the time."""
    monkeypatch.setattr(loop, "compile_step", lambda *_: None)


@pytest.mark.usefixtures("no_compiler")
def test_checkpoint_of_another_model_is_refused(call: Called, finished: Path) -> None:
    before = {name: (finished / name).read_text() for name in ("config.json", "model.txt")}
    result = call(train_program.main, *tiny(finished, model__mixture_tokens=5, model__logit_bias=None))
    refused(result, f"checkpoint 8 in {finished / 'checkpoints'} was made by another configuration:\n")
    # Parameters and both moments; the moments are named by Optax.
    lines = [line.strip() for line in result[2].split("another configuration:\n")[1].splitlines()]
    assert len(lines) == 6
    assert "only in the checkpoint:    params/bias float32[]" in lines
    tokens = "float32[4, 32] in the checkpoint, float32[5, 32] in the configuration"
    assert f"differs: params/vision/tokens is {tokens}" in lines
    for name, text in before.items():
        assert (finished / name).read_text() == text, "a refused run must leave the directory's description alone"


@pytest.mark.usefixtures("no_compiler")
def test_long_differences_are_cut(call: Called, finished: Path) -> None:
    result = call(train_program.main, *tiny(finished, model__text__width=64))
    refused(result, "differs: opt_state/", "more\n")
    assert len(result[2].splitlines()) == 22


@pytest.mark.usefixtures("no_compiler")
def test_fewer_steps_than_done_are_refused(call: Called, finished: Path) -> None:
    result = call(train_program.main, *tiny(finished, train__steps=4))
    refused(result, "train.steps=4, but the run directory holds a checkpoint of step 8")
    assert json.loads((finished / "config.json").read_text())["train"]["steps"] == TINY["train.steps"]


# launch/evaluate.py


def test_evaluating_what_is_not_there(call: Called, finished: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    refused(call(evaluate_program.main, "--workdir", nowhere), f"no run in {nowhere}")
    assert not nowhere.exists()
    result = call(evaluate_program.main, "--workdir", finished, "--step", 7)
    refused(result, "--step: no checkpoint 7", "there are: [4, 6, 8]")
    shutil.rmtree(finished / "checkpoints")
    refused(call(evaluate_program.main, "--workdir", finished), "no checkpoint", "there are: none")
    (finished / "config.json").write_text("{")
    refused(call(evaluate_program.main, "--workdir", finished), "config.json")


def test_evaluating_again_gives_the_same(finished: Path) -> None:
    expected = (finished / "eval/6.json").read_text()
    (finished / "eval/6.json").unlink()
    done = run(["launch/evaluate.py", "--workdir", str(finished), "--step", "6"])
    assert done.returncode == 0, done.stderr
    again = json.loads((finished / "eval/6.json").read_text())
    for task, figures in json.loads(expected).items():  # and intervals beside them
        assert figures.items() <= again[task].items() if isinstance(figures, dict) else figures == again[task]
    assert "evaluation after 6 steps: 24 images" in done.stdout


# The same mistakes in a process of their own, with eight devices.


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"train__batch_size": 20}, ["train.batch_size=20", "8 devices", "20 = 2 x 8 + 4", "nearest: 16"]),
        pytest.param(
            {"eval__batch_size": 12},
            ["eval.batch_size=12", "8 devices", "12 = 1 x 8 + 4"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_batches_on_eight_devices(tmp_path: Path, changes: dict[str, object], parts: list[str]) -> None:
    done = run(["launch/train.py", *tiny(tmp_path / "run", **changes)], devices=8)
    refused((done.returncode, done.stdout, done.stderr), *parts)


def test_process_with_a_mistake_in_the_data(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", [record(0), "{"])
    done = run(["launch/train.py", *tiny(tmp_path / "run", data__source="folder", data__path=data)])
    refused((done.returncode, done.stdout, done.stderr), "captions.jsonl, line 2: not valid JSON")


def test_process_without_arguments() -> None:
    done = run(["launch/evaluate.py"])
    assert done.returncode == 2
    assert "--workdir" in done.stderr


def test_evaluation_without_the_tokenizer_is_refused(call: Called, finished: Path) -> None:
    """Another one, trained on the evaluation's captions, would give figures that mean nothing."""
    (finished / "tokenizer.json").unlink()
    refused(call(evaluate_program.main, "--workdir", finished), "tokenizer.json is missing")
    assert not (finished / "tokenizer.json").exists()


def test_evaluation_takes_overrides(call: Called, finished: Path) -> None:
    refused(call(evaluate_program.main, "--workdir", finished, "--config.mesh.data=3"), "mesh: data=3")


def test_workdir_that_is_a_file(call: Called, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused(call(evaluate_program.main, "--workdir", tmp_path / "file"), "no run in")


def test_config_that_is_not_python(call: Called, finished: Path) -> None:
    refused(call(train_program.main, "--config", finished / "config.json", "--check"), "is not a Python file")


def test_templates_are_checked_at_the_start(call: Called) -> None:
    refused(call(train_program.main, "--config", DEMO, "--check", "--config.eval.templates=('dog',)"), "eval.templates")


@pytest.mark.usefixtures("no_compiler")
def test_another_computation_with_the_same_parameters_is_refused(call: Called, finished: Path) -> None:
    result = call(train_program.main, *tiny(finished, model__mixer_temperature=1.0))
    refused(result, "model.mixer_temperature: 5.0 -> 1.0")
