"""Several runs side by side, and their differences query by query."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from llip_jax.config import ConfigError, differences
from llip_jax.report.curves import curves
from llip_jax.report.exhibits import Mapped, Picture, read_exhibits
from llip_jax.report.figures import Row, headlines
from llip_jax.report.html import Section, write_page
from llip_jax.report.page import facts, figure_sets, split_difference
from llip_jax.report.pairing import Paired, Pairing, digests, pairings
from llip_jax.report.run_files import Run, read_run


class Headline(NamedTuple):
    """A headline figure of the first run and of another; ``paired``: None where they were asked different things."""

    label: str
    before: Row
    after: Row
    paired: Paired | None


class MappedByRuns(NamedTuple):
    """What the captions of one image look at; ``runs``: by name, each run's maps and their pictures."""

    name: str
    runs: dict[str, tuple[Mapped, dict[str, Picture]]]


class SideBySide(NamedTuple):
    """The figures of one task: of each, its rows by run (None: it has none). ``note``: how it was done."""

    title: str
    note: str
    runs: list[str]
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
    paired = {name: pairings(base, other) for name, other in others}
    tables, alone = _side_by_side(runs)
    sections = [
        Section(
            "paired",
            "Paired differences",
            f"The same queries answered by {first} and by another run: what that one gains (+) or loses (−), in "
            "points, with a 95 % interval of a bootstrap over images. An interval without 0 in it is a difference that "
            "other images would likely show too; other seeds of training may still differ. Many figures are compared: "
            "one in twenty has p below 0.05 by chance alone.",
            paired,
        ),
        Section(
            "side-by-side",
            "Side by side",
            "Each run's own figures with their 95 % intervals. Intervals that overlap do not settle a comparison: "
            "paired differences are sharper.",
            {"tables": tables, "alone": alone},
        ),
        Section(
            "compared-maps",
            "What a caption looks at",
            "The same images and captions, as each run reads them; each map is scaled by itself.",
            _maps(runs),
        ),
        curves(runs, "All runs over each other."),
        Section(
            "changes",
            "Configuration",
            f"What differs from {first}.",
            {
                "first": first,
                "changes": {name: _changes(base, other) for name, other in others},
                "facts": {name: facts(run) for name, run in runs.items()},
            },
        ),
    ]
    return write_page(
        Path(out),
        title=" and ".join([", ".join(list(runs)[:-1]), list(runs)[-1]]),
        kind="Comparison of runs",
        facts={name: f"evaluated {facts(run)['Evaluated']}" for name, run in runs.items()},
        headlines=Section(
            "differences",
            "Headline figures",
            first,
            {name: _headlines(base, runs[name], paired[name]) for name in paired},
        ),
        sections=[section for section in sections if section.content],
        pictures={},
    )


def _headlines(base: Run, other: Run, paired: Sequence[Pairing]) -> list[Headline]:
    """The headline figures that both runs have."""
    known = {row.row.path: row for own in paired if not own.set for rows in own.tasks.values() for row in rows}
    before = {row.path: row for row in headlines(base.results)}
    return [
        Headline(row.label, before[row.path], row, known.get(row.path))
        for row in headlines(other.results)
        if row.path in before
    ]


def _changes(base: Run, other: Run) -> list[tuple[str, str, str]]:
    """Fields of the configuration, and what the evaluations changed of it, where the runs differ."""
    found = [split_difference(line) for line in differences(base.config, other.config)]
    overrides = [" ".join(run.results.get("overrides", [])) or "as trained" for run in (base, other)]
    return found + ([("(evaluated with)", overrides[0], overrides[1])] if overrides[0] != overrides[1] else [])


def _maps(runs: Mapping[str, Run]) -> list[MappedByRuns]:
    """The images that every run has maps of, for the same captions."""
    known = [digests(run) for run in runs.values()]
    maps: dict[tuple[str, tuple[str, ...]], dict[str, tuple[Mapped, dict[str, Picture]]]] = {}
    for name, run in runs.items():
        exhibits, pictures = read_exhibits(run.workdir / "eval" / str(run.step))
        for mapped in exhibits.maps:
            key = (mapped.name, tuple(caption.text for caption in mapped.captions))
            maps.setdefault(key, {})[name] = (mapped, pictures)
    return [
        MappedByRuns(image, shown)
        for (image, _), shown in maps.items()
        if len(shown) == len(runs) and all(image in own and own[image] == known[0].get(image) for own in known)
    ]


def _named(runs: Sequence[Run]) -> dict[str, Run]:
    """Runs by their directories' names, numbered where these are alike."""
    times = Counter(run.name for run in runs)
    names = [run.name if times[run.name] == 1 else f"{run.name} ({number})" for number, run in enumerate(runs, start=1)]
    return {name: run._replace(shown_as=name) for name, run in zip(names, runs, strict=True)}


def _side_by_side(runs: Mapping[str, Run]) -> tuple[list[SideBySide], dict[str, list[str]]]:
    """Tasks that several runs have done, with the runs that have; and by run those that it alone has done."""
    found: dict[str, dict[str, dict[str, Row]]] = {}
    notes: dict[str, dict[str, list[str]]] = {}
    for name, run in runs.items():
        for one in figure_sets(run.results):
            for table in one.tables:
                title = f"{table.title} ({one.title})" if one.title else table.title
                found.setdefault(title, {})[name] = {row.path: row for row in table.rows}
                notes.setdefault(title, {}).setdefault(table.note, []).append(name)
    tables, alone = [], dict[str, list[str]]()
    for title, by_run in found.items():
        if len(by_run) == 1:
            alone.setdefault(next(iter(by_run)), []).append(title)
            continue
        names = {path: row.name for rows in by_run.values() for path, row in rows.items()}
        rows = [(name, [own.get(path) for own in by_run.values()]) for path, name in names.items()]
        own = notes[title]
        note = (
            next(iter(own)) if len(own) == 1 else "; ".join(f"{', '.join(own[text])}: {text}" for text in own if text)
        )
        tables.append(SideBySide(title, note, list(by_run), rows))
    return tables, alone
