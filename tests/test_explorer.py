"""The explorer against the model it shows, bad inputs, and its page in a browser."""

import contextlib
import copy
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
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path

import jax
import numpy as np
import pytest
from browser import chromium
from oracles import random_params
from PIL import Image
from run_helpers import COMPILATIONS, ROOT, finished_run, temporary_folder, tiny_config
from test_inference import pictures
from test_pretrained import tokenizer_file

from launch import explore as explore_program
from llip_jax.config import ConfigError, resolve, to_dict
from llip_jax.data.images import resize_for_eval
from llip_jax.data.sources import build_source
from llip_jax.evaluation.maps import overlay
from llip_jax.explorer.content import (
    BLOCK,
    MOST_CAPTIONS,
    MOST_CHARACTERS,
    UPLOAD,
    Comparison,
    Exhibit,
    compare,
    guess,
    read_lines,
    read_picture,
    warm_up,
)
from llip_jax.explorer.serve import explore, load_exhibit, served
from llip_jax.inference import Model
from llip_jax.training.checkpoints import Checkpoints
from llip_jax.training.metrics import write_json
from llip_jax.training.progress import Progress
from llip_jax.training.state import TrainState

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
def run_directory() -> Path:
    """Of a run that was never trained: a configuration, noise for parameters at steps 4 and 8, a tokenizer."""
    workdir, config = temporary_folder() / "run", tiny_config(model={"mixer_temperature": 0.3})
    with contextlib.closing(Checkpoints(workdir / "checkpoints", config.checkpoint)) as checkpoints:
        for step in (4, 8):
            state = TrainState(np.asarray(step), random_params(config, step), ())  # type: ignore[arg-type]
            checkpoints.save(state, Progress(0, 0.0, {}, ""))
    write_json(workdir / "config.json", to_dict(config))
    shutil.copy(tokenizer_file(), workdir / "tokenizer.json")
    return workdir


@functools.cache
def exhibit() -> Exhibit:
    return load_exhibit(run_directory())


def sigmoid_model() -> Model:
    return exhibit().model


def softmax_model() -> Model:
    """The same, and compiled once with it, as if it had been trained by the softmax loss."""
    model = copy.copy(sigmoid_model())
    objective = {"sigmoid": None, "softmax": {"weight": 1.0, "duplicates": "ignore"}}
    model.config = resolve(to_dict(model.config) | {"objective": objective})
    return model


@pytest.mark.parametrize("model", [sigmoid_model, softmax_model])
def test_what_is_shown_is_what_the_model_says(model: Callable[[], Model]) -> None:
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
    assert shown.by_itself == (model is sigmoid_model)


def test_after_the_warming_up_no_number_of_captions_compiles(caplog: pytest.LogCaptureFixture) -> None:
    warm_up(exhibit())
    subject = read_picture(png(pictures(1)[0]), 16)
    captions = [f"a dog, number {number}" for number in range(2 * BLOCK + 1)]
    with jax.log_compiles():
        shown = [compare(exhibit().model, subject, captions[:count]) for count in range(1, len(captions) + 1)]
        guess(exhibit().model, subject, exhibit().classes, exhibit().templates)
    assert not [line for line in caplog.messages if line.startswith("Compiling")]
    for comparison in shown:
        count = len(comparison.captions)
        np.testing.assert_allclose(comparison.cosines, shown[-1].cosines[:count], atol=1e-6)
        assert len(comparison.maps) == 1 + count


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
    source = build_source(tiny_config().data, "eval", 16)
    records = [source[index] for index in range(len(source))]
    assert exhibit().name == "run, step 8"
    assert set(exhibit().classes) == {record.fields["scene_name"] for record in records}
    by_captions = {"\n".join(record.captions[:3]): record for record in records}
    assert len(exhibit().examples) == 12
    for example in exhibit().examples:
        np.testing.assert_array_equal(example.subject.seen, by_captions[example.captions].image)
    assert load_exhibit(run_directory(), 4).name == load_exhibit(run_directory() / "checkpoints" / "4").name


def test_weights_without_a_run_are_shown_without_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exhibit().model.save_pretrained(tmp_path / "weights")
    alone = load_exhibit(tmp_path / "weights")
    assert (alone.name, alone.examples, alone.classes) == ("weights", (), ())
    with pytest.raises(ConfigError, match=r"--step: .*weights is no run directory"):
        load_exhibit(tmp_path / "weights", 3)

    run = Path(shutil.copytree(run_directory(), tmp_path / "run"))
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
        explore(run_directory(), 7)
    for port in (-1, 0, 65536, 99999):
        with pytest.raises(ConfigError, match=f"--port: {port} is not valid: expected 1 to 65535"):
            explore(tmp_path, port=port)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'llip_jax\[report\]'"):
        explore(tmp_path)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The page of ``exhibit``, served by this process."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    before = dict(os.environ)
    os.environ["http_proxy"] = "http://203.0.113.7:3128"  # which must not be asked for this machine itself
    try:
        with served(exhibit(), "127.0.0.1", free_port()) as url:
            assert url.startswith("http://127.0.0.1:")
            yield url.rstrip("/")
        assert not Path(os.environ["GRADIO_TEMP_DIR"]).exists()
    finally:
        os.environ.clear()
        os.environ.update(before)


def files() -> set[Path]:
    """What is kept of uploads and examples. (Gradio leaves an empty file behind for each upload.)"""
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    return {path for path in folder.rglob("*") if path.is_file() and path.stat().st_size}


def answer(address: str, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, str]:
    """Status and text; ``headers`` with underscores for hyphens."""
    connection = HTTPConnection(address.removeprefix("http://"), timeout=30)
    connection.putrequest(method, path, skip_host="Host" in headers)
    if method == "POST" and not headers.keys() & {"Content_Length", "Transfer_Encoding"}:
        connection.putheader("Content-Length", str(len(body)))
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders(body)
    with contextlib.closing(connection):
        response = connection.getresponse()
        return response.status, response.read().decode()


def multipart(*files: bytes) -> bytes:
    head = '--edge\r\nContent-Disposition: form-data; name="files"; filename="{}.png"\r\n\r\n'
    parts = [head.format(index).encode() + data + b"\r\n" for index, data in enumerate(files)]
    return b"".join(parts) + b"--edge--\r\n"


MULTIPART = "multipart/form-data; boundary=edge"


def test_other_sites_get_no_answer(address: str) -> None:
    own = address.removeprefix("http://")
    port = own.partition(":")[2]
    assert answer(address, "GET", "/config")[0] == 200
    assert answer(address, "GET", "/config", Host=f"localhost:{port}")[0] == 200
    for name in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example"):
        foreign = f"http://{name}:{port}"
        status, text = answer(address, "GET", "/config", Host=f"{name}:{port}", Origin=foreign)
        assert status == 400 and "components" not in text
        upload = {"body": multipart(b"x"), "Content_Type": MULTIPART, "Origin": foreign}
        assert answer(address, "POST", "/gradio_api/upload", **upload)[0] == 403  # type: ignore[arg-type]
    for origin in ("null", f"http://127.0.0.1:{int(port) - 1}", f"http://localhost:{port}"):
        assert answer(address, "GET", "/config", Origin=origin)[0] == 403
    assert answer(address, "GET", "/config", Origin=address)[0] == 200


def test_an_upload_is_one_file_of_bounded_size(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from llip_jax.explorer import guards

    def upload(body: bytes, path: str = "/gradio_api/upload", **headers: str) -> int:
        return answer(address, "POST", path, body, Content_Type=MULTIPART, **headers)[0]

    before = files()
    assert upload(multipart(b"one", b"two")) == 400
    assert upload(b"", Content_Length=str(UPLOAD.image_bytes + 2**16 + 1)) == 413
    assert upload(b"", Transfer_Encoding="chunked") == 411
    assert upload(multipart(bytes(UPLOAD.image_bytes + 1))) == 413
    for elsewhere in ("process_recording", "component_server"):
        assert upload(multipart(b"one"), f"/gradio_api/{elsewhere}") == 404
    assert files() == before
    picture = np.random.default_rng().bytes(100_000)  # uploaded and never asked for
    assert upload(multipart(picture)) == 200
    assert [path.read_bytes() for path in files() - before] == [picture]
    monkeypatch.setattr(guards, "MOST_KEPT", sum(path.stat().st_size for path in files()) + 50_000)
    assert upload(multipart(picture[::-1])) == 507
    assert upload(multipart(picture[:1000])) == 200
    assert len(files() - before) == 2


@needs_gradio
def test_a_page_for_all_addresses_answers_by_the_names_of_this_machine() -> None:
    from llip_jax.explorer.guards import host_names

    assert host_names("127.0.0.1") == ["127.0.0.1", "localhost"]
    assert host_names("Box.lan") == ["127.0.0.1", "localhost", "box.lan"]
    assert {"localhost", socket.gethostname().lower()} <= set(host_names("0.0.0.0"))


_ASKED: list[str] | None = None


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    """Notes the foreign hosts that this process asks for."""
    if _ASKED is None or event not in ("socket.connect", "socket.getaddrinfo"):
        return
    host = arguments[1][0] if event == "socket.connect" and isinstance(arguments[1], tuple) else arguments[0]
    if isinstance(host, str | bytes) and host not in ("127.0.0.1", "localhost", b"127.0.0.1", b"localhost"):
        _ASKED.append(str(host))


@pytest.fixture
def asked() -> Iterator[list[str]]:
    global _ASKED
    sys.addaudithook(_watch)  # for good
    _ASKED = []
    yield _ASKED
    _ASKED = None


@needs_gradio
def test_captions_typed_in_a_browser_change_scores_and_nothing_leaves_the_machine(
    asked: list[str], address: str, tmp_path: Path
) -> None:
    picture = pictures(1)[0]
    (tmp_path / "mine.png").write_bytes(png(picture))
    wrong = tmp_path / f"{'a-long-name-' * 8}.png"
    wrong.write_text("just some text")
    model = exhibit().model
    before = files()

    with chromium() as browser:
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
        thumbnails = page.locator("#examples .thumbnail-item")
        shown = [example.captions.partition("\n")[0] for example in exhibit().examples]
        assert [thumbnail.get_attribute("alt") for thumbnail in page.locator("#examples img").all()] == shown
        assert "selected" in thumbnails.first.get_attribute("class")
        page.locator("input[type=file]").set_input_files(tmp_path / "mine.png")
        page.locator("#captions textarea").fill("a red circle\na blue square")
        shows("a red circle", "a blue square")
        assert not any("selected" in thumbnail.get_attribute("class") for thumbnail in thumbnails.all())
        page.locator("#captions textarea").fill("a red circle\na ${6*7} {{value}} <b>star</b>")
        shows("a red circle", "a ${6*7} {{value}} <b>star</b>")
        assert page.locator("[aria-live=polite] figure").count() == 4

        page.locator("#classes textarea").fill("red circle\nblue square")
        page.get_by_role("button", name="Compare").click()
        page.get_by_text("Softmax over 2 classes").wait_for()
        red, blue = model.classify(picture, ["red circle", "blue square"], exhibit().templates)[0]
        assert page.locator("#guesses li").first.inner_text().startswith("red circle" if red > blue else "blue square")

        page.locator("#captions textarea").fill(" \n")
        page.get_by_text("Type a caption").wait_for()
        page.locator("input[type=file]").set_input_files(wrong)
        page.locator("#scores").get_by_text(f"{wrong.name}: this file cannot be used as a picture").wait_for()
        page.locator("#guesses").get_by_text("No picture").wait_for()
        assert page.locator("#scores figure, #guesses li").count() == 0
        thumbnails.first.click()
        page.locator("#scores figure").first.wait_for()

        assert not problems
        assert all(url.startswith((address, "data:", "blob:")) for url in requests)
    assert files() == before
    assert not asked


@pytest.mark.slow
@needs_gradio
def test_the_program_explores_a_trained_run_until_it_is_interrupted(tmp_path: Path) -> None:
    settings = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(COMPILATIONS),
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(tmp_path),
    }
    # SIGINT is ignored where the tests run in the background.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import runpy, sys; "
    program += "sys.argv[0] = 'launch/explore.py'; runpy.run_path(sys.argv[0], run_name='__main__')"
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", program, "--workdir", str(finished_run()), "--port", str(port)],
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
        assert answer(f"http://127.0.0.1:{port}", "GET", "/config")[0] == 200, printed
        process.send_signal(signal.SIGINT)
        printed += process.communicate(timeout=60)[0]
        assert process.returncode == 0, printed
        assert re.search(r"compiling \.\.\. [\d.]+ s\nevery user of this machine can open the page", printed), printed
        assert f"explorer: http://127.0.0.1:{port}/" in printed and "Traceback" not in printed, printed
        assert not list(tmp_path.glob("llip_jax_explorer_*"))
    finally:
        process.kill()
