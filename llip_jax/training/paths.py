"""Parameters by their paths as in model.txt: ``vision/transformer/blocks/qkv``."""

from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import Any

from flax import traverse_util

from llip_jax.config import ConfigError, nearest

Params = dict[str, Any]
"""Nested dict of float32 arrays."""


def by_path(params: Params) -> dict[str, Any]:
    """The leaves by path."""
    return traverse_util.flatten_dict(params, sep="/")


def nested(leaves: dict[str, Any]) -> Params:
    """The inverse of :func:`by_path`."""
    return traverse_util.unflatten_dict(leaves, sep="/")


def part(params: Params, paths: Collection[str]) -> Params:
    """The leaves at ``paths`` alone."""
    return nested({path: leaf for path, leaf in by_path(params).items() if path in paths})


def merged(params: Params, changed: Params) -> Params:
    """``params`` with the leaves of ``changed`` in place of their own."""
    return nested(by_path(params) | by_path(changed))


def matching(field: str, pattern: str, paths: Collection[str]) -> list[str]:
    """The paths that a shell-like pattern matches; ``*`` stands for any text, with "/" in it too.

    Raises:
        ConfigError: none; names ``field``, whose pattern it is.
    """
    matches = [path for path in paths if fnmatchcase(path, pattern)]
    if not matches:
        folders = {path[:end] + "/*" for path in paths for end, letter in enumerate(path) if letter == "/"}
        raise ConfigError(f"{field}: {pattern!r} matches no parameter.{nearest(pattern, [*paths, *folders])}")
    return matches
