"""Charts as SVG to be put into a page: matplotlib's, with the page's own type and colours, light or dark."""

import math
import re
from collections.abc import Mapping, Sequence
from io import StringIO
from types import MappingProxyType
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

_DASHES = ("", "5 2", "1.5 1.5", "6 2 1.5 2", "8 3", "3 1 1 1 1 1")
_INCHES = (3.1, 1.95)
"""Small, so that its letters are readable where a chart fills a phone's width."""
_INK, _GRID = "#0a0b01", "#0a0b02"
_COLOURS = tuple(f"#0a0c0{n}" for n in range(1, 7))
# Stand-ins that matplotlib writes, and the page's variables.
_VARIABLES = {_INK: "var(--soft)", _GRID: "var(--rule)"} | {
    colour: f"var(--series-{n})" for n, colour in enumerate(_COLOURS, start=1)
}
_POINTS = 400
"""More than can be told apart; longer series are averaged in blocks."""
_TICKS = 4

_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "xtick.major.size": 3,
}


class Series(NamedTuple):
    """A line: [n] values over [n] positions.

    place: number among the lines of the chart, which gives the line its look.
    intervals: low and high by position, of those that have any.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    place: int = 0
    intervals: Mapping[int, tuple[float, float]] = MappingProxyType({})


class Chart(NamedTuple):
    """A drawing, and what the page says about it. ``legend``: names and places of lines, where they need any."""

    title: str
    svg: Markup
    legend: Sequence[tuple[str, int]]


def stroke(place: int) -> tuple[int, str]:
    """Number of the page's colour, from 1, and dashes in SVG's terms, of a line: 36 looks, all colours first."""
    return place % len(_COLOURS) + 1, _DASHES[(place + place // len(_COLOURS)) % len(_DASHES)]


def lines(
    key: str,
    title: str,
    series: Sequence[Series],
    *,
    x_label: str = "step",
    share: bool = False,
    log: bool = False,
    chance: float | None = None,
) -> Chart:
    """Lines over a common axis.

    Args:
        key: of the chart alone in its page.
        title: for people.
        series: a few points are drawn as dots too.
        x_label: what x counts.
        share: y is written in per cent, from 0.
        log: y on a logarithmic axis.
        chance: where to draw a line for random guesses.
    """
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": key}):
        figure = Figure(_INCHES, layout="constrained")
        axes = figure.add_subplot()
        for one in series:
            x, y = (_thinned(values) for values in (one.x, one.y))
            number, dashes = stroke(one.place)
            colour, style = _COLOURS[number - 1], (0, [float(d) for d in dashes.split()]) if dashes else "solid"
            marker = "o" if len(x) <= 12 else ""
            axes.plot(x, y, color=colour, linestyle=style, linewidth=1.5, marker=marker, markersize=3.2)
            for position, (low, high) in one.intervals.items():
                axes.plot([position] * 2, [low, high], color=colour, linewidth=1, marker="_", markersize=5)
        if chance is not None:
            axes.axhline(chance, color=_INK, linewidth=0.9, linestyle=(0, (2, 2)))
        if share:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        places = sorted({x for one in series for x in one.x})
        axes.xaxis.set_major_locator(FixedLocator(places) if len(places) <= 4 else MaxNLocator(4, integer=True))
        positive = [value for one in series for value in one.y if value > 0]
        if log and positive:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(FixedLocator(_log_ticks(min(positive), max(positive))))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(_TICKS))
        form = (lambda value, _: f"{100 * value:g} %") if share else (lambda value, _: f"{value:,.6g}")
        axes.yaxis.set_major_formatter(FuncFormatter(form))
        axes.set_xlabel(x_label)
        named = [(one.label, one.place) for one in series] if len(series) > 1 else []
        return Chart(title, _svg(figure, key, title, _described(series, share)), named)


def _log_ticks(low: float, high: float) -> list[float]:
    """A few round numbers from the one to the other: 1, 2 and 5 of every decade, fewer of many decades."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1,)):
        ticks = [digit * 10.0**decade for decade in decades for digit in digits if low <= digit * 10.0**decade <= high]
        if 2 <= len(ticks) <= _TICKS + 1:
            return ticks
    if len(ticks) < 2:
        return [tick for tick in MaxNLocator(_TICKS).tick_values(low, high) if tick > 0]
    return ticks[:: -(-len(ticks) // _TICKS)]


def heat(key: str, title: str, values: Sequence[Sequence[float]], *, x_label: str, y_label: str) -> Chart:
    """A matrix [rows, columns] as squares, the fuller the larger the (non-negative) value."""
    matrix = np.nan_to_num(np.asarray(values, float))
    rows, columns = matrix.shape
    shares = np.clip(matrix / (max(matrix.max(), 0.0) or 1.0), 0, 1)
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": key, "axes.grid": False, "axes.spines.bottom": False}):
        figure = Figure((_INCHES[0], min(_INCHES[1], 0.6 + 0.25 * rows)), layout="constrained")
        axes = figure.add_subplot()
        for row in range(rows):
            for column in range(columns):
                place = (column + 0.54, row + 0.54)
                axes.add_patch(
                    Rectangle(place, 0.92, 0.92, facecolor=_COLOURS[0], alpha=0.05 + 0.95 * shares[row, column])
                )
        axes.set(xlim=(0.5, columns + 0.5), ylim=(rows + 0.5, 0.5), xlabel=x_label, ylabel=y_label)
        axes.tick_params(length=0)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        text = f"{rows} by {columns} values from {matrix.min():.3g} to {matrix.max():.3g}."
        return Chart(f"{title}: {matrix.min():.2g} to {matrix.max():.2g}", _svg(figure, key, title, text), [])


def _thinned(values: Sequence[float]) -> np.ndarray:
    """Means of equal blocks, so that at most _POINTS are left."""
    array = np.asarray(values, float)
    size = -(-len(array) // _POINTS)
    starts = np.arange(0, len(array), max(size, 1))
    return np.add.reduceat(array, starts) / np.diff(starts, append=len(array))


def _described(series: Sequence[Series], share: bool) -> str:
    """What a line does, in words."""
    unit = (lambda value: f"{value:.1%}") if share else (lambda value: f"{value:.4g}")
    return " ".join(
        f"{one.label}: {unit(one.y[0])} at {one.x[0]:g}, {unit(one.y[-1])} at {one.x[-1]:g}." for one in series
    )


def _svg(figure: Figure, key: str, title: str, description: str) -> Markup:
    """The drawing, as large as its place in the page, with words for those who do not see it."""
    key = re.sub(r"[^A-Za-z0-9]+", "-", key)
    stream = StringIO()
    nothing: Mapping[str, None] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(stream, metadata=nothing)
    drawn = stream.getvalue()
    width, height = (72 * inches for inches in figure.get_size_inches())
    inner = drawn[drawn.index("<svg") :].partition(">")[2]
    # Rules for every element of the page, if they stayed.
    inner = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", inner, flags=re.DOTALL)
    inner = re.sub(r"font: ([\d.]+)px [^;\"]*|font-family: [^;\"]*", _own_font, inner)
    inner = re.sub(r'\bid="', f'id="{key}-', inner)
    inner = re.sub(r'href="#', f'href="#{key}-', inner)
    inner = inner.replace("url(#", f"url(#{key}-")
    for colour, variable in _VARIABLES.items():
        inner = inner.replace(colour, variable)
    return Markup(
        f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="{key}-title {key}-desc">'
        f'<title id="{key}-title">{escape(title)}</title><desc id="{key}-desc">{escape(description)}</desc>'
        f"{inner}"
    )


def _own_font(found: re.Match[str]) -> str:
    return f"font-size: {found[1]}px" if found[1] else "font-family: inherit"
