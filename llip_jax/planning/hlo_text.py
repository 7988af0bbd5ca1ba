"""Reads the text of a compiled program (``jax.stages.Compiled.as_text()``) into computations and instructions."""

import math
import re
from dataclasses import dataclass, field
from functools import cached_property

HBM, HOST = 0, 5
"""Memory spaces of XLA's layouts: S(0) is not written, S(5) is the host's memory; the rest is on the chip."""

_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True, slots=True)
class Array:
    """One array of an instruction's result."""

    dtype: str
    shape: tuple[int, ...]
    space: int = HBM
    minor_to_major: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        """Size in memory; the dimensions that lie in tiles are padded to whole tiles."""
        shape = list(self.shape)
        for axis, tile in zip(self.minor_to_major, reversed(self.tile), strict=False):
            shape[axis] = math.ceil(shape[axis] / tile) * tile
        return math.ceil(math.prod(shape) * self.bits / 8)

    @property
    def bits(self) -> int:
        """Of one element."""
        width = re.search(r"\d+", self.dtype)  # f32, bf16, s4, c64, f8e4m3fn
        return int(width[0]) if width else {"pred": 8}.get(self.dtype, 0)


@dataclass(frozen=True)
class Instruction:
    """``%name = result opcode(operands), attributes``."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    """What stands between the brackets: a constant's value, a parameter's number."""
    attributes: str

    def attribute(self, name: str) -> str | None:
        """Value of ``name=...`` up to its end: brackets are followed, quotes taken off."""
        start = re.search(rf"(?:^|[ ,{{]){name}=", self.attributes)
        if start is None:
            return None
        return _bracketed(self.attributes, start.end())

    def numbers(self, name: str) -> tuple[int, ...]:
        """Value of a list of integers, ``name={1,2}``; empty where it is not there."""
        return tuple(int(n) for n in re.findall(r"-?\d+", self.attribute(name) or ""))

    @property
    def calls(self) -> str | None:
        """Name of the computation of a fusion, call or asynchronous operation."""
        called = self.attribute("calls") or self.attribute("to_apply")
        return called.lstrip("%") if called else None

    @property
    def op_name(self) -> str:
        """What the operation is in the traced program: its path of scopes."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1] if found else ""

    @property
    def cycles(self) -> int | None:
        """The TPU compiler's own estimate for one execution, where it states one."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else None


def _bracketed(text: str, start: int) -> str:
    depth = 0
    for end in range(start, len(text)):
        if text[end] in "{([":
            depth += 1
        elif text[end] in "})]":
            depth -= 1
        elif text[end] in ", " and depth == 0:
            return text[start:end]
        if depth < 0:
            return text[start:end]
    return text[start:]


@dataclass
class Computation:
    """Instructions in the order in which they run; the last one marked ROOT is the result."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """By number."""
        return {int(i.literal): i for i in self.instructions.values() if i.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """Who reads an instruction's result, and as which operand."""
        users: dict[str, list[tuple[Instruction, int]]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for position, operand in enumerate(instruction.operands):
                users[operand].append((instruction, position))
        return users

    def operand(self, instruction: Instruction, position: int) -> Instruction:
        """The instruction that makes an operand."""
        return self.instructions[instruction.operands[position]]

    def results(self) -> list[Instruction]:
        """What the computation returns, a tuple's elements one by one."""
        root = self.instructions[self.root]
        return [self.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]


@dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: Computation
    partitions: int
    """Over how many devices it is divided."""


def parse(text: str) -> Module:
    """Reads a program.

    Raises:
        ValueError: the text has no entry computation, so it is no compiled program.
    """
    computations: dict[str, Computation] = {}
    current = entry = None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = Computation(header[2])
            entry = current if header[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.instructions[found[2]] = _instruction(found[2], found[3])
            current.root = found[2] if found[1] else current.root
        elif line.startswith("}"):
            current = None
    if entry is None:
        raise ValueError("no entry computation: not the text of a compiled program")
    partitions = re.search(r"num_partitions=(\d+)", text.split("\n", 1)[0])
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _instruction(name: str, text: str) -> Instruction:
    end = len(_bracketed(text, 0))
    opening = text.index("(", end)
    inside = _bracketed(text, opening)
    return Instruction(
        name,
        text[end:opening].strip(),
        tuple(_array(*found) for found in _ARRAY.findall(text[:end])),
        tuple(_NAME.findall(inside)),
        inside[1:-1],
        text[opening + len(inside) :].lstrip(", "),
    )


def _array(dtype: str, shape: str, layout: str) -> Array:
    order, _, placement = layout.partition(":")
    tile, space = _TILE.search(placement), _SPACE.search(placement)
    return Array(
        dtype,
        tuple(int(n) for n in re.findall(r"\d+", shape)),
        int(space[1]) if space else HBM,
        tuple(int(n) for n in order.split(",") if n),
        tuple(int(n) for n in tile[1].split(",")) if tile else (),
    )
