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
from llip_jax.evaluation.reading import Annotation, digest_of
from llip_jax.evaluation.scoring import Bar, Progress, silent

Label = str | int


class Annotated(NamedTuple):
    """Annotations by index in the source, None where the record cannot be read; and what the classes are."""

    annotations: list[Annotation | None]
    classes: ClassSpec | None
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
    with bar(len(source), "record", "reading captions") as progress:
        records, problem = _records(source, progress)
    if not any(records):
        raise ConfigError(f"{field}: none of the {len(source)} images can be read; the first: {problem}")
    setting = "data.label_field" if field == "eval" else f"{field}.label_field"
    labels: list[tuple[Label, ...]] = [()] * len(records)
    classes, multi_label = None, False
    if eval_set.label_field is not None:
        labels = [_labels(record, eval_set.label_field, setting) if record else () for record in records]
        multi_label = any(record and len(own) != 1 for record, own in zip(records, labels, strict=True))
        prompts = read_templates(own.templates_from, field) if own.templates_from else eval_set.templates or templates
        classes = _classes(eval_set, own, prompts, labels, field)
    numbers = {} if classes is None else {name: number for number, name in enumerate(classes.names)}
    annotations = [
        None
        if record is None
        else Annotation(
            record.name,
            record.captions[: record.specific],
            tuple(_number(one, numbers, f"{setting}: {record.name}") for one in own_labels),
            _choices(record, own.choice_field, field),
            record.fields,
            digest_of(record.image_group, *record.captions, *_choices(record, own.choice_field, field)),
        )
        for record, own_labels in zip(records, labels, strict=True)
    ]
    return Annotated(annotations, classes, multi_label, problem)


def _records(source: Source, progress: Progress) -> tuple[list[Record | None], str]:
    """Records with a digest in place of their pictures, which would not fit memory, and the first problem."""
    problem = ""
    records: list[Record | None] = []
    for index in range(len(source)):
        try:
            record = read_patiently(source, index, time.sleep)
            picture = record.image if isinstance(record.image, bytes) else record.image.tobytes()
            records.append(dataclasses.replace(record, image=b"", image_group=digest_of(picture)))
        except (BadSample, OSError) as error:  # left out of every evaluation, also should it become readable
            problem = problem or str(error)
            records.append(None)
        progress(1)
    return records, problem


def _labels(record: Record, field: str, setting: str) -> tuple[Label, ...]:
    """Class names or numbers of a record; several, or none, in a set with several labels an image."""
    labels = label_names(record, field, setting)
    if not labels and lookup(record.name, record.fields, field) is None:
        known = nearest(field, list(record.fields))
        raise ConfigError(f"{setting}: {record.name} has no field {field!r}.{known}")
    return labels


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
    names = {one for own_labels in labels for one in own_labels}
    if numbers := sorted(one for one in names if isinstance(one, int)):
        raise ConfigError(
            f"{field}.classes: the labels of {eval_set.label_field!r} are numbers ({numbers[0]}, ...); expected the "
            "names of the classes, in order"
        )
    return ClassSpec.from_names(sorted(map(str, names)), templates)


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


def training_labels(eval_set: EvalSet, classes: ClassSpec, most: int) -> TrainingLabels | None:
    """At most ``most`` training images with one label each, evenly spread; None where the set has none."""
    if eval_set.train is None or eval_set.label_field is None:
        return None
    source, field = eval_set.train(), eval_set.label_field
    numbers = {name: number for number, name in enumerate(classes.names)}
    indices, labels, known = [], [], []
    for index in np.unique(np.linspace(0, len(source) - 1, min(most, len(source))).astype(int)).tolist():
        try:
            record = read_patiently(source, index, time.sleep)
        except (BadSample, OSError):
            continue
        found = label_names(record, field)
        if len(found) == 1:
            label = found[0] if isinstance(found[0], int) else numbers.setdefault(found[0], len(numbers))
            indices.append(index)
            labels.append(label)
            known += [record.name, str(found[0])]
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
