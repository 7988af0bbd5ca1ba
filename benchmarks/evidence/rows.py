"""Rows of ``benchmarks/ladder.py``: reading, selecting and comparing them.

A row is one run. Seeds are paired across arms (the same batches under the same seed), so arms are compared by the
difference on each common seed: its mean, with a 95 % t interval. What has no rows is left out; scales are kept apart.
"""

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

Row = dict[str, Any]
Rows = list[Row]


class Arm(NamedTuple):
    """How an arm is named and drawn. Colours: Okabe and Ito's; Llip's other K in shades of its blue."""

    name: str
    colour: str
    marker: str


ARMS = {
    "clip": Arm("CLIP", "#cc79a7", "v"),
    "siglip": Arm("SigLIP", "#e69f00", "o"),
    "registers": Arm("SigLIP + registers", "#009e73", "s"),
    "average": Arm("learned average", "#d55e00", "^"),
    "llip_1": Arm("Llip, K = 1", "#a6cfe8", "D"),
    "llip_4": Arm("Llip, K = 4", "#56b4e9", "D"),
    "llip_16": Arm("Llip, K = 16", "#0072b2", "D"),
    "llip_64": Arm("Llip, K = 64", "#003a5c", "D"),
}
LLIP = "llip_16"
"""The arm that others are compared with."""
LADDER = ("clip", "siglip", "registers", "average", LLIP)
TOKENS = {"llip_1": 1, "llip_4": 4, LLIP: 16, "llip_64": 64}
TOPICS = range(1, 7)
FIGURES = {
    "loss": "training loss",
    "zero_shot": "zero-shot",
    "image_to_text_r1": "image→text R@1",
    "text_to_image_r1": "text→image R@1",
    "image_to_text_r5": "image→text R@5",
    "text_to_image_r5": "text→image R@5",
    "effective_rank_scored": "scored embedding",
    "effective_rank_unconditioned": "unconditioned embedding",
    "effective_rank_tower": "tower's output",
}
MAIN = ("zero_shot", "image_to_text_r1", "text_to_image_r1")
COMPARED = ("zero_shot", "text_to_image_r1")
RANKS = tuple(figure for figure in FIGURES if figure.startswith("effective_rank"))
EMOJI = {
    kind: tuple(
        f"{prefix}_r1"
        for prefix in (
            f"{kind}_image_to_text",
            f"seen_{kind}_image_to_text",
            f"unseen_{kind}_image_to_text",
            f"{kind}_text_to_image",
        )
    )
    for kind in ("names", "any")
}
COLOURS_ALONE = "colours without objects"
"""How the level of :func:`colours_alone` is called."""
KINDS = {"names": "names", "any": "any caption", "coco": "photographs of COCO"}
FIELDS = {
    "train.steps": "steps",
    "model.mixer_temperature": "temperature of the mixing attention",
    "model.mixer_heads": "heads of the mixing attention",
    "data.captions.slots": "captions an image and step",
    "model.embed_dim": "joint width d",
}
CONTROLS = {
    "": "as trained",
    "wrong_caption_": "mixed by a wrong caption",
    "wrong_object_": "mixed by one of another object",
    "wrong_colour_": "mixed by one of another colour",
    "shuffled_tokens_": "tokens shuffled between images",
}


class Interval(NamedTuple):
    """A mean of ``n`` values with its 95 % t interval: NaN for fewer than two values (the mean: for none)."""

    mean: float
    low: float
    high: float
    n: int


def read(path: Path) -> Rows:
    """Rows of a results file. A last line that a killed run left torn is passed over.

    Raises:
        ValueError: any other line is not JSON.
    """
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}: row {number} is not JSON: {error}") from error
    return rows


def select(rows: Rows, arm: str, topics: int | None = 6, changes: Row | None = None, data: str = "toyworld") -> Rows:
    """Of rows of one scale: one a seed, the latest; ``changes`` None: of the ladder itself."""
    wanted = (data, arm, topics, changes or {})
    own = [row for row in rows if (row["data"], row["arm"], row["topics"], row["changes"]) == wanted]
    return list({row["seed"]: row for row in own}.values())


def by_scale(rows: Rows) -> dict[str, Rows]:
    """Rows of each scale, in order of appearance."""
    return {scale: [row for row in rows if row["scale"] == scale] for scale in dict.fromkeys(r["scale"] for r in rows)}


def arms_of(rows: Rows, names: Iterable[str], topics: int | None = 6, data: str = "toyworld") -> dict[str, Rows]:
    """Rows of the ladder by arm, without arms that have none."""
    selected = {arm: select(rows, arm, topics, data=data) for arm in names}
    return {arm: own for arm, own in selected.items() if own}


def values(rows: Rows, figure: str) -> dict[int, float]:
    """A figure by seed, from rows that have it."""
    return {row["seed"]: row["figures"][figure] for row in rows if row["figures"].get(figure) is not None}


def interval(sample: Iterable[float]) -> Interval:
    """Mean and 95 % t interval of independent values."""
    array = np.fromiter(sample, float)
    if array.size == 0:
        return Interval(np.nan, np.nan, np.nan, 0)
    mean = float(array.mean())
    if array.size == 1:
        return Interval(mean, np.nan, np.nan, 1)
    half = float(stats.t.ppf(0.975, array.size - 1) * array.std(ddof=1) / array.size**0.5)
    return Interval(mean, mean - half, mean + half, array.size)


def paired(rows_a: Rows, rows_b: Rows, figure: str) -> Interval:
    """a − b over the seeds that both have."""
    a, b = values(rows_a, figure), values(rows_b, figure)
    return interval(a[seed] - b[seed] for seed in sorted(a.keys() & b.keys()))


def ablations(rows: Rows) -> dict[tuple[str, int], list[tuple[Any, str]]]:
    """By changed field and topics: the values it takes in ToyWorld's runs, with the arms that were trained so."""
    groups: dict[tuple[str, int], set[tuple[Any, str]]] = {}
    for row in rows:
        if row["data"] == "toyworld" and len(row["changes"]) == 1 and "shortcut" not in row["changes"]:
            ((field, value),) = row["changes"].items()
            groups.setdefault((field, row["topics"]), set()).add((value, row["arm"]))
    order = [*ARMS]
    return {group: sorted(found, key=lambda pair: (pair[0], order.index(pair[1]))) for group, found in groups.items()}


def label_name(figure: str) -> str:
    """``seen_names_image_to_text_r1``: seen names image→text R@1."""
    for known, label in FIGURES.items():
        if figure.endswith(known):
            return f"{figure.removesuffix(known).replace('_', ' ')}{label}"
    return figure.replace("_", " ")


def topics_name(topics: int) -> str:
    return "one topic" if topics == 1 else f"{topics} topics"


def field_name(field: str) -> str:
    return FIELDS.get(field, field)


@functools.cache
def colours_alone(topics: int, colours: int = 7) -> float:
    """Zero-shot accuracy of one who knows which colours are in a picture, and not on which of the named objects.

    The best answer for every object is the commonest of the ``topics`` colours, which are drawn independently.
    """
    drawn = np.indices((colours,) * topics).reshape(topics, -1)
    counts = [(drawn == colour).sum(axis=0) for colour in range(colours)]
    return float(np.max(counts, axis=0).mean() / topics)


def colours_alone_of(rows: Rows, figure: str) -> float | None:
    """The level of :func:`colours_alone` where rows are of one number of topics and the figure is theirs."""
    topics = {row["topics"] for row in rows}
    (only,) = topics if len(topics) == 1 else (None,)
    return colours_alone(only) if only and figure == "zero_shot" else None


def chance_of(rows: Rows, figure: str) -> float | None:
    """The chance level that rows of one setting state."""
    return next((row["chance"][figure] for row in rows if figure in row["chance"]), None)
