"""Losses over all pairs, streamed: against NumPy in float64 and against the dense form, on one device and on many.

Errors are the largest difference as a fraction of a tensor's largest magnitude.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float
from oracles import above, fast_to_compile, relative_error, tree_errors
from run_helpers import call_on_devices, call_on_processes, run, tiny_config

from llip_jax.config import ConfigError, MeshConfig, PairScoresConfig
from llip_jax.objectives.losses import SigmoidLoss, SoftmaxLoss, Together
from llip_jax.objectives.pairs import PairTargets, pair_ids, pair_targets
from llip_jax.ops import pair_blocks
from llip_jax.ops import plan as pair_plan
from llip_jax.ops.pair_blocks import GramScorer, MetricScorer, prepare
from llip_jax.ops.pair_kernel import with_kernel
from llip_jax.ops.pair_loss import PairLoss, Statistics, pair_loss
from llip_jax.ops.pair_scores import Affine, FixedSide, ImageSide, MixtureSide, TextSide, cosines
from llip_jax.ops.plan import even, make_plan
from llip_jax.ops.sweep import BlockSizes, Plan
from llip_jax.parallel.mesh import make_mesh, neighbour_ring
from llip_jax.parallel.sharding import batch_sharding
from llip_jax.training.loop import check

TOLERANCE = 1e-5
BFLOAT16_TOLERANCE = 2e-2
TEMPERATURE = 2.5


class Inputs(NamedTuple):
    """What gradients are taken of; the text embedding is not normalised. ``keys`` is None for fixed images."""

    queries: Array | None
    keys: Array | None
    values: Array
    output: Array | None
    text: Array
    affine: Affine


class Shape(NamedTuple):
    """N images of K tokens in M heads of dh, C captions each."""

    n: int
    c: int
    k: int
    m: int
    dh: int


SHAPES = [
    Shape(7, 1, 7, 2, 4),  # prime counts: every block size leaves a rest
    Shape(6, 3, 1, 8, 3),  # one token
    Shape(5, 2, 64, 8, 6),  # M K > d
    Shape(9, 3, 2, 1, 12),  # M K < d, one head
]


def mixture_inputs(seed: int, shape: Shape, dtype: Any = jnp.float32) -> Inputs:
    n, c, k, m, dh = shape
    rng, j, d = np.random.default_rng(seed), n * c, m * dh

    def draw(*dims: int) -> Array:
        return jnp.asarray(1.5 * rng.normal(size=dims), dtype)

    affine = Affine(jnp.float32(7.0), jnp.float32(-2.0))
    return Inputs(draw(j, m, dh), draw(n, k, m, dh), draw(n, k, m, dh), draw(d, d), draw(j, d), affine)


def fixed_inputs(seed: int, shape: Shape) -> Inputs:
    full = mixture_inputs(seed, shape)
    return full._replace(queries=None, keys=None, values=full.values.mean(1).reshape(shape.n, -1), output=None)


def sides(x: Inputs) -> tuple[ImageSide, TextSide]:
    if x.keys is None:
        return FixedSide(x.values), TextSide(x.text)
    return MixtureSide(x.keys, x.values, x.output, TEMPERATURE), TextSide(x.text, x.queries)


def random_ids(seed: int, n: int, c: int) -> tuple[Any, Any]:
    """Some equal pictures, some equal captions, some empty slots, captions of different weight."""
    rng = np.random.default_rng(seed)
    weight = rng.uniform(0.2, 1, size=(n, c)) * (rng.random((n, c)) < 0.7)
    weight[:, 0] = 1
    weight /= weight.sum(axis=1, keepdims=True)
    groups = rng.integers(n, size=n), rng.integers(2 * n, size=(n, c))
    return pair_ids(*(jnp.asarray(x, jnp.int32) for x in groups), jnp.asarray(weight, jnp.float32))


def soft_targets(images: Any, texts: Any) -> PairTargets:
    """Targets between 0 and 1, a mask and weights that have nothing to do with who owns which caption."""
    distance = jnp.abs(images.place[:, None] - texts.place) + 0.37 * (texts.caption % 3)
    weight = jnp.broadcast_to(0.2 + texts.weight, distance.shape)
    return PairTargets(jnp.exp(-distance), weight, ((images.picture[:, None] + texts.caption) % 4 > 0).astype(float))


IGNORE = functools.partial(pair_targets, duplicates="ignore")
POSITIVE = functools.partial(pair_targets, duplicates="positive")
LOSSES: dict[str, PairLoss] = {
    "sigmoid": SigmoidLoss(IGNORE),
    "softmax": SoftmaxLoss(POSITIVE),
    "soft targets": Together(
        {"sigmoid": SigmoidLoss(soft_targets), "softmax": SoftmaxLoss(soft_targets)}, {"sigmoid": 0.3, "softmax": 2.0}
    ),
}


def dense(loss: PairLoss, x: Inputs, ids: tuple[Any, Any]) -> Float[Array, ""]:
    logits = x.affine.scale * cosines(*sides(x)) + x.affine.bias
    return loss.value(loss.statistics(logits, *ids, jnp.ones(logits.shape, bool)))


def streamed(loss: PairLoss, x: Inputs, ids: tuple[Any, Any], plan: Plan) -> Float[Array, ""]:
    return pair_loss(loss, prepare(*sides(x)), x.affine, *ids, plan)[0]


def planned(
    loss: PairLoss, x: Inputs, ids: tuple[Any, Any], settings: PairScoresConfig, ring: tuple[int, ...] | None = None
) -> Float[Array, ""]:
    prepared = prepare(*sides(x))
    return pair_loss(loss, prepared, x.affine, *ids, make_plan(prepared, settings, ring))[0]


def loss_and_gradient(function: Callable[..., Array], loss: PairLoss, x: Inputs, *rest: Any) -> tuple[Array, Inputs]:
    differentiated = jax.value_and_grad(lambda x, ids: function(loss, x, ids, *rest[1:]))
    return jax.device_get(fast_to_compile(differentiated)(x, rest[0]))


def without_bias(x: Inputs) -> Inputs:
    """A bias moves all logits of a softmax alike: its gradient is zero but for rounding."""
    return x._replace(affine=x.affine._replace(bias=None))


def exact_sigmoid(x: Inputs, ids: tuple[Any, Any]) -> tuple[float, Inputs]:
    """Loss and gradient in float64, the pair targets of ``IGNORE`` given."""
    pairs = [np.asarray(array, np.float64) for array in IGNORE(*ids)]
    exact = [np.asarray(array, np.float64) for array in (x.queries, x.keys, x.values, x.output, x.text)]
    cosine = reference.contextual_cosines(*exact, TEMPERATURE)
    scale, bias = (float(array) for array in x.affine)
    d_logits = reference.sigmoid_loss_gradient(scale * cosine + bias, *pairs)
    gradient = reference.contextual_cosines_vjp(*exact, TEMPERATURE, scale * d_logits)
    affine = Affine(np.sum(d_logits * cosine), np.sum(d_logits))
    return reference.sigmoid_loss(scale * cosine + bias, *pairs), Inputs(*gradient, affine)


@pytest.mark.parametrize("sizes", [(3, 4), (100, 100)])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_float64(shape: Shape, sizes: tuple[int, int]) -> None:
    x, ids = mixture_inputs(0, shape), random_ids(1, shape.n, shape.c)
    value, gradient = loss_and_gradient(streamed, LOSSES["sigmoid"], x, ids, Plan(BlockSizes(*sizes)))
    expected_value, expected_gradient = exact_sigmoid(x, ids)
    assert relative_error(value, expected_value) < TOLERANCE
    assert above(tree_errors(gradient, expected_gradient), TOLERANCE) == {}


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_is_within_two_percent_of_float64(shape: Shape, gram: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured: 0.9 %."""
    monkeypatch.setattr(pair_blocks, "_gram_is_cheaper", lambda *shape: gram)
    x, ids = mixture_inputs(2, shape, jnp.bfloat16), random_ids(3, shape.n, shape.c)
    value, gradient = loss_and_gradient(streamed, LOSSES["sigmoid"], x, ids, Plan(BlockSizes(3, 4)))
    expected_value, expected_gradient = exact_sigmoid(x, ids)
    assert gradient.keys.dtype == jnp.bfloat16
    assert relative_error(value, expected_value) < BFLOAT16_TOLERANCE
    assert above(tree_errors(gradient, expected_gradient), BFLOAT16_TOLERANCE) == {}


@pytest.mark.parametrize("make", [mixture_inputs, fixed_inputs])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_dense(name: str, make: Callable[[int, Shape], Inputs]) -> None:
    for shape in SHAPES[:1] + SHAPES[3:]:
        x, ids = make(4, shape), random_ids(5, shape.n, shape.c)
        expected = loss_and_gradient(dense, LOSSES[name], x, ids)
        for sizes in (BlockSizes(2, 5), BlockSizes(1, 1)):
            value, gradient = loss_and_gradient(streamed, LOSSES[name], x, ids, Plan(sizes))
            assert relative_error(value, expected[0]) < TOLERANCE
            errors = tree_errors(*(without_bias(y) if name == "softmax" else y for y in (gradient, expected[1])))
            assert above(errors, TOLERANCE) == {}


@pytest.mark.parametrize("gram", [False, True])
def test_both_forms_of_the_norm_equal_dense(gram: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_blocks, "_gram_is_cheaper", lambda *shape: gram)
    # Gram matrices of two images at a time.
    monkeypatch.setattr(pair_blocks, "_GRAM_BYTES", 2 * 4 * 3 * 2 * 16)
    for shape in (Shape(5, 2, 3, 2, 8), Shape(4, 1, 9, 4, 3)):
        x, ids = mixture_inputs(6, shape), random_ids(7, shape.n, shape.c)
        assert isinstance(prepare(*sides(x)).scorer, GramScorer if gram else MetricScorer)
        expected = loss_and_gradient(dense, LOSSES["sigmoid"], x, ids)
        value, gradient = loss_and_gradient(streamed, LOSSES["sigmoid"], x, ids, Plan(BlockSizes(2, 3)))
        assert relative_error(value, expected[0]) < TOLERANCE
        assert above(tree_errors(gradient, expected[1]), TOLERANCE) == {}


def test_the_cheaper_norm_is_chosen() -> None:
    """By the Gram matrix where M K < d and there are texts enough to pay for making it."""

    def form(texts: int, k: int, m: int, dh: int) -> type:
        keys, text = (
            jax.ShapeDtypeStruct((2, k, m, dh), jnp.float32),
            jax.ShapeDtypeStruct((texts, m * dh), jnp.float32),
        )
        output, queries = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((m * dh, m * dh), (texts, m, dh)))
        chosen = []
        jax.eval_shape(
            lambda k, o, t, q: chosen.append(type(prepare(MixtureSide(k, k, o, 1.0), TextSide(t, q)).scorer)),
            keys, output, text, queries,
        )  # fmt: skip
        return chosen[0]

    assert form(32_768, 64, 8, 160) is GramScorer  # G/14
    assert form(32_768, 64, 8, 96) is GramScorer  # L/14
    assert form(32_768, 64, 8, 64) is MetricScorer  # B/16: M K = d
    assert form(64, 64, 8, 160) is MetricScorer  # few texts


def test_images_and_texts_that_are_zero_have_finite_gradients() -> None:
    shape = SHAPES[0]
    x, ids = mixture_inputs(8, shape), random_ids(9, shape.n, shape.c)
    x = x._replace(values=x.values.at[1].set(0), text=x.text.at[2].set(0))
    for name, loss in LOSSES.items():
        value, gradient = loss_and_gradient(streamed, loss, x, ids, Plan(BlockSizes(3, 3)))
        assert np.isfinite(value), name
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient)), name


def test_the_loss_alone_is_the_loss_beside_its_gradient() -> None:
    shape = SHAPES[0]
    x, ids = mixture_inputs(10, shape), random_ids(11, shape.n, shape.c)
    for loss in LOSSES.values():
        alone = fast_to_compile(functools.partial(streamed, loss, plan=Plan(BlockSizes(3, 4))))(x, ids)
        assert relative_error(alone, loss_and_gradient(dense, loss, x, ids)[0]) < TOLERANCE


def test_the_gradient_is_scaled_by_what_becomes_of_the_loss() -> None:
    shape = SHAPES[0]
    x, ids = mixture_inputs(22, shape), random_ids(23, shape.n, shape.c)

    def scaled(loss: PairLoss, x: Inputs, ids: tuple[Any, Any]) -> Float[Array, ""]:
        return -3.7 * streamed(loss, x, ids, Plan(BlockSizes(3, 4)))

    gradient = loss_and_gradient(scaled, LOSSES["sigmoid"], x, ids)[1]
    expected = loss_and_gradient(dense, LOSSES["sigmoid"], x, ids)[1]
    assert above(tree_errors(gradient, jax.tree.map(lambda y: -3.7 * y, expected)), TOLERANCE) == {}


@pytest.mark.parametrize("name", LOSSES)
def test_statistics_beside_the_gradient_are_those_of_all_pairs(name: str) -> None:
    shape, loss = SHAPES[0], LOSSES[name]
    x, ids = mixture_inputs(24, shape), random_ids(25, shape.n, shape.c)

    def both(x: Inputs) -> tuple[Array, Statistics]:
        return pair_loss(loss, prepare(*sides(x)), x.affine, *ids, Plan(BlockSizes(3, 4)))

    statistics = fast_to_compile(jax.grad(both, has_aux=True))(x)[1]
    logits = x.affine.scale * cosines(*sides(x)) + x.affine.bias
    expected = loss.statistics(logits, *ids, jnp.ones(logits.shape, bool))
    assert above(tree_errors(statistics, expected), TOLERANCE) == {}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("gram", [False, True])
def test_where_little_is_left_after_wo_cosines_stay_cosines(
    gram: bool, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wo of rank 1, or values in directions that it shrinks 100-fold: the square is a difference of large numbers.

    Measured in bfloat16: cosines of 0.8 at most, gradients 1.05 times the dense form's; without a floor 3.8 and 232
    times here, and on other draws any size.
    """
    monkeypatch.setattr(pair_blocks, "_gram_is_cheaper", lambda *shape: gram)
    shape = Shape(24, 1, 1, 1, 64)
    ids = random_ids(26, shape.n, shape.c)
    rng = np.random.default_rng(27)
    left, _, right = np.linalg.svd(rng.normal(size=(64, 64)))
    shrinking = left @ np.diag(np.where(np.arange(64) < 60, 1.0, 0.01)) @ right
    aligned = rng.normal(size=(24, 1, 1, 4)) @ left[:, 60:].T
    rank_one = np.outer(rng.normal(size=64), rng.normal(size=64)) / 8
    for output, values in ((shrinking, aligned), (rank_one, rng.normal(size=(24, 1, 1, 64)))):
        x = mixture_inputs(28, shape, dtype)
        x = x._replace(output=jnp.asarray(output, dtype), values=jnp.asarray(values, dtype))
        prepared = prepare(*sides(x))
        cosine, _ = prepared.scorer.forward(prepared.images, prepared.texts, prepared.shared)
        assert jnp.abs(cosine).max() < 1.5
        gradients = (
            loss_and_gradient(function, LOSSES["sigmoid"], x, ids, Plan(BlockSizes(5, 7)))[1]
            for function in (streamed, lambda loss, x, ids, plan: dense(loss, x, ids))
        )
        ours, wanted = (np.sqrt(sum(np.sum(np.float64(y) ** 2) for y in jax.tree.leaves(g))) for g in gradients)
        assert ours < 3 * wanted


# Over devices.

DEVICES_SHAPE = Shape(16, 3, 7, 2, 8)
MESHES = [(1, 1, 1), (8, 1, 1), (2, 2, 2)]
MORE_MESHES = [(2, 1, 1), (1, 4, 1)]


def losses_on_more_meshes() -> list[dict[str, Any]]:
    return losses_on_meshes(MORE_MESHES)


def losses_on_meshes(meshes: list[tuple[int, int, int]] = MESHES) -> list[dict[str, Any]]:
    """Errors against dense by mesh, exchange and kind of images; runs with eight devices."""
    results = []
    loss = LOSSES["soft targets"]
    ids = random_ids(13, DEVICES_SHAPE.n, DEVICES_SHAPE.c)
    for kind, make in (("metric", mixture_inputs), ("gram", mixture_inputs), ("fixed", fixed_inputs)):
        pair_blocks._gram_is_cheaper = lambda *shape, kind=kind: kind == "gram"
        x = make(12, DEVICES_SHAPE)
        expected = loss_and_gradient(dense, loss, x, ids)
        for shape in meshes:
            mesh = make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "tensor"), shape, strict=True))),
                             jax.devices()[: int(np.prod(shape))])  # fmt: skip
            for exchange in ("ring", "gather"):
                settings = PairScoresConfig(exchange=exchange, image_block=2, text_block=5)  # type: ignore[arg-type]
                # Any order of the devices is a ring.
                ring = tuple(np.random.default_rng(14).permutation(mesh.size).tolist())
                with jax.set_mesh(mesh):
                    value, gradient = loss_and_gradient(planned, loss, x, ids, settings, ring)
                errors = tree_errors(gradient, expected[1])
                error = max(relative_error(value, expected[0]), *errors.values())
                results.append({"kind": kind, "mesh": shape, "exchange": exchange, "error": error})
    return results


def test_every_mesh_gives_the_loss_of_one_device() -> None:
    """Measured: 1e-6."""
    results = call_on_devices(losses_on_meshes, 8)
    assert len(results) == 3 * len(MESHES) * 2
    assert [r for r in results if r["error"] > TOLERANCE] == []


@pytest.mark.slow
def test_more_meshes_give_the_loss_of_one_device() -> None:
    results = call_on_devices(losses_on_more_meshes, 8)
    assert len(results) == 3 * len(MORE_MESHES) * 2
    assert [r for r in results if r["error"] > TOLERANCE] == []


def error_of_this_process() -> float:
    """Against dense: the loss, and the pieces of the gradient that this process holds."""
    loss, ids = LOSSES["soft targets"], random_ids(13, DEVICES_SHAPE.n, DEVICES_SHAPE.c)
    host = mixture_inputs(12, DEVICES_SHAPE)
    # Each process for itself, on one of its own devices.
    with jax.default_device(jax.local_devices()[0]):
        expected = loss_and_gradient(dense, loss, host, ids)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    assert len({device.process_index for device in mesh.devices.flat}) == 2
    divided, whole = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())

    def place(tree: Any, sharding: NamedSharding) -> Any:
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: np.asarray(x)[index]), tree
        )

    x = Inputs(*(place(y, whole if name in ("output", "affine") else divided) for name, y in host._asdict().items()))
    with jax.set_mesh(mesh):
        differentiated = jax.value_and_grad(lambda x, ids: planned(loss, x, ids, PairScoresConfig()))
        value, gradient = fast_to_compile(differentiated)(x, place(ids, divided))
    errors = [relative_error(jax.device_get(value), expected[0])]
    for actual, wanted in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected[1]), strict=True):
        scale = np.abs(wanted).max()
        for piece in actual.addressable_shards:
            errors.append(float(np.abs(np.asarray(piece.data) - wanted[piece.index]).max() / scale))
    return max(errors)


@pytest.mark.slow
def test_two_processes_of_four_devices_give_the_loss_of_one() -> None:
    """Measured: 1e-6."""
    assert max(call_on_processes(error_of_this_process, processes=2, devices=4)) < TOLERANCE


# Memory and traffic, as the compiler sees them.


def compiled(
    shape: Shape,
    texts: int,
    *,
    images: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    settings: PairScoresConfig | None = None,
) -> jax.stages.Compiled:
    """Loss and gradient of ``images`` images (default: one a text) and texts, never run."""
    n, _, k, m, dh = shape
    n = n if images is None else images
    divided, whole = (None, None) if mesh is None else (batch_sharding(mesh), NamedSharding(mesh, PartitionSpec()))

    def abstract(*dims: int, sharding: Any = divided, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    keys, scalar = abstract(n, k, m, dh), abstract(sharding=whole)
    x = Inputs(
        abstract(texts, m, dh), keys, keys, abstract(m * dh, m * dh, sharding=whole), abstract(texts, m * dh),
        Affine(scalar, scalar),
    )  # fmt: skip

    def function(x: Inputs, place: Array, weight: Array) -> tuple[Array, Inputs]:
        images, texts = pair_ids(place, place[:, None], weight)
        images = jax.tree.map(lambda y: y[:n], images)
        return jax.value_and_grad(
            lambda x: planned(LOSSES["sigmoid"], x, (images, texts), settings or PairScoresConfig())
        )(x)

    arguments = x, abstract(texts, dtype=jnp.int32), abstract(texts, 1)
    options = {"out_shardings": (whole, jax.tree.map(lambda y: y.sharding, x))} if mesh else {}
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        return jax.jit(function, **options).lower(*arguments).compile()


def temporaries(program: jax.stages.Compiled) -> int:
    return program.memory_analysis().temp_size_in_bytes


def test_memory_grows_with_texts_by_the_texts_themselves() -> None:
    """Folded embeddings and the gradients of texts: at most 2.5 arrays of J x d, measured 2.04."""
    shape = Shape(16, 1, 16, 4, 32)
    sizes = [temporaries(compiled(shape, texts, images=16)) for texts in (512, 4096, 32_768)]
    array = 4 * 128  # bytes of d numbers
    for (few, many), (less, more) in zip(((512, 4096), (4096, 32_768)), itertools.pairwise(sizes), strict=True):
        assert more - less <= 2.5 * array * (many - few)


def test_gram_matrices_are_made_for_some_images_at_a_time() -> None:
    """The vectors of 256 images would take 64 MiB and their gradients as much; measured 59 MiB in all.

    What stays is the matrices and their gradients, 16 MiB each, and a block.
    """
    program = compiled(Shape(0, 1, 16, 8, 64), 512, images=256)
    assert temporaries(program) < 90 * 2**20


def temporaries_on_devices() -> dict[str, Any]:
    """Of one device, 16 images on each of 1 to 8; and the collectives on 8."""
    result: dict[str, Any] = {"ring": [], "gather": []}
    for exchange in ("ring", "gather"):
        for devices in (1, 2, 4, 8):
            mesh = make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
            settings = PairScoresConfig(exchange=exchange)  # type: ignore[arg-type]
            program = compiled(Shape(0, 1, 64, 8, 64), 64 * devices, images=64 * devices, mesh=mesh, settings=settings)
            result[exchange].append(temporaries(program))
    settings = PairScoresConfig()
    text = compiled(Shape(0, 1, 64, 8, 64), 512, images=512, mesh=mesh, settings=settings).as_text()
    result["collectives"] = re.findall(r"= \(?(\w+)\[([\d,]*)\]\S* (collective-permute|all-gather|all-to-all)", text)
    return result


def test_memory_does_not_grow_with_devices_and_only_texts_travel() -> None:
    """From 1 device to 2 the texts under way are added; from there on nothing."""
    result = call_on_devices(temporaries_on_devices, 8)
    assert max(result["ring"]) < 1.05 * min(result["ring"])
    moved = [(kind, math.prod(int(n) for n in dims.split(",") if n)) for _, dims, kind in result["collectives"]]
    assert moved
    assert {kind for kind, _ in moved} == {"collective-permute"}
    assert max(size for _, size in moved) == 64 * 512  # a device's texts, d numbers each; its images have 64 times that


def test_no_array_of_all_pairs_exists() -> None:
    """Of 300 images and 700 texts, neither on the device nor as a constant."""
    text = compiled(Shape(0, 1, 4, 2, 8), 700, images=300, settings=PairScoresConfig(text_block=100)).as_text()
    assert not re.search(r"\[(300,700|700,300|210000)", text)


# The plan.


def test_blocks_are_even_and_fit() -> None:
    assert [even(10, 4), even(256, 256), even(257, 256), even(7, 100), even(5, 0)] == [4, 256, 129, 7, 1]
    prepared = prepare(*sides(mixture_inputs(15, Shape(64, 8, 64, 8, 16))))
    plan = make_plan(prepared, PairScoresConfig())
    assert plan.sizes.texts == 256
    assert 1 <= plan.sizes.images < 64
    assert plan.sizes.images * 256 * prepared.scorer.bytes_of_a_pair(prepared.images) <= pair_plan.block_bytes()
    chosen = make_plan(prepared, PairScoresConfig(image_block=3, text_block=50))
    assert chosen.sizes == BlockSizes(3, 50)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        assert make_plan(prepared, PairScoresConfig(), ring=(0,)).ring == (0,)
        assert make_plan(prepared, PairScoresConfig(), ring=(1, 0)).ring is None  # of another mesh


@pytest.mark.parametrize(("field", "available"), [("image_block", 7), ("text_block", 14)])
def test_a_block_larger_than_the_batch_is_refused(field: str, available: int) -> None:
    prepared = prepare(*sides(mixture_inputs(16, Shape(7, 2, 3, 2, 4))))
    with pytest.raises(ConfigError, match=rf"pair_scores\.{field}=99 is more than the {available} "):
        make_plan(prepared, PairScoresConfig(**{field: 99}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": (4, 3, 2, 4)}, r"keys and values: .*\(5, 3, 2, 4\) and \(4, 3, 2, 4\)"),
        ({"output": (8, 6)}, r"output projection: expected \(8, 8\) for 2 heads of 4, got \(8, 6\)"),
        ({"text": (5, 6)}, r"text embedding: expected \(5, 8\)"),
        ({"queries": (5, 1, 8)}, r"queries: expected \(5, 2, 4\)"),
        ({"queries": None}, "need texts with queries"),
    ],
)
def test_sides_that_do_not_belong_together_are_refused(change: dict[str, Any], message: str) -> None:
    x = mixture_inputs(17, Shape(5, 1, 3, 2, 4))
    wrong = {name: None if shape is None else jnp.ones(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: prepare(*sides(x))[1:3], x._replace(**wrong))


class Chip(NamedTuple):
    """Stands in for a TPU device."""

    coords: tuple[int, int, int]


class Grid:
    """Stands in for a mesh."""

    def __init__(self, width: int, height: int, seed: int):
        chips = [Chip((x, y, 0)) for x in range(width) for y in range(height)]
        np.random.default_rng(seed).shuffle(chips)  # type: ignore[arg-type]
        self.devices = np.empty(len(chips), object)
        self.devices[:] = chips


@pytest.mark.parametrize(("width", "height"), [(2, 2), (4, 4), (16, 16), (3, 4), (4, 3), (2, 1), (3, 3)])
def test_the_ring_visits_neighbours_and_closes(width: int, height: int) -> None:
    grid = Grid(width, height, 18)
    ring = neighbour_ring(grid)  # type: ignore[arg-type]
    if height == 1 or (width % 2 and height % 2):
        assert ring is None
        return
    assert sorted(ring) == list(range(width * height))
    places = [np.asarray(grid.devices[position].coords) for position in ring]
    steps = [np.abs(a - b).sum() for a, b in zip(places, places[1:] + places[:1], strict=True)]
    assert set(steps) == {1}


def test_devices_without_a_place_have_no_ring_of_their_own() -> None:
    assert neighbour_ring(make_mesh(MeshConfig(data=1), jax.devices()[:1])) is None


def tpu_lines(*options: str) -> list[dict[str, Any]]:
    """What the TPU compiler says (benchmarks/pair_scores_tpu.py)."""
    pytest.importorskip("libtpu", reason="the TPU compiler comes with libtpu: pip install libtpu")
    # Compiling needs no TPU, so nothing is shared with another process that has libtpu loaded.
    environment = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = run(["benchmarks/pair_scores_tpu.py", *options], keep_compilations=False, environment=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["streamed", "kernel"])
def test_a_pod_of_256_chips_needs_little_memory_and_moves_only_texts(implementation: str) -> None:
    """Batch 32,768 on v5e; measured 17 MiB (B/16) and 449 MiB (G/14), with the kernel 9 and 537."""
    lines = tpu_lines("--topology", "v5e:16x16", "--sizes", "B/16", "G/14", "--implementation", implementation)
    for line, width in zip(lines, (512, 1280), strict=True):
        assert line["temporaries_mib"] <= 1024
        # The gradient of S or Wo is summed over all chips.
        assert set(line["collectives"]) == {"collective-permute", "all-reduce"}
        assert line["collectives"]["all-reduce"]["largest"] == width**2
        permutes = line["collectives"]["collective-permute"]
        assert permutes["largest"] == 32_768 // 256 * width
        assert permutes["asynchronous"] == permutes["count"]


@pytest.mark.parametrize("shape", [Shape(5, 1, 3, 2, 8), Shape(4, 2, 9, 4, 3)])
def test_the_kernel_gives_the_loss_of_the_dense_form(shape: Shape) -> None:
    """Interpreted; tests/test_pair_kernel.py compares the kernels themselves."""
    x, ids = mixture_inputs(19, shape), random_ids(20, shape.n, shape.c)

    def with_interpreted_kernel(loss: PairLoss, x: Inputs, ids: tuple[Any, Any]) -> Float[Array, ""]:
        prepared = with_kernel(prepare(*sides(x)))
        prepared = prepared._replace(scorer=dataclasses.replace(prepared.scorer, interpret=True))
        return pair_loss(loss, prepared, x.affine, *ids, Plan(BlockSizes(2, 3)))[0]

    value, gradient = loss_and_gradient(with_interpreted_kernel, LOSSES["sigmoid"], x, ids)
    expected = loss_and_gradient(dense, LOSSES["sigmoid"], x, ids)
    assert relative_error(value, expected[0]) < TOLERANCE
    assert above(tree_errors(gradient, expected[1]), TOLERANCE) == {}


def test_fixed_images_have_no_kernel() -> None:
    with pytest.raises(ValueError, match="images that texts mix, got FixedScorer"):
        with_kernel(prepare(*sides(fixed_inputs(21, SHAPES[0]))))


@pytest.mark.parametrize(
    ("pooler", "settings", "message"),
    [
        ("average", {"implementation": "kernel"}, "not for model.pooler='average'; expected 'streamed'"),
        ("mixer", {"implementation": "kernel"}, "pair_scores.implementation='kernel' needs TPUs, the devices are cpu"),
        ("mixer", {"implementation": "dense", "text_block": 4}, "'dense' has no blocks"),
        ("mixer", {"image_block": 17}, "pair_scores.image_block=17 is more than the 16 images"),
        ("mixer", {"implementation": "kernels"}, "pair_scores.implementation: 'kernels' is not valid"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_training(
    pooler: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check(tiny_config(model={"pooler": pooler}, pair_scores=settings))
