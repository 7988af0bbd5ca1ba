"""Estimated times, against arithmetic by hand."""

import dataclasses
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from llip_jax.ops import attention
from llip_jax.parallel.chips import CHIPS, Chip
from llip_jax.planning.hlo import Collective, Cost, Loop, ProgramCosts
from llip_jax.planning.matmuls import Kernel, Matmul
from llip_jax.planning.roofline import (
    HBM_EFFICIENCY,
    HOP_SECONDS,
    KERNEL_SECONDS,
    LINK_EFFICIENCY,
    MATMUL_EFFICIENCY,
    PARTS,
    VECTOR_OPERATIONS,
    Estimate,
    step_estimate,
)

V5E = CHIPS["v5e"]
PEAK, MEMORY = V5E.peak_bf16 * MATMUL_EFFICIENCY, V5E.hbm_rate * HBM_EFFICIENCY
LINK = V5E.link_rate * LINK_EFFICIENCY


def cost(**fields: Any) -> Cost:
    return Cost("x", fields.pop("opcode", "fusion"), "", **fields)


def estimate(
    *body: Cost | Loop, chip: Chip = V5E, sides: tuple[int, ...] = (16, 16), partitions: int = 256, model: float = 1e12
) -> Estimate:
    return step_estimate(ProgramCosts(body, partitions), chip, sides, model)


BUSY = cost(matmuls=(Matmul(1, 40_960, 1_664, 8_192),))
STREAM = cost(hbm_bytes=10**9)


def test_an_instruction_takes_as_long_as_the_busier_of_products_and_memory() -> None:
    assert estimate(BUSY).parts["matrix products"] == pytest.approx(BUSY.flops / PEAK)
    assert estimate(STREAM).parts["main memory"] == pytest.approx(1e9 / MEMORY)
    both = dataclasses.replace(BUSY, hbm_bytes=1000)
    assert estimate(both).seconds == estimate(BUSY).seconds
    assert estimate(BUSY, STREAM).seconds == pytest.approx(BUSY.flops / PEAK + 1e9 / MEMORY)
    assert estimate(cost()).seconds == KERNEL_SECONDS


def test_loops_multiply() -> None:
    loop = Loop("outer", 3, (BUSY, Loop("inner", 5, (STREAM,))))
    assert estimate(loop).seconds == pytest.approx(3 * (BUSY.flops / PEAK + 5 * 1e9 / MEMORY))


@pytest.mark.parametrize(
    ("matmul", "tile", "padded"),
    [
        (Matmul(1, 256, 256, 256), 128, (256, 256, 256)),
        (Matmul(7, 320, 320, 104), 128, (320, 384, 128)),  # one side stays in whole tiles, the other streams by 8
        (Matmul(7, 320, 320, 104), 256, (320, 512, 256)),
        (Matmul(1, 3, 1_000, 588), 128, (8, 1_024, 640)),
        (Matmul(1, 1_000, 3, 588), 128, (8, 1_024, 640)),
    ],
)
def test_products_are_padded_to_the_tiles_of_the_systolic_array(
    matmul: Matmul, tile: int, padded: tuple[int, int, int]
) -> None:
    assert matmul.padded_flops(tile) == 2 * matmul.batch * math.prod(padded)


ATTENTION = Kernel(flops=4 * 16 * 320 * 320 * 104, transcendentals=16 * 320 * 320, rows=320, columns=104)


@pytest.mark.parametrize(("name", "tile"), [("v5e", 128), ("v6e", 256)])
def test_kernels_are_padded_as_their_products_are_and_add_their_vectors(name: str, tile: int) -> None:
    chip = CHIPS[name]
    # A product of queries and keys holds keys, one of weights and values the values: both are padded to whole tiles.
    tokens, head = math.ceil(320 / tile) * tile, math.ceil(104 / tile) * tile
    products = 16 * 2 * (2 * 320 * tokens * head)
    assert chip.vector_rate is not None
    vectors = 16 * 320 * 384 * VECTOR_OPERATIONS / chip.vector_rate
    found = estimate(cost(opcode="custom-call", kernels=(ATTENTION,)), chip=chip)
    assert found.parts["vectors of kernels"] == pytest.approx(vectors)
    assert found.parts["matrix products"] == pytest.approx(products / (chip.peak_bf16 * MATMUL_EFFICIENCY))
    assert found.seconds == pytest.approx(math.fsum(found.parts.values()))
    moving = estimate(cost(opcode="custom-call", kernels=(ATTENTION,), hbm_bytes=10**10), chip=chip)
    assert moving.seconds == moving.parts["main memory"]


def on_weights(jaxpr: Any, tokens: int) -> int:
    """Elementwise operations and sums on matrices of tokens x tokens."""
    found = 0
    for equation in jaxpr.eqns:
        inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
        inner = [value for value in inner if hasattr(value, "eqns")]
        shapes = [getattr(v.aval, "shape", None) for v in (*equation.invars, *equation.outvars)]
        moves = equation.primitive.name in ("dot_general", "broadcast_in_dim", "get", "swap")
        found += ((tokens, tokens) in shapes and not moves and not inner) + sum(on_weights(j, tokens) for j in inner)
    return found


def test_vector_operations_are_those_of_the_attention_kernels_and_some_for_the_slow_ones() -> None:
    def attend(q: Any, k: Any, v: Any) -> Any:
        return attention.by_kernel(q, k, v, bias=None, causal=False, interpret=True)

    x = jnp.zeros((1, 80, 1, 8), jnp.bfloat16)
    both = jax.make_jaxpr(lambda q, k, v: jax.vjp(attend, q, k, v)[1](q))(x, x, x)
    assert 0.75 * VECTOR_OPERATIONS < on_weights(both.jaxpr, 80) / 2 <= VECTOR_OPERATIONS


def gather(size: int, group: int, kind: str = "all-gather", **fields: Any) -> Cost:
    return cost(opcode=kind, collective=Collective(kind, size, group), **fields)


@pytest.mark.parametrize(
    ("group", "sides", "links", "hops"),
    [
        (256, (16, 16), 4, 16),  # two rings
        (128, (16, 16), 3, 8 + 7),  # a ring and half of one: a line
        (16, (16, 16), 2, 8),
        (8, (16, 16), 1, 7),
        (64, (8, 8), 2, 14),  # sides of 8 are no rings on v5e
        (4, (2, 2), 2, 2),
    ],
)
def test_a_synchronous_exchange_goes_over_the_rings_and_lines_of_its_group(
    group: int, sides: tuple[int, ...], links: int, hops: int
) -> None:
    expected = 1e9 / (links * LINK) + hops * HOP_SECONDS
    found = estimate(gather(10**9, group), sides=sides, partitions=math.prod(sides))
    assert found.seconds == found.parts["collectives"] == pytest.approx(expected)
    reduced = estimate(gather(10**9, group, "all-reduce"), sides=sides, partitions=math.prod(sides))
    assert reduced.seconds == pytest.approx(expected + hops * HOP_SECONDS)


def test_sides_of_four_are_rings_of_v5p_and_a_step_of_a_permutation_is_one_link() -> None:
    v5p = CHIPS["v5p"]
    rate = v5p.link_rate * LINK_EFFICIENCY
    found = estimate(gather(10**9, 256), chip=v5p, sides=(8, 8, 4))
    assert found.seconds == pytest.approx(1e9 / (6 * rate) + (4 + 4 + 2) * HOP_SECONDS)
    permuted = estimate(gather(10**9, 256, "collective-permute"), chip=v5p, sides=(8, 8, 4))
    assert permuted.seconds == pytest.approx(1e9 / rate + HOP_SECONDS)


def test_an_asynchronous_exchange_hides_behind_what_runs_meanwhile() -> None:
    size = 10**9
    wire = size / (4 * LINK) + 16 * HOP_SECONDS
    start = gather(size, 256, starts="g")
    end = cost(opcode="fusion", ends="g")
    busy = BUSY.flops / PEAK
    assert wire < busy < 3 * wire
    assert estimate(start, BUSY, end).seconds == pytest.approx(busy)
    assert estimate(start, end, BUSY).seconds == pytest.approx(wire + busy)
    # Three of them share the links; nothing waits for the last but the end of the program.
    others = [gather(size, 256, starts=key) for key in "hi"]
    assert estimate(start, *others, BUSY, end).seconds == pytest.approx(3 * wire)
    # Beside a synchronous exchange nothing else is sent.
    assert estimate(start, gather(size, 256), end).parts["collectives"] == pytest.approx(2 * wire)


def test_copies_ahead_take_the_time_that_memory_is_free_and_those_to_the_host_their_own() -> None:
    ahead, wait = cost(opcode="copy-start", hbm_bytes=10**9, starts="c"), cost(opcode="copy-done", ends="c")
    copy = 1e9 / MEMORY
    assert estimate(ahead, BUSY, wait).seconds == pytest.approx(BUSY.flops / PEAK)
    assert estimate(ahead, STREAM, wait).seconds == pytest.approx(2 * copy)
    out = cost(opcode="copy-start", hbm_bytes=10**9, host_bytes=10**9, starts="h")
    host = estimate(out, STREAM)
    assert host.parts["transfers"] == pytest.approx(1e9 / V5E.host_rate - copy)


def test_utilization_and_recomputation_are_those_of_all_chips() -> None:
    model = 200 * BUSY.flops
    found = estimate(BUSY, model=model)
    assert found.mfu == pytest.approx(model / (found.seconds * 256 * V5E.peak_bf16))
    assert found.recompute == pytest.approx(256 / 200)
    assert found.mfu * found.recompute == pytest.approx(MATMUL_EFFICIENCY)


def test_two_devices_of_a_chip_share_it() -> None:
    chip = CHIPS["tpu7x"]
    found = estimate(BUSY, chip=chip, sides=(2, 2, 1), partitions=8, model=8 * BUSY.flops)
    padded = BUSY.matmuls[0].padded_flops(256)
    assert found.seconds == pytest.approx(padded / (chip.peak_bf16 / 2 * MATMUL_EFFICIENCY))
    assert found.mfu == pytest.approx(MATMUL_EFFICIENCY * BUSY.flops / padded)


def test_the_compilers_cycles_give_a_second_estimate() -> None:
    assert estimate(BUSY).compiler_seconds is None
    found = estimate(dataclasses.replace(BUSY, cycles=15_000_000), STREAM, gather(10**9, 256))
    wire = 1e9 / (4 * LINK) + 16 * HOP_SECONDS
    assert found.compiler_seconds == pytest.approx(0.01 + 1e9 / MEMORY + wire)
    assert found.compiler_mfu == pytest.approx(1e12 / (256 * V5E.peak_bf16 * found.compiler_seconds))


def test_the_answer_is_json_and_says_what_it_assumes() -> None:
    found = estimate(BUSY, STREAM, gather(10**9, 256))
    assert json.loads(json.dumps(dataclasses.asdict(found)))["seconds"] == found.seconds
    assert tuple(found.parts) == PARTS
    assert math.fsum(found.parts.values()) == pytest.approx(found.seconds)
    said = " ".join(found.assumptions)
    for constant in (MATMUL_EFFICIENCY, HBM_EFFICIENCY, LINK_EFFICIENCY):
        assert f"{constant:.0%}" in said
    assert all(len(line) < 100 for line in found.assumptions)
