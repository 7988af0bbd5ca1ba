"""Diagnostics as tables and charts: spectra together, everything else by the shape of its values."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from llip_jax.report.figures import is_number, label, number
from llip_jax.report.plots import Chart, Series, heat, lines

_LEADS = {
    "spectra": "Singular values, the largest set to 1. A curve that drops early uses few of its dimensions; the "
    "effective rank says how many.",
    "mixture": "How captions mix the learned image tokens, by head. Entropy is 1 where a head uses all alike, 0 where "
    "it settles on one; movement is the part of the weights that changes from one caption of an image to another.",
    "geometry": "Alignment (low is good): how near images are to their captions. Uniformity (low is good): how evenly "
    "embeddings are spread. Modality gap: how far the mean image is from the mean text.",
    "schur": "How varied the images are beyond what their texts say (Schur complement entropy).",
    "inversion": "Images of the same kind found by an image itself (intra-modal), and by a text made to stand for it "
    "(inter-modal).",
    "attribution": "How well words that do not fit are found: an image's own captions against those of other images.",
}
_FEW = 12
"""A list of so many numbers is written out; a longer one is drawn."""
_SMALLEST = 1e-7
"""Singular values below this part of the largest are rounding, and not drawn."""
_HEADS = ("mixture token", "head")
_AXES = {"token_use": _HEADS, "token_largest": _HEADS}
_TITLES = {
    "token_use": "Mean weight of each token",
    "token_largest": "How often a token has the largest weight",
    "schur": "Schur complement",
}


class Diagnostic(NamedTuple):
    """One analysis: charts, and a table whose ``rows`` are as long as ``columns``."""

    title: str
    lead: str
    charts: Sequence[Chart]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def diagnostics(results: Mapping[str, Any]) -> list[Diagnostic]:
    """Those that an evaluation holds, in its order."""
    found = []
    for name, values in results.get("diagnostics", {}).items():
        title, lead = _TITLES.get(name, label(name)), _LEADS.get(name, "")
        one = _spectra(title, lead, values) if name == "spectra" else _by_shape(title, lead, name, values)
        if one.rows or one.charts:
            found.append(one)
    return found


def _spectra(title: str, lead: str, spectra: Mapping[str, Any]) -> Diagnostic:
    """A line and a row of figures for each embedding."""
    known = {name: spectrum for name, spectrum in spectra.items() if isinstance(spectrum, Mapping)}
    series: list[Series] = []
    for name, spectrum in known.items():
        values = spectrum.get("singular_values")
        if _vector(values) and values[0] > 0:
            relative = [value / values[0] for value in values if value > _SMALLEST * values[0]]
            series.append(Series(label(name), range(1, len(relative) + 1), relative, len(series)))
    columns = dict.fromkeys(key for spectrum in known.values() for key, value in spectrum.items() if is_number(value))
    rows = [
        [label(name), *(number(value) if is_number(value := spectrum.get(column)) else "" for column in columns)]
        for name, spectrum in known.items()
    ]
    charts = [lines("spectra", "Singular values", series, x_label="number", log=True)] if series else []
    return Diagnostic(title, lead, charts, ["embedding", *(label(column).lower() for column in columns)], rows)


def _by_shape(title: str, lead: str, name: str, values: Mapping[str, Any]) -> Diagnostic:
    """Numbers become rows with the chance levels that stand beside them, longer lists lines, matrices squares."""
    rows: list[tuple[str, str, str]] = []
    charts: list[Chart] = []

    def add(path: tuple[str, ...], value: Any, chance: Any = None) -> None:
        key = f"diagnostic-{name}-{'-'.join(path)}"
        words = _TITLES.get(path[-1], label("/".join(path))) if path else title
        if isinstance(value, Mapping):
            for part, own in value.items():
                if part.removesuffix("_chance") not in value.keys() - {part}:
                    add((*path, part), own, value.get(f"{part}_chance"))
        elif is_number(value):
            rows.append((words, number(value), number(chance) if is_number(chance) else ""))
        elif isinstance(value, str | bool):
            rows.append((words, str(value), ""))
        elif _vector(value) and len(value) <= _FEW:
            rows.append((words, "  ".join(map(number, value)), ""))
        elif _vector(value):
            charts.append(lines(key, words, [Series(words, range(1, len(value) + 1), value)], x_label="number"))
        elif isinstance(value, list) and value and all(map(_vector, value)) and len(set(map(len, value))) == 1:
            x_label, y_label = _AXES.get(path[-1], ("column", "row"))
            charts.append(heat(key, words, value, x_label=x_label, y_label=y_label))

    add((), values)
    if not any(chance for *_, chance in rows):
        return Diagnostic(title, lead, charts, ["figure", "value"], [row[:2] for row in rows])
    return Diagnostic(title, lead, charts, ["figure", "value", "chance"], rows)


def _vector(values: Any) -> TypeGuard[list[float]]:
    return isinstance(values, list) and len(values) > 0 and all(map(is_number, values))
