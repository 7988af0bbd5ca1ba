"""What a class is to a zero-shot classifier: a name and the texts that stand for it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from llip_jax.config import ConfigError


@dataclass(frozen=True)
class ClassSpec:
    """Classes in label order: ``texts[c]`` stand for the class named ``names[c]``.

    Raises:
        ConfigError: there is no class, a class has no text, a name or a text is blank, or two names are equal.
    """

    names: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]

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

    @classmethod
    def from_names(cls, names: Sequence[str], templates: Sequence[str]) -> "ClassSpec":
        """One text for each class and template, the class name in place of every ``{}``.

        Raises:
            ConfigError: a template has no ``{}``, or the classes are not valid (see the class).
        """
        if without := [template for template in templates if "{}" not in template]:
            raise ConfigError(f"expected '{{}}' for the class name in every template, missing in {without}")
        # Not str.format: other braces in a template or a name are plain text.
        texts = tuple(tuple(template.replace("{}", name) for template in templates) for name in names)
        return cls(tuple(names), texts)
