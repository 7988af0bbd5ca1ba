"""Where numbers go: metrics.jsonl, TensorBoard, and the progress bar."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import jax
from tqdm import tqdm

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file that is either the old or the new one, never half of it."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


class MetricsWriter:
    """Appends one object a logged step to metrics.jsonl, and the same to TensorBoard.

    start_step: lines of later steps, left by a run that died after its last checkpoint, are dropped, so that the file
    holds every step once. ``workdir`` is None in all processes but the first, which write nothing.
    """

    def __init__(self, workdir: Path | None, start_step: int):
        self._file: TextIO | None = None
        if workdir is None:
            return
        self._path = workdir / "metrics.jsonl"
        self._keep_until(start_step)
        self._file = self._path.open("a")
        self._tensorboard = _summary_writer(workdir / "tensorboard", start_step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line; None becomes null."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        self.scalars(step, values)

    def scalars(self, step: int, values: Mapping[str, Any], prefix: str = "") -> None:
        """Numbers for TensorBoard only."""
        if self._file is None:
            return
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._tensorboard.add_scalar(prefix + name, value, step)

    def close(self) -> None:
        """Flushes both."""
        if self._file is None:
            return
        self._file.close()
        self._tensorboard.close()

    def _keep_until(self, step: int) -> None:
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines():
            try:
                if json.loads(line)["step"] > step:
                    break
            except ValueError:  # a line cut off by a kill is the last one
                break
            kept.append(line + "\n")
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, self._path)


def _summary_writer(folder: Path, first_step: int) -> "SummaryWriter":
    # tensorboardX imports torch wherever there is one, for things other than scalars: seconds of every start.
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter(str(folder), purge_step=first_step, flush_secs=10)


def progress_bar(total: int, initial: int, unit: str, label: str, *, keep: bool = True, delay: float = 0) -> Any:
    """The first process's bar on standard error, with rate and time left; every ten seconds if that is no terminal."""
    interactive = sys.stderr.isatty()
    return tqdm(
        total=total,
        disable=jax.process_index() != 0,
        initial=initial,
        unit=unit,
        desc=label,
        leave=keep,
        delay=delay,
        mininterval=0.5 if interactive else 10,
        dynamic_ncols=interactive,
        smoothing=0.1,
    )


@contextlib.contextmanager
def progress_of(total: int, unit: str, label: str) -> Iterator[Callable[[int], Any]]:
    """A progress bar that comes after two seconds and goes when all is done.

    Its value takes what has been done since the last call.
    """
    with progress_bar(total, 0, unit, label, keep=False, delay=2) as bar:
        yield bar.update
