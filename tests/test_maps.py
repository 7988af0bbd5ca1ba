"""Rules between two libraries' names: what was written reads back bit by bit, and nothing is lost unseen.

That the rules mean what the libraries mean by their names is in test_open_clip_weights.py, test_huggingface_weights.py
and test_big_vision.py.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from oracles import random_params

from llip_jax.config import Config, ConfigError, resolve
from llip_jax.interop import huggingface, open_clip
from llip_jax.interop.maps import Rule, concatenate, linear, norm, parameter_shapes, stack, tie, to_ours, to_theirs

CLIP = {
    "size": "B/16",
    "pooler": "class_token",
    "mixture_tokens": 1,
    "embed_dim": 24,
    "image_size": 20,
    "vision": {"layers": 3, "width": 48, "heads": 3, "mlp": 120, "patch": 4},
    "text": {"layers": 2, "width": 40, "heads": 5, "mlp": 100, "length": 13},
    "logit_bias": None,
}
SIGLIP = CLIP | {
    "embed_dim": 48,
    "vision": CLIP["vision"] | {"patch_bias": True, "norm_pre": False, "pooling": "attention", "projection": False},
    "text": CLIP["text"] | {"causal": False, "pooling": "last", "projection_bias": True},
    "logit_bias": -10.0,
}


def make_config(model: dict[str, Any]) -> Config:
    return resolve({"model": model, "data": {"tokenizer": {"vocabulary_size": 311}}})


def clip_arrays(seed: int = 0) -> tuple[Config, list[Rule], dict[str, np.ndarray]]:
    config = make_config(CLIP)
    rules = open_clip.rules(config)
    return config, rules, to_theirs(rules, random_params(config, seed))


@pytest.mark.parametrize("rules", [open_clip.rules, huggingface.rules], ids=["open_clip", "huggingface"])
@pytest.mark.parametrize("model", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_what_was_written_reads_back_bit_by_bit(rules: Callable[[Config], list[Rule]], model: dict[str, Any]) -> None:
    config = make_config(model)
    params = random_params(config, seed=1)
    arrays = to_theirs(rules(config), params)
    assert all(x.dtype == np.float32 and x.flags.c_contiguous for x in arrays.values())
    assert sum(x.size for x in arrays.values()) == sum(x.size for x in jax.tree.leaves(params)) + (
        48 if model is CLIP else 0  # the class token's position
    )
    again = to_ours(rules(config), arrays, config, source="here")
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_linear_layer_is_read_as_torch_computes_it() -> None:
    rng = np.random.default_rng(2)
    weight, x = rng.normal(size=(15, 8)), rng.normal(size=(4, 8))  # 15 out, 8 in
    heads = linear().read(weight, (8, 3, 5))
    np.testing.assert_allclose(np.einsum("bd,dhe->bhe", x, heads).reshape(4, 15), x @ weight.T)
    merged, y = linear(2).read(weight.T, (3, 5, 8)), rng.normal(size=(4, 3, 5))
    np.testing.assert_allclose(np.einsum("bhe,hed->bd", y, merged), y.reshape(4, 15) @ weight)


def test_a_class_token_is_the_sum_of_theirs_and_its_position() -> None:
    config, rules, arrays = clip_arrays()
    rng = np.random.default_rng(3)
    arrays["visual.class_embedding"] = token = rng.normal(size=48).astype(np.float32)
    arrays["visual.positional_embedding"] = positions = rng.normal(size=(26, 48)).astype(np.float32)
    vision = to_ours(rules, arrays, config, source="here")["vision"]
    np.testing.assert_array_equal(vision["tokens"], [token + positions[0]])
    np.testing.assert_array_equal(vision["positions"], positions[1:])


def test_numbers_of_other_types_come_out_as_float32() -> None:
    config, rules, arrays = clip_arrays()
    wide = {name: x.astype(np.float64) for name, x in arrays.items()}
    for ours, x in zip(*(jax.tree.leaves(to_ours(rules, a, config, source="")) for a in (wide, arrays)), strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, x)


def test_everything_that_does_not_fit_is_told_at_once() -> None:
    config, rules, arrays = clip_arrays()
    del arrays["visual.ln_pre.bias"]
    for layer in range(3):
        del arrays[f"visual.transformer.resblocks.{layer}.ln_1.weight"]
    arrays["visual.ls"] = np.zeros((2, 3), np.float32)
    arrays["visual.proj"] = arrays["visual.proj"].T
    arrays["logit_scale"] = np.array(3)
    with pytest.raises(ConfigError) as error:
        to_ours(rules, arrays | {"step": np.array(1)}, config, source="w.bin", ignored=["step"])
    assert str(error.value).splitlines() == [
        "w.bin: the weights do not fit the model that their configuration describes:",
        "  missing: visual.ln_pre.bias [48]",
        "  missing: visual.transformer.resblocks.*.ln_1.weight (3 of them) [48]",
        "  left over: visual.ls [2, 3]",
        "  of another shape: visual.proj [24, 48], expected [48, 24]",
        "  not floating-point: logit_scale int64",
    ]


@pytest.mark.parametrize(
    ("section", "field", "value", "told"),
    [
        ("vision", "layers", 10**9, "model.vision.layers="),
        ("text", "layers", 75, "model.text.layers="),
        ("vision", "width", 3 * 10**9, "model.vision=TowerShape.*width="),
        ("vision", "mlp", 10**18, "model.vision=TowerShape.*mlp="),
        ("text", "length", 10**9, "model.text.length="),
        ("", "image_size", 4 * 10**9, "model.image_size="),
        ("", "image_size", 4 * 10**30, "model.image_size="),
        ("", "embed_dim", 10**9, "model.embed_dim="),
    ],
)
def test_a_model_larger_than_the_weights_is_refused_before_anything_of_its_size_is_made(
    section: str, field: str, value: int, told: str
) -> None:
    _, _, arrays = clip_arrays()
    config = make_config(CLIP | ({section: CLIP[section] | {field: value}} if section else {field: value}))
    with pytest.raises(ConfigError, match=f"w.bin: .* more than its 74 arrays .*hold: .*{told}{value}"):
        to_ours(open_clip.rules(config), arrays, config, source="w.bin")


def test_a_vocabulary_or_patches_larger_than_the_weights_are_refused() -> None:
    _, rules, arrays = clip_arrays()
    model = CLIP | {"image_size": 10**9, "vision": CLIP["vision"] | {"patch": 10**9}}
    config = resolve({"model": model, "data": {"tokenizer": {"vocabulary_size": 10**9}}})
    with pytest.raises(ConfigError, match=r"data.tokenizer.vocabulary_size=10+; model.vision.patch=10+"):
        to_ours(rules, arrays, config, source="w.bin")


def test_parameters_that_the_weights_do_not_have_are_told() -> None:
    _, rules, arrays = clip_arrays()
    with_bias = make_config(CLIP | {"logit_bias": -10.0})
    with pytest.raises(ConfigError, match=re.escape("parameters that the weights do not have: bias []")):
        to_ours(rules, arrays, with_bias, source="here")


def test_parameters_without_a_place_among_theirs_are_told() -> None:
    config = make_config(CLIP | {"pooler": "registers", "mixture_tokens": 4})
    params = random_params(config, seed=4)
    rules = open_clip.rules(make_config(CLIP))
    del params["pooler"]["image"]
    params["pooler"]["query"] = np.zeros((2, 3))
    with pytest.raises(ConfigError) as error:
        to_theirs(rules, params)
    assert str(error.value).splitlines()[1:] == ["  missing: pooler/image", "  without a place: pooler/query [2, 3]"]


def test_rules_for_several_arrays() -> None:
    """Stacked in ours, and below each other in theirs, for each of two layers."""
    rng = np.random.default_rng(5)
    ours = {
        "qkv": rng.normal(size=(2, 4, 3, 6)).astype(np.float32),
        "a": rng.normal(size=(2, 4, 5)).astype(np.float32),
        "b": rng.normal(size=(2, 4, 2, 3)).astype(np.float32),
        "n": {"scale": np.zeros(2, np.float32), "bias": np.ones(2, np.float32)},
        "c": np.float32(7),
    }
    rules = [
        stack(["{}.q", "{}.k", "{}.v"], "qkv", axis=1, view=linear()),
        concatenate("{}.ab", ["a", "b"], linear()),
        *norm("n", "n"),
        tie("c", "c"),
    ]
    theirs = to_theirs(rules, ours)
    assert theirs.keys() == {f"{i}.{x}" for i in range(2) for x in ("q", "k", "v", "ab")} | {"n.weight", "n.bias", "c"}
    np.testing.assert_array_equal(theirs["1.k"], ours["qkv"][1, :, 1].T)
    np.testing.assert_array_equal(theirs["0.ab"], np.concatenate([ours["a"][0].T, ours["b"][0].reshape(4, 6).T]))
    for rule in rules[:2]:
        layers = [
            rule.read([theirs[n.format(i)] for n in rule.theirs], [ours[p][i].shape for p in rule.ours]) for i in (0, 1)
        ]
        for path, *read in zip(rule.ours, *layers, strict=True):
            np.testing.assert_array_equal(np.stack(read), ours[path])


def test_parameter_shapes_are_the_models() -> None:
    config = make_config(SIGLIP)
    shapes = parameter_shapes(config)
    assert shapes["vision/attention_pool/key_value"] == (48, 2, 3, 16)
    assert shapes["text/transformer/blocks/qkv"] == (2, 40, 3, 5, 8)
    assert sum(int(np.prod(s)) for s in shapes.values()) == sum(
        x.size for x in jax.tree.leaves(random_params(config, seed=6))
    )
