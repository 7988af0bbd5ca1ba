"""A run directory's files, read and checked."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pydantic
from typing_extensions import TypedDict

from llip_jax.config import Config, ConfigError, resolve
from llip_jax.sessions import FILE, Session, read_sessions

_T = TypeVar("_T")
_LINES = 4000
"""Of metrics.jsonl, at most: more than can be drawn."""


class _SetResults(TypedDict, total=False):
    """What eval/STEP.json holds of a set beside the figures of its tasks."""

    __pydantic_config__ = pydantic.ConfigDict(extra="allow")  # type: ignore[misc]
    images: int
    unreadable_images: int
    texts: int
    classes: int
    asked: dict[str, str]
    groups: dict[str, dict[str, dict[str, float | None]]]
    diagnostics: dict[str, dict[str, Any]]
    left_out: dict[str, str]


class _Robustness(TypedDict, total=False):
    """Of a set and its variants, beside the figures."""

    __pydantic_config__ = pydantic.ConfigDict(extra="allow")  # type: ignore[misc]
    members: list[str]
    worst_member: str


class _Results(_SetResults, total=False):
    """The whole of it, the run's own set at the top."""

    step: pydantic.StrictInt
    overrides: list[str]
    sets: dict[str, _SetResults]
    robustness: dict[str, _Robustness]


class _Line(TypedDict):
    """A line of metrics.jsonl."""

    __pydantic_config__ = pydantic.ConfigDict(extra="allow")  # type: ignore[misc]
    step: pydantic.StrictInt


class Run(NamedTuple):
    """What the pages show of a run.

    evaluations: of every step that was evaluated, in order.
    step: of the evaluation that is shown in detail; None: there is none.
    shown_as: a name in place of the directory's.
    """

    workdir: Path
    config: Config
    metrics: Sequence[Mapping[str, Any]]
    parameters: str
    evaluations: Mapping[int, Mapping[str, Any]]
    step: int | None
    sessions: Sequence[Session] = ()
    shown_as: str = ""

    @property
    def name(self) -> str:
        """The directory's own name, or the one that it is shown as."""
        return self.shown_as or self.workdir.resolve().name

    @property
    def results(self) -> Mapping[str, Any]:
        """The evaluation that is shown; empty where there is none."""
        return {} if self.step is None else self.evaluations[self.step]

    @property
    def sets(self) -> dict[str, Mapping[str, Any]]:
        """The results of every set, the run's own by the name ''."""
        return {"": self.results, **self.results.get("sets", {})}


_RESULTS: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(_Results)
_LINE: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(_Line)


def read_run(workdir: Path, step: int | None = None) -> Run:
    """Reads all but exhibits and outcomes; what is missing is left out, but for config.json.

    Args:
        workdir: the run directory.
        step: the evaluation to show; None: the newest.

    Raises:
        ConfigError: no run, no evaluation of that step, or a damaged file.
    """
    path = workdir / "config.json"
    try:
        config = resolve(json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"no run in {workdir} (no config.json)") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    steps = sorted(int(path.stem) for path in (workdir / "eval").glob("*.json") if path.stem.isdecimal())
    if step is not None and step not in steps:
        raise ConfigError(f"step {step} has no evaluation in {workdir}; those there are: {steps or 'none'}")
    return Run(
        workdir,
        config,
        _metrics(workdir / "metrics.jsonl"),
        (_text(workdir / "model.txt") or "").strip(),
        {done: parsed(_RESULTS, workdir / "eval" / f"{done}.json") for done in steps},
        steps[-1] if step is None and steps else step,
        read_sessions(workdir / FILE),
    )


def parsed(adapter: pydantic.TypeAdapter[_T], path: Path) -> _T:
    """A JSON file of a known shape; raises ConfigError naming file and place."""
    try:
        return adapter.validate_python(json.loads(path.read_text()))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def _metrics(path: Path) -> list[dict[str, Any]]:
    """The lines, evenly thinned where there are many, with the last one.

    A line without its end, cut off by a kill or being written, does not count.
    """
    kept: list[dict[str, Any]] = []
    last, stride = None, 1
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    last = _LINE.validate_json(line)
                except ValueError:
                    shown = line[:80].decode(errors="replace").rstrip()
                    raise ConfigError(f"{path}:{number}: expected a JSON object with a step, got {shown!r}") from None
                if (number - 1) % stride == 0:
                    kept.append(last)
                if len(kept) > _LINES:
                    kept, stride = kept[::2], 2 * stride
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{path}: {error}") from None
    return kept if last is None or kept[-1] is last else [*kept, last]
