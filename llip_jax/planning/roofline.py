"""How long a compiled step takes: an estimate, with everything that it assumes.

An instruction takes as long as the busier of the matrix units and main memory, one instruction after the other.
Transfers that the schedule starts early run beside what follows as far as links or memory are free, and delay the
instruction that waits for them by the rest. Elementwise work is assumed to hide behind either, but not that of Pallas
kernels, which comes between their products. The compiler's own count of cycles, which knows what its instructions do
but counts none for kernels, gives the second estimate.
"""

import math
from collections import deque
from dataclasses import dataclass, field

from llip_jax.parallel.chips import Chip
from llip_jax.planning.hlo import Collective, Cost, Loop, ProgramCosts
from llip_jax.planning.matmuls import Kernel, Matmul

MATMUL_EFFICIENCY = 0.9
"""Of the peak, for matrix products of whole tiles. Whole steps of MaxText reach 66.9 % model FLOPs utilization at 32B
on a v5e-256 (MaxText/configs/v5e/README.md and 32b.sh) while they compute every forward pass twice: 89 % of the peak.
libtpu 0.0.52 counts 92 % (v5e), 94 % (v5p, v4), 85 % (tpu7x) and 78 % (v6e) for a product of bf16[16384,16384]."""

HBM_EFFICIENCY = 0.8
"""Of the rate of main memory, for streams. libtpu 0.0.52 counts 81 % (v5e, v6e), 77 % (v4) and 72 % (v5p) for a pass
over a float32 array of 1 GiB."""

LINK_EFFICIENCY = 0.9
"""Of a link's rate: "How to Scale Your Model" (jax-ml.github.io/scaling-book/tpus) uses 45 and 90 GB/s for links of 50
and 100."""

HOP_SECONDS = 1e-6
"""From chip to chip, by the same book; counts for small exchanges."""

KERNEL_SECONDS = 1e-6
"""The least that a fusion or copy takes: libtpu counts 1,800 cycles and more for the smallest, 1.2 us on v5e."""

VECTOR_OPERATIONS = 12
"""Elementwise operations with each number that a kernel exponentiates: the mean of the 7 and 14 that the attention
kernels (ops/attention.py) write forward and backward, and some for what a TPU has no single instruction for: the
exponential is a product and a power of two, a division more. Powers (one register in 2 cycles on v4, by
ayaka14732.github.io/pallas-tpu-tutorial/chapter01) are made beside them."""

VECTOR_LANES = 128
"""Of the vector unit of every TPU, to which rows of numbers are padded."""

PARTS = ("matrix products", "vectors of kernels", "main memory", "collectives", "transfers")
"""Of a step's time: bound by one of the three, exposed exchanges between devices, exposed copies in memory and to the
host."""


@dataclass(frozen=True)
class Estimate:
    """Time of one step.

    recompute: FLOPs executed over those that the model asks for.
    parts: seconds by PARTS, which add up to ``seconds``.
    compiler_seconds, compiler_mfu: by the compiler's count of cycles, where it makes one.
    """

    seconds: float
    mfu: float
    recompute: float
    parts: dict[str, float]
    compiler_seconds: float | None
    compiler_mfu: float | None
    assumptions: tuple[str, ...]


def step_estimate(costs: ProgramCosts, chip: Chip, sides: tuple[int, ...], model_flops: float) -> Estimate:
    """Estimated time of a compiled step.

    Args:
        costs: of one device (planning.hlo.program_costs).
        chip: of which the slice is made.
        sides: of the slice, in chips; the number of GPUs.
        model_flops: of one step over all devices (training.flops.train_step_flops).
    """
    machine = _Machine(chip, sides, costs.partitions)
    ideal = model_flops / (math.prod(sides) * chip.peak_bf16)
    parts = machine.run(costs.body, by_cycles=False).parts
    seconds = math.fsum(parts.values())
    compiled = (
        math.fsum(machine.run(costs.body, by_cycles=True).parts.values()) if costs.cycles and chip.clock else None
    )
    return Estimate(
        seconds=seconds,
        mfu=ideal / seconds,
        recompute=costs.flops * costs.partitions / model_flops,
        parts={name: parts.get(name, 0.0) for name in PARTS},
        compiler_seconds=compiled,
        compiler_mfu=None if compiled is None else ideal / compiled,
        assumptions=machine.assumptions(),
    )


@dataclass
class _Run:
    """What a sequence of instructions takes: seconds by part, and for how long each resource is busy."""

    parts: dict[str, float] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=dict)

    def add(self, other: "_Run", times: int = 1) -> None:
        for mine, its in ((self.parts, other.parts), (self.busy, other.busy)):
            for key, seconds in its.items():
                mine[key] = mine.get(key, 0.0) + times * seconds


class _Machine:
    """A slice of chips, and what one device of it takes for an instruction."""

    def __init__(self, chip: Chip, sides: tuple[int, ...], devices: int):
        self.chip, self.sides = chip, sides
        self.devices_per_chip = max(1, devices // math.prod(sides))

    def run(self, body: tuple[Cost | Loop, ...], *, by_cycles: bool) -> _Run:
        """Time of a schedule; asynchronous transfers that nothing waits for end with it."""
        run = _Run()
        under_way: dict[str, deque[tuple[str, float]]] = {"links": deque(), "memory": deque(), "host": deque()}
        for item in body:
            if isinstance(item, Loop):
                step = _Run()
                step.add(self.run(item.body, by_cycles=by_cycles), item.times)
            else:
                if item.ends is not None:
                    _wait(run, under_way, item.ends)
                if item.starts is not None:
                    resource, seconds = self.transfer(item)
                    under_way[resource].append((item.starts, seconds))
                    if not item.matmuls:
                        continue
                step = self.step(item, by_cycles=by_cycles)
            total = math.fsum(step.parts.values())
            for resource, queue in under_way.items():
                _proceed(queue, total - step.busy.get(resource, 0.0))
            run.add(step)
        _wait(run, under_way, None)
        return run

    def step(self, cost: Cost, *, by_cycles: bool) -> _Run:
        """Time of one instruction that the device waits for."""
        compute, memory, vectors = self.compute(cost), self.memory(cost.hbm_bytes), self.vectors(cost)
        if cost.collective is not None and cost.starts is None:
            wire = self.wire(cost.collective)
            return _Run({"collectives": max(wire, memory)}, {"links": wire, "memory": memory})
        if cost.host_bytes:
            host = self.host(cost)
            return _Run({"transfers": host}, {"host": host, "memory": memory})
        least = KERNEL_SECONDS if cost.opcode in ("fusion", "copy", "custom-call") and cost.ends is None else 0.0
        seconds = max(compute + vectors, memory, least)
        if by_cycles and cost.cycles is not None and self.chip.clock is not None:
            seconds = cost.cycles / self.chip.clock
        busy = {"memory": min(memory, seconds)}
        if compute + vectors <= memory:
            return _Run({"main memory": seconds}, busy)
        return _Run({"matrix products": seconds - vectors, "vectors of kernels": vectors}, busy)

    def compute(self, cost: Cost) -> float:
        """Seconds of the matrix units."""
        products: tuple[Matmul | Kernel, ...] = (*cost.matmuls, *cost.kernels)
        flops = math.fsum(product.padded_flops(self.chip.mxu) for product in products)
        return flops * self.devices_per_chip / (self.chip.peak_bf16 * MATMUL_EFFICIENCY)

    def vectors(self, cost: Cost) -> float:
        """Seconds of the vector unit, of kernels."""
        if self.chip.vector_rate is None:
            return 0.0
        numbers = math.fsum(kernel.padded_transcendentals(VECTOR_LANES) for kernel in cost.kernels)
        return numbers * VECTOR_OPERATIONS * self.devices_per_chip / self.chip.vector_rate

    def memory(self, size: int) -> float:
        """Seconds of main memory."""
        return size * self.devices_per_chip / (self.chip.hbm_rate * HBM_EFFICIENCY)

    def host(self, cost: Cost) -> float:
        """Seconds of the way to the host."""
        return cost.host_bytes * self.devices_per_chip / self.chip.host_rate

    def transfer(self, cost: Cost) -> tuple[str, float]:
        """What an asynchronous transfer keeps busy, and for how long."""
        if cost.collective is not None:
            return "links", self.wire(cost.collective)
        if cost.host_bytes:
            return "host", self.host(cost)
        return "memory", self.memory(cost.hbm_bytes)

    def wire(self, collective: Collective) -> float:
        """Seconds of an exchange."""
        rings = self.rings(collective.group)
        if collective.kind == "collective-permute" and self.chip.torus:
            links, hops = 1, 1
        else:
            links = sum(2 if ring else 1 for _, ring in rings) if self.chip.torus else 1
            hops = sum(side // 2 if ring else side - 1 for side, ring in rings) if self.chip.torus else 1
        size = collective.bytes * self.devices_per_chip
        if collective.kind.endswith("all-to-all") and self.chip.torus:  # on its way through other chips
            size *= max(1, max((side for side, _ in rings), default=1) // 4)
        rate = links * self.chip.link_rate * LINK_EFFICIENCY
        return size / rate + hops * HOP_SECONDS * (2 if collective.kind == "all-reduce" else 1)

    def rings(self, group: int) -> list[tuple[int, bool]]:
        """Over how much of which sides a group of devices lies, and whether that closes to a ring."""
        left = max(1, group // self.devices_per_chip)
        found: list[tuple[int, bool]] = []
        for side in sorted(self.sides, reverse=True):
            part = min(side, left)
            if part > 1:
                found.append((part, self.chip.full_ring > 0 and part == side and side % self.chip.full_ring == 0))
            left = max(1, left // part)
        return found or [(1, False)]

    def assumptions(self) -> tuple[str, ...]:
        """What the estimate rests on, for people."""
        chip = self.chip
        lines = [
            f"peak {chip.peak_bf16 / 1e12:,.0f} TFLOP/s bf16 x {MATMUL_EFFICIENCY:.0%}, products padded to {chip.mxu}",
            f"main memory {chip.hbm_rate / 1e9:,.0f} GB/s x {HBM_EFFICIENCY:.0%}; "
            f"a kernel takes at least {KERNEL_SECONDS * 1e6:.0f} us",
            f"links {chip.link_rate / 1e9:.0f} GB/s each way x {LINK_EFFICIENCY:.0%}, {HOP_SECONDS * 1e6:.0f} us a hop",
            "groups of devices fill whole sides of the slice first; a ring has two links, a line one",
            "instructions run one after the other, bound by products or memory; elementwise work hides",
            "kernels (Pallas) by the FLOPs and exponentials that they state, padded as their first operand is",
            "asynchronous transfers run beside computation as far as links and memory are free",
        ]
        if chip.vector_rate is not None:
            lines.append(
                f"after their products {VECTOR_OPERATIONS} elementwise operations with each exponential, "
                f"{chip.vector_rate / 1e12:.1f} T a second"
            )
        return (*lines, *([] if chip.clock is None else [f"the compiler's cycles at {chip.clock / 1e9:.2f} GHz"]))


def _proceed(queue: deque[tuple[str, float]], seconds: float) -> None:
    """Transfers of one resource go on, one after the other, for so long."""
    while queue and seconds > 0:
        key, left = queue.popleft()
        if left > seconds:
            queue.appendleft((key, left - seconds))
        seconds -= left


def _wait(run: _Run, under_way: dict[str, deque[tuple[str, float]]], key: str | None) -> None:
    """Adds the time until a transfer, and those queued before it, are done; None: until all are."""
    for resource, queue in under_way.items():
        part = "collectives" if resource == "links" else "transfers"
        while queue and (key is None or any(waiting == key for waiting, _ in queue)):
            run.add(_Run({part: queue.popleft()[1]}))
