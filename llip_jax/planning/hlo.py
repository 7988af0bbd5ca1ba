"""What a compiled program computes, moves and sends, from its text.

``program_costs(compiled.as_text())`` follows the schedule from the entry computation through loops (as often as they
turn), calls and fusions. Every figure is of one device. XLA's own ``cost_analysis`` counts a loop's body once and knows
neither memory spaces nor collectives; the text has them all.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from llip_jax.planning.hlo_text import HBM, HOST, Array, Computation, Instruction, Module, parse
from llip_jax.planning.matmuls import Kernel, Matmul, convolution, dot

_COLLECTIVE = re.compile(
    "(all-gather|all-reduce|reduce-scatter|ragged-all-to-all|all-to-all|collective-permute|collective-broadcast)(-start)?$"
)
_FREE = frozenset(
    ["parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"]
)
_VIEWS = frozenset(["bitcast", "reshape", "get-tuple-element", "convert"])
_SLICES = frozenset(["dynamic-slice", "slice", "gather"])
_WITHOUT_PRODUCTS = frozenset(
    [
        "AllocateBuffer",
        "ConcatBitcast",
        "AssumeGatherIndicesInBound",
        "GatherScatterIndicesBitpacked",
        "AsyncCollectiveStart",
        "AsyncCollectiveDone",
        "TopK",
    ]
)
"""Custom calls that compute no matrix products."""


@dataclass(frozen=True)
class Collective:
    """One exchange among ``group`` devices; of a permutation all, however many take part."""

    kind: str
    bytes: int
    """What a device sends where each piece takes the way round a ring: (group - 1) / group of the whole array, twice
    that for an all-reduce; the operand for a permutation."""
    group: int


@dataclass(frozen=True)
class Cost:
    """One instruction of the schedule, per execution."""

    name: str
    opcode: str
    op_name: str
    matmuls: tuple[Matmul, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    hbm_bytes: int = 0
    """Read and written in the chip's main memory; what stays in on-chip memory is none."""
    host_bytes: int = 0
    """Moved between the chip and its host."""
    cycles: int | None = None
    """The TPU compiler's own estimate."""
    collective: Collective | None = None
    starts: str | None = None
    """Key of an asynchronous transfer that begins here and runs beside what follows,"""
    ends: str | None = None
    """until the instruction that waits for it."""

    @property
    def flops(self) -> int:
        """Of its matrix products; elementwise work is not counted."""
        return sum(matmul.flops for matmul in self.matmuls) + sum(kernel.flops for kernel in self.kernels)


@dataclass(frozen=True)
class Loop:
    """``times`` executions of ``body``."""

    name: str
    times: int
    body: "tuple[Cost | Loop, ...]"


@dataclass(frozen=True)
class ProgramCosts:
    """A compiled program on one device."""

    body: tuple[Cost | Loop, ...]
    partitions: int
    """Devices it is compiled for."""
    unknown: tuple[str, ...] = field(default=())
    """What could not be counted: kernels that state no cost, other custom calls, loops of unknown length."""

    def executed(self) -> Iterator[tuple[int, Cost]]:
        """(times executed, instruction) in the order of the schedule."""
        return _executed(self.body, 1)

    @property
    def flops(self) -> int:
        """Of all matrix products."""
        return sum(times * cost.flops for times, cost in self.executed())

    @property
    def hbm_bytes(self) -> int:
        """Traffic of main memory."""
        return sum(times * cost.hbm_bytes for times, cost in self.executed())

    @property
    def host_bytes(self) -> int:
        """Traffic with the host."""
        return sum(times * cost.host_bytes for times, cost in self.executed())

    @property
    def cycles(self) -> int:
        """Sum of the compiler's own estimates; 0 where it makes none."""
        return sum(times * (cost.cycles or 0) for times, cost in self.executed())

    def collectives(self) -> "tuple[CollectiveTotal, ...]":
        """All exchanges, by kind, size of group and whether they run beside computation; most bytes first."""
        totals: dict[tuple[str, int, bool], tuple[int, int]] = {}
        for times, cost in self.executed():
            if cost.collective is not None:
                key = cost.collective.kind, cost.collective.group, cost.starts is not None
                count, sent = totals.get(key, (0, 0))
                totals[key] = count + times, sent + times * cost.collective.bytes
        found = (CollectiveTotal(*key, *total) for key, total in totals.items())
        return tuple(sorted(found, key=lambda total: -total.bytes))


@dataclass(frozen=True)
class CollectiveTotal:
    """Exchanges of one kind in a whole program."""

    kind: str
    group: int
    asynchronous: bool
    count: int
    bytes: int


def _executed(body: tuple[Cost | Loop, ...], times: int) -> Iterator[tuple[int, Cost]]:
    for item in body:
        if isinstance(item, Loop):
            yield from _executed(item.body, times * item.times)
        else:
            yield times, item


def program_costs(text: str) -> ProgramCosts:
    """Costs of a compiled program.

    Raises:
        ValueError: not the text of a compiled program.
    """
    reader = _Reader(parse(text))
    body = reader.block(reader.module.entry)
    return ProgramCosts(body, reader.module.partitions, tuple(dict.fromkeys(reader.unknown)))


class _Reader:
    """Walks a module and remembers what it met and could not count."""

    def __init__(self, module: Module):
        self.module = module
        self.unknown: list[str] = []
        self.under_way: set[str | None] = set()
        """Channels of collectives that go on beside the fusions that name them."""

    def block(self, computation: Computation) -> tuple[Cost | Loop, ...]:
        """Costs of a computation that the schedule runs instruction by instruction."""
        items: list[Cost | Loop] = []
        for instruction in computation.instructions.values():
            if instruction.opcode == "while":
                items.append(self.loop(computation, instruction))
            elif instruction.opcode == "call":
                items += self.block(self.called(instruction))
            elif instruction.opcode == "conditional":
                items += self.dearest_branch(instruction)
            elif instruction.opcode not in _FREE:
                items.append(self.cost(computation, instruction))
        return tuple(items)

    def called(self, instruction: Instruction) -> Computation:
        return self.module.computations[instruction.calls or ""]

    def dearest_branch(self, instruction: Instruction) -> tuple[Cost | Loop, ...]:
        names = re.findall(r"%([\w.\-]+)", instruction.attribute("branch_computations") or "") or [
            (instruction.attribute(f"{side}_computation") or "").lstrip("%") for side in ("true", "false")
        ]
        blocks = [self.block(self.module.computations[name]) for name in names]
        return max(blocks, key=lambda block: sum(n * (c.flops + c.hbm_bytes) for n, c in _executed(block, 1)))

    def loop(self, computation: Computation, instruction: Instruction) -> Loop:
        body, condition = (
            self.module.computations[(instruction.attribute(what) or "").lstrip("%")] for what in ("body", "condition")
        )
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.attributes)
        turns = int(known[1]) if known else self.turns(computation, instruction, condition)
        if turns is None:
            self.unknown.append(f"turns of the loop {instruction.op_name or instruction.name} (counted once)")
        return Loop(instruction.name, 1 if turns is None else turns, self.block(body))

    def turns(self, computation: Computation, loop: Instruction, condition: Computation) -> int | None:
        """Turns of a loop that counts up by one to a constant, as every jax.lax.scan does."""
        root = condition.instructions[condition.root]
        where = self.called(root) if root.opcode == "fusion" else condition
        compare = where.instructions[where.root]
        if compare.opcode != "compare" or compare.attribute("direction") != "LT":
            return None
        counter, bound = (where.operand(compare, position) for position in (0, 1))
        if where is not condition:
            counter, bound = (
                condition.operand(root, int(maker.literal)) if maker.opcode == "parameter" else maker
                for maker in (counter, bound)
            )
        start = computation.operand(loop, 0)
        if counter.opcode != "get-tuple-element" or bound.opcode != "constant" or start.opcode != "tuple":
            return None
        first = computation.operand(start, int(counter.attribute("index") or 0))
        while first.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
            first = computation.operand(first, 0)
        return int(bound.literal) - int(first.literal) if first.opcode == "constant" else None

    def cost(self, computation: Computation, instruction: Instruction) -> Cost:
        """Cost of one instruction, with all that is fused into it."""
        inside = list(self.fused(computation, instruction))
        starts, ends = _transfer(instruction, inside)
        collective = None
        for where, part in inside:
            target = (part.attribute("custom_call_target") or "").strip('"') if part.opcode == "custom-call" else ""
            if target and target not in _WITHOUT_PRODUCTS and _stated(where, part) is None:
                self.unknown.append(f"{target} ({part.op_name or part.name})")
            if _COLLECTIVE.match(part.opcode) and part.attribute("channel_id") not in self.under_way:
                collective = _collective(where, part, self.module.partitions)
        channels = {part.attribute("channel_id") for _, part in inside if _COLLECTIVE.match(part.opcode)}
        if starts is not None and instruction.opcode == "fusion":
            self.under_way |= channels
        elif ends is not None:
            self.under_way -= channels
        moved = [] if instruction.opcode.endswith("-done") else self.moved(computation, instruction)
        hbm, host = (sum(size for where, size in moved if where == space) for space in (HBM, HOST))
        stated = [kernel for where, part in inside if (kernel := _stated(where, part)) is not None]
        return Cost(
            name=instruction.name,
            opcode=instruction.opcode,
            op_name=instruction.op_name,
            matmuls=tuple(product for where, part in inside if (product := _matmul(where, part)) is not None),
            kernels=tuple(kernel for kernel, _ in stated),
            # A kernel states bytes without the padding of arrays in memory, but may read some more than once.
            hbm_bytes=max(hbm, sum(size for _, size in stated)),
            host_bytes=host,
            cycles=instruction.cycles,
            collective=collective,
            starts=starts,
            ends=ends,
        )

    def fused(self, computation: Computation, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        """The instruction itself or, of a fusion, those in it and where they stand."""
        if instruction.opcode in ("fusion", "async-start"):
            inner = self.called(instruction)
            for part in inner.instructions.values():
                yield from self.fused(inner, part)
        else:
            yield computation, instruction

    def moved(self, computation: Computation, instruction: Instruction) -> list[tuple[int, int]]:
        """(memory space, bytes) of everything that an instruction reads and writes."""
        if instruction.opcode in ("dynamic-slice-start", "dynamic-update-slice-start"):
            whole = computation.operand(instruction, 0).results[0]
            if instruction.opcode == "dynamic-slice-start":
                piece = instruction.results[len(instruction.operands)]
            else:
                piece = computation.operand(instruction, 1).results[0]
            return [(whole.space, piece.bytes), (piece.space, piece.bytes)]
        if (instruction.attribute("custom_call_target") or "").strip('"') == "AllocateBuffer":
            return []
        read = []
        for position, name in enumerate(instruction.operands):
            arrays = computation.instructions[name].results
            sizes = [self.read(computation, instruction, position)] if len(arrays) == 1 else [a.bytes for a in arrays]
            read += [(array.space, size) for array, size in zip(arrays, sizes, strict=True)]
        return read + self.written(computation, instruction)

    def read(self, computation: Computation, user: Instruction, position: int) -> int:
        """Bytes of an operand that its user reads: the slice where it takes a slice, none where it writes into it."""
        whole = sum(array.bytes for array in computation.operand(user, position).results)
        if user.opcode == "fusion":
            inner = self.called(user)
            return min(whole, self.read_by_all(inner, inner.parameters[position]))
        if user.opcode in _SLICES or user.opcode == "slice-start":
            taken = user.results[1] if user.opcode == "slice-start" else user.results[0]
            return min(whole, taken.bytes) if position == 0 else whole
        return 0 if user.opcode == "dynamic-update-slice" and position == 0 else whole

    def read_by_all(self, computation: Computation, source: Instruction) -> int:
        total = 0
        for user, position in computation.users[source.name]:
            if user.opcode in _VIEWS:
                total += self.read_by_all(computation, user)
            elif user.opcode not in ("tuple", "custom-call") and not _COLLECTIVE.match(user.opcode):
                total += self.read(computation, user, position)
        return total

    def written(self, computation: Computation, instruction: Instruction) -> list[tuple[int, int]]:
        """(memory space, bytes) of the results, as far as they are not operands handed through."""
        if instruction.opcode == "copy-start":
            results = list(instruction.results[:1])
        elif instruction.opcode.endswith("-start") and len(instruction.results) > len(instruction.operands):
            results = list(instruction.results[len(instruction.operands) :])
        elif instruction.opcode == "fusion":
            inner = self.called(instruction)
            made = inner.results()
            if len(made) == len(instruction.results):
                return [
                    (array.space, _update(inner, one, array))
                    for one, array in zip(made, instruction.results, strict=True)
                ]
            results = list(instruction.results)
        else:
            return [(array.space, _update(computation, instruction, array)) for array in instruction.results]
        return [(array.space, array.bytes) for array in results]


def _update(computation: Computation, maker: Instruction, array: Array) -> int:
    """Bytes written for a result: of an update in place only the update."""
    while maker.opcode in _VIEWS:
        maker = computation.operand(maker, 0)
    if maker.opcode == "dynamic-update-slice":
        return min(array.bytes, sum(update.bytes for update in computation.operand(maker, 1).results))
    if maker.opcode == "parameter":
        return 0
    return array.bytes


def _transfer(instruction: Instruction, inside: list[tuple[Computation, Instruction]]) -> tuple[str | None, str | None]:
    """Key of the asynchronous transfer that an instruction starts, and of the one that it waits for."""
    if instruction.opcode.endswith("-start"):
        return instruction.name, None
    if instruction.opcode.endswith("-done"):
        return None, instruction.operands[0]
    targets = {part.attribute("custom_call_target") for _, part in inside}
    channel = next((part.attribute("channel_id") for _, part in inside if _COLLECTIVE.match(part.opcode)), None)
    key = f"channel {channel}"
    return (
        key if '"AsyncCollectiveStart"' in targets else None,
        key if '"AsyncCollectiveDone"' in targets else None,
    )


def _matmul(computation: Computation, instruction: Instruction) -> Matmul | None:
    if instruction.opcode not in ("dot", "convolution"):
        return None
    left, right = (computation.operand(instruction, position).results[0] for position in (0, 1))
    return (dot if instruction.opcode == "dot" else convolution)(instruction, left, right)


_ESTIMATE = re.compile(r'"cost_estimate":\{"flops":"(\d+)","transcendentals":"(\d+)","bytes_accessed":"(\d+)"')


def _stated(computation: Computation, instruction: Instruction) -> tuple[Kernel, int] | None:
    """A Pallas kernel and the bytes it moves by its ``cost_estimate``."""
    found = _ESTIMATE.search(instruction.attributes)
    if found is None:
        return None
    shape = computation.operand(instruction, 0).results[0].shape if instruction.operands else ()
    rows, columns = (1, 1, *shape)[-2:]
    return Kernel(int(found[1]), int(found[2]), rows, columns), int(found[3])


def _collective(computation: Computation, instruction: Instruction, devices: int) -> Collective:
    kind = instruction.opcode.removesuffix("-start")
    operands = [array for name in instruction.operands for array in computation.instructions[name].results]
    size = sum(math.ceil(math.prod(array.shape) * array.bits / 8) for array in operands)
    if kind == "collective-permute":
        return Collective(kind, size, devices)
    group = _group(instruction, devices)
    if kind == "all-reduce" and "all-reduce-scatter" in computation.name:  # how TPU programs write a reduce-scatter
        kind = "reduce-scatter"
    factor = {"all-gather": group, "all-reduce": 2}.get(kind, 1)
    return Collective(kind, size * factor * (group - 1) // group, group)


def _group(instruction: Instruction, devices: int) -> int:
    """Devices that take part in one exchange, of the three ways in which XLA writes replica groups."""
    text = instruction.attributes
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        return math.prod(
            int(part or sizes[name]) for name, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        )
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text):
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    return listed[1].count(",") + 1 if listed else devices
