"""The explorer against the model it shows, bad inputs, and its page in a browser."""

import dataclasses
import functools
import html
import importlib.util
import io
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import chromium
from PIL import Image
from run_helpers import COMPILATIONS, ROOT, finished_run
from test_inference import model_of, pictures
from test_pretrained import tiny_weights

from launch import explore as explore_program
from llip_jax.config import ConfigError
from llip_jax.data.images import resize_for_eval
from llip_jax.data.sources import build_source
from llip_jax.evaluation.maps import overlay
from llip_jax.explorer.content import (
    MOST_CAPTIONS,
    MOST_CHARACTERS,
    UPLOAD,
    Comparison,
    compare,
    guess,
    read_lines,
    read_picture,
)
from llip_jax.explorer.serve import explore, load_exhibit
from llip_jax.inference import Model, load
from llip_jax.training.run_directory import read_config

CAPTIONS = ["a dog on grass", "a cat", "number 7"]
CLASSES = [f"number {n}" for n in range(7)]
TEMPLATES = ("a {}", "{} on grass", "{}")

needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed")


def png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and ends there."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@functools.cache
def softmax_model() -> Model:
    weights = tiny_weights(logit_bias=None)
    objective = {"sigmoid": None, "softmax": {"weight": 1.0, "duplicates": "ignore"}}
    return Model(dataclasses.replace(weights, config=weights.config | {"objective": objective}))


@pytest.mark.parametrize("model", [model_of, softmax_model])
def test_what_is_shown_is_what_the_model_says(model: Any) -> None:
    for picture in pictures(2, seed=int(np.random.default_rng().integers(1000))):
        subject = read_picture(png(picture), model().config.model.image_size)
        shown = compare(model(), subject, CAPTIONS)
        np.testing.assert_allclose(shown.cosines, model().score(picture, CAPTIONS)[0], atol=1e-6)
        logits = model().logit_scale * shown.cosines.astype(np.float64) + model().logit_bias
        exponentials = np.exp(logits)
        expected = exponentials / (1 + exponentials if shown.by_itself else exponentials.sum())
        np.testing.assert_allclose(shown.chance, expected, rtol=1e-5)
        maps = np.concatenate([model().maps(picture)[0], model().maps(picture, CAPTIONS)[0]])
        for own, one in zip(maps, shown.maps, strict=True):
            assert np.abs(overlay(subject.shown, own).astype(int) - one).max() <= 1
        probabilities = model().classify(picture, CLASSES, TEMPLATES)[0]
        best = np.argsort(-probabilities)[:5]
        guesses = guess(model(), subject, CLASSES, TEMPLATES)
        assert [name for name, _ in guesses] == [CLASSES[index] for index in best]
        np.testing.assert_allclose([share for _, share in guesses], probabilities[best], rtol=1e-5)
    assert shown.by_itself == (model is not softmax_model)


@pytest.mark.parametrize(("size", "side"), [((32, 32), 384), ((90, 50), 350), ((700, 500), 384)])
def test_people_and_model_see_the_same_square(size: tuple[int, int], side: int) -> None:
    picture = np.random.default_rng().integers(256, size=(*size, 3), dtype=np.uint8)
    subject = read_picture(png(picture), 16)
    np.testing.assert_array_equal(subject.seen, resize_for_eval(picture, 16))
    assert subject.shown.shape == (side, side, 3)
    again = resize_for_eval(subject.shown, 16).astype(int)
    assert np.abs(again - subject.seen).mean() < 12


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"just some text", "no known image format"),
        (b"", "no known image format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no known image format"),
        (png_header(9000, 9000), "9000x9000 is more than"),
        (png_header(60000, 60000), "60000x60000 is more than|decompression bomb"),
        (png_header(3, 1), "fewer than 2 pixels"),
        (png(np.zeros((64, 64, 3), np.uint8))[:60], "cannot decode image"),
        (bytes(UPLOAD.image_bytes + 1), "is larger than"),
    ],
)
def test_what_is_no_picture_is_told_in_words(data: bytes, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot be used as a picture: .*({problem})"):
        read_picture(data, 16)


def test_lines_are_stripped_and_counted_once() -> None:
    assert read_lines("\n  a dog \n\ta cat\r\n\na dog\n", "caption", 2) == ["a dog", "a cat"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "Type a caption"),
        (" \n\t\n", "Type a caption"),
        ("\n".join(map(str, range(1000))), f"1,000 lines; expected at most {MOST_CAPTIONS}"),
        ("b\n" + "a" * (MOST_CHARACTERS + 1), f"{MOST_CHARACTERS + 1} characters, expected at most {MOST_CHARACTERS}"),
    ],
)
def test_captions_are_bounded(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        read_lines(text, "caption", MOST_CAPTIONS)


@needs_gradio
def test_texts_of_strangers_are_escaped() -> None:
    from llip_jax.explorer.page import comparison_html, guesses_html, notice_html

    bad = "<img src=x onerror=alert(1)>\"'"
    picture, ones = np.zeros((16, 16, 3), np.uint8), np.ones(1)
    shown = comparison_html(Comparison(picture, [bad], ones, ones, True, [picture, picture]))
    for page in (shown, guesses_html([(bad, 0.5)], 1), notice_html(bad)):
        assert html.escape(bad) in page and bad not in page


def test_a_run_brings_examples_and_class_names() -> None:
    exhibit = load_exhibit(finished_run())
    source = build_source(read_config(finished_run()).data, "eval", 16)
    records = [source[index] for index in range(len(source))]
    assert exhibit.name == "run, step 8"
    assert set(exhibit.classes) == {record.fields["scene_name"] for record in records}
    by_captions = {"\n".join(record.captions[:3]): record for record in records}
    assert len(exhibit.examples) == 12
    for example in exhibit.examples:
        np.testing.assert_array_equal(example.subject.seen, by_captions[example.captions].image)
    assert load_exhibit(finished_run(), 4).name == load_exhibit(finished_run() / "checkpoints" / "4").name


def test_weights_without_a_run_are_shown_without_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_of().save_pretrained(tmp_path / "weights")
    exhibit = load_exhibit(tmp_path / "weights")
    assert (exhibit.name, exhibit.examples, exhibit.classes) == ("weights", (), ())
    with pytest.raises(ConfigError, match=r"--step: .*weights is no run directory"):
        load_exhibit(tmp_path / "weights", 3)

    run = Path(shutil.copytree(finished_run(), tmp_path / "run"))
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(config.replace('"source": "toyworld"', '"source": "folder"'))
    assert load_exhibit(run).examples == ()
    assert re.search("cannot be read: data.path: is empty", capsys.readouterr().out)


def test_mistakes_of_the_command_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match=r"--port \d+: .*in use"):
        explore_program.main(["--workdir", str(tmp_path), "--port", str(taken.getsockname()[1])])
    with pytest.raises(ConfigError, match="--host: cannot listen on 203"):
        explore(tmp_path, host="203.0.113.7")
    with pytest.raises(ConfigError, match="no such file or folder"):
        explore(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no checkpoint 7; there are"):
        explore(finished_run(), 7)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'llip_jax\[report\]'"):
        explore(tmp_path)


_WATCHED = """
import runpy, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background

def watch(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    elif event == "socket.getaddrinfo" and arguments[0] is not None:
        host = arguments[0]
    else:
        return
    if host not in ("127.0.0.1", "localhost", b"127.0.0.1", b"localhost"):
        print("ASKED", host, flush=True)

sys.addaudithook(watch)
sys.argv[0] = "launch/explore.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@contextmanager
def explored(workdir: Path, temporary: Path) -> Iterator[str]:
    """Address of launch/explore.py as a process; afterwards Ctrl-C, and what it must leave behind."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(COMPILATIONS),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(temporary),
        "http_proxy": "http://203.0.113.7:3128",  # which must not be asked for this machine itself
    }
    process = subprocess.Popen(
        [sys.executable, "-c", _WATCHED, "--workdir", str(workdir), "--port", str(port)],
        cwd=ROOT,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    printed = ""
    try:
        for line in process.stdout:
            printed += line
            if line.startswith("explorer: "):
                break
        assert f"explorer: http://127.0.0.1:{port}/" in printed, printed
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGINT)
        printed += process.communicate(timeout=60)[0]
        assert process.returncode == 0, printed
        assert "ASKED" not in printed and "Traceback" not in printed, printed
        assert not list(temporary.glob("llip_jax_explorer_*"))
    finally:
        process.kill()


@needs_gradio
def test_captions_typed_in_a_browser_change_scores_and_nothing_leaves_the_machine(tmp_path: Path) -> None:
    picture = pictures(1)[0]
    (tmp_path / "mine.png").write_bytes(png(picture))
    (tmp_path / "text.png").write_text("just some text")
    (tmp_path / "temporary").mkdir()
    model = load(finished_run())

    with chromium() as browser, explored(finished_run(), tmp_path / "temporary") as address:
        page = browser.new_page()
        page.set_default_timeout(60_000)
        requests: list[str] = []
        problems: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))

        def shows(*captions: str) -> None:
            """Waits until these captions have the model's scores."""
            for caption, cosine in zip(captions, model.score(picture, captions)[0], strict=True):
                figure = page.locator("#scores figure", has=page.get_by_text(caption, exact=True))
                figure.get_by_text(f"cosine {cosine:.3f}").wait_for()
            assert page.locator("#scores figure").count() == 2 + len(captions)

        page.goto(address)
        page.locator("#scores figure").first.wait_for()  # an example of the run
        page.locator("input[type=file]").set_input_files(tmp_path / "mine.png")
        page.locator("#captions textarea").fill("a red circle\na blue square")
        shows("a red circle", "a blue square")
        page.locator("#captions textarea").fill("a red circle\na ${6*7} {{value}} <b>star</b>")
        shows("a red circle", "a ${6*7} {{value}} <b>star</b>")

        page.locator("#classes textarea").fill("red circle\nblue square")
        page.get_by_role("button", name="Compare").click()
        page.get_by_text("Softmax over 2 classes").wait_for()
        red, blue = model.classify(picture, ["red circle", "blue square"])[0]
        assert page.locator("#guesses li").first.inner_text().startswith("red circle" if red > blue else "blue square")

        page.locator("#captions textarea").fill(" \n")
        page.get_by_text("Type a caption").wait_for()
        page.locator("button[aria-label=Clear], button[aria-label='Remove this file']").first.click()
        page.locator("input[type=file]").set_input_files(tmp_path / "text.png")
        page.get_by_text("cannot be used as a picture").wait_for()

        assert not problems
        assert all(url.startswith((address, "data:", "blob:")) for url in requests)
