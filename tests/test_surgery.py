"""From a source's parameters to another model's: identity start, resampled positions, what is refused."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from jaxtyping import Array, Float
from oracles import fast_to_compile, random_params, relative_error
from test_towers import EMBED, IMAGE, LENGTH, PATCH, TEXT, VISION, VOCABULARY, random_batch

from llip_jax.config import Config, ConfigError, resolve, to_dict
from llip_jax.interop.surgery import LONG_CLIP_KEPT, adapt, adapted_config, resample_grid, stretch
from llip_jax.models.dual_encoder import abstract_model
from llip_jax.objectives.objective import Forward, objective

COMMON = {"image_size": IMAGE, "embed_dim": EMBED, "mixer_heads": 3, "dtype": "float32", "scan_layers": False}
SOURCES: dict[str, dict[str, Any]] = {
    "clip": {
        "model": COMMON
        | {"pooler": "class_token", "mixture_tokens": 1, "logit_bias": None, "vision": VISION | {"patch": PATCH}}
        | {"text": TEXT | {"length": LENGTH}},
        "objective": {"sigmoid": None, "softmax": {}},
        "data": {"tokenizer": {"vocabulary_size": VOCABULARY}},
    },
    "siglip": {
        "model": COMMON
        | {"pooler": "class_token", "mixture_tokens": 1, "layer_norm_epsilon": 1e-6, "activation": "gelu_tanh"}
        | {
            "vision": {"layers": 2, "width": EMBED, "heads": 3, "mlp": 60, "patch": PATCH, "norm_pre": False}
            | {"patch_bias": True, "pooling": "attention", "projection": False},
            "text": TEXT | {"length": LENGTH, "causal": False, "pooling": "last", "projection_bias": True},
        },
        "data": {"tokenizer": {"vocabulary_size": VOCABULARY, "pad": 1}},
    },
}


def source(name: str, seed: int) -> tuple[Config, dict[str, Any]]:
    config = resolve(SOURCES[name])
    return config, jax.tree.map(np.asarray, random_params(config, seed))


def target(name: str, **sections: Any) -> Config:
    return resolve(adapted_config(sections, SOURCES[name]))


def logits(config: Config, params: dict[str, Any], seed: int = 3) -> Float[np.ndarray, "N N"]:
    graph, _ = nnx.split(abstract_model(config), nnx.Param)
    batch = random_batch(seed)

    @fast_to_compile
    def run(params: dict[str, Any]) -> Array:
        return Forward(nnx.merge(graph, params), jax.tree.map(jnp.asarray, batch)).logits

    return np.asarray(run(params))


def token_gradients(config: Config, params: dict[str, Any]) -> Float[np.ndarray, "K D"]:
    graph, _ = nnx.split(abstract_model(config), nnx.Param)
    batch = jax.tree.map(jnp.asarray, random_batch(4))

    @fast_to_compile
    def gradients(params: dict[str, Any]) -> Array:
        def loss(params: dict[str, Any]) -> Array:
            return objective(config.objective, Forward(nnx.merge(graph, params), batch))[0]

        return jax.grad(loss)(params)["vision"]["tokens"]

    return np.asarray(gradients(params))


@functools.cache
def source_logits(name: str) -> Float[np.ndarray, "N N"]:
    return logits(*source(name, seed=1))


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize(
    ("pooler", "tokens"),
    [
        pytest.param("mixer", 1, marks=pytest.mark.slow),
        ("mixer", 16),
        pytest.param("mixer", 64, marks=pytest.mark.slow),
        ("average", 16),
    ],
)
def test_the_first_scores_are_those_of_the_source(name: str, pooler: str, tokens: int) -> None:
    before, params = source(name, seed=1)
    after = target(name, model={"pooler": pooler, "mixture_tokens": tokens})
    adapted = adapt(params, before, after)
    assert relative_error(logits(after, adapted.params), source_logits(name)) < 1e-5
    assert adapted.dropped == ()


@pytest.mark.parametrize("name", SOURCES)
def test_texts_tell_the_copies_apart_from_the_first_step_on_and_without_key_bias_never(name: str) -> None:
    before, params = source(name, seed=2)
    for key_bias in (True, False):
        after = target(name, model={"pooler": "mixer", "mixture_tokens": 4, "mixer_key_bias": key_bias})
        gradients = token_gradients(after, adapt(params, before, after).params)
        apart = np.abs(gradients[1:] - gradients[0]).max() / np.abs(gradients).max()
        assert (apart > 0.1) if key_bias else (apart < 1e-4)


def test_without_their_weight_in_attention_the_copies_would_change_the_scores() -> None:
    before, params = source("clip", seed=5)
    after = target("clip", model={"pooler": "mixer", "mixture_tokens": 16, "vision": {"token_weight": 1.0}})
    assert relative_error(logits(after, adapt(params, before, after).params), logits(before, params)) > 1e-3


def test_fresh_tokens_stand_beside_the_class_token() -> None:
    before, params = source("clip", seed=6)
    after = target("clip", model={"pooler": "mixer", "mixture_tokens": 5}, init={"tokens": "fresh"})
    adapted = adapt(params, before, after)
    tokens = adapted.params["vision"]["tokens"]
    np.testing.assert_array_equal(tokens[:1], params["vision"]["tokens"])
    assert len(np.unique(tokens, axis=0)) == 5
    assert adapted.origin["vision/tokens"] == "class token and 4 new"
    assert after.model.vision.token_weight == 1 and not after.model.mixer_key_bias


def test_noise_on_the_copies_has_the_asked_size_and_follows_the_seed() -> None:
    before, params = source("clip", seed=7)
    sections = {"model": {"pooler": "mixer", "mixture_tokens": 64}, "init": {"token_noise": 0.1}}
    one, same, other = (
        adapt(params, before, target("clip", seed=seed, **sections)).params["vision"]["tokens"] for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    noise = one - params["vision"]["tokens"]
    assert 0.09 < noise.std() / params["vision"]["tokens"].std() < 0.11


def test_what_is_copied_is_copied_bit_by_bit() -> None:
    before, params = source("siglip", seed=8)
    after = target("siglip", model={"pooler": "mixer", "mixture_tokens": 3})
    adapted = adapt(params, before, after)
    old, new = (traverse_util.flatten_dict(tree, sep="/") for tree in (params, adapted.params))
    copied = [path for path, how in adapted.origin.items() if how == "copied"]
    assert set(old) - set(copied) == {"vision/tokens"}
    for path in copied:
        np.testing.assert_array_equal(new[path], old[path])
    assert {path for path in new if path not in old} == {
        f"pooler/{x}" for x in ("query", "key", "key_bias", "value", "output")
    }


@pytest.mark.parametrize(("old", "new"), [(5, 9), (9, 5), (7, 7), (4, 16), (16, 4)])
def test_grids_are_resampled_as_torch_does_with_antialiasing(old: int, new: int) -> None:
    torch = pytest.importorskip("torch", reason="the reference is torch's bicubic interpolation")
    positions = np.random.default_rng(old * new).normal(size=(old**2, 6)).astype(np.float32)
    grid = torch.from_numpy(positions.reshape(1, old, old, 6)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, (new, new), mode="bicubic", antialias=True, align_corners=False)
    expected = expected.permute(0, 2, 3, 1).reshape(new**2, 6).numpy()
    np.testing.assert_allclose(resample_grid(positions, new**2), expected, atol=2e-6)


def test_grids_that_are_not_square_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.image_size: cannot resample 12 positions to 16"):
        resample_grid(np.ones((12, 3), np.float32), 16)


def test_stretching_is_long_clips_rule() -> None:
    """77 to 248: the first 20 stay, each of the others becomes four, a quarter of the way to the next apart."""
    positions = np.random.default_rng(9).normal(size=(77, 5)).astype(np.float32)
    expected = list(positions[:20])
    for i in range(20, 77):
        step = positions[i + 1] - positions[i] if i < 76 else positions[76] - positions[75]
        expected += [positions[i] + quarter * step / 4 for quarter in range(4)]
    stretched = stretch(positions, 248)
    np.testing.assert_allclose(stretched, np.array(expected), atol=1e-6)
    np.testing.assert_array_equal(stretched[:LONG_CLIP_KEPT], positions[:LONG_CLIP_KEPT])
    np.testing.assert_array_equal(stretched[LONG_CLIP_KEPT::4], positions[LONG_CLIP_KEPT:])


@pytest.mark.parametrize(("old", "new"), [(77, 100), (64, 256), (13, 20), (3, 9)])
def test_stretching_continues_straight_lines(old: int, new: int) -> None:
    line = np.outer(np.arange(old), [0.5, -2.0]).astype(np.float32) + 3
    kept = min(LONG_CLIP_KEPT, old - 2)
    slope = (old - kept) / (new - kept)
    at = np.concatenate([np.arange(kept), kept + slope * np.arange(new - kept)])
    np.testing.assert_allclose(stretch(line, new), np.outer(at, [0.5, -2.0]) + 3, rtol=1e-5)


def test_shorter_texts_cut_the_positions() -> None:
    positions = np.random.default_rng(10).normal(size=(9, 4)).astype(np.float32)
    np.testing.assert_array_equal(stretch(positions, 6), positions[:6])


def test_another_image_size_and_text_length_resample_the_positions_alone() -> None:
    before, params = source("clip", seed=11)
    after = target("clip", model={"image_size": 2 * IMAGE, "text": {"length": 2 * LENGTH}})
    adapted = adapt(params, before, after)
    changed = {path: how for path, how in adapted.origin.items() if how != "copied"}
    assert changed == {
        "vision/positions": "resampled from 5 x 5 to 10 x 10",
        "text/positions": f"stretched from {LENGTH} to {2 * LENGTH}",
    }
    assert "vision/positions resampled" in adapted.summary()


def test_weights_that_do_not_fit_are_listed() -> None:
    before, params = source("clip", seed=12)
    after = target("clip", model={"text": {"layers": 3}, "vision": {"patch_bias": True}})
    with pytest.raises(ConfigError, match="do not fit") as caught:
        adapt(params, before, after)
    message = str(caught.value)
    assert "vision/patch_bias [48]: only in the configuration" in message
    assert "text/transformer/blocks/up: [2, 40, 100] in the weights, [3, 40, 100] in the configuration" in message


def test_a_llip_cannot_become_another_pooler() -> None:
    before = target("clip", model={"pooler": "mixer", "mixture_tokens": 4})
    params = jax.tree.map(np.asarray, random_params(before, 13))
    with pytest.raises(ConfigError, match=r"model\.pooler: weights with pooler 'mixer' cannot become 'average'"):
        adapt(params, before, target("clip", model={"pooler": "average", "mixture_tokens": 4}))


def test_a_bias_may_come_and_go() -> None:
    before, params = source("clip", seed=14)
    with_bias = target("clip", model={"logit_bias": -3.0})
    adapted = adapt(params, before, with_bias)
    assert adapted.params["bias"] == np.float32(-3) and adapted.origin["bias"] == "new"
    assert adapt(adapted.params, with_bias, before).dropped == ("bias",)


def test_filling_gaps_leaves_the_source_as_it_was_and_the_users_fields_win() -> None:
    raw = {"model": {"pooler": "mixer", "mixture_tokens": 8, "vision": {"token_weight": 0.5}, "activation": "relu"}}
    filled = adapted_config(raw, SOURCES["clip"])
    assert filled["model"]["vision"]["token_weight"] == 0.5 and filled["model"]["activation"] == "relu"
    assert filled["model"]["mixer_key_bias"] and filled["model"]["vision"]["width"] == VISION["width"]
    assert "token_weight" not in SOURCES["clip"]["model"]["vision"]
    assert adapted_config({}, SOURCES["clip"]) == SOURCES["clip"]
    for whole in (SOURCES["siglip"], to_dict(resolve(SOURCES["siglip"]))):  # a run's config.json names every field
        siglip = adapted_config({"model": {"pooler": "mixer"}}, whole)["model"]
        assert (siglip["mixture_tokens"], siglip["mixer_key_bias"], siglip["vision"]["token_weight"]) == (16, True, 1)
    clip = adapted_config({"model": {"pooler": "mixer"}}, to_dict(resolve(SOURCES["clip"])))["model"]
    assert (clip["mixture_tokens"], clip["mixer_key_bias"], clip["vision"]["token_weight"]) == (16, True, 1 / 16)


def test_copies_part_in_a_learned_average_too_and_registers_have_to_be_fresh() -> None:
    before, params = source("clip", seed=15)
    after = target("clip", model={"pooler": "average", "mixture_tokens": 4})
    gradients = token_gradients(after, adapt(params, before, after).params)
    directions = gradients / np.linalg.norm(gradients, axis=1, keepdims=True)
    assert (directions @ directions.T)[~np.eye(4, dtype=bool)].max() < 0.999
    with pytest.raises(ConfigError, match=r"init\.tokens: 'copies' is not valid for registers"):
        adapt(params, before, target("clip", model={"pooler": "registers", "mixture_tokens": 4}))
    fresh = target("clip", model={"pooler": "registers", "mixture_tokens": 4}, init={"tokens": "fresh"})
    tokens = adapt(params, before, fresh).params["vision"]["tokens"]
    np.testing.assert_array_equal(tokens[:1], params["vision"]["tokens"])
    assert not after.model.mixer_key_bias and len(np.unique(tokens, axis=0)) == 4
