"""The kernels against the scorers they stand in for and against float64, interpreted; and compiled for TPUs.

Errors are the largest difference as a fraction of an array's largest magnitude; the largest seen were 2e-6 in float32
and 4e-3 in bfloat16.
"""

import functools
import importlib.util
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jaxtyping import Array, Float
from oracles import above, fast_to_compile, tree_errors
from run_helpers import run

from llip_jax.ops.pair_blocks import BlockScorer, GramScorer, MetricScorer, MixtureBlock, TextBlock
from llip_jax.ops.pair_kernel import KernelScorer

TEMPERATURE = 2.5
KERNEL = KernelScorer(TEMPERATURE, interpret=True)

FORMS = pytest.mark.parametrize("gram", [False, True], ids=["metric", "gram"])

COMPILER_ONLY = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
"""libtpu asks nobody for a TPU, and minds no other process that has loaded it (another test's, say)."""

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
TPU_SHAPES: list[tuple[str, int, str, bool]] = [
    ("B/16", 512, "bfloat16", False),
    ("B/16", 512, "float32", False),
    ("L/14", 768, "bfloat16", True),
    ("G/14", 1280, "bfloat16", True),
]
"""Name, d, dtype, and whether the norm is by Gram matrices; all with K = 64, M = 8 and 128 images."""

Block = tuple[MixtureBlock, TextBlock, Any]


def random_block(
    seed: int, gram: bool, n: int = 3, j: int = 5, k: int = 7, m: int = 2, dh: int = 4, dtype: Any = np.float32
) -> Block:
    """Images, texts and shared, with mixing weights far from uniform; n images and j texts."""
    rng = np.random.default_rng(seed)
    d = m * dh
    keys, values = rng.normal(size=(2, n, k, m, dh))
    queries = 6 * dh**-0.5 * rng.normal(size=(j, m, dh))
    output = d**-0.5 * rng.normal(size=(d, d))
    texts = TextBlock(jnp.asarray(queries, dtype), jnp.asarray(rng.normal(size=(j, d)), jnp.float32))
    projected = np.einsum("nkmh,mhd->nmkd", values, output.reshape(m, dh, d)).reshape(n, m * k, d)
    grams = jnp.asarray(projected @ projected.swapaxes(1, 2), dtype) if gram else None
    images = MixtureBlock(jnp.asarray(keys, dtype), jnp.asarray(values, dtype), grams)
    return images, texts, None if gram else jnp.asarray(output @ output.T, dtype)


def random_cotangent(block: Block) -> Float[np.ndarray, "n j"]:
    shape = len(block[0].keys), len(block[1].queries)
    return np.random.default_rng(99).normal(size=shape).astype(np.float32)


@functools.lru_cache(typed=True)  # scorers are tuples: those of two classes can be equal
def both_passes(scorer: BlockScorer) -> Callable[..., tuple[Array, tuple]]:
    """Cosines and gradients; compiled once for blocks of one shape."""

    def both(images: MixtureBlock, texts: TextBlock, shared: Any, cotangent: Array) -> tuple[Array, tuple]:
        cosines, kept = scorer.forward(images, texts, shared)
        return cosines, scorer.backward(kept, images, texts, shared, cotangent)

    return fast_to_compile(both)


def cosines_and_gradients(scorer: BlockScorer, block: Block) -> tuple[Array, tuple]:
    return both_passes(scorer)(*block, random_cotangent(block))


def exact_cosines_and_gradients(block: Block) -> tuple[Array, tuple]:
    """In float64, by automatic differentiation."""

    def cosines(images: MixtureBlock, texts: TextBlock, shared: Any) -> Float[Array, "n j"]:
        weights = jax.nn.softmax(jnp.einsum("jmh,nkmh->njmk", texts.queries, images.keys) / TEMPERATURE)
        mixed = jnp.einsum("njmk,nkmh->njmh", weights, images.values).reshape(*weights.shape[:2], -1)
        if images.gram is None:
            square = jnp.einsum("njd,de,nje->nj", mixed, shared, mixed)
        else:
            flat = weights.reshape(*weights.shape[:2], -1)
            square = jnp.einsum("njp,npr,njr->nj", flat, images.gram, flat)
        return jnp.einsum("njd,jd->nj", mixed, texts.folded) / jnp.sqrt(square)

    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), block)
        values, vjp = jax.vjp(cosines, *exact)
        return jax.tree.map(np.asarray, (values, vjp(jnp.asarray(random_cotangent(block), jnp.float64))))


@FORMS
@pytest.mark.parametrize(
    ("n", "j", "k", "m", "dh"),
    [
        (3, 5, 7, 8, 3),
        (2, 130, 64, 1, 64),  # more texts than one row of lanes
        (2, 4, 1, 1, 160),  # one token: nothing to mix, no gradient through the weights
        (1, 128, 7, 2, 4),
    ],
)
def test_equals_the_scorer_it_stands_in_for(gram: bool, n: int, j: int, k: int, m: int, dh: int) -> None:
    block = random_block(1, gram, n, j, k, m, dh)
    scorer = GramScorer(TEMPERATURE) if gram else MetricScorer(TEMPERATURE)
    expected = cosines_and_gradients(scorer, block)
    assert above(tree_errors(cosines_and_gradients(KERNEL, block), expected), 1e-5) == {}


@FORMS
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_is_near_float64(gram: bool, dtype: Any, tolerance: float) -> None:
    block = random_block(2, gram, n=4, j=9, k=16, m=2, dh=8, dtype=dtype)
    actual, expected = cosines_and_gradients(KERNEL, block), exact_cosines_and_gradients(block)
    assert {x.dtype for x in jax.tree.leaves(actual)} == {np.dtype(np.float32)}
    assert above(tree_errors(actual, expected), tolerance) == {}


@FORMS
def test_an_image_of_zero_values_has_finite_gradients_and_leaves_others_alone(gram: bool) -> None:
    images, texts, shared = random_block(3, gram)
    zeroed = jax.tree.map(lambda x: x.at[1].set(0), images)._replace(keys=images.keys)
    cosines, gradients = cosines_and_gradients(KERNEL, (zeroed, texts, shared))
    before, gradients_before = cosines_and_gradients(KERNEL, (images, texts, shared))
    np.testing.assert_array_equal(cosines[1], 0)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
    others = np.array([0, 2])
    for actual, expected in ((cosines, before), (gradients[0].keys, gradients_before[0].keys)):
        np.testing.assert_allclose(actual[others], expected[others], rtol=0, atol=1e-6)


@FORMS
def test_weights_near_zero_and_one_and_vectors_too_short_to_have_a_direction(gram: bool) -> None:
    images, texts, shared = random_block(4, gram)
    short = images._replace(values=1e-14 * images.values, gram=1e-28 * images.gram if gram else None)
    block = short, texts._replace(queries=30 * texts.queries), shared
    expected = cosines_and_gradients(GramScorer(TEMPERATURE) if gram else MetricScorer(TEMPERATURE), block)
    assert above(tree_errors(cosines_and_gradients(KERNEL, block), expected), 1e-4) == {}


@FORMS
def test_too_many_texts_are_refused_when_traced(gram: bool) -> None:
    block = jax.eval_shape(lambda: random_block(5, gram, n=1, j=50_000, k=64, m=8, dh=64, dtype=jnp.bfloat16))
    with pytest.raises(ValueError, match=r"50048 texts takes about \d+ MiB of VMEM, of 48 MiB: use fewer texts"):
        jax.eval_shape(KERNEL.forward, *block)


def temporaries_on_tpu(topology: str, d: int, dtype: str, gram: bool, texts: int) -> int:
    """Bytes of HBM that both passes take beside arguments and results, compiled ahead of time."""
    n, k, m = 128, 64, 8
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]

    def array(*shape: int, dtype: str = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(device))

    tokens = array(n, k, m, d // m)
    images = MixtureBlock(tokens, tokens, array(n, m * k, m * k) if gram else None)
    block = images, TextBlock(array(texts, m, d // m), array(texts, d, dtype="float32")), None if gram else array(d, d)
    scorer = KernelScorer(TEMPERATURE)

    def both(images: MixtureBlock, texts: TextBlock, shared: Any, cotangent: Array) -> tuple[Array, tuple]:
        cosines, kept = scorer.forward(images, texts, shared)
        return cosines, scorer.backward(kept, images, texts, shared, cotangent * cosines)

    compiled = jax.jit(both).lower(*block, array(n, texts, dtype="float32")).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed")
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_compiles_for_tpu(chip: str) -> None:
    """128 more texts, 16,384 more pairs, take less than 128 bytes a pair: of d numbers a pair nothing is in HBM."""
    calls = [(TOPOLOGIES[chip], *shape[1:], texts) for shape in TPU_SHAPES for texts in (128, 256)]
    program = f"import json, {__name__} as m; print('RESULT' + json.dumps([m.temporaries_on_tpu(*c) for c in {calls}]))"
    done = run(["-c", program], keep_compilations=False, environment=COMPILER_ONLY)
    assert done.returncode == 0, done.stderr
    temporaries = json.loads(done.stdout.rpartition("RESULT")[2])
    for shape, fewer, more in zip(TPU_SHAPES, temporaries[::2], temporaries[1::2], strict=True):
        assert more - fewer < 128 * 128 * 128, shape
