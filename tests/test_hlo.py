"""What compiled programs cost, against counts by hand and against XLA's arithmetic."""

import importlib.util
import json
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from run_helpers import call_on_devices, run, tiny_config

from llip_jax.parallel.mesh import make_mesh
from llip_jax.planning.hlo import Collective, CollectiveTotal, Cost, ProgramCosts, program_costs
from llip_jax.planning.hlo_text import parse
from llip_jax.planning.matmuls import Kernel, Matmul
from llip_jax.training.flops import train_step_flops
from llip_jax.training.optimizer import make_optimizer
from llip_jax.training.state import state_spec
from llip_jax.training.step import make_train_step, step_inputs

RNG = random.Random()


def shaped(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def costs_of(function: Callable[..., Any], *args: jax.ShapeDtypeStruct) -> ProgramCosts:
    return program_costs(jax.jit(function).lower(*args).compile().as_text())


def program(instructions: str, others: str = "", partitions: int = 1) -> str:
    """Text of a program with these instructions in its entry computation."""
    lines = "\n".join(f"  {line.strip()}" for line in instructions.strip().splitlines())
    head = f"HloModule jit_f, is_scheduled=true, num_partitions={partitions}"
    return f"{head}\n\n{others}\n\nENTRY %main (p: f32[1]) -> f32[1] {{\n{lines}\n}}\n"


def only(text: str, name: str) -> Cost:
    """Cost of one instruction of a program."""
    return next(cost for _, cost in program_costs(text).executed() if cost.name == name)


# FLOPs


def test_products_in_nested_loops_count_as_often_as_the_loops_turn() -> None:
    outer, inner, rows, width = (RNG.randint(2, 9) for _ in range(4))
    start = RNG.randint(0, 3)

    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jax.lax.fori_loop(start, start + inner, lambda _, x: jnp.tanh(x @ w), x), None

    costs = costs_of(lambda x, w: jax.lax.scan(layer, x, w)[0] @ w[0], shaped(rows, width), shaped(outer, width, width))
    assert costs.flops == (outer * inner + 1) * 2 * rows * width * width
    assert costs.unknown == ()


def test_attention_and_its_gradient_in_a_scan_of_layers_with_and_without_recomputation() -> None:
    layers, batch, heads, tokens, width = 3, 2, 4, 16, 32
    head = width // heads

    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        q, k, v = (jnp.einsum("bsd,dhe->bshe", x, part) for part in w.reshape(3, width, heads, head))
        mixed = jnp.einsum("bhqk,bkhe->bqhe", jax.nn.softmax(jnp.einsum("bqhe,bkhe->bhqk", q, k)), v)
        return x + mixed.reshape(x.shape), None

    def loss(w: jax.Array, x: jax.Array, keep: bool) -> jax.Array:
        return jax.lax.scan(layer if keep else jax.checkpoint(layer), x, w)[0].sum()

    forward = layers * (3 * 2 * batch * tokens * width**2 + 2 * 2 * batch * tokens**2 * width)
    last = layers * 2 * batch * tokens**2 * width  # nothing in the gradient needs the recomputed mixture
    args = shaped(layers, 3 * width * width), shaped(batch, tokens, width)
    assert costs_of(lambda w, x: loss(w, x, True), *args).flops == forward
    assert costs_of(jax.grad(lambda w, x: loss(w, x, True)), *args).flops == 3 * forward
    assert costs_of(jax.grad(lambda w, x: loss(w, x, False)), *args).flops == 4 * forward - last


@pytest.mark.parametrize("seed", range(6))
def test_a_convolution_counts_what_meets_an_element_of_the_image(seed: int) -> None:
    rng = random.Random(seed)
    groups, batch, features, out = rng.choice([1, 2]), rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 3)
    height, width, kernel_h, kernel_w = rng.randint(3, 9), rng.randint(3, 9), rng.randint(1, 4), rng.randint(1, 4)
    strides, dilations = (rng.randint(1, 3), rng.randint(1, 3)), (rng.randint(1, 3), rng.randint(1, 3))
    padding = [(rng.randint(2, 4), rng.randint(2, 4)), (rng.randint(2, 4), rng.randint(2, 4))]

    def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, w, strides, padding, lhs_dilation=dilations, feature_group_count=groups)

    x, w = (batch, features * groups, height, width), (out * groups, features, kernel_h, kernel_w)
    multiplications = float(convolve(jnp.ones(x), jnp.ones(w)).sum())  # each adds one
    assert costs_of(convolve, shaped(*x), shaped(*w)).flops == 2 * multiplications


@pytest.mark.parametrize(
    ("left", "right", "out", "window", "labels", "expected"),
    [
        # Taken from a Llip G/14 compiled for v5e:16x16.
        ("bf16[128,320,1664]", "bf16[1664,8192,1]", "bf16[128,320,8192]", "size=1", "b0f_io0->b0f",
         Matmul(1, 128 * 320, 8192, 1664)),
        ("bf16[128,320,16,104]", "bf16[128,320,16,104]", "f32[128,16,320,320]",
         "size=128x16 stride=127x15 lhs_dilate=128x16", "0b1f_0o1i->01bf", Matmul(128 * 16, 320, 320, 104)),
        ("bf16[128,64,1664,1]", "bf16[1664,8,160,1]", "bf16[128,64,8,160]",
         "size=1x8 pad=0_0x7_7 rhs_reversal=0x1", "b0f1_i1o0->b01f", Matmul(1, 128 * 64, 8 * 160, 1664)),
        ("bf16[128,320,1664]", "bf16[128,320,8192]", "bf16[1664,8192,1]", "size=320", "f0b_i0o->bf0",
         Matmul(1, 1664, 8192, 128 * 320)),
        ("bf16[128,320,1664,1,1]", "bf16[3,16,104,128,320]", "bf16[1664,3,16,104,1]",
         "size=3x16x320 pad=2_2x15_15x0_0 rhs_reversal=1x1x0", "f2b01_01oi2->b01f2",
         Matmul(1, 1664, 3 * 16 * 104, 128 * 320)),
        ("bf16[3,64,8,160]", "bf16[8,3,64,1280]", "bf16[8,160,1280,1]", "size=8x3 stride=7x1 lhs_dilate=8x1",
         "1f0b_01io->0bf1", Matmul(8, 160, 1280, 3 * 64)),
        ("bf16[16,512,8,64]", "bf16[16,128,512,1]", "f32[16,8,64,128]", "size=1x16 stride=1x15 lhs_dilate=1x16",
         "1f0b_1oi0->10bf", Matmul(16, 8 * 64, 128, 512)),
    ],
)  # fmt: skip
def test_the_tpus_convolutions_are_products_of_matrices(
    left: str, right: str, out: str, window: str, labels: str, expected: Matmul
) -> None:
    text = program(
        f"""%a = {left} parameter(0)
        %b = {right} parameter(1)
        ROOT %c = {out} convolution(%a, %b), window={{{window}}}, dim_labels={labels}"""
    )
    assert only(text, "c").matmuls == (expected,)


def test_a_train_step_executes_the_models_flops_and_recomputes_little_less_than_a_forward_pass() -> None:
    def flops(remat: str) -> tuple[float, float]:
        config = tiny_config(model={"remat": remat, "scan_layers": True, "vision.layers": 4, "text.layers": 3})
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        spec = state_spec(config, optimizer, mesh)
        with jax.set_mesh(mesh):
            step = jax.jit(make_train_step(config, spec, optimizer)).lower(spec.abstract, step_inputs(config, mesh))
            text = step.compile({"xla_backend_optimization_level": 0}).as_text()
        return program_costs(text).flops, train_step_flops(config)

    executed, model = flops("none")
    assert executed == pytest.approx(model, rel=0.005)
    executed, model = flops("layer")
    # Of a layer's forward pass the last product, 4 of 12 parts of its weights, need not be done again.
    assert executed / model == pytest.approx(1 + (1 - 4 / 12) / 3, abs=0.05)


# What cannot be known


def test_a_loop_of_unknown_length_counts_once_and_is_said() -> None:
    costs = costs_of(lambda x: jax.lax.while_loop(lambda x: x.sum() < 1e3, lambda x: x @ x, x), shaped(8, 8))
    assert costs.flops == 2 * 8**3
    assert len(costs.unknown) == 1 and "turns of the loop" in costs.unknown[0]


def test_of_a_conditional_the_dearest_branch_counts() -> None:
    costs = costs_of(
        lambda which, x: jax.lax.switch(which, [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x], x),
        shaped(dtype=jnp.int32), shaped(8, 8),
    )  # fmt: skip
    assert costs.flops == 2 * 2 * 8**3


def test_a_kernel_counts_what_it_states_and_is_said_to_be_unknown_where_it_states_nothing() -> None:
    estimate = '"cost_estimate":{"flops":"77","transcendentals":"5","bytes_accessed":"{bytes}"}'
    call = '%k = f32[3,16,104]{2,1,0:T(8,128)} custom-call(%a), custom_call_target="tpu_custom_call"'
    call += ', metadata={op_name="f/flash"}'
    a = "%a = f32[3,16,104]{2,1,0:T(8,128)} parameter(0)\n"
    padded = 2 * 4 * 3 * 16 * 128
    for size in (88, padded, 2 * padded):
        stated = f'backend_config={{"custom_call_config":{{"body":"x",{estimate.replace("{bytes}", str(size))}}}}}'
        known = program_costs(program(f"{a}{call}, {stated}"))
        assert (known.flops, known.hbm_bytes, known.unknown) == (77, max(size, padded), ())
        assert only(program(f"{a}{call}, {stated}"), "k").kernels == (Kernel(77, 5, 16, 104),)
    unknown = program_costs(program(a + call))
    assert (unknown.flops, unknown.hbm_bytes) == (0, padded)
    assert unknown.unknown == ("tpu_custom_call (f/flash)",)


def test_other_text_is_refused() -> None:
    with pytest.raises(ValueError, match="no entry computation"):
        program_costs("module @jit_f {}")


# Bytes


def test_arrays_in_memory_are_padded_to_their_tiles_and_those_on_the_chip_are_no_traffic() -> None:
    text = program(
        """%a = bf16[1,13,8190]{2,0,1:T(2,128)(2,1)} parameter(0)
        %b = f32[7]{0:T(1024)S(1)} parameter(1)
        %c = f32[7]{0:T(1024)} copy(%b)
        %d = s4[3,5]{1,0:T(8,128)S(1)} convert(%a)
        ROOT %e = pred[3,5]{1,0} copy(%d)"""
    )
    assert only(text, "c").hbm_bytes == 4 * 1024
    assert only(text, "d").hbm_bytes == 2 * 2 * 13 * 8192
    assert only(text, "e").hbm_bytes == 15


def test_a_scan_reads_and_writes_one_layer_at_a_time() -> None:
    layers, width = 50, 64

    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sin(x) + w, x

    costs = costs_of(lambda x, w: jax.lax.scan(layer, x, w), shaped(width, width), shaped(layers, width, width))
    one = 4 * width**2
    assert 4 * layers * one <= costs.hbm_bytes < 12 * layers * one  # with the whole stack each time, 200 times as much


def test_updates_in_place_and_slices_move_only_themselves() -> None:
    inner = """%update (p0: bf16[48,128,256], p1: bf16[1,128,256], p2: s32[]) -> bf16[48,128,256] {
  %p0 = bf16[48,128,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[1,128,256]{2,1,0:T(8,128)(2,1)} parameter(1)
  %p2 = s32[]{:T(128)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %u = bf16[48,128,256]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%p0, %p1, %p2, %zero, %zero)
}

%slice (q0: bf16[48,128,256], q1: s32[]) -> bf16[128,256] {
  %q0 = bf16[48,128,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %q1 = s32[]{:T(128)} parameter(1)
  %zero.1 = s32[]{:T(128)} constant(0)
  %v = bf16[48,128,256]{2,1,0:T(8,128)(2,1)} bitcast(%q0)
  %s = bf16[1,128,256]{2,1,0:T(8,128)(2,1)} dynamic-slice(%v, %q1, %zero.1, %zero.1), dynamic_slice_sizes={1,128,256}
  ROOT %b = bf16[128,256]{1,0:T(8,128)(2,1)} bitcast(%s)
}"""
    text = program(
        """%stack = bf16[48,128,256]{2,1,0:T(8,128)(2,1)} parameter(0)
        %new = bf16[1,128,256]{2,1,0:T(8,128)(2,1)} parameter(1)
        %i = s32[]{:T(128)S(6)} parameter(2)
        %put = bf16[48,128,256]{2,1,0:T(8,128)(2,1)} fusion(%stack, %new, %i), kind=kLoop, calls=%update
        ROOT %take = bf16[128,256]{1,0:T(8,128)(2,1)} fusion(%put, %i), kind=kLoop, calls=%slice""",
        inner,
    )
    assert only(text, "put").hbm_bytes == only(text, "take").hbm_bytes == 2 * 2 * 128 * 256


def test_copies_between_memories_count_on_the_side_of_main_memory_and_those_to_the_host_apart() -> None:
    text = program(
        """%a = f32[1024]{0:T(1024)} parameter(0)
        %in = (f32[1024]{0:T(1024)S(1)}, f32[1024]{0:T(1024)}, u32[]{:S(2)}) copy-start(%a)
        %in.done = f32[1024]{0:T(1024)S(1)} copy-done(%in)
        %part = ((f32[1024]{0:T(1024)}), f32[512]{0:T(512)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:512]}
        %part.done = f32[512]{0:T(512)S(1)} slice-done(%part)
        %out = (f32[1024]{0:T(1024)S(5)}, f32[1024]{0:T(1024)}, u32[]{:S(2)}) copy-start(%a)
        ROOT %out.done = f32[1024]{0:T(1024)S(5)} copy-done(%out)"""
    )
    assert (only(text, "in").hbm_bytes, only(text, "in").host_bytes) == (4096, 0)
    assert (only(text, "part").hbm_bytes, only(text, "part").host_bytes) == (2048, 0)
    assert (only(text, "out").hbm_bytes, only(text, "out").host_bytes) == (4096, 4096)
    assert only(text, "out").starts == only(text, "out.done").ends == "out"
    assert only(text, "out.done").hbm_bytes == 0


# Exchanges


def test_a_layer_that_goes_to_the_host_or_comes_back_counts_alone() -> None:
    text = program(
        """
        %kept = bf16[48,16,256]{2,1,0:T(8,128)(2,1)S(5)} parameter(0)
        %x = bf16[1,16,256]{2,1,0:T(8,128)(2,1)} parameter(1)
        %i = s32[] parameter(2)
        %out = ((bf16[48,16,256]{2,1,0:T(8,128)(2,1)S(5)}, bf16[1,16,256]{2,1,0:T(8,128)(2,1)}, s32[], s32[], s32[]), bf16[48,16,256]{2,1,0:T(8,128)(2,1)S(5)}, u32[]) dynamic-update-slice-start(%kept, %x, %i, %i, %i)
        %done = bf16[48,16,256]{2,1,0:T(8,128)(2,1)S(5)} dynamic-update-slice-done(%out)
        %back = ((bf16[48,16,256]{2,1,0:T(8,128)(2,1)S(5)}, s32[], s32[], s32[]), bf16[1,16,256]{2,1,0:T(8,128)(2,1)}, u32[]) dynamic-slice-start(%done, %i, %i, %i), dynamic_slice_sizes={1,16,256}
        ROOT %layer = bf16[1,16,256]{2,1,0:T(8,128)(2,1)} dynamic-slice-done(%back)
        """  # noqa: E501
    )
    layer = 16 * 256 * 2
    for name in ("out", "back"):
        cost = only(text, name)
        assert (cost.host_bytes, cost.hbm_bytes) == (layer, layer)
    assert program_costs(text).host_bytes == 2 * layer


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,2,2]T(1,0,2)", 2),
        ("mesh['a'=2,'b'=4] {'b'}", 4),
        ("mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("mesh['a'=8] {'a':(2)2}", 2),
        ("{}", 8),
    ],
)
def test_groups_of_devices_in_every_notation(groups: str, size: int) -> None:
    text = program(
        f"""%a = f32[100]{{0}} parameter(0)
        ROOT %r = f32[100]{{0}} all-reduce(%a), channel_id=1, replica_groups={groups}, use_global_device_ids=true""",
        partitions=8,
    )
    assert only(text, "r").collective == Collective("all-reduce", 400 * 2 * (size - 1) // size, size)


def sharded_products() -> list[list[Any]]:
    """Exchanges of products over 8 devices, of which each kind is known."""
    mesh = jax.make_mesh((8,), ("x",))
    rows, columns, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("x",), (None, "x"), ()))
    a, b = shaped(64, 128), shaped(128, 256)
    found = []
    for left, right, out in [(whole, rows, whole), (columns, rows, whole), (rows, whole, rows)]:
        step = jax.jit(jnp.dot, in_shardings=(left, right), out_shardings=out)
        costs = program_costs(step.lower(a, b).compile().as_text())
        found.append([costs.flops, [[c.kind, c.group, c.count, c.bytes] for c in costs.collectives()]])
    return found


def test_exchanges_of_a_sharded_product() -> None:
    gathered, reduced, local = call_on_devices(sharded_products, 8)
    flops = 2 * 64 * 128 * 256 // 8
    assert reduced == [flops, [["all-reduce", 8, 1, 2 * 4 * 64 * 256 * 7 // 8]]]
    assert local == [flops, []]
    # Partial products of what each device has are cheaper to add up than parts to gather.
    assert gathered in (
        [flops, [["all-reduce", 8, 1, 2 * 4 * 64 * 256 * 7 // 8]]],
        [8 * flops, [["all-gather", 8, 1, 4 * 128 * 256 * 7 // 8]]],
    )


ASYNC = """%start (p: bf16[13,128]) -> (bf16[13,128], bf16[208,128]) {
  %p = bf16[13,128]{1,0} parameter(0)
  %g = bf16[208,128]{1,0} all-gather(%p), channel_id=47, replica_groups=[16,16]<=[256], dimensions={0}
  ROOT %c = (bf16[13,128]{1,0}, bf16[208,128]{1,0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%meanwhile (p.1: bf16[13,128], p.2: bf16[208,128], p.3: bf16[64,64]) -> (bf16[64,64], bf16[208,128]) {
  %p.1 = bf16[13,128]{1,0} parameter(0)
  %p.2 = bf16[208,128]{1,0} parameter(1)
  %p.3 = bf16[64,64]{1,0} parameter(2)
  %g.1 = bf16[208,128]{1,0} all-gather(%p.1), channel_id=47, replica_groups=[16,16]<=[256], dimensions={0}
  %d = bf16[64,64]{1,0} dot(%p.3, %p.3), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (bf16[64,64]{1,0}, bf16[208,128]{1,0}) tuple(%d, %p.2)
}

%done (p.4: bf16[13,128], p.5: bf16[208,128]) -> bf16[208,128] {
  %p.4 = bf16[13,128]{1,0} parameter(0)
  %p.5 = bf16[208,128]{1,0} parameter(1)
  %g.2 = bf16[208,128]{1,0} all-gather(%p.4), channel_id=47, replica_groups=[16,16]<=[256], dimensions={0}
  ROOT %c.1 = bf16[208,128]{1,0} custom-call(%p.4, %p.5, %g.2), custom_call_target="AsyncCollectiveDone"
}"""


def test_a_gather_that_runs_beside_fusions_counts_once_and_asynchronous() -> None:
    """As the TPU compiler writes it: the gather stands in each of the fusions that it runs beside."""
    text = program(
        """%a = bf16[13,128]{1,0} parameter(0)
        %b = bf16[64,64]{1,0} parameter(1)
        %s = (bf16[13,128]{1,0}, bf16[208,128]{1,0}) fusion(%a), kind=kCustom, calls=%start
        %s0 = bf16[13,128]{1,0} get-tuple-element(%s), index=0
        %s1 = bf16[208,128]{1,0} get-tuple-element(%s), index=1
        %m = (bf16[64,64]{1,0}, bf16[208,128]{1,0}) fusion(%s0, %s1, %b), kind=kOutput, calls=%meanwhile
        %m1 = bf16[208,128]{1,0} get-tuple-element(%m), index=1
        ROOT %e = bf16[208,128]{1,0} fusion(%s0, %m1), kind=kCustom, calls=%done""",
        ASYNC,
        partitions=256,
    )
    costs = program_costs(text)
    assert costs.collectives() == (CollectiveTotal("all-gather", 16, True, 1, 2 * 208 * 128 * 15 // 16),)
    assert only(text, "s").starts == only(text, "e").ends is not None
    assert costs.flops == 2 * 64**3
    assert only(text, "m").hbm_bytes == 2 * 2 * 64 * 64
    assert costs.unknown == ()


def test_a_reduction_of_which_each_device_keeps_a_part_is_a_reduce_scatter() -> None:
    text = program(
        """%a = f32[16,128]{1,0} parameter(0)
        ROOT %f = f32[2,128]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1""",
        """%all-reduce-scatter.1 (p.1: f32[16,128]) -> f32[2,128] {
  %p.1 = f32[16,128]{1,0} parameter(0)
  %r = f32[16,128]{1,0} all-reduce(%p.1), channel_id=3, replica_groups=[1,8]<=[8]
  %z = s32[] constant(0)
  ROOT %s = f32[2,128]{1,0} dynamic-slice(%r, %z, %z), dynamic_slice_sizes={2,128}
}""",
        partitions=8,
    )
    assert only(text, "f").collective == Collective("reduce-scatter", 4 * 16 * 128 * 7 // 8, 8)


# The TPU's compiler


def compile_layers(topology: str) -> str:
    """Gradient of a scan of two products over weights that all chips share out between them."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices), ("x",))
    rows, stacked = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec(None, "x"))

    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, PartitionSpec()))
        return x + jnp.tanh(x @ w) @ w.T, None

    step = jax.jit(
        jax.grad(lambda w, x: jax.lax.scan(layer, x, w)[0].astype(jnp.float32).sum()),
        in_shardings=(stacked, rows),
        out_shardings=stacked,
    )
    w, x = shaped(LAYERS, WIDTH, WIDTH, dtype=jnp.bfloat16), shaped(ROWS, WIDTH, dtype=jnp.bfloat16)
    return step.lower(w, x).compile().as_text()


LAYERS, WIDTH, ROWS = 6, 1024, 16_384


def layers_on_tpu() -> list[Any]:
    costs = program_costs(compile_layers("v5e:2x2"))
    exchanges = [[c.kind, c.group, c.count, c.bytes] for c in costs.collectives()]
    return [costs.flops, costs.partitions, costs.cycles, costs.hbm_bytes, exchanges, list(costs.unknown)]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed")
def test_a_program_of_the_tpu_compiler() -> None:
    program = f"import json, {__name__} as m; print('RESULT' + json.dumps(m.layers_on_tpu()))"
    # Compiling needs no TPU: nobody is asked for one, and other processes may have the compiler loaded.
    environment = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = run(["-c", program], keep_compilations=False, environment=environment)
    assert done.returncode == 0, done.stderr
    flops, partitions, cycles, hbm_bytes, exchanges, unknown = json.loads(done.stdout.rpartition("RESULT")[2])
    # Forward and backward: two products and four; the rows are divided over the chips.
    assert flops == LAYERS * 6 * 2 * ROWS * WIDTH**2 // 4
    assert (partitions, unknown) == (4, [])
    assert 0.5 < flops / 197e12 / (cycles / 1.5e9) < 1
    activations = 2 * ROWS * WIDTH // 4
    # Two activations of a layer are kept, written once and read once; others may stay on the chip. At the most each of
    # six products reads two arrays and writes one.
    assert LAYERS * 4 * activations < hbm_bytes < LAYERS * (4 + 6 * 3) * activations
    weights = 2 * LAYERS * WIDTH**2
    sent = {kind: sum(size for found, *_, size in exchanges if found == kind) for kind, *_ in exchanges}
    # Gathered forward and backward; the gradient is added up, of which each chip needs a part.
    assert 0.75 * weights <= sent["all-gather"] <= 2 * 0.75 * weights
    assert 0.75 * weights <= sent.get("reduce-scatter", 0) + sent.get("all-reduce", 0) <= 2 * 0.75 * weights


def test_the_text_of_a_program_is_read_whole() -> None:
    text = jax.jit(lambda x: jnp.sort(x).cumsum()).lower(shaped(100)).compile().as_text()
    read = sum(len(computation.instructions) for computation in parse(text).computations.values())
    assert read == sum(" = " in line and line.startswith("  ") for line in text.splitlines())
