"""Maps against their formula in float64 NumPy, its derivatives by finite differences; what is drawn of them."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Float
from oracles import fast_to_compile, random_params, relative_error
from run_helpers import tiny_config
from test_inference import TEXTS, model_of, pictures
from test_pretrained import SIGLIP

from llip_jax.config import Config, ConfigError
from llip_jax.evaluation.maps import caption_maps, overlay, uncaptioned_maps
from llip_jax.inference import Texts
from llip_jax.models.dual_encoder import DualEncoder, abstract_model
from llip_jax.ops.pair_scores import TextSide

# Without ReLU's kinks, on whose other side float32 or a finite difference may be.
SMOOTH = {"vision.layers": 2, "activation": "quick_gelu"}
MODELS: dict[str, dict[str, Any]] = {
    "llip": {**SMOOTH, "vision.token_weight": 0.5},
    "llip, attention pooling": {**SMOOTH, "vision.pooling": "attention"},
    "siglip": {**SMOOTH, **SIGLIP},
}
Edge = tuple[int, int, int, int]


class Reference:
    """One image in the tower and the pooler, float64, loops over heads and layers; quick GELU between."""

    def __init__(self, config: Config, params: Any, image: np.ndarray):
        self.config = config.model
        self.params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        self.image = image

    def tokens(self, edge: tuple[Edge, float] | None = None) -> tuple[np.ndarray, dict[Edge, float]]:
        """Mixture tokens, with one attention weight (layer, head, token, patch) changed, and all such weights."""
        p, weights = self.params["vision"], {}
        pixels = (self.image / 255 - self.config.image_mean) / self.config.image_std
        side, patch = 4, len(self.image) // 4
        x = np.stack(
            [pixels[i * patch :, j * patch :][:patch, :patch].ravel() for i in range(side) for j in range(side)]
        )
        x = x @ p["patch_kernel"] + p.get("patch_bias", 0) + p["positions"]
        learned = 0 if "attention_pool" in p else len(p["tokens"])
        x = np.concatenate([p["tokens"][:learned], x])
        if "norm_pre" in p:
            x = self.norm(x, p["norm_pre"])
        bias = np.where(np.arange(len(x)) < learned, np.log(self.config.vision.token_weight), 0)
        blocks = p["transformer"]["blocks"]
        for layer in range(len(blocks["qkv"])):
            b = jax.tree.map(lambda a, layer=layer: a[layer], blocks)
            q, k, v = (self.norm(x, b["norm1"]) @ b["qkv"][:, i].swapaxes(0, 1) for i in range(3))  # [h, S, dh]
            q, k, v = (y + b["qkv_bias"][i][:, None] for i, y in enumerate((q, k, v)))
            x = x + self.attend(q, k, v, bias, b, layer, learned, edge, weights)
            x = x + self.mlp(self.norm(x, b["norm2"]), b)
        x = self.norm(x, p["norm_post"])
        if learned:
            return x[:learned], weights
        b = p["attention_pool"]
        q = p["tokens"] @ b["query"].swapaxes(0, 1) + b["query_bias"][:, None]
        k, v = (x @ b["key_value"][:, i].swapaxes(0, 1) + b["key_value_bias"][i][:, None] for i in range(2))
        y = self.attend(q, k, v, 0, b, 0, 0, edge, weights, pool=True)
        return y + self.mlp(self.norm(y, b["norm"]), b), weights

    def attend(self, q, k, v, bias, b, layer, learned, edge, weights, pool=False) -> np.ndarray:  # type: ignore[no-untyped-def]
        out = b["out_bias"]
        for h in range(len(q)):
            logits = q[h] @ k[h].T / np.sqrt(q.shape[-1]) + bias
            a = np.exp(logits - logits.max(1, keepdims=True))
            a /= a.sum(1, keepdims=True)
            if learned or pool:
                for token in range(len(q[h]) if pool else learned):
                    weights |= {(layer, h, token, i): a[token, learned + i] for i in range(a.shape[1] - learned)}
                if edge is not None and edge[0][:2] == (layer, h):
                    a[edge[0][2], learned + edge[0][3]] += edge[1]
            out = out + a @ v[h] @ b["out"][h]
        return out

    def norm(self, x: np.ndarray, p: Any) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + self.config.layer_norm_epsilon) * p[
            "scale"
        ] + p.get("bias", 0)

    def mlp(self, x: np.ndarray, b: Any) -> np.ndarray:
        hidden = x @ b["up"] + b["up_bias"]
        return hidden / (1 + np.exp(-1.702 * hidden)) @ b["down"] + b["down_bias"]

    def vector(self, tokens: np.ndarray, weights: Float[np.ndarray, "M K"] | None) -> np.ndarray:
        p = self.params["pooler"]
        if weights is None:
            return tokens[0] @ p.get("image", np.eye(tokens.shape[1]))
        values = np.einsum("kd,dmh->mkh", tokens, p["value"])
        return np.einsum("mk,mkh->mh", weights, values).ravel() @ p["output"]

    def mixing(self, tokens: np.ndarray, query: Float[np.ndarray, "M dh"]) -> Float[np.ndarray, "M K"]:
        keys = np.einsum("kd,dmh->mkh", tokens, self.params["pooler"]["key"])
        weights = np.exp(np.einsum("mh,mkh->mk", query, keys) / self.config.mixer_temperature)
        return weights / weights.sum(1, keepdims=True)

    def maps(self, scores: list[Callable[[np.ndarray], float]], step: float = 1e-5) -> Float[np.ndarray, "n 4 4"]:
        """For each function of the tokens: sum over edges to a patch of weight times derivative by it."""
        result = np.zeros((len(scores), 16))
        for edge, weight in self.tokens()[1].items():
            up, down = (self.tokens((edge, sign * step))[0] for sign in (1, -1))
            result[:, edge[3]] += [weight * (score(up) - score(down)) / (2 * step) for score in scores]
        return result.reshape(-1, 4, 4)


@pytest.mark.parametrize(
    "name", ["llip", *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name != "llip")]
)
def test_maps_are_those_of_the_formula(name: str) -> None:
    model, picture = model_of(**MODELS[name]), np.random.default_rng().integers(0, 256, (16, 16, 3), np.uint8)
    reference, texts = Reference(model.config, model.params, picture), model.encode_text(TEXTS[:2])
    tokens = reference.tokens()[0]

    def cosine(j: int) -> Callable[[np.ndarray], float]:
        weights = None if texts.queries is None else reference.mixing(tokens, texts.queries[j])
        unit = texts.embedding[j] / np.linalg.norm(texts.embedding[j])

        def of(tokens: np.ndarray) -> float:
            z = reference.vector(tokens, weights)
            return float(z @ unit / np.linalg.norm(z))

        return of

    def length(tokens: np.ndarray) -> float:
        alike = None if texts.queries is None else np.full((texts.queries.shape[1], len(tokens)), 1 / len(tokens))
        return float(np.linalg.norm(reference.vector(tokens, alike)))

    *expected, uncaptioned = reference.maps([cosine(0), cosine(1), length])
    assert relative_error(model.maps(picture, texts)[0], expected) < 2e-5
    assert relative_error(expected[0], expected[1]) > 0.05
    assert relative_error(model.maps(picture)[0, 0], uncaptioned) < 2e-5


def test_captions_of_one_direction_read_an_image_by_their_own_mixtures() -> None:
    model, picture = model_of(**MODELS["llip"]), pictures(1)[0]
    texts = model.encode_text(TEXTS[:2])
    assert texts.queries is not None
    one = texts.embedding[:1].repeat(2, axis=0)
    different = model.maps(picture, Texts(one, texts.queries))[0]
    assert relative_error(different[0], different[1]) > 0.05
    same = model.maps(picture, Texts(one, texts.queries[:1].repeat(2, axis=0)))[0]
    np.testing.assert_array_equal(same[0], same[1])


@pytest.mark.parametrize("pooling", ["tokens", "attention"])
def test_a_patch_that_all_tokens_look_at_has_the_whole_map(pooling: str) -> None:
    """One direction of the keys marks the patch, by its position; every query is along it."""
    rng = np.random.default_rng()
    planted = int(rng.integers(16))
    config = tiny_config(model={"vision.layers": 2, "vision.pooling": pooling, "vision.norm_pre": False})
    params = random_params(config, seed=int(rng.integers(1000)))
    vision = params["vision"]
    vision["positions"] = vision["positions"].at[planted, 0].set(1000.0)
    layers = vision["attention_pool"] if pooling == "attention" else vision["transformer"]["blocks"]
    width = vision["positions"].shape[1]
    along = np.zeros((width, 2, width // 2), np.float32)
    along[0] = 10.0
    if pooling == "attention":
        layers["query"], layers["query_bias"] = 0 * layers["query"], 0 * layers["query_bias"] + 10
        layers["key_value"] = layers["key_value"].at[:, 0].set(along)
        vision["norm_post"]["scale"] = 0 * vision["norm_post"]["scale"] + 1
    else:
        layers["qkv"] = layers["qkv"].at[:, :, 0].set(0).at[:, :, 1].set(along)
        layers["qkv_bias"] = layers["qkv_bias"].at[:, 0].set(10)
        layers["norm1"]["scale"] = 0 * layers["norm1"]["scale"] + 1
    model: DualEncoder = nnx.merge(nnx.split(abstract_model(config), nnx.Param)[0], params)  # type: ignore[assignment]
    texts = TextSide(rng.normal(size=(2, 32)).astype(np.float32), rng.normal(size=(2, 4, 8)).astype(np.float32))
    images = rng.integers(0, 256, (2, 16, 16, 3), np.uint8)
    maps = np.asarray(fast_to_compile(partial(caption_maps, model))(images, texts)).reshape(2, 2, 16)
    assert (np.abs(maps[..., planted]) > 0.999 * np.abs(maps).sum(axis=-1)).all()
    alike = np.asarray(fast_to_compile(partial(uncaptioned_maps, model))(images)).reshape(2, 16)
    assert (np.abs(alike[:, planted]) > 0.999 * np.abs(alike).sum(axis=-1)).all()


def test_a_tower_that_hides_its_attention_is_refused() -> None:
    model: Any = SimpleNamespace(vision=nnx.Module())
    with pytest.raises(ConfigError, match="big_vision"):
        uncaptioned_maps(model, np.zeros((1, 16, 16, 3), np.uint8))  # type: ignore[arg-type]


def test_an_overlay_is_lightest_where_the_map_is_highest_and_ignores_what_is_below_zero() -> None:
    rng = np.random.default_rng()
    # In random places, and further apart than what bilinear pixels beside a patch's centre take from its neighbours.
    map = rng.permutation(np.linspace(-1, 1, 24, dtype=np.float32)).reshape(4, 6)
    grey = np.full((32, 48, 3), 128, np.uint8)
    drawn = overlay(grey, map)
    assert drawn.shape == (160, 240, 3) and drawn.dtype == np.uint8
    centres = drawn[20::40, 20::40].astype(float) @ [0.299, 0.587, 0.114]
    assert np.argmax(centres) == np.argmax(map)
    positive = np.argsort(map[map > 0])
    assert (np.diff(centres[map > 0][positive]) > 0).all()
    np.testing.assert_array_equal(overlay(grey, np.maximum(map, 0)), drawn)
    np.testing.assert_array_equal(overlay(grey, 2.0**-20 * map), drawn)  # each by its own scale
    nothing = overlay(grey, -np.abs(map))
    assert (nothing == nothing[0, 0]).all() and nothing.max() < 70
    assert overlay(np.zeros((300, 200, 3), np.uint8), map).shape == (300, 200, 3)
