"""From what a pass has read to figures, task by task."""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from llip_jax.config import ConfigError, EvalConfig, Task
from llip_jax.evaluation.choice import choice_outcomes
from llip_jax.evaluation.classes import ClassSpec
from llip_jax.evaluation.classification import accuracy_outcomes, mean_average_precision_outcomes
from llip_jax.evaluation.diagnostics.figures import PARTS, diagnostic_figures
from llip_jax.evaluation.figures import Outcome, Result, figures_of
from llip_jax.evaluation.probes import INVERSE_REGULARIZATIONS, knn, linear_probe
from llip_jax.evaluation.reading import Reading
from llip_jax.evaluation.retrieval import retrieve
from llip_jax.evaluation.scoring import Bar, silent
from llip_jax.evaluation.texts import needs_captions
from llip_jax.evaluation.two_stage import shortlist, two_stage_figures


class LeftOut(Exception):
    """A task that the set has nothing for; the message says what it lacks."""


def run_tasks(reading: Reading, tasks: Collection[Task], config: EvalConfig, bar: Bar = silent) -> Result:
    """Figures by task, and by ``TASK/FIGURE`` the outcomes that they are means of.

    Every set has ``images`` and ``unreadable_images``, ``texts`` where a task looks at captions, and ``classes`` where
    there are any. What a set has nothing for is named in ``left_out``, with the reason.
    """
    figures: dict[str, Any] = {
        "images": len(reading.annotations),
        "unreadable_images": reading.unreadable,
    }
    if needs_captions(tasks):
        figures["texts"] = len(reading.texts)
    if reading.classes is not None:
        figures["classes"] = len(reading.classes.names)
    outcomes: dict[str, Outcome] = {}
    left_out = {}
    for task, run in TASKS.items():
        if task not in tasks:
            continue
        try:
            results = run(reading, config, bar)
        except (LeftOut, ConfigError) as reason:
            left_out[task] = str(reason)
            continue
        for name, result in results.items():
            figures[name] = result.figures
            outcomes |= {f"{name}/{figure}": outcome for figure, outcome in result.outcomes.items()}
    return Result(figures | ({"left_out": left_out} if left_out else {}), outcomes)


Run = Callable[[Reading, EvalConfig, Bar], dict[str, Result]]


def zero_shot(reading: Reading, config: EvalConfig, bar: Bar) -> dict[str, Result]:
    """Classification by each scorer."""
    classes_of(reading)
    results = {}
    for scorer, scores in reading.class_scores.items():
        if reading.multi_label:
            if not any(own.labels for own in reading.annotations):
                raise LeftOut("no image has a label")
            outcomes = mean_average_precision_outcomes(scores, reading.targets())
        else:
            outcomes = accuracy_outcomes(scores, reading.labels())
        results["zero_shot" if scorer == "mean_text" else f"zero_shot_{scorer}"] = Result(
            figures_of(outcomes), outcomes
        )
    return results


def retrieval(reading: Reading, config: EvalConfig, bar: Bar) -> dict[str, Result]:
    """Every image against every caption, and in two stages where ``eval.shortlist`` says so."""
    if not reading.texts:
        raise LeftOut("no image has a caption")
    described = reading.positives.any(axis=1)  # images without captions have no right answer, and are no answer
    scores, positives = reading.caption_scores, reading.positives
    if not described.all():
        scores, positives = scores[described], positives[described]
    result, units = retrieve(scores, positives), np.flatnonzero(described)
    outcomes = {name: outcome._replace(unit=units[outcome.unit]) for name, outcome in result.outcomes.items()}
    results = {"retrieval": Result(result.figures, outcomes)}
    if config.shortlist is not None:
        unconditioned = reading.embeddings["unconditioned"][described]
        listed = shortlist(unconditioned, reading.text_embedding[: len(reading.texts)], config.shortlist)
        results["two_stage"] = Result(two_stage_figures(scores, positives, listed), {})
    return results


def choice(reading: Reading, config: EvalConfig, bar: Bar) -> dict[str, Result]:
    """Which of an image's own choices scores best."""
    if reading.choices is None:
        raise LeftOut("no image has captions to choose from: eval.choice_field names the record field with them")
    outcomes = choice_outcomes(reading.choices.cosines, reading.choices.mask)
    return {"choice": Result(figures_of(outcomes), outcomes)}


def probes(probe: Callable[..., Result], steps: int | None = None) -> Run:
    """A probe on every named embedding; its progress is counted in ``steps`` fits, or else in test images."""

    def run(reading: Reading, config: EvalConfig, bar: Bar) -> dict[str, Result]:
        spec = classes_of(reading)
        if reading.multi_label:
            raise LeftOut("images have several labels")
        if reading.train is None:
            raise LeftOut("there are no labelled training images to learn from")
        train, labels = reading.train, reading.labels()
        # Training images may be of classes that the set has not.
        classes = max(len(spec.names), int(train.labels.max()) + 1)
        results = {}
        for name, test in reading.embeddings.items():
            with bar(steps or len(test), "fit" if steps else "image", f"{probe.__name__} of {name}") as progress:
                results[name] = probe(train.embeddings[name], train.labels, test, labels, classes, progress=progress)
        figures = {name: result.figures for name, result in results.items()}
        outcomes = {
            f"{name}/{figure}": outcome
            for name, result in results.items()
            for figure, outcome in result.outcomes.items()
        }
        return {probe.__name__: Result(figures, outcomes)}

    return run


def diagnostics(reading: Reading, config: EvalConfig, bar: Bar) -> dict[str, Result]:
    """What embeddings and mixing weights look like."""
    with bar(PARTS, "part", "diagnostics") as progress:
        return {"diagnostics": Result(diagnostic_figures(reading, config.groups, progress), {})}


def classes_of(reading: Reading) -> ClassSpec:
    """The classes, for a task that cannot do without."""
    if reading.classes is None:
        raise LeftOut("images have no classes: data.label_field names the record field with them")
    return reading.classes


TASKS: dict[Task, Run] = {
    "zero_shot": zero_shot,
    "retrieval": retrieval,
    "choice": choice,
    "knn": probes(knn),
    "linear_probe": probes(linear_probe, len(INVERSE_REGULARIZATIONS) + 1),
    "diagnostics": diagnostics,
}
"""In the order of reports. (``exhibits`` needs pixels: evaluation/exhibits.py.)"""
