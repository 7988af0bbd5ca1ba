"""What a class is to a zero-shot classifier: a name and the texts that stand for it."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from llip_jax.config import ConfigError


class Layout(NamedTuple):
    """The T texts of a ClassSpec, class after class, and the G groups that they are in."""

    owner: Int[np.ndarray, "T"]
    """Class of each text, ascending."""
    weight: Float[np.ndarray, "T"]
    """Of each text in its class; the weights of a class sum to 1."""
    group: Int[np.ndarray, "T"]
    """Group of each text; groups are numbered class after class."""
    group_weight: Float[np.ndarray, "T"]
    """Of each text in its group; the weights of a group sum to 1."""
    group_owner: Int[np.ndarray, "G"]
    """Class of each group, ascending."""


@dataclass(frozen=True)
class ClassSpec:
    """Classes in label order: ``texts[c]`` stand for the class named ``names[c]``.

    Args:
        names: of the classes.
        texts: of each class.
        weights: of each text of each class, above 0, only their ratios within a class count; None: all alike.
        groups: of each text of each class, the group it is in (the attribute it describes, a style of prompt), by name;
            None: one group a class. Groups of different classes are different groups.

    Raises:
        ConfigError: there is no class, a class has no text, a name or a text is blank, two names are equal, a weight is
            not above 0, or lengths disagree.
    """

    names: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    weights: tuple[tuple[float, ...], ...] | None = None
    groups: tuple[tuple[str, ...], ...] | None = None

    def __post_init__(self) -> None:
        if not self.names:
            raise ConfigError("expected at least one class, got none")
        if len(self.names) != len(self.texts):
            raise ConfigError(f"expected texts for {len(self.names)} classes, got {len(self.texts)}")
        if repeated := [name for name, count in Counter(self.names).items() if count > 1]:
            raise ConfigError(f"class names given more than once: {', '.join(map(repr, repeated))}")
        for label, (name, texts) in enumerate(zip(self.names, self.texts, strict=True)):
            if not name.strip():
                raise ConfigError(f"class {label} has a blank name")
            if not texts or not all(text.strip() for text in texts):
                raise ConfigError(f"class {name!r} needs at least one text and no blank ones, got {texts}")
        for what, given in (("weights", self.weights), ("groups", self.groups)):
            if given is not None and len(given) != len(self.names):
                raise ConfigError(f"expected {what} for {len(self.names)} classes, got {len(given)}")
            for name, texts, own in zip(self.names, self.texts, given or (), strict=False):
                if len(own) != len(texts):
                    raise ConfigError(f"class {name!r} has {len(texts)} texts, expected as many {what}, got {own}")
        for name, weights in zip(self.names, self.weights or (), strict=False):
            if not all(0 < weight < math.inf for weight in weights):
                raise ConfigError(f"class {name!r}: expected weights above 0, got {weights}")

    @classmethod
    def from_names(cls, names: Sequence[str], templates: Sequence[str]) -> "ClassSpec":
        """One text for each class and template, the class name in place of every ``{}``.

        Raises:
            ConfigError: a template has no ``{}``, or the classes are not valid (see the class).
        """
        return cls(tuple(names), prompts(names, templates))

    @cached_property
    def layout(self) -> Layout:
        """The texts as arrays."""
        counts = [len(texts) for texts in self.texts]
        owner = np.repeat(np.arange(len(counts)), counts)
        weight = np.ones(len(owner)) if self.weights is None else np.concatenate(self.weights).astype(np.float64)
        numbers: dict[tuple[int, str], int] = {}
        named = [""] * len(owner) if self.groups is None else [group for own in self.groups for group in own]
        group = np.asarray([numbers.setdefault(key, len(numbers)) for key in zip(owner.tolist(), named, strict=True)])
        return Layout(
            owner,
            weight / np.bincount(owner, weight)[owner],
            group,
            weight / np.bincount(group, weight)[group],
            np.asarray([label for label, _ in numbers]),
        )


def prompts(names: Sequence[str], templates: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Of each class, every template with the class name in place of every ``{}``.

    Raises:
        ConfigError: a template has no ``{}``.
    """
    if without := [template for template in templates if "{}" not in template]:
        raise ConfigError(f"expected '{{}}' for the class name in every template, missing in {without}")
    # Not str.format: other braces in a template or a name are plain text.
    return tuple(tuple(template.replace("{}", name) for template in templates) for name in names)
