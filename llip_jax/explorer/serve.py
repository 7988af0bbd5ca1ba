"""The explorer of a model: from its files to a page that is served."""

import contextlib
import importlib.util
import ipaddress
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from llip_jax.config import Config, ConfigError
from llip_jax.data.evaluation_sets import label_names
from llip_jax.data.records import BadSample
from llip_jax.data.sources import build_source
from llip_jax.evaluation.class_texts import class_spec, read_templates
from llip_jax.explorer.content import BLOCK, MOST_CLASSES, UPLOAD, Example, Exhibit, read_picture, warm_up
from llip_jax.inference import load
from llip_jax.training import run_directory
from llip_jax.training.checkpoints import Checkpoints

_SAMPLES = 1000
"""Samples of the evaluation set that are read for its classes, at most; evenly spread."""
_EXAMPLES = 12
_EXAMPLE_CAPTIONS = 3


def explore(path: Path, step: int | None = None, host: str = "127.0.0.1", port: int | None = None) -> None:
    """Serves the explorer of a model until Ctrl-C or SIGTERM.

    Args:
        path: anything that :func:`llip_jax.load` takes.
        step: checkpoint of a run directory; None: the newest.
        host: name or IPv4 address to listen on.
        port: None: the first free one from 7860 on.

    Raises:
        ConfigError: Gradio is not installed, the address cannot be listened on, or what is at ``path`` cannot be shown.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("the explorer needs Gradio: pip install 'llip_jax[report]'")
    _check_address(host, port)
    exhibit = load_exhibit(path, step)
    print(f"{exhibit.name}: {exhibit.model}, {len(exhibit.examples)} examples, {len(exhibit.classes):,} class names")
    print("compiling ...", end=" ", flush=True)
    start = time.perf_counter()
    warm_up(exhibit)
    print(f"{time.perf_counter() - start:.1f} s")
    with served(exhibit, host, port) as url:
        who = "every user of this machine" if _is_loopback(host) else "warning: whoever reaches this machine by network"
        print(f"{who} can open the page, and see what it shows of the model and the evaluation set")
        print(f"explorer: {url} (Ctrl-C ends it)", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


@contextlib.contextmanager
def served(exhibit: Exhibit, host: str, port: int | None) -> Iterator[str]:
    """The page's address, at which it is served meanwhile."""
    with tempfile.TemporaryDirectory(prefix="llip_jax_explorer_") as uploads:
        # Gradio asks its own server whether it is up, which no proxy knows.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": uploads, "no_proxy": "*"}
        from llip_jax.explorer.guards import guards
        from llip_jax.explorer.page import CSS, THEME, build_page

        page = build_page(exhibit)
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            inline=False,
            prevent_thread_lock=True,
            quiet=True,
            max_file_size=UPLOAD.image_bytes,
            app_kwargs={"middleware": guards(host, Path(uploads))},
            state_session_capacity=64,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            ssr_mode=False,
            pwa=False,
            theme=THEME,
            css=CSS,
        )
        try:
            yield url
        finally:
            page.close(verbose=False)


def load_exhibit(path: Path, step: int | None = None) -> Exhibit:
    """A model with examples and class names of its run's evaluation set, where that can be read.

    Args:
        path: anything that :func:`llip_jax.load` takes.
        step: checkpoint of a run directory; None: the newest.

    Raises:
        ConfigError: no such weights or checkpoint, or weights without a tokenizer.
    """
    workdir = path.parent.parent if path.parent.name == "checkpoints" else path
    if not (workdir / "checkpoints").is_dir():
        if step is not None:
            raise ConfigError(f"--step: {path} is no run directory, so it has no checkpoint {step}")
        model = load(path, batch_size=BLOCK)
        _ = model.tokenizer  # Without one nothing can be typed.
        return Exhibit(model, path.resolve().stem)
    config = run_directory.read_config(workdir)
    if path == workdir:
        with contextlib.closing(Checkpoints(workdir / "checkpoints", config.checkpoint, read_only=True)) as checkpoints:
            step = checkpoints.latest if step is None else step
        path = workdir if step is None else workdir / "checkpoints" / str(step)
    model, name = load(path, batch_size=BLOCK), f"{workdir.resolve().name}, step {path.name}"
    try:
        return Exhibit(model, name, *read_evaluation_set(config))
    except (ConfigError, OSError) as error:
        print(f"no examples, as the run's evaluation set cannot be read: {error}")
        return Exhibit(model, name)


def read_evaluation_set(config: Config) -> tuple[list[Example], list[str], Sequence[str]]:
    """Examples, class names and prompt templates of a run's own evaluation set; reads a bounded number of samples.

    Raises:
        ConfigError: data or class texts that are missing or not as expected.
        OSError: data that cannot be read.
    """
    source = build_source(config.data, "eval", config.model.image_size)
    templates = read_templates(config.eval.templates_from) if config.eval.templates_from else config.eval.templates
    examples: list[Example] = []
    labels: set[str] = set()
    count = min(len(source), _SAMPLES)
    for number, index in enumerate(np.linspace(0, len(source) - 1, count).astype(int).tolist()):
        try:
            record = source[index]
            if config.data.label_field is not None:
                labels.update(map(str, label_names(record, config.data.label_field)))
            if number % max(1, count // _EXAMPLES) == 0 and len(examples) < _EXAMPLES:
                subject = read_picture(record.image, config.model.image_size, config.data.limits)
                examples.append(Example(subject, "\n".join(record.captions[: record.specific][:_EXAMPLE_CAPTIONS])))
        except (BadSample, OSError, ConfigError):
            continue
    if config.eval.classes:
        return examples, list(class_spec(config.eval.classes, templates).names[:MOST_CLASSES]), templates
    return examples, sorted(labels)[:MOST_CLASSES], templates


def _check_address(host: str, port: int | None) -> None:
    """Raises ConfigError where nobody can listen there: now, and not after a model has been loaded."""
    if port is not None and not 1 <= port <= 65535:
        raise ConfigError(f"--port: {port} is not valid: expected 1 to 65535")
    try:
        socket.create_server((host, port or 0)).close()
    except OSError as error:
        flag = "--host" if port is None else f"--port {port}"
        raise ConfigError(f"{flag}: cannot listen on {host}: {error.strerror or error}") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
