"""Configuration: what is accepted comes back unchanged, what is not is named with the nearest thing that exists."""

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from run_helpers import DEMO, ROOT, TINY, tiny_config

from llip_jax.config import (
    Config,
    ConfigError,
    MeshConfig,
    ObjectiveConfig,
    PairLossConfig,
    differences,
    nearest,
    resolve,
    to_dict,
)
from llip_jax.config_files import LADDER, load, overridden, with_variant
from llip_jax.models.pooling import token_count
from llip_jax.models.sizes import model_shape

FILES = sorted(path for path in (ROOT / "configs").glob("*.py") if "def get_config(" in path.read_text())
FINE_TUNING = ROOT / "configs" / "finetune.py"
VARIANTS = [
    (file, variant) for file in FILES for variant in (LADDER if file != FINE_TUNING else ("", "as_is", "locked"))
]


@pytest.mark.parametrize(("file", "variant"), VARIANTS, ids=lambda value: getattr(value, "stem", value))
def test_every_file_and_variant_loads_and_comes_back_unchanged(file: Path, variant: str) -> None:
    config = load(f"{file}:{variant}" if variant else str(file))
    assert resolve(to_dict(config)) == config
    assert resolve(json.loads(json.dumps(to_dict(config)))) == config
    assert model_shape(config.model).vision.layers >= 1


def test_there_are_files() -> None:
    assert DEMO in FILES


def test_defaults_come_back_unchanged() -> None:
    assert resolve({}) == Config()
    assert resolve(to_dict(Config())) == Config()


def test_optional_and_mixed_fields_come_back_unchanged() -> None:
    raw = {
        "model": {"logit_bias": None, "scan_layers": True, "embed_dim": 96, "image_mean": (0.5, 0.5, 0.5)},
        "objective": {"sigmoid": None, "softmax": {"weight": 2.0, "duplicates": "positive"}},
        "optimizer": {"clip_norm": None},
        "data": {"label_field": "kind", "folder": {"eval_exclude": {"kind": ("a", "b")}, "specific_field": None}},
        "checkpoint": {"keep_every_steps": 7},
    }
    config = resolve(raw)
    assert config.model.image_mean == (0.5, 0.5, 0.5)
    assert config.data.folder.eval_exclude == {"kind": ("a", "b")}
    assert config.objective.terms() == {"softmax": PairLossConfig(weight=2.0, duplicates="positive")}
    assert resolve(json.loads(json.dumps(to_dict(config)))) == config


def test_configuration_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.steps = 3  # type: ignore[misc]


def test_whole_numbers_are_numbers() -> None:
    assert resolve({"optimizer": {"learning_rate": 1, "weight_decay": 0}}).optimizer.learning_rate == 1.0


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"modle": {}}, "modle: no such field. Did you mean 'model'?"),
        ({"model": {"mixture_token": 3}}, "model.mixture_token: no such field. Did you mean 'mixture_tokens'?"),
        ({"model": {"vision": {"layer": 3}}}, "model.vision.layer: no such field. Did you mean 'layers'?"),
        ({"train": {"batchsize": 3}}, "train.batchsize: no such field. Did you mean 'batch_size'?"),
        ({"objective": {"softmx": {}}}, "objective.softmx: no such field. Did you mean 'softmax'?"),
        ({"objective": {"sigmoid": {"wait": 1}}}, "objective.sigmoid.wait: no such field. Did you mean 'weight'?"),
        ({"mesh": {"qqqq": 1}}, "mesh.qqqq: no such field. Valid names: data, fsdp, fsdp_limit, tensor."),
        ({"train": {"steps": "many"}}, "train.steps: 'many' is not valid"),
        ({"train": {"steps": 2.5}}, "train.steps: 2.5 is not valid"),
        ({"train": {"steps": True}}, "train.steps: True is not valid"),
        ({"train": {"steps": -1}}, "train.steps: -1 is not valid: input should be greater than or equal to 0"),
        ({"train": 7}, "train: 7 is not valid"),
        ({"train": None}, "train: None is not valid"),
        ({"seed": 2**31}, f"seed: {2**31} is not valid"),
        ({"data": {"path": 123}}, "data.path: 123 is not valid"),
        (
            {"data": {"source": "tar"}},
            "data.source: 'tar' is not valid: input should be 'toyworld', 'folder', 'webdataset', ",
        ),
        ({"data": {"toyworld": {"aspects": (3, 2)}}}, "data.toyworld.aspects: "),
        ({"data": {"augment": {"crop_scale": (0.0, 1.0)}}}, "data.augment.crop_scale: "),
        ({"model": {"image_mean": (0.5, 0.5)}}, "model.image_mean"),
        ({"model": {"logit_bias": "auto"}}, "'auto' is not valid: input should be a valid number or input should be"),
        ({"optimizer": {"learning_rate": float("nan")}}, "optimizer.learning_rate: nan is not valid"),
        ({"objective": {"sigmoid": None}}, "expected at least one term (sigmoid, softmax)"),
        ({"objective": {"softmax": {"weight": 0}}}, "objective.softmax.weight: 0 is not valid"),
        (
            {"mesh": {"data": 0}},
            "for data and fsdp, got data, fsdp, tensor = (0, 1, 1)",
        ),
        ({"mesh": {"data": -1, "tensor": -1}}, "-1 for one of them or for data and fsdp"),
        ({"seed": object()}, "expected numbers, strings, tuples, booleans and None"),
    ],
)
def test_mistakes_are_named(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(raw)
    assert message in str(caught.value)
    assert len({line.split(": ")[0] for line in str(caught.value).splitlines()}) == 1, "only the mistake is named"


def test_all_mistakes_are_told_together() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({"train": {"steps": -1, "batch": 3}, "seeds": 0})
    assert len(str(caught.value).splitlines()) == 3


def test_nearest() -> None:
    assert nearest("B16", ["B/16", "L/14"]) == " Did you mean 'B/16'?"
    assert nearest("zzz", ["b", "a"]) == " Valid names: a, b."


def test_differences() -> None:
    old = tiny_config()
    new = tiny_config(train={"steps": 9}, model={"logit_bias": None})
    assert differences(old, old) == []
    assert differences(old, new) == ["model.logit_bias: 'prior' -> None", "train.steps: 8 -> 9"]
    other = dataclasses.replace(old, objective=ObjectiveConfig(sigmoid=None, softmax=PairLossConfig()))
    assert [line.split(":")[0] for line in differences(old, other)] == ["objective.sigmoid", "objective.softmax"]


@pytest.mark.parametrize(
    ("override", "field", "expected"),
    [
        ("train.steps=3", "train.steps", 3),
        ("optimizer.learning_rate=1e-3", "optimizer.learning_rate", 1e-3),
        ("model.logit_bias=None", "model.logit_bias", None),
        ("model.logit_bias=-3", "model.logit_bias", -3.0),
        ("model.logit_bias=prior", "model.logit_bias", "prior"),
        ("checkpoint.keep_every_steps=100", "checkpoint.keep_every_steps", 100),
        ("optimizer.clip_norm=None", "optimizer.clip_norm", None),
        ("data.toyworld.aspects=(2,3)", "data.toyworld.aspects", (2, 3)),
        ("data.augment.crop_scale=[0.5, 1]", "data.augment.crop_scale", (0.5, 1.0)),
        ("data.augment.flip=True", "data.augment.flip", True),
        ("data.path=123", "data.path", "123"),
        ("data.path=None", "data.path", "None"),
        ("data.path=a=b", "data.path", "a=b"),
        ("data.path=", "data.path", ""),
        ("data.label_field=label", "data.label_field", "label"),
        ("data.label_field=None", "data.label_field", None),
        ("data.folder.eval_exclude={'kind': ('x',)}", "data.folder.eval_exclude", {"kind": ("x",)}),
        ("eval.templates=('a {}',)", "eval.templates", ("a {}",)),
        ("objective.softmax.weight=2", "objective.softmax", PairLossConfig(weight=2.0)),
        ("objective.softmax={}", "objective.softmax", PairLossConfig()),
        ("model.scan_layers=auto", "model.scan_layers", "auto"),
        ("model.scan_layers=False", "model.scan_layers", False),
        ("model.size=B/32", "model.size", "B/32"),
    ],
)
def test_overrides(override: str, field: str, expected: Any) -> None:
    value: Any = load(str(DEMO), [override])
    for name in field.split("."):
        value = getattr(value, name)
    assert value == expected
    assert type(value) is type(expected)


def test_a_term_is_added_to_those_of_the_file_and_may_replace_them() -> None:
    both = load(str(DEMO), ["objective.sigmoid.weight=0.5", "objective.softmax.weight=2"])
    assert {name: term.weight for name, term in both.objective.terms().items()} == {"sigmoid": 0.5, "softmax": 2.0}
    added = load(str(DEMO), ["objective.softmax.weight=2"])
    assert {name: term.weight for name, term in added.objective.terms().items()} == {"sigmoid": 1.0, "softmax": 2.0}
    one = load(str(DEMO), ["objective.sigmoid=None", "objective.softmax.weight=2"])
    assert list(one.objective.terms()) == ["softmax"]


def test_last_override_counts() -> None:
    assert load(str(DEMO), ["train.steps=3", "train.steps=4"]).train.steps == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=3", "train.step: no such field. Did you mean 'steps'?"),
        ("steps=3", "steps: no such field."),
        ("train.steps.x=3", "train.steps: {'x': 3} is not valid"),
        ("train.steps=", "train.steps: '' is not valid"),
        ("model.size=7", None),
        ("data.label_field=7", "data.label_field: 7 is not valid"),
    ],
)
def test_bad_overrides(override: str, message: str | None) -> None:
    if message is None:
        assert load(str(DEMO), [override]).model.size == "7"
        return
    with pytest.raises(ConfigError) as caught:
        load(str(DEMO), [override])
    assert message in str(caught.value)


def test_ladder_changes_the_model_and_nothing_else() -> None:
    base = load(str(DEMO))
    tokens = {}
    for variant in LADDER:
        config = load(f"{DEMO}:{variant}")
        tokens[variant] = token_count(config.model)
        changed = {line.split(":")[0].split(".")[0] for line in differences(base, config)}
        assert changed <= ({"model", "objective"} if variant == "clip" else {"model"})
    assert tokens == {"": 8, "siglip": 1, "registers": 8, "average": 8, "clip": 1}
    assert list(load(f"{DEMO}:clip").objective.terms()) == ["softmax"]
    assert load(f"{DEMO}:clip").model.logit_bias is None


def test_with_variant_leaves_its_argument_alone() -> None:
    config = {"model": {"pooler": "mixer"}}
    assert with_variant(config, "siglip").model.pooler == "class_token"
    assert config == {"model": {"pooler": "mixer"}}
    with pytest.raises(ConfigError, match=r"no variant named 'sigmoid'\. Did you mean 'siglip'"):
        with_variant(config, "sigmoid")


def test_helpers_name_fields_that_exist() -> None:
    assert resolve(to_dict(tiny_config())).train.batch_size == TINY["train.batch_size"]


def test_mesh_defaults_take_every_device() -> None:
    assert MeshConfig() == MeshConfig(data=-1, fsdp=1, tensor=1)


def test_what_has_no_effect_beside_a_mixture_is_refused() -> None:
    mixture = {"a": {"source": "toyworld"}}
    for field in ({"path": "x"}, {"eval_path": "x"}, {"fields": {"captions": ["x"]}}):
        with pytest.raises(ConfigError, match=f"{next(iter(field))} have no effect beside data.mixture"):
            resolve({"data": {"mixture": mixture, **field}})
    with pytest.raises(ConfigError, match="at least one weight above 0"):
        resolve({"data": {"mixture": {"a": {"weight": 0}}}})
    assert resolve({"data": {"fields": {"captions": "txt"}}}).data.fields.captions == ("txt",)


def test_fields_of_a_mixture_are_named_set_and_compared() -> None:
    raw = {"data": {"mixture": {"web": {"source": "webdataset", "path": "a.tar"}, "toys": {"source": "toyworld"}}}}
    for field, message in (
        ({"wieght": 1}, "data.mixture.web.wieght: no such field. Did you mean 'weight'?"),
        ({"weight": -1}, "data.mixture.web.weight: -1 is not valid"),
        ({"fields": {"image": 5}}, "data.mixture.web.fields.image: 5 is not valid"),
        ({"captions": {"min_words": 0}}, "data.mixture.web.captions.min_words: 0 is not valid"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            resolve({"data": {"mixture": {"web": field}}})
    old = resolve(raw)
    new = resolve(overridden(copy.deepcopy(raw), ["data.mixture.web.weight=2.5", "data.mixture.web.path=2024"]))
    assert sorted(differences(old, new)) == [
        "data.mixture.web.path: 'a.tar' -> '2024'",
        "data.mixture.web.weight: 1.0 -> 2.5",
    ]
    del raw["data"]["mixture"]["toys"]
    assert differences(old, resolve(raw))[0].startswith("data.mixture: {")
