"""Differences between two runs query by query, wherever both were asked the same."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from llip_jax.evaluation.figures import Outcome, Saved, load_outcomes, paired_difference
from llip_jax.report.figures import Row, tables, task_title
from llip_jax.report.run_files import Run

DRAWS = 1000
"""Of the bootstrap; p is at least 2 / (DRAWS + 1)."""
_NEEDS = {
    "zero_shot": ("classes",),
    "retrieval": ("images", "texts"),
    "two_stage": ("images", "texts"),
    "choice": (),
    "knn": ("classes", "training"),
    "linear_probe": ("classes", "training"),
}
"""What two evaluations must have in common, besides the images that are paired, by the start of a task's name."""
_REASONS = {
    "images": "another pool of images",
    "texts": "another pool of captions",
    "classes": "other classes",
    "training": "other training images",
}

Image = tuple[str, str]
"""Name and digest of an image."""


class Paired(NamedTuple):
    """One figure of two runs over the images of both: ``difference`` is the other's less the first's."""

    row: Row
    images: int
    difference: float
    low: float
    high: float
    p: float

    @property
    def extent(self) -> float:
        """The largest distance from 0 that the interval or the difference has."""
        return max(abs(self.low), abs(self.high), abs(self.difference))

    @property
    def p_text(self) -> str:
        """p, or its floor."""
        return f"≤ {2 / (DRAWS + 1):.3f}" if self.p <= 2 / (DRAWS + 1) else f"{self.p:.3f}"


class Pairing(NamedTuple):
    """A set of a run against that of the first one, by task; ``notes``: what could not be paired."""

    set: str
    tasks: dict[str, list[Paired]]
    notes: list[str]

    @property
    def reach(self) -> float:
        """Half the width of the drawing."""
        return max((row.extent for rows in self.tasks.values() for row in rows), default=0.0) or 1.0


def pairings(base: Run, other: Run) -> list[Pairing]:
    """All sets that both runs have, their own first."""
    first, second = base.sets, other.sets
    found = [pair(base, other, name) for name in first if name in second]
    for run, alone in ((base, first.keys() - second.keys()), (other, second.keys() - first.keys())):
        if alone:
            found[0].notes.append(f"sets that only {run.name} has: {', '.join(sorted(alone))}")
    return found


def pair(base: Run, other: Run, name: str = "") -> Pairing:
    """Differences of the figures of a set over the images that both runs evaluated, where both were asked the same.

    An image is the same if its name and its digest are: another picture may have its name.
    """
    unknown = [
        f"{run.name}: nothing to pair by; launch/evaluate.py writes it"
        for run in (base, other)
        if not run.sets[name].get("asked") or not outcomes_file(run, name).exists()
    ]
    if unknown:
        return Pairing(name, {}, unknown)
    before, after = (load_outcomes(outcomes_file(run, name)) for run in (base, other))
    images, other_images = (list(zip(saved.names, saved.digests, strict=True)) for saved in (before, after))
    rows = {row.path: row for table in tables(other.sets[name]) for row in table.rows}
    found: dict[str, list[Paired]] = {}
    reasons: dict[str, str] = {}
    for path in (path for path in before.outcomes if path in after.outcomes and path in rows):
        task = path.split("/")[0]
        if reason := _asked_otherwise(task, base.sets[name]["asked"], other.sets[name]["asked"]):
            reasons[task] = reason
        elif aligned := align(before.outcomes[path], images, after.outcomes[path], other_images):
            difference = paired_difference(aligned[1], aligned[0], draws=DRAWS)
            number = len(np.unique(aligned[0].unit))
            found.setdefault(task_title(task), []).append(Paired(rows[path], number, **difference))
    notes = [f"{task_title(task)}: not paired, {reason}" for task, reason in reasons.items()]
    notes += [*_about_images(base, before, other, after), *_alone(base, before, other, after)]
    return Pairing(name, found, notes)


def align(
    a: Outcome, a_images: Sequence[Image], b: Outcome, b_images: Sequence[Image]
) -> tuple[Outcome, Outcome] | None:
    """The queries of images that both have, row by row the same; None where there are none.

    Images that occur twice in a run are left out, and so are those with another number of queries. Both get the weights
    of the first: those of a class are other ones among other images.
    """
    a_rows, b_rows = _rows_by_image(a, a_images), _rows_by_image(b, b_images)
    common = [image for image in a_rows if image in b_rows and len(a_rows[image]) == len(b_rows[image])]
    if not common:
        return None
    unit = np.repeat(np.arange(len(common)), [len(a_rows[image]) for image in common])
    first, second = (np.concatenate([rows[image] for image in common]) for rows in (a_rows, b_rows))
    weight = a.weight[first]
    if not weight.any():
        return None
    return Outcome(a.values[first], unit, weight, None), Outcome(b.values[second], unit, weight, None)


def outcomes_file(run: Run, name: str = "") -> Path:
    """What the queries of a set got; '': of the run's own."""
    folder = run.workdir / "eval"
    return folder / str(run.step) / "sets" / f"{name}.npz" if name else folder / f"{run.step}.npz"


def digests(run: Run) -> dict[str, str]:
    """Digests of the images of the run's own set by name, those that occur once; none where none are known."""
    path = outcomes_file(run)
    if not run.results.get("asked") or not path.exists():
        return {}
    saved = load_outcomes(path)
    times = Counter(saved.names)
    return {name: digest for name, digest in zip(saved.names, saved.digests, strict=True) if times[name] == 1}


def _asked_otherwise(task: str, a: Mapping[str, str], b: Mapping[str, str]) -> str:
    """Why a task cannot be paired, or ''."""
    needs: Sequence[Any] = next((own for start, own in _NEEDS.items() if task.startswith(start)), tuple(_REASONS))
    reasons = [_REASONS[need] for need in needs if need not in a or a[need] != b.get(need)]
    return " and ".join(reasons).replace(" and another pool of", " and")


def _about_images(base: Run, before: Saved, other: Run, after: Saved) -> Iterator[str]:
    a, b = (set(zip(saved.names, saved.digests, strict=True)) for saved in (before, after))
    if len(a & b) < max(len(before.names), len(after.names)):
        numbers = f"{base.name}: {len(before.names)}, {other.name}: {len(after.names)}"
        yield f"{len(a & b)} images are in both ({numbers})"
    if others := len({name for name, _ in a - b} & {name for name, _ in b - a}):
        yield f"{others} images have the same name but are other pictures, or have other captions"


def _alone(base: Run, before: Saved, other: Run, after: Saved) -> Iterator[str]:
    """Tasks that only one of the runs has done."""
    a, b = ({path.split("/")[0] for path in saved.outcomes} for saved in (before, after))
    for run, tasks in ((base, a - b), (other, b - a)):
        if tasks:
            yield f"only {run.name}: {', '.join(sorted(map(task_title, tasks)))}"


def _rows_by_image(outcome: Outcome, images: Sequence[Image]) -> dict[Image, Int[np.ndarray, "q"]]:
    """The queries of each image, in their order."""
    order = np.argsort(outcome.unit, kind="stable")
    units, starts = np.unique(outcome.unit[order], return_index=True)
    times = Counter(images)
    return {
        images[unit]: rows
        for unit, rows in zip(units.tolist(), np.split(order, starts[1:]), strict=True)
        if times[images[unit]] == 1
    }
