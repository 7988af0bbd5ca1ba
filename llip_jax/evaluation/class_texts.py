"""Class names, descriptions and prompt templates from files, and from installed packages that carry the usual ones."""

import importlib.util
import json
import reprlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llip_jax.config import ConfigError, nearest
from llip_jax.evaluation.classes import ClassSpec, prompts

_KNOWN = "a .txt or .json file, 'open_clip:NAME' or 'clip_benchmark:NAME' (or 'clip_benchmark:NAME:LANGUAGE')"
_OPEN_CLIP_TEMPLATES = {"imagenet": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}
_OPEN_CLIP_CLASSES = {"imagenet": "IMAGENET_CLASSNAMES"}
_PROJECTS = {"open_clip": "open_clip_torch", "clip_benchmark": "clip-benchmark"}
_TEXT = "{text}"


def class_spec(classes: str | Sequence[str], templates: Sequence[str], field: str = "eval") -> ClassSpec:
    """Classes and the texts that stand for them, in label order.

    Names become texts by way of the templates. Names that are blank or occur more than once (CLIP_benchmark's lists,
    and ImageNet's with its two "sunglasses") get their number behind them; texts are made of the name as it is.

    A .json file may also give the texts of each class itself, as CuPL's (arXiv 2209.03320) and those of classification
    by description (arXiv 2210.07183): ``{NAME: TEXTS}`` or ``{NAME: {GROUP: TEXTS}}``, where TEXTS is a list of texts
    or ``{TEXT: WEIGHT}``. Templates then count only if they hold ``{text}``: "{}, which has {text}" makes sentences of
    descriptors. Without such templates, the texts are complete.

    Args:
        classes: names, or where they are (``eval.classes``).
        templates: each with ``{}`` (or CLIP_benchmark's ``{c}``) for the class name.
        field: of the configuration, that ``classes`` is from; for errors.

    Raises:
        ConfigError: something named is not there or not as expected, or classes or templates are not valid.
    """
    field = f"{field}.classes" + (f"={classes!r}" if isinstance(classes, str) else "")
    found = _read_classes(classes, field) if isinstance(classes, str) else classes
    templates = _with_braces(templates)
    with_text = [template for template in templates if _TEXT in template]
    try:
        if isinstance(found, dict):
            return _described(found, with_text)
        if with_text:
            raise ConfigError(f"classes are names without texts, which the templates {with_text} ask for")
        numbered = Counter(found)
        names = [
            name if name.strip() and numbered[name] == 1 else f"{name} (class {label})".strip()
            for label, name in enumerate(found)
        ]
        return ClassSpec(tuple(names), prompts(found, templates))
    except ConfigError as error:
        raise ConfigError(f"{field}: {error}") from error


def read_templates(where: str, field: str = "eval") -> tuple[str, ...]:
    """Prompt templates with ``{}`` for the class name.

    Args:
        where: they are (``eval.templates_from``).
        field: of the configuration, that ``where`` is from; for errors.

    Raises:
        ConfigError: something named is not there or not as expected, or a template has no ``{}`` (or ``{c}``).
    """
    field = f"{field}.templates_from={where!r}"
    package, _, name = where.partition(":")
    if package == "open_clip":
        return tuple(template("{}") for template in _open_clip(_OPEN_CLIP_TEMPLATES, name, field))
    if package == "clip_benchmark":
        found = _clip_benchmark("zeroshot_classification_templates", name, field)
    else:
        found = _strings(_read_file(where, field), field)
    templates = _with_braces(found)
    if not templates or any("{}" not in template for template in templates):
        raise ConfigError(f"{field}: expected templates, each with '{{}}' for the class name, got {templates}")
    return templates


def _with_braces(templates: Sequence[str]) -> tuple[str, ...]:
    """CLIP_benchmark's templates, in its package and its data sets, have ``{c}``."""
    return tuple(template if "{}" in template else template.replace("{c}", "{}") for template in templates)


def _read_classes(where: str, field: str) -> Sequence[str] | dict[str, Any]:
    """Names, or texts by name."""
    package, _, name = where.partition(":")
    if package == "open_clip":
        return list(_open_clip(_OPEN_CLIP_CLASSES, name, field))
    if package == "clip_benchmark":
        return _clip_benchmark("classnames", name, field)
    content = _read_file(where, field)
    return content if isinstance(content, dict) else _strings(content, field)


def _described(content: dict[str, Any], templates: Sequence[str]) -> ClassSpec:
    """Classes whose texts were given."""
    classes = {
        name: [
            (group, sentence, weight)
            for group, text, weight in _texts(texts, f"class {name!r}")
            for sentence in [one.replace("{}", name).replace(_TEXT, text) for one in templates] or [text]
        ]
        for name, texts in content.items()
    }
    return ClassSpec(
        tuple(classes),
        texts=tuple(tuple(sentence for _, sentence, _ in own) for own in classes.values()),
        weights=tuple(tuple(weight for *_, weight in own) for own in classes.values()),
        groups=tuple(tuple(group for group, *_ in own) for own in classes.values()),
    )


def _texts(content: Any, where: str) -> Iterator[tuple[str, str, float]]:
    """Group, text and weight of every text of a class."""
    if isinstance(content, dict) and all(isinstance(value, list | dict) for value in content.values()):
        for group, texts in content.items():
            yield from ((group, text, weight) for text, weight in _weighted(texts, f"{where}, {group!r}"))
    else:
        yield from (("", text, weight) for text, weight in _weighted(content, where))


def _weighted(content: Any, where: str) -> list[tuple[str, float]]:
    if isinstance(content, dict) and all(type(weight) in (int, float) for weight in content.values()):
        return list(content.items())
    if isinstance(content, list) and all(isinstance(text, str) for text in content):
        return [(text, 1.0) for text in content]
    raise ConfigError(f"{where}: expected a list of texts or {{text: weight}}, got {reprlib.repr(content)}")


def _read_file(where: str, field: str) -> Any:
    """Lines of a .txt file, or what a .json file holds."""
    path = Path(where)
    if path.suffix not in (".txt", ".json"):
        raise ConfigError(f"{field}: expected {_KNOWN}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            return json.loads(text, object_pairs_hook=_without_repetition)
    except FileNotFoundError:
        there = [str(other) for other in path.parent.glob("*") if other.suffix == path.suffix]
        raise ConfigError(f"{field}: there is no such file.{nearest(where, there) if there else ''}") from None
    except (OSError, ValueError, RecursionError) as error:  # also what is neither UTF-8 nor JSON
        raise ConfigError(f"{field}: {error}") from error
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if "" in lines:
        raise ConfigError(f"{field}: line {lines.index('') + 1} is blank")
    return lines


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if repeated := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
        raise ValueError(f"given more than once: {', '.join(map(repr, repeated))}")
    return dict(pairs)


def _strings(content: Any, field: str) -> list[str]:
    if not isinstance(content, list) or not all(isinstance(one, str) for one in content):
        raise ConfigError(f"{field}: expected a list of strings, got {reprlib.repr(content)}")
    return content


def _open_clip(constants: dict[str, str], name: str, field: str) -> Any:
    """A constant of open_clip.zero_shot_metadata."""
    if name not in constants:
        raise ConfigError(f"{field}: open_clip has no {name!r}.{nearest(name, list(constants))}")
    # The file alone: the package would import torch.
    file = _installed("open_clip", field) / "zero_shot_metadata.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return getattr(module, constants[name])
    except (OSError, AttributeError) as error:
        raise ConfigError(f"{field}: the installed open_clip does not have it: {error}") from error


def _clip_benchmark(what: str, name: str, field: str) -> list[str]:
    """An entry of datasets/LANGUAGE_WHAT.json in CLIP_benchmark."""
    dataset, _, language = name.partition(":")
    folder = _installed("clip_benchmark", field) / "datasets"
    files = {file.name.removesuffix(f"_{what}.json"): file for file in folder.glob(f"*_{what}.json")}
    language = language or "en"
    if language not in files:
        raise ConfigError(f"{field}: clip_benchmark has no language {language!r}.{nearest(language, list(files))}")
    entries = _read_file(str(files[language]), field)
    if dataset not in entries:
        raise ConfigError(
            f"{field}: clip_benchmark has no {what} of {dataset!r} in {language!r}.{nearest(dataset, list(entries))}"
        )
    return _strings(entries[dataset], field)


def _installed(package: str, field: str) -> Path:
    """The folder of a package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"{field}: {package} is not installed (pip install {_PROJECTS[package]})")
    return Path(spec.submodule_search_locations[0])
