"""The figures of an evaluation as rows of tables, and numbers as people write them."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

_PARTS = ("diagnostics", "groups", "left_out", "robustness", "sets")
"""Keys of results that are no tasks."""
_TASKS = {
    "zero_shot": "Zero-shot classification",
    "zero_shot_mean_score": "Zero-shot classification, scores of texts averaged",
    "zero_shot_max_score": "Zero-shot classification, best text of a class",
    "zero_shot_attributes": "Zero-shot classification by description",
    "retrieval": "Retrieval",
    "two_stage": "Retrieval in two stages",
    "choice": "Image-caption choice",
    "knn": "Nearest neighbours",
    "linear_probe": "Linear probe",
}
_HEADLINES = {
    "zero_shot/top_1_accuracy": "Zero-shot top-1 accuracy",
    "zero_shot/mean_average_precision": "Zero-shot mean average precision",
    "retrieval/image_to_text_recall_at_1": "Image → text recall at 1",
    "retrieval/text_to_image_recall_at_1": "Text → image recall at 1",
    "choice/accuracy": "Image-caption choice",
}
_WORDS = {"knn": "k-NN", "k": "k", "map": "mAP", "auroc": "AUROC"}
_PHRASES = {
    "image_to_text": "image → text",
    "text_to_image": "text → image",
    "zero_shot": "zero-shot",
    "per_class": "per-class",
    "intra_modal": "intra-modal",
    "inter_modal": "inter-modal",
    "f_clip_score": "F-CLIPScore",
}
_SHARE = re.compile(r"accuracy|recall|precision|share|overlap|shortlist$")
_THIN = "\u202f"
"""No-break space between a number and its unit."""


class Row(NamedTuple):
    """A figure; ``share`` tells those between 0 and 1, which are written in per cent."""

    path: str
    label: str
    value: float
    chance: float | None
    interval: tuple[float, float] | None
    share: bool

    @property
    def text(self) -> str:
        """The value as it is written."""
        return percent(self.value) if self.share else number(self.value)

    @property
    def times(self) -> str:
        """How many times chance the value is, or ''."""
        return times(self.value / self.chance) if self.chance else ""


class Table(NamedTuple):
    """The figures of one task."""

    title: str
    rows: Sequence[Row]

    @property
    def compared(self) -> bool:
        """Whether any figure has a chance level or an interval."""
        return any(row.chance is not None or row.interval for row in self.rows)


def tables(results: Mapping[str, Any]) -> list[Table]:
    """One table a task; of tasks that are done by embedding, one an embedding."""
    found: list[Table] = []
    for task, figures in results.items():
        if task in _PARTS or not isinstance(figures, Mapping):
            continue
        title = _TASKS.get(task, label(task))
        parts = {title: (task, figures)}
        parts |= {f"{title}: {label(k)}": (f"{task}/{k}", v) for k, v in figures.items() if isinstance(v, Mapping)}
        found += [Table(name, found_rows) for name, (path, part) in parts.items() if (found_rows := rows(part, path))]
    return found


def rows(figures: Mapping[str, Any], path: str) -> list[Row]:
    """The numbers among a task's figures, chance levels and intervals beside them."""
    found = []
    for name, value in figures.items():
        if not is_number(value) or name.removesuffix("_chance") in figures.keys() - {name}:
            continue
        chance, interval = figures.get(f"{name}_chance"), figures.get(f"{name}_interval")
        limits = tuple(filter(is_number, interval)) if isinstance(interval, list) else ()
        found.append(
            Row(
                f"{path}/{name}",
                label(name),
                value,
                chance if is_number(chance) else None,
                (limits[0], limits[1]) if len(limits) == 2 else None,
                chance is not None or _SHARE.search(name) is not None,
            )
        )
    return found


def headlines(results: Mapping[str, Any]) -> list[Row]:
    """The figures that say most, those of them that there are."""
    known = {row.path: row for table in tables(results) for row in table.rows}
    return [known[path]._replace(label=name) for path, name in _HEADLINES.items() if path in known]


def is_number(value: Any) -> TypeGuard[float]:
    """A finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def label(name: str) -> str:
    """A key in words."""
    text = name.replace("retrieval/", "")
    for key, written in _PHRASES.items():
        text = text.replace(key, written)
    text = re.sub(r"top_(\d+)", r"top-\1", text)
    words = [_WORDS.get(word, word) for word in text.replace("/", ": ").replace("_", " ").split()]
    text = " ".join(words)
    return text if words and words[0] in _WORDS.values() else text[:1].upper() + text[1:]


def percent(value: float) -> str:
    """0.218 as 21.8 %; small shares with two digits."""
    digits = 0 if value in (0, 1) else 1 if abs(value) >= 0.09995 else 2
    return f"{100 * value:.{digits}f}{_THIN}%"


def signed(value: float) -> str:
    """Two digits behind the point and a sign; none for what rounds to 0."""
    text = f"{value:+.2f}".replace("-", "−")
    return "0.00" if text[1:] == "0.00" else text


def score(value: float) -> str:
    """A cosine."""
    return f"{value:.3f}".replace("-", "−")


def number(value: float) -> str:
    """Four digits; whole numbers whole, thousands apart."""
    if not math.isfinite(value):
        return "–"
    if float(value).is_integer():
        text = f"{int(value):,}"
    else:
        text = f"{value:.4g}"
    return text.replace("-", "−").replace(",", _THIN)


def times(value: float) -> str:
    """How many times chance."""
    return f"{value:,.0f}×".replace(",", _THIN) if value >= 10 else f"{value:.1f}×"
