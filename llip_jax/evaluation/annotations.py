"""What is known of the images of a set before any is looked at: captions, classes, choices."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from llip_jax.config import ClassesConfig, ConfigError, nearest
from llip_jax.data.evaluation_sets import EvalSet, label_names
from llip_jax.data.fields import lookup
from llip_jax.data.pipeline import read_patiently
from llip_jax.data.records import BadSample, Record, Source
from llip_jax.evaluation.class_texts import class_spec, read_templates
from llip_jax.evaluation.classes import ClassSpec
from llip_jax.evaluation.reading import Annotation, digest_of, spread
from llip_jax.evaluation.scoring import Bar, silent

Label = str | int


class Annotated(NamedTuple):
    """Annotations by index in the source, None where the record cannot be read; and what the classes are."""

    annotations: list[Annotation | None]
    classes: ClassSpec | None
    numbered: bool
    """Whether integers among the labels are class numbers: their names were given. Otherwise they are names."""
    multi_label: bool
    first_problem: str
    """Of records that cannot be read; '' where there is none."""


def annotate(
    eval_set: EvalSet, own: ClassesConfig, templates: Sequence[str], field: str, bar: Bar = silent
) -> Annotated:
    """Reads all records of a set.

    Args:
        eval_set: the set.
        own: where its class texts come from.
        templates: prompts where ``own`` and the set itself name none.
        field: what the configuration calls the set ("eval" the run's own), for errors.
        bar: of progress.

    Raises:
        ConfigError: the set is empty or none of its records can be read, a label or a choice is not as expected, or
            class texts cannot be read.
    """
    source = eval_set.source
    if not len(source):
        raise ConfigError(f"{field}: expected at least one sample, got none")
    setting = "data.label_field" if field == "eval" else f"{field}.label_field"
    numbered = bool(own.classes) or eval_set.class_names is not None
    records: list[_Known | None] = []
    problem = ""
    with bar(len(source), "record", "reading captions") as progress:
        for index in range(len(source)):
            try:
                record = read_patiently(source, index, time.sleep)
                labels = _labels(record, eval_set.label_field, setting, numbered)
                records.append(_Known(_digested(record), labels, _choices(record, own.choice_field, field)))
            except (BadSample, OSError) as error:  # left out of every evaluation, also should it become readable
                problem = problem or str(error)
                records.append(None)
            progress(1)
    read = [known for known in records if known]
    if not read:
        raise ConfigError(f"{field}: none of the {len(source)} images can be read; the first: {problem}")
    classes, multi_label = None, False
    if eval_set.label_field is not None:
        multi_label = any(len(known.labels) != 1 for known in read)
        prompts = read_templates(own.templates_from, field) if own.templates_from else eval_set.templates or templates
        classes = _classes(eval_set, own, prompts, [known.labels for known in read], field)
    numbers = {} if classes is None else {name: number for number, name in enumerate(classes.names)}
    annotations = [known and _annotation(known, numbers, setting) for known in records]
    return Annotated(annotations, classes, numbered, multi_label, problem)


class _Known(NamedTuple):
    """A record with a digest in place of its picture, its labels, and the captions it is to choose from."""

    record: Record
    labels: tuple[Label, ...]
    choices: tuple[str, ...]


def _annotation(known: _Known, numbers: Mapping[str, int], setting: str) -> Annotation:
    record, labels, choices = known
    return Annotation(
        record.name,
        record.captions[: record.specific],
        tuple(_number(label, numbers, f"{setting}: {record.name}") for label in labels),
        choices,
        record.fields,
        digest_of(record.image_group, *record.captions, *choices),
    )


def _digested(record: Record) -> Record:
    """Without its picture: those of a set would not fit memory."""
    picture = record.image if isinstance(record.image, bytes) else record.image.tobytes()
    return dataclasses.replace(record, image=b"", image_group=digest_of(picture))


def _labels(record: Record, field: str | None, setting: str, numbered: bool) -> tuple[Label, ...]:
    """Class names or numbers of a record; several, or none, in a set with several labels an image."""
    if field is None:
        return ()
    labels = label_names(record, field, setting)
    if not labels and lookup(record.name, record.fields, field) is None:
        if field in record.fields:
            raise ConfigError(f"{setting}: the {field!r} of {record.name} is null, expected a class")
        known = nearest(field, list(record.fields)) if record.fields else " It has no fields."
        raise ConfigError(f"{setting}: {record.name} has no field {field!r}.{known}")
    return labels if numbered else tuple(map(str, labels))


def _classes(
    eval_set: EvalSet,
    own: ClassesConfig,
    templates: Sequence[str],
    labels: Sequence[tuple[Label, ...]],
    field: str,
) -> ClassSpec:
    if own.classes:
        return class_spec(own.classes, templates, field)
    if eval_set.class_names is not None:
        return class_spec(eval_set.class_names, templates, field)
    names = {str(one) for own_labels in labels for one in own_labels}
    if not names:
        raise ConfigError(f"{field}: no image has a label in {eval_set.label_field!r}, and {field}.classes names none")
    return ClassSpec.from_names(sorted(names), templates)


def _number(label: Label, numbers: Mapping[str, int], where: str) -> int:
    if isinstance(label, int):
        if not 0 <= label < len(numbers):
            raise ConfigError(f"{where}: class number {label}, expected one in [0, {len(numbers)})")
        return label
    if label not in numbers:
        raise ConfigError(f"{where}: {label!r} is none of the {len(numbers)} classes.{nearest(label, list(numbers))}")
    return numbers[label]


def _choices(record: Record, field: str | None, where: str) -> tuple[str, ...]:
    """Captions to choose from; none where the record has fewer than two."""
    value = None if field is None else lookup(record.name, record.fields, field)
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) and one.strip() for one in value):
        raise ConfigError(
            f"{where}.choice_field: the {field!r} of {record.name} is {value!r}, expected captions, the true one first"
        )
    return tuple(value) if len(value) > 1 else ()


class TrainingLabels(NamedTuple):
    """Images that probes learn from, and their class numbers; names that are no class of the set have numbers of their
    own beyond.

    digest: of names and labels.
    """

    source: Source
    labels: Int[np.ndarray, "n"]
    digest: str


def training_labels(
    eval_set: EvalSet, classes: ClassSpec, numbered: bool, most: int, bar: Bar = silent
) -> TrainingLabels | None:
    """At most ``most`` training images with one label each, evenly spread; None where the set has none.

    Numbers that are no class's (-1 marks the unlabelled in TensorFlow Datasets) leave their image out.
    """
    if eval_set.train is None or eval_set.label_field is None:
        return None
    source, field = eval_set.train(), eval_set.label_field
    numbers = {name: number for number, name in enumerate(classes.names)}
    indices, labels, known = [], [], []
    candidates = spread(range(len(source)), most).tolist()
    with bar(len(candidates), "record", "reading training labels") as progress:
        for index in candidates:
            progress(1)
            try:
                record = read_patiently(source, index, time.sleep)
                found = label_names(record, field, f"the training images' {field!r}")
            except (BadSample, OSError):
                continue
            if len(found) != 1:
                continue
            name = found[0] if numbered else str(found[0])
            if isinstance(name, int) and not 0 <= name < len(classes.names):
                continue
            labels.append(name if isinstance(name, int) else numbers.setdefault(name, len(numbers)))
            indices.append(index)
            known += [record.name, str(name)]
    picked = _Picked(source, indices)
    return TrainingLabels(picked, np.asarray(labels, np.int64), digest_of(*known)) if indices else None


@dataclasses.dataclass(frozen=True)
class _Picked:
    """Some samples of a source."""

    source: Source
    indices: list[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.source[self.indices[index]]

    def identity(self) -> Mapping[str, str]:
        return self.source.identity()
