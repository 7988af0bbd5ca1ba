"""Configuration files and command-line overrides: ``--config FILE[:VARIANT]`` and ``--config.FIELD=VALUE``."""

import ast
import copy
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ml_collections import ConfigDict

from llip_jax.config import Config, ConfigError, dataclass_in, field_name, nearest, resolve

LADDER: dict[str, dict[str, Any]] = {
    "": {},
    "siglip": {"model": {"pooler": "class_token", "mixture_tokens": 1}},
    "registers": {"model": {"pooler": "registers"}},
    "average": {"model": {"pooler": "average"}},
    "clip": {
        "model": {"pooler": "class_token", "mixture_tokens": 1, "logit_scale": 1 / 0.07, "logit_bias": None},
        "objective": {"sigmoid": None, "softmax": {}},
    },
}
"""What each rung of the paper's ablation ladder (and CLIP) changes in a Llip configuration."""


def with_variant(config: Mapping[str, Any], variant: str | None) -> ConfigDict:
    """A Llip configuration turned into one of the ladder's rungs; for use in ``get_config(arg)``.

    Raises:
        ConfigError: an unknown variant.
    """
    if (variant or "") not in LADDER:
        raise ConfigError(f"variant: no variant named {variant!r}.{nearest(str(variant), [v for v in LADDER if v])}")
    return ConfigDict(merged(config, LADDER[variant or ""]))


def load(spec: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration of ``path/to/file.py[:arg]``, with ``field.path=value`` overrides applied.

    Fields that the file leaves out keep their defaults.

    Raises:
        ConfigError: a file that is missing or fails, and everything :func:`llip_jax.config.resolve` refuses.
    """
    return resolve(read(spec, overrides))


def read(spec: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """As :func:`load`, but only what file and overrides say, and not yet validated.

    The file's ``get_config(arg)`` returns a ConfigDict. The file's folder is on the import path while it is read, so
    that configurations can share code.

    Raises:
        ConfigError: a file that is missing or fails.
    """
    path, _, arg = spec.partition(":")
    return overridden(_run_config_file(Path(path), arg or None), overrides)


def overridden(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A plain nested configuration with ``field.path=value`` overrides put in; changes ``raw``."""
    for override in overrides:
        name, _, text = override.partition("=")
        path = name.split(".")
        hint = _hint(path)
        value = _parse(hint, text)
        if isinstance(hint, type) and is_dataclass(hint) and not isinstance(value, Mapping):
            first = next(iter(_fields(hint)))
            raise ConfigError(f"{name}: {value!r} is not valid: expected one of its fields, as {name}.{first}")
        _set(raw, path, value)
    return raw


def _run_config_file(path: Path, arg: str | None) -> dict[str, Any]:
    if not path.is_file():
        near = nearest(path.name, [p.name for p in path.parent.glob("*.py")]) if path.parent.is_dir() else ""
        raise ConfigError(f"--config: no file {str(path)!r}.{near}")
    if path.suffix != ".py":
        raise ConfigError(f"--config: {str(path)!r} is not a Python file with get_config(arg)")
    spec = importlib.util.spec_from_file_location(f"config_file_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # given for every .py file
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
        return module.get_config(arg).to_dict()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"--config: {path} failed with {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent))


def merged(base: Mapping[str, Any], changes: Mapping[str, Any], owner: type = Config) -> dict[str, Any]:
    """A raw configuration with changes put in, section by section; a copy.

    Mappings that are values, such as ``optimizer.rates``, are replaced whole. ``owner`` is whose fields they are.
    """
    result = copy.deepcopy(dict(base))
    hints = _fields(owner)
    for name, value in changes.items():
        section = dataclass_in(hints.get(name))
        nested = section and isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
        result[name] = merged(result[name], value, section) if nested and section else copy.deepcopy(value)
    return result


def _set(raw: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        if not isinstance(raw.get(name), dict):
            raw[name] = {}
        raw = raw[name]
    raw[path[-1]] = value


def _hint(path: list[str]) -> Any:
    """The type of a field, or None."""
    hint: Any = Config
    for name in path:
        hint = get_args(hint)[1] if get_origin(hint) is dict else _fields(dataclass_in(hint)).get(name)
    return hint


def _parse(hint: Any, text: str) -> Any:
    """A Python literal where the text is one (and the field is not itself a string), otherwise the text."""
    if hint is str:
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _fields(owner: Any) -> dict[str, Any]:
    """Types of a configuration's fields by name."""
    if not isinstance(owner, type) or not is_dataclass(owner):
        return {}
    hints = get_type_hints(owner)
    return {field_name(field): hints[field.name] for field in fields(owner)}
