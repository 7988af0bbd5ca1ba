"""What a model is evaluated on: the run's own evaluation samples, or a set of ``eval.sets``."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from llip_jax.config import Config, ConfigError, nearest
from llip_jax.data.fields import RowsSource, lookup
from llip_jax.data.formats.clip_benchmark import LABEL, ClipBenchmarkRows, has_split
from llip_jax.data.records import Record, Source
from llip_jax.data.sources import build_one_source, build_source


class EvalSet(NamedTuple):
    """Samples to evaluate on, and what is known about their classes.

    name: key in ``eval.sets``; "" is the run's own set.
    source: the samples; those of named sets may lack captions (``captions=()``).
    train: opens labelled training images; None where there are none.
    label_field: record field with the labels; see :func:`label_names`. None: there are none.
    class_names: by class number, where the data says; names may repeat.
    templates: prompts with ``{}`` for the class name, where the data has its own.
    """

    name: str
    source: Source
    train: Callable[[], Source] | None
    label_field: str | None
    class_names: tuple[str, ...] | None
    templates: tuple[str, ...] | None


def build_eval_set(config: Config, name: str) -> EvalSet:
    """The run's own evaluation set (``name`` "") or that of ``eval.sets``.

    A named set is all of its ``path``; of formats with splits the evaluation split: ``folder.eval_split`` of a list
    whose records have a split, ``tfds.eval_split``, ``test/`` of clip_benchmark, and ToyWorld's.

    Raises:
        ConfigError: no such set, or data that is missing or not as expected.
    """
    size = config.model.image_size
    if not name:
        train = partial(build_source, config.data, "train", size)
        return EvalSet("", build_source(config.data, "eval", size), train, config.data.label_field, None, None)
    if name not in config.eval.sets:
        raise ConfigError(f"eval.sets has no {name!r}.{nearest(name, list(config.eval.sets))}")
    own, field = config.eval.sets[name], f"eval.sets.{name}"
    source = build_one_source(own, config.data, "eval", size, field, whole=True)
    rows = source.rows if isinstance(source, RowsSource) else None
    if not isinstance(rows, ClipBenchmarkRows) or rows.kind == "retrieval":
        return EvalSet(name, source, None, own.label_field, None, None)
    labelled = has_split(own.path, "train", f"{field}.path")
    return EvalSet(
        name,
        source,
        partial(build_one_source, own, config.data, "train", size, field, whole=True) if labelled else None,
        own.label_field or LABEL,
        rows.class_names,
        rows.templates,
    )


def label_names(record: Record, field: str, setting: str = "data.label_field") -> tuple[str | int, ...]:
    """The classes of a record: names, or numbers among the set's classes; none where it lacks the field.

    Args:
        record: of the set.
        field: where the label is, or a list of labels; dots lead into nested fields.
        setting: what the configuration calls ``field``.

    Raises:
        ConfigError: a label is blank.
        BadSample: JSON on the way to the field that cannot be parsed.
    """
    value = lookup(record.name, record.fields, field)
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if value is None:
        return ()
    labels: list[str | int] = []
    for label in value if isinstance(value, list | tuple) else [value]:
        if type(label) is int:
            labels.append(label)
            continue
        text = label.decode(errors="replace") if isinstance(label, bytes) else str(label)
        if not text.strip():
            raise ConfigError(f"{setting}: the {field!r} of {record.name} is blank, expected a class name")
        labels.append(text)
    return tuple(labels)
