"""Plots of the rows of ``benchmarks/ladder.py``. Needs matplotlib (extra ``report``)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from benchmarks.evidence.rows import (
    ARMS,
    COLOURS_ALONE,
    EMOJI,
    KINDS,
    LADDER,
    LLIP,
    MAIN,
    TOKENS,
    TOPICS,
    Interval,
    Rows,
    ablations,
    arms_of,
    by_scale,
    chance_of,
    colours_alone,
    colours_alone_of,
    field_name,
    interval,
    label_name,
    select,
    topics_name,
    values,
)

STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "figure.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 6,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": 150,
}
_DOTTED: dict[str, Any] = {"color": "#555555", "linestyle": (0, (1, 2)), "linewidth": 1.4, "zorder": 1}
DOTS = "%  (small dots: seeds; bars: 95 % interval of their mean; dashed: chance"


def _panel(axes: Axes, arms: dict[str, Rows], figure: str) -> None:
    """A line for each arm: its seeds, their mean and its interval; dashed and dotted: levels to compare with."""
    for height, (arm, own) in enumerate(arms.items()):
        style, found = ARMS[arm], _percent(own, figure)
        sample = [100 * value for value in values(own, figure).values()]
        axes.plot(sample, [height + 0.28] * len(sample), ".", color=style.colour, alpha=0.6, markersize=6, mew=0)
        axes.errorbar(found.mean, height, xerr=_half(found), fmt=style.marker, color=style.colour, capsize=3)
    axes.set_yticks(range(len(arms)), [ARMS[arm].name for arm in arms])
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    _chance(axes.axvline, [row for own in arms.values() for row in own], figure)


def _half(found: Interval) -> float | None:
    return found.high - found.mean if found.n > 1 else None


def _chance(draw: Callable[..., Any], rows: Rows, figure: str) -> None:
    if (chance := chance_of(rows, figure)) is not None:
        draw(100 * chance, color="#555555", linestyle=(0, (4, 3)), linewidth=1, label="chance", zorder=1)
    if (level := colours_alone_of(rows, figure)) is not None:
        draw(100 * level, label=COLOURS_ALONE, **_DOTTED)


def _curve(axes: Axes, arm: str, points: dict[float, Interval], **style: Any) -> None:
    own = ARMS[arm]
    means, halves = [i.mean for i in points.values()], [_half(i) or 0 for i in points.values()]
    marker = {"color": own.colour, "marker": own.marker, "label": own.name, "capsize": 3}
    axes.errorbar([*points], means, yerr=halves, **{**marker, **style})


def _percent(rows: Rows, figure: str) -> Interval:
    return interval(100 * value for value in values(rows, figure).values())


def _ladder_plot(rows: Rows) -> Figure | None:
    runs = {topics: arms_of(rows, LADDER, topics) for topics in (6, 1)}
    columns = [topics for topics, own in runs.items() if own]
    if not columns:
        return None
    drawing = Figure((6.2 if len(columns) == 1 else 9, 7.4), layout="constrained")
    panels = drawing.subplots(len(MAIN), len(columns), sharex=True, sharey=True, squeeze=False)
    for topics, column in zip(columns, panels.T, strict=True):
        arms = {arm: runs[topics].get(arm, []) for arm in LADDER if any(arm in own for own in runs.values())}
        for figure, axes in zip(MAIN, column, strict=True):
            _panel(axes, arms, figure)
            axes.set_title(f"{label_name(figure)}, {topics_name(topics)}")
    panels[0, 0].set_xlim(-2, 102)
    drawing.suptitle("ToyWorld's shelf, by arm")
    drawing.supxlabel(f"{DOTS}; dotted: {COLOURS_ALONE})", fontsize=10)
    return drawing


def _topics_plot(rows: Rows) -> Figure | None:
    found = {arm: {n: own for n in TOPICS if (own := select(rows, arm, n))} for arm in LADDER}
    if max(map(len, found.values())) < 2:
        return None
    drawing = Figure((8, 4.4), layout="constrained")
    axes = drawing.subplots()
    for number, (arm, runs) in enumerate(found.items()):
        if runs:  # side by side, so that no interval hides another; no line across what was not run
            shift = 0.05 * (number - len(LADDER) // 2)
            _curve(axes, arm, {n + shift: _percent(runs.get(n, []), "zero_shot") for n in TOPICS})
    _chance(axes.axhline, [row for runs in found.values() for own in runs.values() for row in own], "zero_shot")
    axes.plot([*TOPICS], [100 * colours_alone(n) for n in TOPICS], label=COLOURS_ALONE, **_DOTTED)
    axes.set(xlabel="topics: a caption names one of the first n objects", ylabel="zero-shot accuracy, %", ylim=(0, 102))
    drawing.legend(loc="outside right center")
    drawing.suptitle("Zero-shot accuracy by how many things an image's captions speak of")
    return drawing


def _tokens_plot(rows: Rows) -> Figure | None:
    arms = arms_of(rows, TOKENS)
    if len(arms) < 2:
        return None
    drawing = Figure((10, 3.8), layout="constrained")
    for figure, axes in zip(MAIN, drawing.subplots(1, len(MAIN), sharey=True), strict=True):
        _curve(axes, LLIP, {TOKENS[arm]: _percent(own, figure) for arm, own in arms.items()}, label="Llip")
        for arm, own in arms_of(rows, ("siglip", "registers", "average")).items():
            axes.axhline(_percent(own, figure).mean, color=ARMS[arm].colour, linestyle="--", label=ARMS[arm].name)
        axes.set_xscale("log", base=2)
        axes.set_xticks([*TOKENS.values()], [str(k) for k in TOKENS.values()])
        axes.minorticks_off()
        axes.set(title=label_name(figure), xlabel="mixture tokens K", ylim=(0, 102))
        _chance(axes.axhline, [row for own in arms.values() for row in own], figure)
    drawing.axes[0].set_ylabel("%")
    drawing.legend(*drawing.axes[0].get_legend_handles_labels(), loc="outside right center")
    drawing.suptitle(f"Llip by the number of its mixture tokens, {topics_name(6)}")
    return drawing


def _spectrum_plot(rows: Rows) -> Figure | None:
    arms = arms_of(rows, ("siglip", "registers", "average", LLIP))
    if not arms:
        return None
    drawing = Figure((10, 4), layout="constrained")
    titles = {"scored": "the embedding that pairs are scored with", "tower": "the vision tower's output"}
    for (name, title), axes in zip(titles.items(), drawing.subplots(1, 2), strict=True):
        for arm, own in arms.items():
            spectra = np.asarray([row["spectrum"][name] for row in own])
            mean = (spectra / spectra[:, :1]).mean(axis=0)
            style = {"color": ARMS[arm].colour, "marker": ARMS[arm].marker, "markevery": max(1, len(mean) // 8)}
            axes.plot(range(1, len(mean) + 1), mean, label=ARMS[arm].name, **style)
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(1e-3, axes.get_ylim()[0]))
        axes.set(title=title, xlabel="singular value, largest first")
    drawing.axes[0].set_ylabel("relative to the largest (mean over seeds)")
    drawing.axes[0].legend(loc="lower left")
    drawing.suptitle(f"Singular values of the image embeddings, {topics_name(6)}")
    return drawing


def _curves_plot(rows: Rows) -> Figure | None:
    arms = {arm: own for arm, own in arms_of(rows, LADDER).items() if arm != "clip"}  # CLIP has another loss.
    if not arms:
        return None
    drawing = Figure((7, 4.2), layout="constrained")
    axes = drawing.subplots()
    for arm, own in arms.items():
        losses = np.mean([row["curve"]["loss"] for row in own], axis=0)
        axes.plot(own[0]["curve"]["step"], losses, color=ARMS[arm].colour, label=ARMS[arm].name)
    axes.set(xlabel="step", ylabel="training loss (mean over seeds)", yscale="log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    axes.grid(visible=True, which="both")
    axes.set_title(f"Training loss by arm, {topics_name(6)}")
    axes.legend()
    return drawing


def _ablations_plot(rows: Rows) -> Figure | None:
    groups = ablations(rows)
    if not groups:
        return None
    columns = min(len(groups), 2)
    height = -(-len(groups) // columns)
    drawing = Figure((4.5 * columns, 2.7 * height + 0.6), layout="constrained")
    panels = drawing.subplots(height, columns, sharey=True, squeeze=False)
    legend = {}
    for ((field, topics), found), axes in zip(groups.items(), panels.flat, strict=False):
        places = {value: place for place, value in enumerate(dict.fromkeys(value for value, _ in found))}
        for arm in dict.fromkeys(arm for _, arm in found):
            runs = {places[v]: select(rows, arm, topics, {field: v}) for v, other in found if other == arm}
            _curve(axes, arm, {x: _percent(own, "zero_shot") for x, own in runs.items()}, linestyle="none")
            axes.axhline(_percent(select(rows, arm, topics), "zero_shot").mean, color=ARMS[arm].colour, linewidth=1)
        _chance(axes.axhline, [row for row in rows if row["topics"] == topics], "zero_shot")
        axes.set_xticks(range(len(places)), [str(value) for value in places])
        axes.set(title=field_name(field) + ("" if topics == 6 else f", {topics_name(topics)}"), ylim=(0, 102))
        axes.set_xlim(-0.5, len(places) - 0.5)
        legend |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    for axes in panels.flat[len(groups) :]:
        axes.remove()
    for axes in panels[:, 0]:
        axes.set_ylabel("zero-shot accuracy, %")
    drawing.legend([*legend.values()], [*legend], loc="outside lower center", ncols=len(legend))
    drawing.suptitle("One setting changed at a time (lines: unchanged)")
    return drawing


def _emoji_plot(rows: Rows) -> Figure | None:
    arms = arms_of(rows, ARMS, None, "emoji")
    if not arms:
        return None
    count = len(EMOJI["names"])
    drawing = Figure((9, 1 + 0.36 * len(arms) * count), layout="constrained")
    panels = drawing.subplots(count, 2, sharex=True, sharey=True)
    for kind, column in zip(EMOJI, panels.T, strict=True):
        for figure, axes in zip(EMOJI[kind], column, strict=True):
            _panel(axes, arms, figure)
            axes.set_title(label_name(figure.replace(f"{kind}_", "")) + f", {KINDS[kind]}")
    panels[0, 0].set_xlim(left=0)
    drawing.suptitle("Emoji: concepts seen and unseen in training, by arm")
    drawing.supxlabel(f"{DOTS})", fontsize=10)
    return drawing


DRAWINGS: dict[str, Callable[[Rows], Figure | None]] = {
    "ladder": _ladder_plot,
    "topics": _topics_plot,
    "tokens": _tokens_plot,
    "spectrum": _spectrum_plot,
    "curves": _curves_plot,
    "ablations": _ablations_plot,
    "emoji": _emoji_plot,
}


def plots(rows: Rows, folder: Path) -> list[Path]:
    """Writes ``ladder.png`` and so on (of a scale that is not "small": ``ladder_gpu.png``); the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for scale, own in by_scale(rows).items():
        for name, draw in DRAWINGS.items():
            with mpl.rc_context(STYLE):
                if drawing := draw(own):
                    written.append(folder / (f"{name}.png" if scale == "small" else f"{name}_{scale}.png"))
                    drawing.savefig(written[-1])
    return written
