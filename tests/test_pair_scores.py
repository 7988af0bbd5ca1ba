"""Mixer and pair scores against NumPy in float64 and torch's attention, and the shortcut that must stay closed.

Errors are the largest difference as a fraction of a tensor's largest magnitude; the largest seen was 2e-6.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import optax
import pytest
from flax import nnx
from jaxtyping import Array, Float, Key
from oracles import above, relative_error, tree_errors, weights_and_gradients

from llip_jax.config import ModelConfig, TextConfig, VisionConfig
from llip_jax.models.pooling import Mixer
from llip_jax.models.sizes import model_shape
from llip_jax.models.vision import TowerOutput
from llip_jax.ops.pair_scores import FixedSide, ImageSide, MixtureSide, TextSide, cosines, mix, normalize

TOLERANCE = 1e-5
TEMPERATURE = 2.5


class Inputs(NamedTuple):
    """Arguments of the pair scores in the order of numpy_reference; ``text`` is not normalised."""

    queries: Float[np.ndarray, "J M dh"]
    keys: Float[np.ndarray, "N K M dh"]
    values: Float[np.ndarray, "N K M dh"]
    output: Float[np.ndarray, "d d"]
    text: Float[np.ndarray, "J d"]


def random_inputs(seed: int, n: int = 3, j: int = 5, k: int = 7, m: int = 2, dh: int = 4) -> Inputs:
    """N images and J texts, with mixing weights far from uniform."""
    rng = np.random.default_rng(seed)
    shapes = [(j, m, dh), (n, k, m, dh), (n, k, m, dh), (m * dh, m * dh), (j, m * dh)]
    return Inputs(*((1.5 * rng.normal(size=shape)).astype(np.float32) for shape in shapes))


def sides(x: Inputs) -> tuple[MixtureSide, TextSide]:
    return MixtureSide(x.keys, x.values, x.output, TEMPERATURE), TextSide(x.text, x.queries)


@jax.jit
def scores(x: Inputs) -> Float[Array, "N J"]:
    return cosines(*sides(x))


@pytest.mark.parametrize(
    ("n", "j", "k", "m", "dh"),
    [
        (3, 5, 7, 2, 4),
        (6, 4, 1, 8, 3),  # one token: nothing to mix, no gradient through the weights
        (2, 3, 64, 8, 4),
        (4, 12, 7, 1, 6),  # three captions an image
    ],
)
def test_equals_the_reference(n: int, j: int, k: int, m: int, dh: int) -> None:
    x = random_inputs(1, n, j, k, m, dh)
    cotangent = np.random.default_rng(2).normal(size=(n, j)).astype(np.float32)
    exact = [array.astype(np.float64) for array in x]
    values, vjp = jax.vjp(scores, x)
    assert relative_error(values, reference.contextual_cosines(*exact, TEMPERATURE)) < TOLERANCE
    expected = Inputs(*reference.contextual_cosines_vjp(*exact, TEMPERATURE, cotangent))
    assert above(tree_errors(vjp(cotangent)[0], expected), TOLERANCE) == {}


def test_equals_torch_attention() -> None:
    """All pairs at once through MultiheadAttention, whose softmax scale is 1 / sqrt(dh)."""
    torch = pytest.importorskip("torch", reason="the oracle is torch.nn.MultiheadAttention")
    n, j, k, heads, dv, d = 3, 5, 7, 4, 20, 24
    config = ModelConfig(
        size="Ti/4",
        mixture_tokens=k,
        mixer_heads=heads,
        mixer_temperature=(d // heads) ** 0.5,
        embed_dim=d,
        vision=VisionConfig(width=dv),
        text=TextConfig(width=d),  # torch's attention takes queries at the joint width
    )
    torch.manual_seed(3)
    attention = torch.nn.MultiheadAttention(d, heads, bias=False, kdim=dv, vdim=dv, batch_first=True).double()
    rng = np.random.default_rng(4)
    tokens, texts, cotangent = (rng.normal(size=shape) for shape in ((n, k, dv), (j, d), (n, j, d)))
    torch_tokens, torch_texts = (torch.tensor(x, requires_grad=True) for x in (tokens, texts))
    expected, _ = attention(torch_texts.expand(n, j, d), torch_tokens, torch_tokens)
    expected.backward(torch.tensor(cotangent))

    def mixer_arrays(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        split = {f"{name}_proj_weight": (-1, heads, d // heads) for name in ("q", "k", "v")}
        query, key, value = (arrays[name].T.reshape(shape) for name, shape in split.items())
        return {"query": query, "key": key, "value": value, "output": arrays["out_proj.weight"].T}

    mixer = Mixer(config, model_shape(config), jnp.float32, nnx.Rngs(5))

    @jax.jit
    def mixed(params: dict[str, Array], tokens: Float[Array, "N K Dv"], texts: Float[Array, "J d"]) -> Array:
        graph, initial = nnx.split(mixer)
        unused = {"text": nnx.to_pure_dict(initial)["text"]}
        merged = nnx.merge(graph, params | unused)
        return mix(merged.images(TowerOutput(tokens, jnp.zeros((n, 0, dv)))), merged.texts(texts).queries)

    weights, gradients = (mixer_arrays(x) for x in weights_and_gradients(attention))
    arguments = jax.tree.map(jnp.float32, (weights, tokens, texts))
    values, vjp = jax.vjp(mixed, *arguments)
    assert relative_error(values, expected.detach().numpy()) < TOLERANCE
    expected_gradients = (gradients, torch_tokens.grad.numpy(), torch_texts.grad.numpy())
    assert above(tree_errors(vjp(jnp.float32(cotangent)), expected_gradients), TOLERANCE) == {}


def test_permuting_images_permutes_rows_and_permuting_texts_permutes_columns() -> None:
    x = random_inputs(6)
    rows, columns = np.array([2, 0, 1]), np.array([3, 1, 4, 0, 2])
    permuted = x._replace(keys=x.keys[rows], values=x.values[rows], queries=x.queries[columns], text=x.text[columns])
    np.testing.assert_allclose(scores(permuted), scores(x)[rows][:, columns], rtol=0, atol=1e-6)


def test_a_pair_depends_on_nothing_but_its_image_and_its_text() -> None:
    x = random_inputs(7)
    before = np.asarray(scores(x))
    other = random_inputs(8)
    for i in range(len(x.keys)):
        keys, values = x.keys.copy(), x.values.copy()
        keys[i], values[i] = other.keys[i], other.values[i]
        changed = np.abs(scores(x._replace(keys=keys, values=values)) - before) > 1e-6
        assert changed[i].all() and not np.delete(changed, i, axis=0).any()
    for j in range(len(x.text)):
        queries, text = x.queries.copy(), x.text.copy()
        queries[j], text[j] = other.queries[j], other.text[j]
        changed = np.abs(scores(x._replace(queries=queries, text=text)) - before) > 1e-6
        assert changed[:, j].all() and not np.delete(changed, j, axis=1).any()


@pytest.mark.parametrize("size", [1e-11, 1e-3, 1e3, 1e12])
def test_normalisation_of_tiny_and_huge_vectors(size: float) -> None:
    rng = np.random.default_rng(9)
    x, cotangent = rng.normal(size=(2, 4, 6))
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    unit = x / norm
    values, vjp = jax.vjp(normalize, jnp.float32(size * x))
    gradient = (cotangent - unit * (unit * cotangent).sum(axis=1, keepdims=True)) / (size * norm)
    assert relative_error(values, unit) < TOLERANCE
    assert relative_error(vjp(jnp.float32(cotangent))[0], gradient) < TOLERANCE


def test_a_zero_vector_stays_zero_with_a_finite_gradient() -> None:
    values, vjp = jax.vjp(normalize, jnp.zeros((2, 3)))
    np.testing.assert_array_equal(values, 0)
    assert np.isfinite(vjp(jnp.ones((2, 3)))[0]).all()


@pytest.mark.parametrize("size", [1.0, 6.0])
def test_bfloat16_sides_are_scored_with_a_float32_softmax(size: float) -> None:
    """Off by less than 2e-3; at the larger size a softmax of bfloat16 products would be off by 0.03."""
    x = random_inputs(10, n=16, j=16, k=16, m=4, dh=8)
    x = x._replace(queries=size * x.queries, keys=size * x.keys)
    rounded = Inputs(*(jnp.bfloat16(array) for array in x))
    actual = scores(rounded)
    assert actual.dtype == jnp.float32
    expected = reference.contextual_cosines(*(np.asarray(array, np.float64) for array in rounded), TEMPERATURE)
    assert np.abs(actual - expected).max() < 5e-3


def test_mixture_images_need_queries() -> None:
    images, texts = sides(random_inputs(11))
    with pytest.raises(ValueError, match="need texts with queries"):
        cosines(images, TextSide(texts.embedding))


# The shortcut: image i mixed by its own text i and compared with text j. The model then writes text i into the image,
# where it can be read off in the pair (i, i), and the loss falls without any picture being understood.


def shortcut_cosines(images: MixtureSide, texts: TextSide) -> Float[Array, "N N"]:
    """The wrong scorer."""
    own = jnp.diagonal(mix(images, texts.queries), axis1=0, axis2=1).T
    return normalize(own) @ normalize(texts.embedding).T


def test_negatives_are_mixed_by_the_text_they_are_compared_with() -> None:
    images, texts = sides(random_inputs(12, n=5))
    ours, wrong = cosines(images, texts), shortcut_cosines(images, texts)
    diagonal = np.eye(5, dtype=bool)
    np.testing.assert_allclose(ours[diagonal], wrong[diagonal], rtol=0, atol=1e-6)
    assert np.abs(ours - wrong)[~diagonal].min() > 1e-4


@pytest.mark.parametrize("scorer", [cosines, shortcut_cosines])
def test_a_negative_does_not_know_the_images_own_text(scorer: Callable[[ImageSide, TextSide], Array]) -> None:
    x, other = random_inputs(13, n=5), random_inputs(14, n=5)
    before = np.asarray(scorer(*sides(x)))
    for i in range(5):
        queries = x.queries.copy()
        queries[i] = other.queries[i]
        changed = np.abs(scorer(*sides(x._replace(queries=queries))) - before)[i] > 1e-6
        assert changed[i]
        assert np.delete(changed, i).any() == (scorer is shortcut_cosines)


@pytest.mark.parametrize("scorer", [cosines, shortcut_cosines])
def test_nothing_is_learned_where_images_say_nothing_about_texts(
    scorer: Callable[[ImageSide, TextSide], Array],
) -> None:
    """Fresh, independent images and texts every step: only the shortcut gets below the loss of a constant guess.

    As a fraction of that loss the shortcut reaches 0.17 and our scorer 1.00, whatever the seed.
    """
    n, k, heads, width, steps = 16, 8, 4, 16, 600
    split = (width, heads, width // heads)
    # Tokens differ from each other by more than images do: what a query needs to write itself into the mixture.
    base = 2 * jax.random.normal(jax.random.key(15), (k, width))
    shapes = {"query": split, "key": split, "value": split, "output": (width, width), "text": (width, width)}
    params = {
        name: width**-0.5 * jax.random.normal(jax.random.fold_in(jax.random.key(16), i), shape)
        for i, (name, shape) in enumerate(shapes.items())
    } | {"log_scale": jnp.log(10.0), "bias": jnp.log(1 / (n - 1))}
    optimizer = optax.adam(1e-2)

    def loss_fn(params: dict[str, Array], key: Key[Array, ""]) -> Float[Array, ""]:
        image_key, text_key = jax.random.split(key)
        tokens = base + 0.5 * jax.random.normal(image_key, (n, k, width))
        texts = jax.random.normal(text_key, (n, width))
        keys, values = (jnp.einsum("nkd,dmh->nkmh", tokens, params[name]) for name in ("key", "value"))
        queries = jnp.einsum("jd,dmh->jmh", texts, params["query"])
        images = MixtureSide(keys, values, params["output"], TEMPERATURE)
        cosine = scorer(images, TextSide(texts @ params["text"], queries))
        logits = jnp.exp(params["log_scale"]) * cosine + params["bias"]
        return -jax.nn.log_sigmoid((2 * jnp.eye(n) - 1) * logits).sum() / n

    @jax.jit
    def train() -> Float[Array, " steps"]:
        def step(carry: tuple, key: Key[Array, ""]) -> tuple[tuple, Float[Array, ""]]:
            params, state = carry
            loss, gradients = jax.value_and_grad(loss_fn)(params, key)
            updates, state = optimizer.update(gradients, state)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(jax.random.key(17), steps))[1]

    p = 1 / n
    chance = -n * (p * np.log(p) + (1 - p) * np.log(1 - p))
    reached = float(train()[-100:].mean()) / chance
    assert reached < 0.5 if scorer is shortcut_cosines else 0.98 < reached < 1.05


def test_fixed_images_are_plain_cosines() -> None:
    images, texts = np.random.default_rng(18).normal(size=(2, 4, 6)).astype(np.float32)
    unit_images, unit_texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts))
    actual = cosines(FixedSide(jnp.asarray(images)), TextSide(jnp.asarray(texts)))
    assert relative_error(actual, unit_images @ unit_texts.T) < TOLERANCE
