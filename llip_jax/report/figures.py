"""The figures of an evaluation as rows of tables, and numbers as people write them."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

_PARTS = ("asked", "diagnostics", "groups", "left_out", "robustness", "sets")
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
HEADLINES = {
    "zero_shot/top_1_accuracy": "Zero-shot top-1 accuracy",
    "zero_shot/mean_average_precision": "Zero-shot mean average precision",
    "retrieval/image_to_text_recall_at_1": "Image → text recall at 1",
    "retrieval/text_to_image_recall_at_1": "Text → image recall at 1",
    "choice/accuracy": "Image-caption choice",
}
_SETTINGS = {
    "k": "k = {}",
    "temperature": "temperature {}",
    "inverse_regularization": "inverse regularization {}",
    "training_images": "{} training images",
    "classes": "{} classes to choose from",
    "unseen_images": "test images of classes that the training images lack: {}",
    "converged": "converged: {}",
}
"""How a task was done, which is no figure."""
_UNREMARKABLE = {"unseen_images": 0, "converged": True}
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
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_THIN = "\u202f"
"""No-break space between a number and its unit."""


class Row(NamedTuple):
    """A figure.

    share: whether it is one of those between 0 and 1, which are written in per cent.
    embedding: which one it is of, where a task is done by embedding.
    """

    path: str
    label: str
    value: float
    chance: float | None
    interval: tuple[float, float] | None
    share: bool
    embedding: str = ""

    @property
    def name(self) -> str:
        """The label, with the embedding where there is one."""
        return f"{self.embedding}: {self.label[:1].lower()}{self.label[1:]}" if self.embedding else self.label

    @property
    def text(self) -> str:
        """The value as it is written."""
        return percent(self.value) if self.share else number(self.value)

    @property
    def between(self) -> str:
        """The interval as it is written, or ''."""
        if self.interval is None:
            return ""
        low, high = map(percent if self.share else number, self.interval)
        return f"{low.removesuffix(f'{_THIN}%')} to {high}"

    @property
    def times(self) -> str:
        """How many times chance the value is, or ''."""
        return times(self.value / self.chance) if self.chance else ""


class Table(NamedTuple):
    """The figures of one task; ``note``: how it was done."""

    title: str
    rows: Sequence[Row]
    note: str = ""

    @property
    def compared(self) -> bool:
        """Whether any figure has a chance level or an interval."""
        return any(row.chance is not None or row.interval for row in self.rows)

    @property
    def columns(self) -> list[str]:
        """Names of the figures of a task that is done by embedding."""
        return list(dict.fromkeys(row.label for row in self.rows if row.embedding))

    @property
    def by_embedding(self) -> dict[str, dict[str, Row]]:
        """Rows by embedding and figure."""
        found: dict[str, dict[str, Row]] = {}
        for row in self.rows:
            found.setdefault(row.embedding, {})[row.label] = row
        return found

    def chance(self, column: str) -> str:
        """The chance levels of a figure, as a rule the same for all embeddings."""
        levels = [row.chance for row in self.rows if row.label == column and row.chance is not None]
        return " / ".join(dict.fromkeys(map(percent, levels)))


def tables(results: Mapping[str, Any]) -> list[Table]:
    """One table a task."""
    found = []
    tasks = {task: own for task, own in results.items() if task not in _PARTS and isinstance(own, Mapping)}
    for task in sorted(tasks, key=lambda task: ([*_TASKS, task].index(task), task)):
        figures = tasks[task]
        parts = {name: own for name, own in figures.items() if isinstance(own, Mapping)}
        own_rows = rows(figures, task)
        for name, part in parts.items():
            own_rows += [row._replace(embedding=label(name)) for row in rows(part, f"{task}/{name}")]
        notes = _settings(parts or {"": figures})
        if task.startswith("zero_shot") and is_number(results.get("classes")):
            notes.append(f"{number(results['classes'])} classes to choose from")
        if own_rows:
            found.append(Table(task_title(task), own_rows, ", ".join(notes)))
    return found


def task_title(task: str) -> str:
    """A task in words."""
    return _TASKS.get(task, label(task))


def rows(figures: Mapping[str, Any], path: str) -> list[Row]:
    """The numbers among a task's figures, chance levels and intervals beside them."""
    found = []
    for name, value in figures.items():
        if not is_number(value) or name in _SETTINGS or name.removesuffix("_chance") in figures.keys() - {name}:
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


def _settings(parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Settings and truth values, once where they are the same for all embeddings."""
    names = dict.fromkeys([*_SETTINGS, *(k for part in parts.values() for k, v in part.items() if isinstance(v, bool))])
    found = []
    for name in names:
        values = {embedding: part[name] for embedding, part in parts.items() if part.get(name) is not None}
        phrase = _SETTINGS.get(name, f"{label(name).lower()}: {{}}")
        if not values or all(value == _UNREMARKABLE.get(name) for value in values.values()):
            continue
        alike: dict[str, list[str]] = {}
        for embedding, value in values.items():
            alike.setdefault(in_words(value), []).append(label(embedding).lower())
        each = ", ".join(f"{text} ({', '.join(embeddings)})" for text, embeddings in alike.items())
        found.append(phrase.format(each if len(alike) > 1 else next(iter(alike))))
    return found


def headlines(results: Mapping[str, Any]) -> list[Row]:
    """The figures that say most, those of them that there are."""
    known = {row.path: row for table in tables(results) for row in table.rows}
    return [known[path]._replace(label=name) for path, name in HEADLINES.items() if path in known]


def is_number(value: Any) -> TypeGuard[float]:
    """A finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def in_words(value: Any) -> str:
    """A number or a truth value for people."""
    return ("yes" if value else "no") if isinstance(value, bool) else number(value) if is_number(value) else str(value)


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
        text, _, exponent = f"{value:.4g}".partition("e")
        if exponent:
            text += f"·10{str(int(exponent)).translate(_RAISED)}"
    return text.replace("-", "−").replace(",", _THIN)


def times(value: float) -> str:
    """How many times chance."""
    return f"{value:,.0f}×".replace(",", _THIN) if value >= 10 else f"{value:.1f}×"
