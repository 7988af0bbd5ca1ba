"""big_vision's weights in and out.

What they compute is compared with big_vision itself where it can be imported (it is on no package index; put a clone of
github.com/google-research/big_vision on PYTHONPATH), and always with the stand-in.
"""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from big_vision_stand_in import (
    GRID,
    LENGTH,
    PATCH,
    TEXT,
    VISION,
    VOCABULARY,
    TwoTowers,
    batch,
    fields,
    nested,
    saved,
    siglip,
    value_range,
)
from flax import nnx, traverse_util
from oracles import above, fast_to_compile, relative_error, tree_errors

from llip_jax.config import ConfigError, resolve
from llip_jax.interop import big_vision
from llip_jax.interop.files import read_npz
from llip_jax.models.dual_encoder import abstract_model
from llip_jax.models.sizes import model_shape


def same(a: Any, b: Any) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.parametrize("prefix", ["", "params/", "opt/target/"])
@pytest.mark.parametrize("scanned", ["image", "text"])
def test_layouts_of_one_model_read_alike(tmp_path: Path, prefix: str, scanned: str) -> None:
    expected = big_vision.read(saved(tmp_path / "apart.npz", siglip(1)))
    arrays = siglip(1, **{f"scan_{scanned}": True})
    path = saved(tmp_path / "other.npz", arrays | {name: arrays[name][0] for name in ("t", "b")}, prefix)
    if prefix:  # beside the parameters: the state of an optimizer, and that of the program
        with np.load(path) as parameters:
            np.savez(path, **parameters, **{"chrono/accum_steps": 7, "opt/0/mu/img/embedding/bias": np.ones(3)})
    weights = big_vision.read(path)
    assert same(weights.params, expected.params)
    assert weights.config == expected.config
    assert {x.dtype for x in jax.tree.leaves(weights.params)} == {np.dtype(np.float32)}


def test_configuration_is_read_off_the_shapes(tmp_path: Path) -> None:
    config = resolve(big_vision.read(saved(tmp_path / "a.npz", siglip(2))).config)
    shape = model_shape(config.model)
    assert (config.model.image_size, shape.patch, shape.embed_dim) == (GRID * PATCH, PATCH, VISION["width"])
    for tower, sizes in ((shape.vision, VISION), (shape.text, TEXT)):
        found = {"width": tower.width, "depth": tower.layers, "mlp_dim": tower.mlp, "num_heads": tower.heads}
        assert found == sizes
    assert config.model.text.length == LENGTH
    tokenizer = config.data.tokenizer
    assert (tokenizer.name, tokenizer.vocabulary_size, tokenizer.clean, tokenizer.pad) == ("", VOCABULARY, "lower", 1)
    assert config.objective.sigmoid is not None


def test_what_is_written_has_the_names_and_bits_of_what_was_read(tmp_path: Path) -> None:
    arrays = siglip(3)
    weights = big_vision.read(saved(tmp_path / "a.npz", arrays))
    big_vision.write(weights, tmp_path / "b.npz")
    written = read_npz(tmp_path / "b.npz")
    assert written.keys() == {f"params/{name}" for name in arrays}
    assert all(np.array_equal(written[f"params/{name}"], x) for name, x in arrays.items())
    assert same(big_vision.read(tmp_path / "b.npz").params, weights.params)


def test_without_a_bias_the_loss_is_the_softmax(tmp_path: Path) -> None:
    arrays = siglip(4)
    del arrays["b"]
    weights = big_vision.read(saved(tmp_path / "a.npz", arrays))
    assert "bias" not in weights.params
    assert resolve(weights.config).objective.sigmoid is None
    big_vision.write(weights, tmp_path / "b.npz")
    assert read_npz(tmp_path / "b.npz").keys() == {f"params/{name}" for name in arrays}


def test_the_tokenizer_is_the_only_one_beside_the_weights(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", siglip(5))
    assert big_vision.read(path).tokenizer is None
    (tmp_path / "c4_en.model").touch()
    weights = big_vision.read(path)
    assert weights.tokenizer == tmp_path / "c4_en.model"
    assert weights.config["data"]["tokenizer"]["name"] == str(tmp_path / "c4_en.model")
    (tmp_path / "mc4.model").touch()
    assert big_vision.read(path).tokenizer is None


def test_siglip_2_has_gemmas_tokens(tmp_path: Path) -> None:
    embedding = np.zeros((256_000, TEXT["width"]), np.float32)
    path = saved(tmp_path / "a.npz", siglip(5) | {"txt/Embed_0/embedding": embedding})
    (tmp_path / "gemma.model").touch()
    weights = big_vision.read(path)
    assert weights.tokenizer is None
    assert weights.config["data"]["tokenizer"]["pad"] == 0
    (tmp_path / "tokenizer.json").touch()
    assert big_vision.read(path).tokenizer == tmp_path / "tokenizer.json"


def with_array(name: str, *shape: int) -> Any:
    return lambda arrays: arrays | {name: np.zeros(shape, np.float32)}


def without(name: str) -> Any:
    return lambda arrays: {key: x for key, x in arrays.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_array("img/head/kernel", 24, 24), "img/head/kernel: a projection of the image embedding"),
        (with_array("img/cls", 1, 1, 24), "img/cls: a class token"),
        (with_array("txt/MAPHead_0/probe", 1, 1, 20), "txt/MAPHead_0/probe: attention pooling of texts"),
        (with_array("img/pos_embedding", 1, 26, 24), "img/pos_embedding: expected positions of a square grid, got 26"),
        (with_array("img/pos_embedding", 16, 16), r"img/pos_embedding: expected an array of 3 axes .*got \[16, 16\]"),
        (with_array("img/embedding/kernel", 27, 24), "img/embedding/kernel: expected an array of 4 axes"),
        (with_array("txt/head/kernel", 20, 25), "model.embed_dim=25"),
        (without("txt/head/kernel"), "txt/head/kernel: expected an array of 2 axes .*got none"),
        (without("img/MAPHead_0/probe"), "missing: img/MAPHead_0/probe"),
        (without("img/Transformer/encoderblock_1/LayerNorm_0/bias"), "missing: img/Transformer/encoderblock_1/LayerN"),
        (with_array("txt/Encoder_0/pos_embedding", 1, 7, 20), "left over: txt/Encoder_0/pos_embedding"),
        (with_array("t", 2), "of another shape: t"),
    ],
)
def test_what_is_not_our_model_is_refused_by_name(tmp_path: Path, change: Any, message: str) -> None:
    path = saved(tmp_path / "a.npz", change(siglip(6)))
    with pytest.raises(ConfigError, match=f"(?s){re.escape(str(path))}.*{message}"):
        big_vision.read(path)


def test_writing_refuses_what_its_modules_cannot_compute(tmp_path: Path) -> None:
    weights = big_vision.read(saved(tmp_path / "a.npz", siglip(7)))
    model = weights.config["model"]
    model |= {"activation": "gelu", "image_mean": (0.4, 0.5, 0.5)}
    model["text"] |= {"causal": True, "activation": "gelu_tanh"}
    with pytest.raises(ConfigError, match=r"(?s)model.image_mean.*model.text.causal=True.*model.activation='gelu'"):
        big_vision.write(weights, tmp_path / "b.npz")
    assert not (tmp_path / "b.npz").exists()
    with pytest.raises(ConfigError, match=r"expected a name that ends in \.npz"):
        big_vision.write(weights, tmp_path / "b")


def real_two_towers() -> Any:
    name = "big_vision.models.proj.image_text.two_towers"
    return pytest.importorskip(name, reason="no clone of google-research/big_vision on PYTHONPATH")


@pytest.mark.parametrize("module", ["stand-in", "apart", "scanned"])
def test_scores_and_gradients_are_theirs(tmp_path: Path, module: str) -> None:
    scan = module == "scanned"
    model = (TwoTowers if module == "stand-in" else real_two_towers().Model)(
        **fields(**({"scan": True} if scan else {}))
    )
    arrays = siglip(8, scan, scan)
    weights = big_vision.read(saved(tmp_path / "a.npz", arrays))
    graph = nnx.split(abstract_model(resolve(weights.config)), nnx.Param)[0]
    images, texts = batch(8)

    def theirs(params: Any) -> tuple[jax.Array, jax.Array]:
        zimg, ztxt, out = model.apply({"params": params}, value_range(images), texts)
        logits = zimg @ ztxt.T * out["t"] + out["b"]
        return sigmoid_loss(logits), logits

    def ours(params: Any) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, params)
        logits = model.logits(model.image_side(model.encode_images(images)), model.text_side(texts, texts * 0 + 1))
        return sigmoid_loss(logits), logits

    (_, expected), expected_gradient = fast_to_compile(jax.value_and_grad(theirs, has_aux=True))(nested(arrays))
    (_, actual), gradient = fast_to_compile(jax.value_and_grad(ours, has_aux=True))(weights.params)
    assert relative_error(actual, expected) < 1e-5
    # The rules take gradients as they take parameters.
    path = saved(tmp_path / "gradient.npz", traverse_util.flatten_dict(jax.device_get(expected_gradient), sep="/"))
    errors = tree_errors(*(without_key_biases(tree) for tree in (gradient, big_vision.read(path).params)))
    assert above(errors, 1e-5) == {}


def sigmoid_loss(logits: jax.Array) -> jax.Array:
    return -jax.nn.log_sigmoid((2 * jnp.eye(*logits.shape) - 1) * logits).sum() / len(logits)


def without_key_biases(gradient: Any) -> Any:
    """One number added to all logits of a query changes no attention: these gradients are zero but for rounding."""
    flat = traverse_util.flatten_dict(gradient, sep="/")
    flat |= {path: np.delete(x, 1, axis=1) for path, x in flat.items() if path.endswith("qkv_bias")}
    return flat | {path: x[1] for path, x in flat.items() if path.endswith("key_value_bias")}


def test_what_is_written_is_what_it_loads(tmp_path: Path) -> None:
    two_towers = real_two_towers()
    arrays = siglip(9)
    big_vision.write(big_vision.read(saved(tmp_path / "a.npz", arrays)), tmp_path / "b.npz")
    loaded = two_towers.load(nested(arrays), str(tmp_path / "b.npz"), ml_collections.ConfigDict(fields()))
    assert same(loaded, nested(arrays))
