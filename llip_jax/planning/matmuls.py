"""Matrix products in a compiled program: the sizes of ``dot`` and of ``convolution``, which is what TPUs make of it."""

import math
import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from llip_jax.planning.hlo_text import Array, Instruction


@dataclass(frozen=True, slots=True)
class Matmul:
    """``batch`` products of [rows, contracted] with [contracted, columns]."""

    batch: int
    rows: int
    columns: int
    contracted: float
    """On average: at the edges of a padded convolution fewer."""

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return round(2 * self.batch * self.rows * self.columns * self.contracted)

    def padded_flops(self, tile: int) -> int:
        """FLOPs of the systolic array of ``tile`` x ``tile`` that holds one operand while the other streams through.

        The operand that stays is padded to whole tiles, the streaming side to 8 rows; the cheaper way round.
        """
        contracted = _pad(self.contracted, tile)
        area = min(_pad(a, tile) * _pad(b, 8) for a, b in [(self.rows, self.columns), (self.columns, self.rows)])
        return 2 * self.batch * area * contracted


@dataclass(frozen=True, slots=True)
class Kernel:
    """A Pallas kernel by what it states of itself."""

    flops: int
    transcendentals: int
    rows: int
    columns: int
    """The last two dimensions of its first operand."""

    def padded_flops(self, tile: int) -> float:
        """FLOPs of a systolic array of ``tile`` x ``tile``, as if rows and columns were the sides that it holds.

        So it is for attention over ``rows`` tokens of ``columns`` numbers a head, forward and backward.
        """
        return self.flops * _pad(self.rows, tile) * _pad(self.columns, tile) / (self.rows * self.columns)

    def padded_transcendentals(self, lanes: int) -> float:
        """Of a vector unit, as if of a matrix of so many columns as there are rows: attention's weights."""
        return self.transcendentals * _pad(self.rows, lanes) / self.rows


def _pad(size: float, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple


def dot(instruction: Instruction, left: Array, right: Array) -> Matmul:
    """Sizes of a ``dot``."""
    batch, contracted = (
        [instruction.numbers(f"{side}_{what}_dims") for side in ("lhs", "rhs")] for what in ("batch", "contracting")
    )

    def free(array: Array, taken: tuple[int, ...]) -> int:
        return math.prod(n for axis, n in enumerate(array.shape) if axis not in taken)

    return Matmul(
        math.prod(left.shape[axis] for axis in batch[0]),
        free(left, batch[0] + contracted[0]),
        free(right, batch[1] + contracted[1]),
        math.prod(left.shape[axis] for axis in contracted[0]),
    )


def convolution(instruction: Instruction, image: Array, kernel: Array) -> Matmul:
    """Sizes of a ``convolution`` as one product.

    TPU programs write every product of matrices as a convolution: a dimension of the window is then one of rows (window
    of one), of columns (the window slides over one padded element), contracted (the window covers all) or of a batch
    (dilated so that each output sees one element). Padding and the holes of dilation count no work.
    """
    labels = re.split("_|->", instruction.attribute("dim_labels") or "")
    image_at, kernel_at, out_at = ({label: axis for axis, label in enumerate(side)} for side in labels)
    out = instruction.results[0]
    sizes = {"batch": 1, "rows": out.shape[out_at["b"]], "columns": out.shape[out_at["f"]]}
    contracted: float = kernel.shape[kernel_at["i"]]
    for axis, window in enumerate(_windows(instruction, len(image_at) - 2)):
        label = str(axis)
        seen, slides, steps = image.shape[image_at[label]], kernel.shape[kernel_at[label]], out.shape[out_at[label]]
        pairs = _pairs(seen, slides, steps, *window)
        if slides == 1:
            sizes["rows"] *= pairs
        elif seen == 1:
            sizes["columns"] *= pairs
        elif pairs == steps == slides == seen:
            sizes["batch"] *= pairs
        else:  # steps == 1: contracted; or a real convolution, whose window is contracted at each step
            sizes["rows"] *= steps
            contracted *= pairs / steps
    return Matmul(**sizes, contracted=contracted)


def _windows(instruction: Instruction, dimensions: int) -> list[tuple[int, int, int, int]]:
    """(stride, padding before, dilation of the image, dilation of the kernel) of each dimension."""
    window = instruction.attribute("window") or ""

    def part(name: str, default: str) -> list[str]:
        found = re.search(rf"\b{name}=([^ }}]+)", window)
        return found[1].split("x") if found else [default] * dimensions

    columns = part("stride", "1"), part("pad", "0_0"), part("lhs_dilate", "1"), part("rhs_dilate", "1")
    return [(int(s), int(p.split("_")[0]), int(d), int(k)) for s, p, d, k in zip(*columns, strict=True)]


@lru_cache(maxsize=4096)
def _pairs(seen: int, slides: int, steps: int, stride: int, pad: int, dilation: int, kernel_dilation: int) -> int:
    """How many (output, window element) pairs see an element of the image, rather than padding or a hole."""
    at = np.arange(steps)[:, None] * stride + np.arange(slides) * kernel_dilation - pad
    return int(((at >= 0) & (at <= (seen - 1) * dilation) & (at % dilation == 0)).sum())
