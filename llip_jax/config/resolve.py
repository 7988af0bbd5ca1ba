"""From a plain nested mapping to the typed configuration and back; every mistake is told by its field."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

import pydantic

from llip_jax.config.errors import ConfigError, nearest
from llip_jax.config.run import Config

_ADAPTER = pydantic.TypeAdapter(Config)


def resolve(raw: Mapping[str, Any]) -> Config:
    """The typed configuration of a ConfigDict (as a plain nested mapping) or of a config.json.

    Raises:
        ConfigError: every unknown name, wrong type and impossible value, one a line.
    """
    try:
        # Through JSON: one set of rules for files under configs/, command lines and a run directory's config.json.
        return _ADAPTER.validate_json(json.dumps(raw))
    except TypeError as error:
        raise ConfigError(f"config: {error}; expected numbers, strings, tuples, booleans and None") from None
    except pydantic.ValidationError as error:
        problems: dict[str, list[str]] = {}
        for e in error.errors():
            subject, text = _message(e["type"], e["loc"], e["msg"], e["input"])
            problems.setdefault(subject, []).append(text)
        # A field of several types has one problem for each of them.
        raise ConfigError(
            "\n".join(f"{subject}{' or '.join(problems[subject])}" for subject in sorted(problems))
        ) from None


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict, ready for JSON; :func:`resolve` takes it back unchanged."""
    return _ADAPTER.dump_python(config, mode="json", by_alias=True)


def field_name(field: dataclasses.Field[Any]) -> str:
    """A field's name in configurations: ``init.from`` is no name that Python allows."""
    return getattr(field.default, "alias", None) or field.name


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Fields in which two configurations (or parts of them) differ, as 'field: old -> new'."""
    if dataclasses.is_dataclass(old) and type(old) is type(new):
        old, new = ({field_name(f): getattr(x, f.name) for f in dataclasses.fields(x)} for x in (old, new))
    if not isinstance(old, dict) or not isinstance(new, dict) or old.keys() != new.keys():
        return [] if old == new else [f"{path}: {old!r} -> {new!r}"]
    return [line for name in old for line in differences(old[name], new[name], f"{path}.{name}".lstrip("."))]


def _message(kind: str, location: tuple[int | str, ...], text: str, value: Any) -> tuple[str, str]:
    """What a pydantic error is about, and what is wrong with it."""
    owner: type = Config
    path: list[str] = []
    parts = iter(location)
    for part in parts:
        names = {field_name(f): f.name for f in dataclasses.fields(owner)}
        if part not in names:
            if kind == "unexpected_keyword_argument":
                return f"{'.'.join([*path, str(part)])}: ", f"no such field.{nearest(str(part), list(names))}"
            break
        path.append(str(part))
        hint = get_type_hints(owner)[names[str(part)]]
        in_mapping = get_origin(hint) is dict
        inner = dataclass_in(get_args(hint)[1] if in_mapping else hint)
        if inner is None:
            break
        if in_mapping and (key := next(parts, None)) is not None:
            path.append(str(key))
        owner = inner
    # What follows the field's own path names alternatives of its type, not something the user wrote.
    text = text.removeprefix("Value error, ")
    return f"{'.'.join(path) or 'config'}: {value!r} is not valid: ", text[0].lower() + text[1:]


def dataclass_in(hint: Any) -> type | None:
    """The dataclass that a type hint such as ``PairLossConfig | None`` is of; None for others, mappings too."""
    if get_origin(hint) is dict:
        return None
    return next((t for t in (hint, *get_args(hint)) if isinstance(t, type) and dataclasses.is_dataclass(t)), None)
