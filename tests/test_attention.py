"""Attention by kernels (interpreted here) and by XLA against float64 NumPy, and whether a TPU's compiler takes them."""

import importlib.util
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_helpers import run

from llip_jax.ops.attention import attention, by_kernel

SHAPES = [(2, 17, 3, 24), (1, 40, 4, 16), (3, 8, 1, 104)]


def reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, d_out: np.ndarray, bias: np.ndarray | None, causal: bool
) -> tuple[np.ndarray, ...]:
    """Output and gradients of q, k and v, one head at a time."""
    out, d_q, d_k, d_v = (np.zeros(q.shape) for _ in range(4))
    scale = 1 / math.sqrt(q.shape[-1])
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            logits = q[b, :, h] @ k[b, :, h].T * scale
            if bias is not None:
                logits += bias[0, 0]
            if causal:
                logits[np.triu_indices(len(logits), 1)] = -np.inf
            weights = np.exp(logits - logits.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            out[b, :, h] = weights @ v[b, :, h]
            d_v[b, :, h] = weights.T @ d_out[b, :, h]
            d_weights = d_out[b, :, h] @ v[b, :, h].T
            d_logits = weights * (d_weights - (weights * d_weights).sum(1, keepdims=True))
            d_q[b, :, h] = d_logits @ k[b, :, h] * scale
            d_k[b, :, h] = d_logits.T @ q[b, :, h] * scale
    return out, d_q, d_k, d_v


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("form", ["kernel", "xla"])
def test_output_and_gradients_are_those_of_the_formula(
    shape: tuple[int, ...], causal: bool, biased: bool, form: str
) -> None:
    rng = np.random.default_rng()
    arrays = [rng.normal(size=shape) for _ in range(4)]
    bias = rng.normal(size=(1, 1, 1, shape[1])) if biased else None
    q, k, v, d_out = (jnp.asarray(x, jnp.float32) for x in arrays)
    given: Any = None if bias is None else jnp.asarray(bias, jnp.float32)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if form == "kernel":
            return by_kernel(q, k, v, bias=given, causal=causal, interpret=True)
        return attention(q, k, v, given, causal=causal)

    out, pull = jax.vjp(attend, q, k, v)
    for ours, theirs in zip((out, *pull(d_out)), reference(*arrays, bias, causal), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6 * np.abs(theirs).max())


def test_bfloat16_rounds_inputs_and_weights_and_nothing_else() -> None:
    rng = np.random.default_rng()
    q, k, v, d_out = (jnp.asarray(rng.normal(size=(2, 33, 2, 64)), jnp.bfloat16) for _ in range(4))
    expected = reference(*(np.asarray(x, np.float64) for x in (q, k, v, d_out)), None, False)
    out, pull = jax.vjp(lambda *x: by_kernel(*x, bias=None, causal=False, interpret=True), q, k, v)
    for ours, theirs in zip((out, *pull(d_out)), expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, rtol=0, atol=2**-7 * np.abs(theirs).max())


@pytest.mark.parametrize(("length", "kernel"), [(1024, True), (1025, False)])
def test_sequences_too_long_for_the_chips_memory_are_left_to_xla(
    length: int, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    monkeypatch.setattr("llip_jax.ops.attention.platform", lambda: "tpu")
    monkeypatch.setattr("llip_jax.ops.attention.by_kernel", lambda q, k, v, **_: ran.append(q.shape[1]) or v)
    q = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    jax.eval_shape(lambda q: attention(q, q, q, implementation="kernel"), q)
    assert ran == [length] * kernel


def test_kernels_are_for_tpus_and_elsewhere_it_is_xla() -> None:
    q = jnp.ones((1, 4, 1, 8))
    text = jax.jit(lambda q: attention(q, q, q, implementation="kernel")).lower(q).as_text()
    assert "custom_call" not in text


COMPILE = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from llip_jax.ops.attention import attention
devices = topologies.get_topology_desc(platform="tpu", topology_name="{topology}").devices
mesh = jax.make_mesh((len(devices), 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)
rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
q = jax.ShapeDtypeStruct((4 * len(devices), {length}, {heads}, {width}), jnp.bfloat16, sharding=rows)
def loss(q, k, v):
    return attention(q, k, v, causal={causal}, implementation="kernel").astype(jnp.float32).sum()
with jax.set_mesh(mesh):
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, q, q).compile()
text = compiled.as_text()
assert text.count("tpu_custom_call") >= 1 and "all-gather" not in text, text[:2000]
print("COMPILED")
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU compiler")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "v5p:2x2x1"])
@pytest.mark.parametrize(
    ("length", "heads", "width", "causal"), [(320, 16, 104, False), (260, 12, 64, False), (77, 20, 64, True)]
)
def test_the_tpu_compiler_takes_it(topology: str, length: int, heads: int, width: int, causal: bool) -> None:
    code = COMPILE.format(topology=topology, length=length, heads=heads, width=width, causal=causal)
    done = run(["-c", code], environment={"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"})
    assert "COMPILED" in done.stdout, done.stderr[-3000:]
