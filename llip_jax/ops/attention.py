"""Attention over a few hundred tokens, on TPUs by Pallas kernels whose weights never leave the chip.

The XLA form writes the logits of all heads, S^2 numbers each, to memory and reads them several times: for G/14 (128
images of 320 tokens on a chip) a third of the traffic of a whole layer. All tokens of a head fit into VMEM here, so the
kernels take the softmax whole, unlike those for long sequences, and the backward one makes the weights again instead of
reading statistics of them.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from llip_jax.ops.plan import platform
from llip_jax.parallel.sharding import ACTIVATIONS, partition_spec

Implementation = Literal["xla", "kernel"]

_BLOCK_BYTES = 2**20
"""Of queries (as of keys, values, ...) that a kernel has in VMEM at a time, about: long enough transfers."""
_VMEM_LIMIT = 48 * 2**20
"""Three quarters of what a core of tpu7x has, the least of the chips in use."""
_LONGEST = 1024
"""Tokens of which all weights of a head, and what is made of them, fit into that."""
_NEVER = -1e30
"""Logit of what is not to be seen: finite, so that differences of logits are numbers."""


def attention(
    q: Float[Array, "B S H dh"],
    k: Float[Array, "B S H dh"],
    v: Float[Array, "B S H dh"],
    bias: Float[Array, "1 1 1 S"] | None = None,
    *,
    causal: bool = False,
    implementation: Implementation = "xla",
) -> Float[Array, "B S H dh"]:
    """softmax(q k / sqrt(dh) + bias) v, the softmax in float32. ``bias`` is a constant.

    'kernel' is for TPUs and up to 1,024 tokens; otherwise it is 'xla'.
    """
    if implementation == "xla" or platform() != "tpu" or q.shape[1] > _LONGEST:
        return jax.nn.dot_product_attention(q, k, v, bias=bias, is_causal=causal)
    mesh = jax.sharding.get_abstract_mesh()
    run = functools.partial(by_kernel, bias=bias, causal=causal)
    if mesh.empty or mesh.manual_axes:
        return run(q, k, v)
    spec = partition_spec(q.shape, ("batch", None, "heads", None), ACTIVATIONS, mesh.shape)
    return jax.shard_map(run, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)(q, k, v)


def by_kernel(
    q: Float[Array, "B S H dh"],
    k: Float[Array, "B S H dh"],
    v: Float[Array, "B S H dh"],
    *,
    bias: Float[Array, "1 1 1 S"] | None,
    causal: bool,
    interpret: bool = False,
) -> Float[Array, "B S H dh"]:
    """The same on one device. ``interpret`` runs the kernels on any, slowly."""
    length = q.shape[1]
    added = jnp.zeros((length, length), jnp.float32) if bias is None else jnp.broadcast_to(bias[0, 0], (length, length))
    if causal:
        added = jnp.where(jnp.tri(length, dtype=bool), added, _NEVER)
    # A kernel reads rows of tokens: of each head, one after the other.
    by_head = (x.swapaxes(1, 2) for x in (q, k, v))
    return _attend(*by_head, jax.lax.stop_gradient(added), interpret).swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: Array, k: Array, v: Array, added: Float[Array, "S S"], interpret: bool) -> Float[Array, "B H S dh"]:
    (out,) = _run(_forward_kernel, (q, k, v), added, 1, interpret)
    return out


def _attend_forward(q: Array, k: Array, v: Array, added: Array, interpret: bool) -> tuple[Array, Any]:
    return _attend(q, k, v, added, interpret), (q, k, v, added)


def _attend_backward(interpret: bool, kept: Any, d_out: Array) -> tuple[Array, Array, Array, None]:
    *qkv, added = kept
    return *_run(_backward_kernel, (*qkv, d_out), added, 3, interpret), None  # type: ignore[return-value]


_attend.defvjp(_attend_forward, _attend_backward)


def _run(
    kernel: Any, inputs: tuple[Float[Array, "B H S dh"], ...], added: Float[Array, "S S"], outputs: int, interpret: bool
) -> list[Float[Array, "B H S dh"]]:
    """A kernel over all sequences and heads, some heads at a time."""
    batch, heads, length, width = inputs[0].shape
    dtype = inputs[0].dtype
    most = max(1, _BLOCK_BYTES // (length * width * dtype.itemsize))
    together = max(n for n in range(1, heads + 1) if heads % n == 0 and n <= most)
    block = pl.BlockSpec((1, together, length, width), lambda b, h: (b, h, 0, 0))
    whole = pl.BlockSpec((length, length), lambda b, h: (0, 0))
    products = 2 if kernel is _forward_kernel else 5
    numbers = batch * heads * length
    return pl.pallas_call(
        functools.partial(kernel, scale=width**-0.5),
        grid=(batch, heads // together),
        in_specs=[*[block] * len(inputs), whole],
        out_specs=[block] * outputs,
        out_shape=[jax.ShapeDtypeStruct(inputs[0].shape, dtype)] * outputs,
        cost_estimate=pl.CostEstimate(
            flops=2 * products * numbers * length * width,
            transcendentals=numbers * length,
            bytes_accessed=(len(inputs) + outputs) * numbers * width * dtype.itemsize,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_VMEM_LIMIT
        ),
        interpret=interpret,
    )(*inputs, added)


def _forward_kernel(q: Any, k: Any, v: Any, added: Any, out: Any, *, scale: float) -> None:
    for head in range(q.shape[1]):
        exponentials, total = _softmax(q[0, head], k[0, head], added[...], scale)
        mixed = _matmul(exponentials.astype(v.dtype), v[0, head])
        out[0, head] = (mixed / total).astype(out.dtype)


def _backward_kernel(
    q: Any, k: Any, v: Any, d_out: Any, added: Any, d_q: Any, d_k: Any, d_v: Any, *, scale: float
) -> None:
    for head in range(q.shape[1]):
        exponentials, total = _softmax(q[0, head], k[0, head], added[...], scale)
        weights = exponentials / total
        d_v[0, head] = _matmul(weights.astype(v.dtype), d_out[0, head], "T.").astype(d_v.dtype)
        d_weights = _matmul(d_out[0, head], v[0, head], ".T")
        d_logits = weights * (d_weights - (weights * d_weights).sum(1, keepdims=True)) * scale
        d_logits = d_logits.astype(q.dtype)
        d_q[0, head] = _matmul(d_logits, k[0, head]).astype(d_q.dtype)
        d_k[0, head] = _matmul(d_logits, q[0, head], "T.").astype(d_k.dtype)


def _softmax(
    q: Float[Array, "S dh"], k: Float[Array, "S dh"], added: Float[Array, "S S"], scale: float
) -> tuple[Float[Array, "S S"], Float[Array, "S 1"]]:
    """Before it is normalised, and what to divide by."""
    logits = _matmul(q, k, ".T") * scale + added
    exponentials = jnp.exp(logits - logits.max(1, keepdims=True))
    return exponentials, exponentials.sum(1, keepdims=True)


def _matmul(a: Array, b: Array, form: Literal["..", "T.", ".T"] = "..") -> Array:
    """a b, a^T b or a b^T, accumulated in float32."""
    contracted = (0 if form == "T." else 1, 1 if form == ".T" else 0)
    return jax.lax.dot_general(
        a, b, (((contracted[0],), (contracted[1],)), ((), ())), preferred_element_type=jnp.float32
    )
