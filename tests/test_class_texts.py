"""Class texts from files, and from installed packages as these have them."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from oracles import import_open_clip

from llip_jax.config import ConfigError
from llip_jax.evaluation.class_texts import class_spec, read_templates

TEMPLATES = ["a {}.", "one {}."]


def write(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def clip_benchmark_data(file: str) -> Any:
    package = pytest.importorskip("clip_benchmark", reason="clip_benchmark is not installed")
    return json.loads((Path(package.__file__).parent / "datasets" / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["classes.txt", "classes.json"])
def test_names_from_files(tmp_path: Path, name: str) -> None:
    content = "\ufeffcat\r\n  jamón {x} \n\n" if name.endswith(".txt") else ["cat", "jamón {x}"]
    spec = class_spec(write(tmp_path / name, content), TEMPLATES)
    assert spec.names == ("cat", "jamón {x}")
    assert spec.texts == (("a cat.", "one cat."), ("a jamón {x}.", "one jamón {x}."))


def test_texts_of_classes_are_used_as_they_are(tmp_path: Path) -> None:
    spec = class_spec(write(tmp_path / "c.json", {"cat": ["a cat", "whiskers"], "dog": ["a dog"]}), TEMPLATES)
    assert spec.names == ("cat", "dog")
    assert spec.texts == (("a cat", "whiskers"), ("a dog",))
    assert len(spec.layout.group_owner) == 2


def test_groups_and_weights_of_texts(tmp_path: Path) -> None:
    content = {
        "cat": {"part": ["whiskers", "claws"], "colour": {"grey": 2, "black": 0.5}},
        "dog": {"a dog": 1.0, "a puppy": 3},
    }
    spec = class_spec(write(tmp_path / "c.json", content), TEMPLATES)
    assert spec.texts == (("whiskers", "claws", "grey", "black"), ("a dog", "a puppy"))
    assert spec.weights == ((1.0, 1.0, 2, 0.5), (1.0, 3))
    assert spec.groups is not None
    assert spec.groups[0] == ("part", "part", "colour", "colour")
    assert len(set(spec.groups[1])) == 1


def test_templates_with_a_place_for_the_text_make_sentences_of_descriptors(tmp_path: Path) -> None:
    path = write(tmp_path / "c.json", {"hen": {"part": ["two legs"], "colour": {"red or brown feathers": 2}}})
    spec = class_spec(path, ["a photo of a {}.", "{}, which has {text}", "{}: {text}"])
    assert spec.texts == (
        (
            "hen, which has two legs",
            "hen: two legs",
            "hen, which has red or brown feathers",
            "hen: red or brown feathers",
        ),
    )
    assert spec.weights == ((1.0, 1.0, 2, 2),)
    assert spec.groups == (("part", "part", "colour", "colour"),)
    with pytest.raises(ConfigError, match="names without texts"):
        class_spec(["hen"], ["{}, which has {text}"])


def test_names_that_are_blank_or_repeated_get_their_number_and_keep_their_text() -> None:
    spec = class_spec(["sunglasses", "crane", "", "sunglasses"], ["{} shapes."])
    assert spec.names == ("sunglasses (class 0)", "crane", "(class 2)", "sunglasses (class 3)")
    assert spec.texts == (("sunglasses shapes.",), ("crane shapes.",), (" shapes.",), ("sunglasses shapes.",))


@pytest.mark.parametrize("name", ["templates.txt", "templates.json"])
def test_templates_from_files(tmp_path: Path, name: str) -> None:
    templates = ["a photo of a {}.", "una foto de {c}, {x}"]
    path = write(tmp_path / name, "\n".join(templates) if name.endswith(".txt") else templates)
    assert read_templates(path) == ("a photo of a {}.", "una foto de {}, {x}")


def test_imagenet_of_open_clip_is_as_the_library_has_it() -> None:
    open_clip = import_open_clip()
    for name, own in (
        ("imagenet", open_clip.OPENAI_IMAGENET_TEMPLATES),
        ("simple", open_clip.SIMPLE_IMAGENET_TEMPLATES),
    ):
        templates = read_templates(f"open_clip:{name}")
        assert len(templates) == len(own)
        spec = class_spec("open_clip:imagenet", templates)
        assert spec.texts == tuple(tuple(t(c) for t in own) for c in open_clip.IMAGENET_CLASSNAMES)
    assert len(spec.names) == len(set(spec.names)) == 1000
    assert [name for name in spec.names if "class" in name] == [
        f"{name} (class {label})"
        for label, name in enumerate(open_clip.IMAGENET_CLASSNAMES)
        if name in ("missile", "sunglasses")
    ]


@pytest.mark.parametrize("language", ["en", "it", "cn"])
def test_every_set_of_clip_benchmark_is_as_the_library_has_it(language: str) -> None:
    classes = clip_benchmark_data(f"{language}_classnames.json")
    templates = clip_benchmark_data(f"{language}_zeroshot_classification_templates.json")
    suffix = "" if language == "en" else f":{language}"
    for name, names in classes.items():
        own = templates.get(name, templates["imagenet1k"])
        known = name if name in templates else "imagenet1k"
        spec = class_spec(f"clip_benchmark:{name}{suffix}", read_templates(f"clip_benchmark:{known}{suffix}"))
        assert spec.texts == tuple(tuple(t.format(c=c) for t in own) for c in names)
    for name, own in templates.items():
        expected = tuple(t.format(c="some class") for t in own)
        found = read_templates(f"clip_benchmark:{name}{suffix}")
        assert tuple(t.replace("{}", "some class") for t in found) == expected


@pytest.mark.parametrize(
    ("package", "classes", "templates"),
    [
        ("open_clip", "open_clip:imagenet", "open_clip:simple"),
        ("clip_benchmark", "clip_benchmark:pets", "clip_benchmark:pets"),
    ],
)
def test_reading_from_a_package_imports_neither_it_nor_torch(package: str, classes: str, templates: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    program = (
        "import sys\n"
        "from llip_jax.evaluation.class_texts import class_spec, read_templates\n"
        f"class_spec({classes!r}, read_templates({templates!r}))\n"
        f"assert not {{'torch', {package!r}}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "at least one class"),
        ({}, "at least one class"),
        ("{", "Expecting property name"),
        ('{"cat": ["a"], "cat": ["b"]}', "given more than once: 'cat'"),
        ({"cat": []}, "class 'cat' needs at least one text"),
        ({"cat": {}}, "class 'cat' needs at least one text"),
        ({"cat": ["a", " "]}, "no blank ones"),
        ({"cat": "a cat"}, "class 'cat': expected a list of texts or {text: weight}, got 'a cat'"),
        ({"cat": {"colour": ["a"], "grey": 1}}, "class 'cat': expected a list of texts"),
        ({"cat": {"colour": [1]}}, "class 'cat', 'colour': expected a list of texts"),
        ({"cat": {"grey": 0}}, "expected weights above 0"),
        ({"cat": {"grey": True}}, "expected a list of texts"),
        ('{"cat": {"grey": NaN}}', "expected weights above 0"),
        (["cat", 1], "expected a list of strings"),
        (3, "expected a list of strings"),
    ],
)
def test_bad_class_files_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = write(tmp_path / "classes.json", content)
    with pytest.raises(ConfigError, match=r"^eval\.sets\.x\.classes='.*classes\.json': ") as error:
        class_spec(path, TEMPLATES, "eval.sets.x")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("cats", "expected a .txt or .json file, 'open_clip:NAME'"),
        ("openclip:imagenet", "expected a .txt or .json file, 'open_clip:NAME'"),
        ("open_clip:imagnet", "open_clip has no 'imagnet'. Did you mean 'imagenet'?"),
        (
            "clip_benchmark:imagenet",
            "clip_benchmark has no classnames of 'imagenet' in 'en'. Did you mean 'imagenet1k'?",
        ),
        ("clip_benchmark:imagenet1k:xx", "clip_benchmark has no language 'xx'"),
    ],
)
def test_unknown_places_are_refused_with_the_nearest(where: str, message: str) -> None:
    package = where.partition(":")[0]
    if package in ("open_clip", "clip_benchmark") and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    with pytest.raises(ConfigError) as error:
        class_spec(where, TEMPLATES)
    assert str(error.value).startswith(f"eval.classes={where!r}: {message}")


def test_missing_files_are_named_with_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "classes.txt", "cat")
    with pytest.raises(ConfigError, match=r"no such file\. Did you mean '.*classes\.txt'"):
        class_spec(str(tmp_path / "clases.txt"), TEMPLATES)
    with pytest.raises(ConfigError, match="no such file"):
        class_spec(str(tmp_path / "nowhere" / "classes.txt"), TEMPLATES)


def test_bad_text_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 2 is blank"):
        class_spec(write(tmp_path / "c.txt", "cat\n \ndog"), TEMPLATES)
    with pytest.raises(ConfigError, match="at least one class"):
        class_spec(write(tmp_path / "c.txt", "\n"), TEMPLATES)
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match="utf-8"):
        class_spec(str(tmp_path / "c.txt"), TEMPLATES)


@pytest.mark.parametrize("content", [[], ["a {}", "a photo"], {"a": 1}, ["a {}", 2]])
def test_bad_templates_are_refused(tmp_path: Path, content: Any) -> None:
    path = write(tmp_path / "t.json", content)
    with pytest.raises(ConfigError, match=r"eval\.templates_from='.*t\.json': expected "):
        read_templates(path)
    with pytest.raises(ConfigError, match=r"eval\.classes: expected '\{\}' for the class name"):
        class_spec(["cat"], ["a photo"])


def test_packages_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="open_clip is not installed \\(pip install open_clip_torch\\)"):
        class_spec("open_clip:imagenet", TEMPLATES)
    with pytest.raises(ConfigError, match="clip_benchmark is not installed \\(pip install clip-benchmark\\)"):
        read_templates("clip_benchmark:imagenet1k")
