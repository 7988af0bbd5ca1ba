"""From the columns of a web format to a record: which column is what, and what of it can be used."""

import contextlib
import json
import reprlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llip_jax.config import ConfigError, FieldsConfig, LimitsConfig
from llip_jax.data.records import BadSample, Reason, Record, Rows

_MOST_METADATA = 2**20
"""Bytes of JSON: parsed, it takes some fifteen times the memory."""
_PROBED = 100
"""Samples looked at before a column is taken to be missing everywhere."""


@dataclass(frozen=True)
class RowsSource:
    """Records of a data format by column names.

    Args:
        rows: the format.
        fields: which columns hold image and captions; both are named here.
        limits: what a sample may be.
        captionless: whether samples without captions are records too, as in classification.
    """

    rows: Rows
    fields: FieldsConfig
    limits: LimitsConfig
    captionless: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        """See :class:`llip_jax.data.records.Source`."""
        name, columns = self.rows[index]
        return make_record(name, columns, self.fields, self.limits, captionless=self.captionless)

    def identity(self) -> Mapping[str, str]:
        """That of the rows."""
        return self.rows.identity()

    def check(self, field: str) -> None:
        """Looks at the first samples; ``field`` is what the configuration calls this source.

        Raises:
            ConfigError: none of them has an image, or none has a caption, in the columns named.
        """
        seen: dict[str, None] = {}
        problems: set[Reason] = set()
        for index in range(min(_PROBED, len(self))):
            try:
                seen |= dict.fromkeys(_names(self.rows[index][1]))
                self[index]
                return
            except BadSample as error:
                problems.add(error.reason)
            except OSError:
                problems.add("unreadable")
        for reason, name, wanted in (
            ("missing_image", "image", self.fields.image),
            ("missing_caption", "captions", self.fields.captions),
        ):
            if problems == {reason}:
                raise ConfigError(
                    f"{field}.fields.{name}: none of the first samples has a column {' or '.join(map(repr, wanted))}; "
                    f"they have: {', '.join(sorted(seen)) or 'no columns'}"
                )


def make_record(
    name: str, columns: Mapping[str, Any], fields: FieldsConfig, limits: LimitsConfig, *, captionless: bool = False
) -> Record:
    """The record of one sample.

    Captions that cannot be used (empty, not text, not UTF-8) and repetitions are left out as long as one remains, or,
    of ``captionless`` samples, in any case.

    Raises:
        BadSample: no image, no usable caption (unless ``captionless``), or metadata that cannot be read.
    """
    image = _image(name, columns, fields, limits)
    captions, kinds = _captions(name, columns, fields, captionless)
    duplicate = None if fields.duplicate is None else lookup(name, columns, fields.duplicate)
    used = {*fields.image, *fields.captions}
    return Record(
        image=image,
        captions=captions,
        kinds=kinds,
        specific=len(captions),
        # A checksum is enough: groups are compared within a batch.
        image_group=f"content:{zlib.crc32(image):08x}:{len(image)}" if duplicate is None else f"duplicate:{duplicate}",
        name=name,
        fields={column: value for column, value in columns.items() if column not in used},
    )


def lookup(name: str, columns: Mapping[str, Any], path: str) -> Any:
    """The value of a column, or of a nested one by dots (JSON members are parsed); None where there is none.

    Raises:
        BadSample: JSON on the way that cannot be parsed.
    """
    if path in columns:
        return columns[path]
    column, dot, rest = path.partition(".")
    inner = columns.get(column)
    if not dot or inner is None:
        return None
    inner = _parsed(name, column, inner)
    return lookup(name, inner, rest) if isinstance(inner, Mapping) else None


def _parsed(name: str, column: str, value: Any) -> Any:
    """JSON in bytes or text; anything else as it is."""
    if not isinstance(value, bytes | str):
        return value
    if len(value) > _MOST_METADATA:
        raise BadSample("bad_metadata", f"{name}: {column} has {len(value)} bytes, more than {_MOST_METADATA}")
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_metadata", f"{name}: {column} is not JSON ({error})") from error


def _image(name: str, columns: Mapping[str, Any], fields: FieldsConfig, limits: LimitsConfig) -> Any:
    for path in fields.image:
        value = lookup(name, columns, path)
        if isinstance(value, Mapping):  # Hugging Face's layout: {"bytes": ..., "path": ...}
            value = value.get("bytes")
        if isinstance(value, bytes) and value:
            if len(value) > limits.image_bytes:
                raise BadSample(
                    "image_too_large", f"{name}: image of {len(value)} bytes is larger than {limits.image_bytes}"
                )
            return value
        if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] == 3:
            return value
    raise BadSample("missing_image", f"{name}: no image in {' or '.join(map(repr, fields.image))}")


def _captions(
    name: str, columns: Mapping[str, Any], fields: FieldsConfig, captionless: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Usable captions, each once, and the column that each comes from."""
    found: dict[str, str] = {}
    problem: BadSample | None = None
    for path in fields.captions:
        for value in _values(name, columns, path):
            try:
                found.setdefault(_caption(name, value), path)
            except BadSample as error:
                problem = problem or error
    if not found and not captionless:
        raise problem or BadSample("missing_caption", f"{name}: no caption in {', '.join(map(repr, fields.captions))}")
    return tuple(found), tuple(found.values())


def _values(name: str, columns: Mapping[str, Any], path: str) -> Sequence[Any]:
    """What a column holds of captions: a problem in place of what cannot be looked up."""
    try:
        value = lookup(name, columns, path)
    except BadSample as error:
        return [error]
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple | np.ndarray) else [value]


def _caption(name: str, value: Any) -> str:
    if isinstance(value, BadSample):
        raise value
    try:
        if isinstance(value, bytes):
            value = value.decode("utf-8-sig")
        elif isinstance(value, str):
            value.encode()  # Half of a surrogate pair cannot be.
    except UnicodeError as error:
        raise BadSample("caption_not_utf8", f"{name}: caption is not UTF-8 ({error})") from error
    if not isinstance(value, str):
        raise BadSample("caption_not_text", f"{name}: caption is {reprlib.repr(value)}, expected text")
    if not value.strip():
        raise BadSample("empty_caption", f"{name}: caption is empty")
    return value


def _names(columns: Mapping[str, Any]) -> Iterator[str]:
    """Columns, and the members of those that are mappings or JSON objects."""
    for column, value in columns.items():
        yield column
        with contextlib.suppress(BadSample):
            inner = _parsed("", column, value) if column == "json" else value
            if isinstance(inner, Mapping):
                yield from (f"{column}.{name}" for name in inner)
