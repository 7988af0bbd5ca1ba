"""Class specifications: what is refused, and their texts as arrays."""

import numpy as np
import pytest

from llip_jax.config import ConfigError, EvalConfig
from llip_jax.evaluation.classes import ClassSpec


def test_class_spec_from_names() -> None:
    spec = ClassSpec.from_names(["cat", "dog {x}"], ["a {}.", "{} and {}, {y}"])
    assert spec.names == ("cat", "dog {x}")
    assert spec.texts == (("a cat.", "cat and cat, {y}"), ("a dog {x}.", "dog {x} and dog {x}, {y}"))
    default = ClassSpec.from_names(["cat"], EvalConfig().templates)
    assert len(default.texts[0]) == len(EvalConfig().templates)
    assert all("cat" in text for text in default.texts[0])


def test_class_spec_keeps_the_texts_of_each_class() -> None:
    spec = ClassSpec(("cat", "dog"), (("a cat", "a kitten"), ("a dog",)))
    assert [len(texts) for texts in spec.texts] == [2, 1]


@pytest.mark.parametrize(
    ("names", "texts", "message"),
    [
        ((), (), "at least one class"),
        (("cat", "dog"), (("a cat",),), "2 classes, got 1"),
        (("cat", "dog", "cat"), (("a",), ("b",), ("c",)), "more than once: 'cat'"),
        (("cat", " "), (("a",), ("b",)), "class 1 has a blank name"),
        (("cat", "dog"), (("a",), ()), "class 'dog' needs at least one text"),
        (("cat",), (("a", ""),), "no blank ones"),
    ],
)
def test_bad_class_specs_are_refused(names: tuple[str, ...], texts: tuple[tuple[str, ...], ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClassSpec(names, texts)


def test_templates_without_a_place_for_the_name_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"missing in \['a picture'\]"):
        ClassSpec.from_names(["cat"], ["a {}", "a picture"])
    with pytest.raises(ConfigError, match="class 'cat' needs at least one text"):
        ClassSpec.from_names(["cat"], [])


@pytest.mark.parametrize(
    ("weights", "groups", "message"),
    [
        (((1.0,),), None, "weights for 2 classes, got 1"),
        (((1.0,), (1.0,)), None, "class 'cat' has 2 texts, expected as many weights"),
        (((1.0, 0.0), (1.0,)), None, "class 'cat': expected weights above 0"),
        (((1.0, 1.0), (float("inf"),)), None, "class 'dog': expected weights above 0"),
        (((1.0, 1.0), (float("nan"),)), None, "class 'dog': expected weights above 0"),
        (None, (("a", "b"), ("a", "b")), "class 'dog' has 1 texts, expected as many groups"),
        (None, (("a", "b"),), "groups for 2 classes, got 1"),
    ],
)
def test_bad_weights_and_groups_are_refused(
    weights: tuple[tuple[float, ...], ...] | None, groups: tuple[tuple[str, ...], ...] | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ClassSpec(("cat", "dog"), (("a cat", "a kitten"), ("a dog",)), weights, groups)


def test_layout_without_weights_and_groups() -> None:
    layout = ClassSpec(("cat", "dog"), (("a cat", "a kitten"), ("a dog",))).layout
    np.testing.assert_array_equal(layout.owner, [0, 0, 1])
    np.testing.assert_array_equal(layout.weight, [0.5, 0.5, 1])
    np.testing.assert_array_equal(layout.group, [0, 0, 1])
    np.testing.assert_array_equal(layout.group_weight, layout.weight)
    np.testing.assert_array_equal(layout.group_owner, [0, 1])


def test_groups_of_a_class_need_not_lie_together_and_end_with_the_class() -> None:
    layout = ClassSpec(
        ("cat", "dog"),
        (("whiskers", "grey", "claws"), ("brown", "a tail")),
        ((1.0, 5.0, 3.0), (2.0, 2.0)),
        (("part", "colour", "part"), ("colour", "part")),
    ).layout
    np.testing.assert_array_equal(layout.group, [0, 1, 0, 2, 3])
    np.testing.assert_allclose(layout.group_weight, [0.25, 1, 0.75, 1, 1])
    np.testing.assert_array_equal(layout.group_owner, [0, 0, 1, 1])
    np.testing.assert_allclose(layout.weight, [1 / 9, 5 / 9, 3 / 9, 0.5, 0.5])
