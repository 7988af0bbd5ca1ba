"""Our model under big_vision's trainers, and its image models as towers of ours.

With big_vision itself where it can be imported, and always with the stand-in.
"""

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from big_vision_stand_in import GRID, PATCH, VISION, VOCABULARY, Vit, batch, nested, saved, siglip, value_range
from flax import nnx
from oracles import fast_to_compile, random_params, relative_error

from llip_jax.config import Config, ConfigError, resolve, to_dict
from llip_jax.interop import big_vision, big_vision_models
from llip_jax.interop.surgery import adapted_config
from llip_jax.models.dual_encoder import abstract_model
from llip_jax.ops.pair_scores import MixtureSide


@pytest.fixture(params=["stand-in", "big_vision"])
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """big_vision.models, with a module ``vit``."""
    if request.param == "big_vision":
        pytest.importorskip("big_vision.models.vit", reason="no clone of google-research/big_vision on PYTHONPATH")
    else:
        for name in ("big_vision", "big_vision.models", "big_vision.models.vit"):
            module = types.ModuleType(name)
            module.__path__, module.Model = [], Vit
            monkeypatch.setitem(sys.modules, name, module)
    return sys.modules["big_vision.models"]


def same(a: Any, b: Any) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def our_logits(config: Config, params: Any, images: Any, texts: Any, mask: Any) -> jax.Array:
    def logits(params: Any) -> jax.Array:
        model = nnx.merge(nnx.split(abstract_model(config), nnx.Param)[0], params)
        return model.logits(model.image_side(model.encode_images(images)), model.text_side(texts, jnp.asarray(mask)))

    return fast_to_compile(logits)(params)


def test_our_siglip_runs_under_its_trainer(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", siglip(1))
    weights = big_vision.read(path)
    fields = weights.config["model"] | {"vocabulary_size": VOCABULARY, "pad": 1}
    model = big_vision_models.Model(**fields)
    images, texts = batch(1)
    initial = fast_to_compile(model.init)(jax.random.key(0), value_range(images)[:1], texts[:1])["params"]
    params = big_vision_models.load(initial, str(path), fields)
    assert same(params, weights.params)
    assert jax.tree.map(jnp.shape, initial) == jax.tree.map(jnp.shape, params)

    apply = fast_to_compile(lambda *batch: model.apply({"params": params}, *batch, train=True))
    zimg, ztxt, out = apply(value_range(images), texts)
    expected = our_logits(resolve(weights.config), params, images, texts, np.ones_like(texts))
    assert relative_error(zimg @ ztxt.T * out["t"] + out["b"], expected) < 1e-6
    assert out["t"].shape == out["b"].shape == (1,)
    assert relative_error(out["t"], np.exp(out["t/parameter"])) < 1e-6
    assert relative_error(ztxt * out["txt/norm"], out["txt/side"].embedding) < 1e-6
    images_alone, none, _ = apply(images, None)
    assert none is None
    assert relative_error(images_alone, zimg) < 1e-6
    none, texts_alone, _ = apply(None, texts)
    assert none is None
    assert relative_error(texts_alone, ztxt) < 1e-6


def test_loading_leaves_what_it_is_told_to(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", siglip(2))
    weights = big_vision.read(path)
    fields = weights.config["model"] | {"vocabulary_size": VOCABULARY}
    initial = random_params(resolve(weights.config), 2)
    loaded = big_vision_models.load(initial, str(path), fields, dont_load=["pooler/.*", "vision"])
    assert same(loaded["pooler"], initial["pooler"])
    assert same(loaded["vision"], weights.params["vision"])


def test_a_siglip_goes_on_as_a_llip(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", siglip(5))
    weights = big_vision.read(path)
    section = adapted_config({"model": {"pooler": "mixer", "mixture_tokens": 3}}, weights.config)["model"]
    fields = ml_collections.ConfigDict(section | {"vocabulary_size": VOCABULARY, "pad": 1})
    model = big_vision_models.Model(**fields)
    params = big_vision_models.load(None, str(path), fields)
    images, texts = batch(5)
    _, _, out = fast_to_compile(lambda: model.apply({"params": params}, value_range(images), texts))()
    expected = our_logits(resolve(weights.config), weights.params, images, texts, np.ones_like(texts))
    assert relative_error(out["logits"], expected) < 1e-5


def test_a_mixer_gives_the_logits_of_pairs() -> None:
    fields = {"size": "Ti/4", "image_size": 8, "mixture_tokens": 3, "patch_dropout": 0.5}
    fields |= {"vision": {"layers": 1}, "text": {"layers": 1, "length": 6}}
    config = resolve({"model": fields, "data": {"tokenizer": {"vocabulary_size": VOCABULARY}}})
    params = random_params(config, 3)
    model = big_vision_models.Model(**fields, vocabulary_size=VOCABULARY, pad=1)
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (3, 8, 8, 3), np.uint8)
    texts = rng.integers(2, VOCABULARY, (4, 6), np.int32)
    mask = np.ones_like(texts)
    texts[0, 2:], mask[0, 2:] = 1, 0
    texts[1, 2] = 1  # inside a text it is a token like others

    apply = fast_to_compile(
        lambda key: model.apply({"params": params}, images, texts, train=True, rngs={"dropout": key})
    )
    zimg, ztxt, out = fast_to_compile(lambda: model.apply({"params": params}, images, texts))()
    assert zimg is None
    assert isinstance(out["img/side"], MixtureSide)
    assert relative_error(out["logits"], our_logits(config, params, images, texts, mask)) < 1e-6
    assert relative_error(jnp.linalg.norm(ztxt, axis=1), jnp.ones(4)) < 1e-6

    once, again = (apply(jax.random.key(seed))[2]["img/encoded"] for seed in range(2))
    assert once.shape == (3, 2, 128)
    assert not np.array_equal(once, again)


def test_it_is_found_among_their_models(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "big_vision.models.llip_jax", None)
    monkeypatch.setattr(package, "llip_jax", None, raising=False)
    big_vision_models.register()
    found = importlib.import_module("big_vision.models.llip_jax")
    assert (found.Model, found.load) == (big_vision_models.Model, big_vision_models.load)
    assert package.llip_jax is found


def test_wrong_fields_are_told() -> None:
    with pytest.raises(ConfigError, match=r"model.vocab_size: no such field"):
        big_vision_models.Model(vocab_size=3)
    with pytest.raises(ConfigError, match="logit_bias: 'prior' needs a batch size"):
        big_vision_models.Model(logit_bias="prior")


def test_a_missing_big_vision_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "big_vision", None)
    monkeypatch.delitem(sys.modules, "big_vision.models", raising=False)
    with pytest.raises(ConfigError, match=r"(?s)big_vision.models cannot be imported.*PYTHONPATH"):
        big_vision_models.register()


def config_with(width: int, name: str = "vit") -> Config:
    half = (0.5, 0.5, 0.5)
    theirs = {"name": name, "arguments": VISION | {"patch_size": (PATCH, PATCH)}}
    vision = {"width": width, "heads": 3, "mlp": 20, "patch": PATCH, "big_vision": theirs}
    text = {"layers": 1, "width": 20, "heads": 5, "mlp": 36, "length": 7}
    model = {"size": "Ti/4", "image_size": GRID * PATCH, "image_mean": half, "image_std": half, "mixture_tokens": 4}
    return resolve({"model": model | {"vision": vision, "text": text, "mixer_heads": 4}})


def test_their_image_model_is_a_tower_of_ours(package: Any) -> None:
    config = config_with(VISION["width"])
    assert resolve(to_dict(config)) == config
    graph, variables = nnx.split(abstract_model(config).vision, nnx.Param)
    hash(graph)  # jit compares models by it
    rng = np.random.default_rng(4)
    params = jax.tree.map(lambda x: 0.2 * rng.normal(size=x.shape).astype(np.float32), nnx.to_pure_dict(variables))
    checkpoint = nested(siglip(4))["img"]
    del checkpoint["MAPHead_0"]
    params["encoder"] = checkpoint
    images, _ = batch(4)

    def squares(params: Any) -> tuple[jax.Array, Any]:
        output = nnx.merge(graph, params)(images)
        return (output.mixture**2).sum(), output

    (_, output), gradient = fast_to_compile(jax.value_and_grad(squares, has_aux=True))(params)
    module = importlib.import_module("big_vision.models.vit").Model(
        **VISION, patch_size=(PATCH, PATCH), pool_type="gap"
    )
    encode = fast_to_compile(lambda params: module.apply({"params": params}, value_range(images))[1]["encoded"])
    assert relative_error(output.patches, encode(checkpoint)) < 1e-5
    assert output.mixture.shape == (len(images), 4, VISION["width"])
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradient))


def test_a_tower_that_does_not_fit_is_refused(package: Any) -> None:
    with pytest.raises(ConfigError, match=r"model.vision.width: 48, but big_vision's 'vit' has 24"):
        abstract_model(config_with(48))
    with pytest.raises(ConfigError, match=r"big_vision.models.vitt cannot be imported"):
        abstract_model(config_with(24, "vitt"))
