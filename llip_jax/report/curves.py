"""Curves of training and of evaluations over steps, of one run or of several over each other."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llip_jax.report.figures import headlines, is_number, tables
from llip_jax.report.html import Section
from llip_jax.report.plots import Chart, Series, lines
from llip_jax.report.run_files import Run


class _Curve(NamedTuple):
    title: str
    name: str
    log: bool = False
    share: bool = False


_TRAINING = (
    _Curve("Loss", "loss"),
    _Curve("Learning rate", "learning_rate"),
    _Curve("Gradient norm", "grad_norm", log=True),
    _Curve("Logit scale", "logit_scale"),
    _Curve("Logit bias", "logit_bias"),
    _Curve("Images a second", "examples_per_second"),
    _Curve("Time spent waiting for data", "data_wait_fraction", share=True),
    _Curve("Use of the chips' peak (MFU)", "mfu", share=True),
    _Curve("Samples replaced", "replaced_samples"),
)


def curves(runs: Mapping[str, Run], lead: str) -> Section:
    """Those of training and of evaluations; what the marks mean is added to ``lead``."""
    training, evaluation = training_charts(runs), evaluation_charts(runs)
    if evaluation:
        lead += " Dotted lines are chance."
    if any(row.interval for run in runs.values() for results in run.evaluations.values() for row in headlines(results)):
        lead += " Bars are 95 % intervals, at the steps that have been evaluated with them." if evaluation else ""
    parts = {"Training": training, "Evaluation": evaluation}
    return Section("curves", "Curves", lead, {name: charts for name, charts in parts.items() if charts})


def training_charts(runs: Mapping[str, Run]) -> list[Chart]:
    """What metrics.jsonl holds, a line a run; what nobody recorded, or never differed from 0, is left out."""
    charts = []
    for curve in _TRAINING:
        series = [
            Series(label, *points, place)
            for place, (label, run) in enumerate(runs.items())
            if (points := _points(run.metrics, curve.name))
        ]
        if any(value for one in series for value in one.y):
            charts.append(lines(f"training-{curve.name}", curve.title, series, log=curve.log, share=curve.share))
    return charts


def evaluation_charts(runs: Mapping[str, Run]) -> list[Chart]:
    """The headline figures over steps with their intervals; left out where only one step was evaluated."""
    charts = []
    for headline in {row.path: row for run in runs.values() for row in headlines(run.results)}.values():
        series = []
        for place, (label, run) in enumerate(runs.items()):
            rows = {
                step: row
                for step, results in run.evaluations.items()
                for table in tables(results)
                for row in table.rows
                if row.path == headline.path
            }
            if not rows:
                continue
            # Evaluations while training have none.
            known = {step: row.interval for step, row in rows.items() if row.interval}
            series.append(Series(label, list(rows), [row.value for row in rows.values()], place, known))
        if any(len(one.x) > 1 for one in series):
            charts.append(
                lines(
                    f"evaluation-{headline.path}", headline.label, series, share=headline.share, chance=headline.chance
                )
            )
    return charts


def _points(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]] | None:
    """Steps at which a number was recorded, and the numbers."""
    pairs = [(line["step"], line[name]) for line in metrics if is_number(line.get(name))]
    return ([step for step, _ in pairs], [value for _, value in pairs]) if pairs else None
