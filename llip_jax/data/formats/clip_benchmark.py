"""CLIP_benchmark's data sets: tar shards by split, with class names and prompts beside them.

The layout is what ``clip_benchmark_export_wds`` writes and the project's data sets on the Hugging Face Hub have:
``{train,test}/{nshards.txt,0.tar,1.tar,...}``, ``classnames.txt``, ``zeroshot_classification_templates.txt`` and
``dataset_type.txt``.
"""

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from llip_jax.config import ConfigError, nearest
from llip_jax.data.files import StoredFile, files_in, read_range
from llip_jax.data.formats.tars import TarRows
from llip_jax.data.records import BadSample

Kind = Literal["classification", "multilabel", "retrieval"]

LABEL = "cls"
"""Column with the number of the class, or a list of them."""

_MOST_LABEL_BYTES = 2**20
_SHARDS, _CLASSES, _TEMPLATES, _KIND = (
    "nshards.txt",
    "classnames.txt",
    "zeroshot_classification_templates.txt",
    "dataset_type.txt",
)


class ClipBenchmarkRows:
    """The samples of one split, in order: images as stored, and ``cls`` or ``txt``, a list with a caption a line.

    Args:
        folder: path or URL of the data set.
        split: folder of the split.
        index_dir: where the index of the shards is kept.
        field: what the configuration calls ``folder``.

    Raises:
        ConfigError: files that are missing or not as CLIP_benchmark writes them.
    """

    kind: Kind
    class_names: tuple[str, ...] | None
    """By class number; names may repeat. None: the data set does not say."""
    templates: tuple[str, ...] | None
    """Prompts with ``{}`` for the class name. None: the data set has none."""

    def __init__(self, folder: str, split: str, index_dir: Path, field: str):
        folder = folder.rstrip("/")
        beside = files_in(folder, field)
        shards = files_in(f"{folder}/{split}", field)
        if _SHARDS not in shards:
            raise ConfigError(
                f"{field}: there is no file '{folder}/{split}/{_SHARDS}'; expected the folder of a data set that "
                "clip_benchmark_export_wds wrote"
            )
        self.kind = _kind(beside, field)
        self.class_names = self.templates = None
        if self.kind != "retrieval":
            self.class_names = _lines(beside[_CLASSES], field) if _CLASSES in beside else None
            self.templates = _prompts(beside[_TEMPLATES], field) if _TEMPLATES in beside else None
        names = [f"{number}.tar" for number in range(_number(shards[_SHARDS], field))]
        if missing := [name for name in names if name not in shards]:
            raise ConfigError(
                f"{field}: there is no file '{folder}/{split}/{missing[0]}', but {_SHARDS} says that there are "
                f"{len(names)} shards ({len(missing)} are missing)"
            )
        self._tars = TarRows([shards[name] for name in names], index_dir)

    def __len__(self) -> int:
        return len(self._tars)

    def __getitem__(self, index: int) -> tuple[str, Mapping[str, Any]]:
        """See :class:`llip_jax.data.records.Rows`.

        Raises:
            BadSample: also for a class that cannot be read, or is not among the class names.
        """
        name, stored = self._tars[index]
        columns = dict(stored)
        if self.kind == "retrieval":
            if "txt" in columns:
                columns["txt"] = _captions(name, columns["txt"])
        elif self.kind == "multilabel":
            columns[LABEL] = _classes_of(name, columns.pop("npy", b""), self.class_names)
        else:
            columns[LABEL] = _class_of(name, columns.get(LABEL, b""), self.class_names)
        return name, columns

    def identity(self) -> Mapping[str, str]:
        """That of the shards."""
        return self._tars.identity()


def has_split(folder: str, split: str, field: str) -> bool:
    """Whether the data set has this split."""
    return _SHARDS in files_in(f"{folder.rstrip('/')}/{split}", field)


def _kind(beside: Mapping[str, StoredFile], field: str) -> Kind:
    if _KIND not in beside:
        return "classification"
    found = _text(beside[_KIND], field).strip().lower()
    for kind in get_args(Kind):
        if found == kind:
            return kind
    raise ConfigError(
        f"{field}: {beside[_KIND].url} says {found[:100]!r}, expected {', '.join(get_args(Kind))}."
        + nearest(found[:100], list(get_args(Kind)))
    )


def _number(file: StoredFile, field: str) -> int:
    text = _text(file, field).strip()
    if not re.fullmatch("[1-9][0-9]{0,7}", text):
        raise ConfigError(f"{field}: {file.url} says {text[:100]!r}, expected the number of shards")
    return int(text)


def _lines(file: StoredFile, field: str) -> tuple[str, ...]:
    lines = tuple(line.strip() for line in _text(file, field).rstrip().splitlines())
    if "" in lines or not lines:
        raise ConfigError(f"{field}: {file.url}, line {lines.index('') + 1 if lines else 1} is blank, expected text")
    return lines


def _prompts(file: StoredFile, field: str) -> tuple[str, ...]:
    templates = _lines(file, field)
    for number, template in enumerate(templates, start=1):
        if "{c}" not in template:
            raise ConfigError(f"{field}: {file.url}, line {number}: {template!r} has no '{{c}}' for the class name")
    return tuple(template.replace("{c}", "{}") for template in templates)


def _text(file: StoredFile, field: str) -> str:
    try:
        return read_range(file, 0, file.size).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{field}: {file.url} cannot be read: {error}") from error


def _captions(name: str, data: bytes) -> list[str]:
    try:
        return data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise BadSample("caption_not_utf8", f"{name}: captions are not UTF-8 ({error})") from error


def _class_of(name: str, data: bytes, class_names: tuple[str, ...] | None) -> int:
    number = data.strip()
    if not number.isdigit() or len(number) > 9:
        raise BadSample("bad_metadata", f"{name}: class is {data[:50]!r}, expected a number")
    if class_names is not None and int(number) >= len(class_names):
        raise BadSample("bad_metadata", f"{name}: class {int(number)} of {len(class_names)} in {_CLASSES}")
    return int(number)


def _classes_of(name: str, data: bytes, class_names: tuple[str, ...] | None) -> list[int]:
    """The classes that an array with 0 or 1 for each class tells."""
    if not 0 < len(data) <= _MOST_LABEL_BYTES:
        raise BadSample("bad_metadata", f"{name}: classes take {len(data)} bytes, expected up to {_MOST_LABEL_BYTES}")
    try:
        array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # the header is parsed as Python, which has many ways to fail
        raise BadSample("bad_metadata", f"{name}: classes are not a NumPy array ({error})") from error
    if array.ndim != 1 or not np.isin(array, (0, 1)).all() or len(array) != len(class_names or array):
        expected = "classes" if class_names is None else f"{len(class_names)} classes of {_CLASSES}"
        raise BadSample(
            "bad_metadata", f"{name}: expected 0 or 1 for each of the {expected}, got {array.dtype} {list(array.shape)}"
        )
    return np.flatnonzero(array).tolist()
