"""Diagnostics as tables and charts: known figures in words, others by the shape of their values."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from llip_jax.report.diagnostic_words import LAYOUTS, TITLES, Layout
from llip_jax.report.figures import in_words, is_number, label, number
from llip_jax.report.plots import Chart, Series, heat, lines

_FEW = 12
"""A list of so many numbers is written out; a longer one is drawn."""
_SMALLEST = 1e-7
"""Singular values below this part of the largest are rounding, and not drawn."""
_SPECTRA = {
    "effective_rank": "effective rank",
    "participation_ratio": "participation ratio",
    "mean_length": "length of the mean",
    "dimensions": "dimensions",
    "images": "rows",
}


class Cell(NamedTuple):
    """A value and its chance level, as they are written; '' for what there is none of."""

    text: str = ""
    chance: str = ""


class GridRow(NamedTuple):
    """A figure, what it means in a few words, and its values."""

    label: str
    meaning: str
    cells: Sequence[Cell]


class Grid(NamedTuple):
    """Rows as long as ``columns``. ``title`` stands above the rows' labels."""

    title: str
    columns: Sequence[str]
    rows: Sequence[GridRow]

    @property
    def chance_column(self) -> bool:
        """Whether chance levels have a column: beside a single value. Beside several they stand below each."""
        return len(self.columns) == 1 and any(cell.chance for row in self.rows for cell in row.cells)


class Diagnostic(NamedTuple):
    """One analysis. ``counts``: of what, in a line."""

    title: str
    lead: str
    charts: Sequence[Chart]
    grids: Sequence[Grid]
    counts: str = ""


def diagnostics(results: Mapping[str, Any]) -> list[Diagnostic]:
    """Those that an evaluation holds, in its order."""
    found = []
    for name, values in results.get("diagnostics", {}).items():
        layout = LAYOUTS.get(name, Layout())
        title = TITLES.get(name, label(name))
        one = _spectra(title, layout, values) if name == "spectra" else _analysis(name, title, layout, values)
        if one.grids or one.charts:
            found.append(one)
    return found


def _spectra(title: str, layout: Layout, spectra: Mapping[str, Any]) -> Diagnostic:
    """A line and a row of figures for each embedding."""
    known = {name: spectrum for name, spectrum in spectra.items() if isinstance(spectrum, Mapping)}
    series: list[Series] = []
    for name, spectrum in known.items():
        values = spectrum.get("singular_values")
        if _vector(values) and values[0] > 0:
            relative = [value / values[0] for value in values if value > _SMALLEST * values[0]]
            series.append(Series(label(name), range(1, len(relative) + 1), relative, len(series)))
    keys = dict.fromkeys(key for spectrum in known.values() for key, value in spectrum.items() if is_number(value))
    rows = [
        GridRow(label(name), "", [Cell(number(value) if is_number(value := spectrum.get(key)) else "") for key in keys])
        for name, spectrum in known.items()
    ]
    charts = [lines("spectra", "Singular values", series, x_label="number", log=True)] if series else []
    grid = Grid("embedding", [_SPECTRA.get(key, label(key).lower()) for key in keys], rows)
    return Diagnostic(title, layout.lead, charts, [grid] if keys else [])


def _analysis(name: str, title: str, layout: Layout, values: Mapping[str, Any]) -> Diagnostic:
    """Known figures where their layout says, then what is left by the shape of its values."""
    leaves = dict(_leaves(values))
    used: set[str] = set()

    def cell(path: str) -> Cell:
        chance_path = layout.chance.get(path, f"{path}_chance")
        used.update((path, chance_path))
        value, chance = leaves.get(path), leaves.get(chance_path)
        return Cell("" if value is None else in_words(value), number(chance) if is_number(chance) else "")

    rows = [GridRow(row.label, row.meaning, [cell(path) for path in row.paths]) for row in layout.rows]
    if (named := layout.named) is not None:
        rows += [GridRow(named.label(path), named.meaning, [cell(path)]) for path in leaves if named.matches(path)]
    heads = {key: leaves[key] for key in layout.by_head if _vector(leaves.get(key))}
    counts = {key: text.format(in_words(leaves[key])) for key, text in layout.counts.items() if key in leaves}
    used.update(heads, counts)
    charts, others = [], []
    for path, value in leaves.items():
        if path in used or (path.endswith("_chance") and path.removesuffix("_chance") in leaves):
            continue
        key, words = f"diagnostic-{name}-{path}", TITLES.get(path.rpartition("/")[2], label(path))
        if _vector(value) and len(value) > _FEW:
            charts.append(lines(key, words, [Series(words, range(1, len(value) + 1), value)], x_label="number"))
        elif _vector(value):
            others.append(GridRow(words, "", [Cell("  ".join(map(number, value)))]))
        elif isinstance(value, list) and value and all(map(_vector, value)) and len(set(map(len, value))) == 1:
            x_label, y_label = layout.axes
            charts.append(heat(key, words, value, x_label=x_label, y_label=y_label))
        elif is_number(value) or isinstance(value, str | bool):
            others.append(GridRow(words, "", [cell(path)]))
    grids = [*_grids(layout.columns, rows, others), _heads(layout, heads)]
    return Diagnostic(title, layout.lead, charts, [grid for grid in grids if grid.rows], ", ".join(counts.values()))


def _grids(columns: Sequence[str], known: Sequence[GridRow], others: Sequence[GridRow]) -> Iterator[Grid]:
    """Rows of several values in one table, without the columns that nothing is in; those of one value in another."""
    several = [row for row in known if len(row.cells) > 1 and any(cell.text for cell in row.cells)]
    used = [i for i in range(len(columns)) if any(len(row.cells) > i and row.cells[i].text for row in several)]
    single = [row for row in [*known, *others] if len(row.cells) == 1 and row.cells[0].text]
    filled = [row._replace(cells=[row.cells[i] if i < len(row.cells) else Cell() for i in used]) for row in several]
    if len(used) == 1:  # its name would say that there is another one
        single, filled = [*filled, *single], []
    yield Grid("figure", [columns[i] for i in used], filled)
    yield Grid("figure", ["value"], single)


def _heads(layout: Layout, heads: Mapping[str, Sequence[float]]) -> Grid:
    """A column a head."""
    most = max(map(len, heads.values()), default=0)
    rows = [
        GridRow(*layout.by_head[key], [Cell(number(value)) for value in values] + [Cell()] * (most - len(values)))
        for key, values in heads.items()
    ]
    return Grid("by head", [number(head) for head in range(1, most + 1)], rows)


def _leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """What is no mapping, by its path."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{key}/")
        elif value is not None:
            yield f"{path}{key}", value


def _vector(values: Any) -> TypeGuard[list[float]]:
    return isinstance(values, list) and len(values) > 0 and all(map(is_number, values))
