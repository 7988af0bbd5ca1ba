"""Several runs side by side, and their differences query by query."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from llip_jax.config import ConfigError, differences
from llip_jax.evaluation.figures import Outcome, load_outcomes, paired_difference
from llip_jax.report.curves import evaluation_charts, training_charts
from llip_jax.report.exhibits import Mapped, Picture, read_exhibits
from llip_jax.report.figures import Row, label
from llip_jax.report.html import Section, write_page
from llip_jax.report.page import facts, figure_sets, split_difference
from llip_jax.report.run_files import Run, read_run


class Paired(NamedTuple):
    """One figure of two runs over the images of both: ``difference`` is the other's less the first's."""

    label: str
    images: int
    difference: float
    low: float
    high: float
    p: float


class Pairing(NamedTuple):
    """A run against the first one; ``notes``: what could not be paired."""

    name: str
    rows: list[Paired]
    notes: list[str]

    @property
    def reach(self) -> float:
        """The largest distance from 0 that any interval has: half the width of the drawing."""
        return max(max(abs(row.low), abs(row.high), abs(row.difference)) for row in self.rows) or 1.0


class MappedByRuns(NamedTuple):
    """What the captions of one image look at; ``runs``: by name, each run's maps and their pictures."""

    name: str
    runs: dict[str, tuple[Mapped, dict[str, Picture]]]


class SideBySide(NamedTuple):
    """The figures of one task: of each, its rows by run (None: it has none)."""

    title: str
    rows: list[tuple[str, list[Row | None]]]


def write_comparison(workdirs: Sequence[Path], out: Path) -> Path:
    """Writes a page that compares runs, each by its newest evaluation, with the first of them.

    Args:
        workdirs: two run directories or more.
        out: the HTML file.

    Returns:
        The file.

    Raises:
        ConfigError: fewer than two runs, one without an evaluation, a damaged file, or the page cannot be written.
    """
    if len(workdirs) < 2:
        raise ConfigError(f"--compare: expected at least two run directories, got {len(workdirs)}")
    runs = _named([read_run(Path(workdir)) for workdir in workdirs])
    for run in runs.values():
        if run.step is None:
            raise ConfigError(f"--compare: {run.workdir} has no evaluation; launch/evaluate.py makes one")
    (first, base), *others = runs.items()
    sections = [
        Section(
            "side-by-side",
            "Side by side",
            "Each run's own figures with their 95 % intervals. Intervals that overlap do not settle a comparison: the "
            "paired differences below are sharper.",
            {"runs": list(runs), "tables": _side_by_side(list(runs.values()))},
        ),
        Section(
            "paired",
            "Paired differences",
            f"The same queries answered by {first} and by another run: what that one gains (+) or loses (−), with a "
            "95 % interval of a bootstrap over images. An interval without 0 in it is a difference that other images "
            "would likely show too; other seeds of training may still differ.",
            [pair(name, base, other) for name, other in others],
        ),
        Section(
            "compared-maps",
            "What a caption looks at",
            "The same images and captions, as each run reads them.",
            _maps(runs),
        ),
        Section(
            "curves",
            "Curves",
            "All runs over each other.",
            {k: v for k, v in {"Training": training_charts(runs), "Evaluation": evaluation_charts(runs)}.items() if v},
        ),
        Section(
            "changes",
            "Configuration",
            f"What differs from {first}.",
            {
                "first": first,
                "changes": {
                    name: [split_difference(line) for line in differences(base.config, other.config)]
                    for name, other in others
                },
                "facts": {name: facts(run) for name, run in runs.items()},
            },
        ),
    ]
    return write_page(
        Path(out),
        title=" and ".join([", ".join(list(runs)[:-1]), list(runs)[-1]]),
        kind="Comparison of runs",
        facts={},
        headlines=[],
        sections=[section for section in sections if section.content],
        pictures={},
    )


def pair(name: str, base: Run, other: Run) -> Pairing:
    """Differences of all figures that both runs have outcomes of, over the images that both evaluated.

    Images are those of the same name, with as many queries in both runs: an image whose captions count differently was
    not asked the same.
    """
    notes = [
        f"{run.name} has no {run.step}.npz to pair by" for run in (base, other) if not _outcomes_file(run).exists()
    ]
    if notes:
        return Pairing(name, [], notes)
    (base_names, base_outcomes), (names, outcomes) = (load_outcomes(_outcomes_file(run)) for run in (base, other))
    rows = []
    unpaired = sorted(base_outcomes.keys() ^ outcomes.keys())
    of_other_sets = [key for key in base_outcomes if key.startswith("sets/")]
    for key in (key for key in base_outcomes if key in outcomes and key not in of_other_sets):
        aligned = align(base_outcomes[key], base_names, outcomes[key], names)
        if aligned is None:
            unpaired.append(key)
            continue
        before, after = aligned
        difference = paired_difference(after, before)
        rows.append(Paired(label(key), len(np.unique(after.unit)), **difference))
    common = len(set(base_names) & set(names))
    if common < max(len(base_names), len(names)):
        notes.append(f"{common} images are in both runs ({base.name}: {len(base_names)}, {name}: {len(names)})")
    if unpaired:
        notes.append(f"not in both runs: {', '.join(map(label, unpaired))}")
    if of_other_sets:
        notes.append("further evaluation sets are compared side by side only")
    return Pairing(name, rows, notes)


def align(a: Outcome, a_names: Sequence[str], b: Outcome, b_names: Sequence[str]) -> tuple[Outcome, Outcome] | None:
    """The queries of images that both have, row by row the same; None where there are none.

    Names that occur twice in a run are left out, and so are images with another number of queries.
    """
    a_rows, b_rows = _rows_by_name(a, a_names), _rows_by_name(b, b_names)
    names = [name for name in a_rows if name in b_rows and len(a_rows[name]) == len(b_rows[name])]
    if not names:
        return None
    unit = np.repeat(np.arange(len(names)), [len(a_rows[name]) for name in names])
    first, second = (
        outcome._replace(
            values=outcome.values[rows],
            unit=unit,
            weight=outcome.weight[rows],
            chance=None if outcome.chance is None else outcome.chance[rows],
        )
        for outcome, rows in (
            (a, np.concatenate([a_rows[name] for name in names])),
            (b, np.concatenate([b_rows[name] for name in names])),
        )
    )
    return first, second


def _rows_by_name(outcome: Outcome, names: Sequence[str]) -> dict[str, Int[np.ndarray, "q"]]:
    """The queries of each image, in their order."""
    order = np.argsort(outcome.unit, kind="stable")
    units, starts = np.unique(outcome.unit[order], return_index=True)
    times = Counter(names)
    return {
        names[unit]: rows
        for unit, rows in zip(units.tolist(), np.split(order, starts[1:]), strict=True)
        if times[names[unit]] == 1
    }


def _maps(runs: Mapping[str, Run]) -> list[MappedByRuns]:
    """The images that every run has maps of."""
    maps: dict[str, dict[str, tuple[Mapped, dict[str, Picture]]]] = {}
    for name, run in runs.items():
        exhibits, pictures = read_exhibits(run.workdir / "eval" / str(run.step))
        for mapped in exhibits.maps:
            maps.setdefault(mapped.name, {})[name] = (mapped, pictures)
    return [MappedByRuns(image, shown) for image, shown in maps.items() if len(shown) == len(runs)]


def _outcomes_file(run: Run) -> Path:
    return run.workdir / "eval" / f"{run.step}.npz"


def _named(runs: Sequence[Run]) -> dict[str, Run]:
    """Runs by their directories' names, numbered where these are alike."""
    times = Counter(run.name for run in runs)
    return {
        (run.name if times[run.name] == 1 else f"{run.name} ({number})"): run
        for number, run in enumerate(runs, start=1)
    }


def _side_by_side(runs: Sequence[Run]) -> list[SideBySide]:
    """Every figure that any run has, in the order of the runs."""
    found: dict[str, dict[str, list[Row | None]]] = {}
    labels: dict[str, str] = {}
    for place, run in enumerate(runs):
        for one in figure_sets(run.results):
            for table in one.tables:
                title = f"{table.title} ({one.title})" if one.title else table.title
                rows = found.setdefault(title, {})
                for row in table.rows:
                    labels[row.path] = row.label
                    rows.setdefault(row.path, [None] * len(runs))[place] = row
    return [
        SideBySide(title, [(labels[path], values) for path, values in rows.items()]) for title, rows in found.items()
    ]
