"""What a ToyWorld scene is, where its objects lie, and its exact picture, boxes and masks.

Objects are sprites on whole pixels: the anti-aliased sprite of every (shape, texture, side) is computed once, and
drawing a scene only mixes each sprite's weights with three colours and copies the result to its places.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Int8, UInt8

SMALLEST_IMAGE = 16
"""Pixels; below this the shapes cannot be drawn."""

Coordinates = Float[np.ndarray, "h w"]
Inside = Bool[np.ndarray, "h w"]
Texture = Bool[np.ndarray, "side side"]


def _star(x: Coordinates, y: Coordinates) -> Inside:
    """Five points of radius 1, inner corners of radius 0.45, one point up."""
    y = y - 0.1  # a five-pointed star reaches 1 upwards but only 0.81 downwards
    angle = np.arctan2(x, -y)
    fifth = 2 * np.pi / 5
    folded = np.abs((angle + fifth / 2) % fifth - fifth / 2)  # angle from the nearest point's axis
    along, across = np.hypot(x, y) * np.cos(folded), np.hypot(x, y) * np.sin(folded)
    corner_along, corner_across = 0.45 * np.cos(fifth / 2), 0.45 * np.sin(fifth / 2)
    return corner_across * (along - 1) < (corner_along - 1) * across


def _heart(x: Coordinates, y: Coordinates) -> Inside:
    """Two lobes above a tip."""
    lobes = np.hypot(np.abs(x) - 0.48, y + 0.42) < 0.54
    tip = (np.abs(x) * 1.03 + y < 0.98) & (y > -0.2)
    return lobes | tip


SHAPES: Mapping[str, Callable[[Coordinates, Coordinates], Inside]] = {
    "circle": lambda x, y: np.hypot(x, y) < 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 1,
    "triangle": lambda x, y: 2 * abs(x) < y + 1,
    "star": _star,
    "cross": lambda x, y: np.minimum(abs(x), abs(y)) < 1 / 3,
    "ring": lambda x, y: (np.hypot(x, y) < 1) & (np.hypot(x, y) > 0.5),
    "diamond": lambda x, y: abs(x) + abs(y) <= 1,  # so that pixels cut in half count as covered
    "heart": _heart,
}
"""Which points (x to the right, y down, both in [-1, 1]) belong to the shape."""

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "green": (35, 155, 50),
    "blue": (45, 75, 230),
    "yellow": (250, 220, 40),
    "pink": (245, 110, 205),
    "cyan": (60, 215, 225),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
"""RGB of objects and backgrounds."""


def _cells(side: int, across: int) -> Int[np.ndarray, "side"]:
    """Divides a line of pixels into about ``across`` cells of whole pixels, to be crisp in small pictures; 0 is the
    middle one."""
    width = max(1, round(side / across))
    return (np.arange(side) - (side - width) // 2) // width


def _striped(side: int) -> Texture:
    return np.tile(_cells(side, 6)[:, None] % 2 == 1, (1, side))


def _dotted(side: int) -> Texture:
    dots = _cells(side, 7) % 2 == 0
    return dots[:, None] & dots


def _checkered(side: int) -> Texture:
    cells = _cells(side, 6)
    return (cells[:, None] + cells) % 2 == 0


TEXTURES: Mapping[str, Callable[[int], Texture]] = {
    "solid": lambda side: np.zeros((side, side), bool),
    "striped": _striped,
    "dotted": _dotted,
    "checkered": _checkered,
}
"""Which pixels of an object have the darker shade of its colour."""

SIZES: Mapping[str, float] = {"small": 0.6, "large": 0.9}
"""Side of an object as a share of its layout cell."""

POSITIONS: Mapping[str, tuple[str, str]] = {
    "top left": ("start", "start"),
    "top right": ("start", "end"),
    "bottom left": ("end", "start"),
    "bottom right": ("end", "end"),
    "center": ("middle", "middle"),
}
"""Where a group lies, as (vertical, horizontal)."""

_SQUARE = ((0, 0), (0, 1), (1, 0), (1, 1))
_ARRANGEMENTS: tuple[tuple[tuple[tuple[int, int], ...], ...], ...] = (
    (((0, 0),),),
    (((0, 0), (0, 1)), ((0, 0), (1, 0)), ((0, 0), (1, 1)), ((0, 1), (1, 0))),
    tuple(tuple(cell for cell in _SQUARE if cell != free) for free in _SQUARE),
    (_SQUARE,),
)
"""By count - 1: the layout cells (row, column) that the copies may fill."""

COUNTS = tuple(range(1, len(_ARRANGEMENTS) + 1))


@dataclass(frozen=True)
class Group:
    """Equal copies of one object, close together."""

    shape: str
    colour: str
    size: str
    texture: str
    count: int
    position: str


@dataclass(frozen=True)
class Scene:
    """Everything about a picture but its pixel noise.

    corners: for each group the (y, x) pixel of the top left of each copy's sprite.
    Objects are numbered group by group; n counts them all.
    """

    image_size: int
    background: str
    groups: tuple[Group, ...]
    corners: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def boxes(self) -> Int[np.ndarray, "n 4"]:
        """Tight box (y0, x0, y1, x1) of each object's mask, in pixels; y1 and x1 lie just outside."""
        boxes = []
        for group, corners in zip(self.groups, self.corners, strict=True):
            y0, x0, y1, x1 = self._sprite(group).box
            boxes += [(y + y0, x + x0, y + y1, x + x1) for y, x in corners]
        return np.array(boxes)

    @property
    def masks(self) -> Int8[np.ndarray, "H W"]:
        """Number of the object that covers at least half of the pixel, -1 for the background."""
        masks = np.full((self.image_size, self.image_size), -1, np.int8)
        number = 0
        for group, corners in zip(self.groups, self.corners, strict=True):
            mask = self._sprite(group).mask
            for y, x in corners:
                masks[y : y + len(mask), x : x + len(mask)][mask] = number
                number += 1
        return masks

    @property
    def entities(self) -> Int[np.ndarray, "n"]:
        """Of each object: a number in [0, 256) that stands for its (shape, colour, texture) in every world."""
        return np.array([entity_id(group) for group in self.groups for _ in range(group.count)])

    def draw(self) -> UInt8[np.ndarray, "H W 3"]:
        """The RGB picture without pixel noise."""
        image = np.empty((self.image_size, self.image_size, 3), np.uint8)
        image[:] = COLOURS[self.background]
        for group, corners in zip(self.groups, self.corners, strict=True):
            weights = self._sprite(group).weights
            patch = weights @ _palette(self.background, group.colour)
            patch = (patch + 0.5).astype(np.uint8)
            for y, x in corners:
                image[y : y + len(patch), x : x + len(patch)] = patch
        return image

    def _sprite(self, group: Group) -> "Sprite":
        cell = _cell_side(self.image_size, len(self.groups))
        return sprite(group.shape, group.texture, object_side(group.size, cell))


def entity_id(group: Group) -> int:
    """The number of the group's (shape, colour, texture), in [0, 256)."""
    shape, colour, texture = _INDEX[group.shape], _INDEX[group.colour], _INDEX[group.texture]
    return (shape * len(COLOURS) + colour) * len(TEXTURES) + texture


def class_id(group: Group) -> int:
    """The number of the group's (shape, colour), in [0, 64)."""
    return _INDEX[group.shape] * len(COLOURS) + _INDEX[group.colour]


_INDEX = {word: i for words in (SHAPES, COLOURS, TEXTURES) for i, word in enumerate(words)}


def place(
    position: str, count: int, size: str, *, groups: int, image_size: int, rng: Random
) -> tuple[tuple[int, int], ...]:
    """Draws the (y, x) sprite corners of a group's copies: apart from each other and from groups at other positions.

    The copies fill cells of a grid of at most 2 x 2. Where one group has the picture to itself, cells are a little
    wider than half a quadrant; then only the centers of its objects are sure to lie in the quadrant.
    """
    cell = _cell_side(image_size, groups)
    side = object_side(size, cell)
    arrangement = rng.choice(_ARRANGEMENTS[count - 1])
    axes = []
    for where, cells in zip(POSITIONS[position], zip(*arrangement, strict=True), strict=True):
        start = _block_start(where, cell * (1 + max(cells)), image_size, rng)
        # The last line of a cell stays free, so copies never touch.
        starts = [start + number * cell + _below(cell - side, rng) for number in cells]
        axes.append([_within_half(where, start, side, image_size) for start in starts])
    return tuple(zip(*axes, strict=True))


def _cell_side(image_size: int, groups: int) -> int:
    if groups == 1:
        return int(0.32 * image_size)
    return image_size // (4 if groups <= 3 else 3)  # more than three: a shelf (toyworld_shelf.py)


def object_side(size: str, cell: int) -> int:
    """Pixels of an object of a size in a layout cell of so many pixels."""
    return min(cell - 1, round(SIZES[size] * cell))


def _block_start(where: str, length: int, image_size: int, rng: Random) -> int:
    """First pixel of a block of cells along one axis: inside its half of the picture, or touching the border."""
    if where == "middle":
        jitter = image_size // 20
        return (image_size - length) // 2 + _below(2 * jitter + 1, rng) - jitter
    distance = _below(max(image_size // 2 - length, 0) + 1, rng)
    return distance if where == "start" else image_size - length - distance


def _within_half(where: str, start: int, side: int, image_size: int) -> int:
    """Moves an object back until its center lies in its half of the picture."""
    last = (image_size - side) // 2
    if where == "start":
        return min(start, last)
    return max(start, image_size - side - last) if where == "end" else start


def _below(limit: int, rng: Random) -> int:
    """Integer in [0, limit) from exactly one draw, so that a scene's attributes do not depend on the image size."""
    return int(rng.random() * limit)


class Sprite(NamedTuple):
    """One object on a square of s x s pixels.

    weights: shares of the background, the object's colour and its darker shade in each pixel.
    mask: where the object covers at least half of the pixel (or, in sprites too small to fill one, half as much as it
    covers anywhere); box: its tight (y0, x0, y1, x1).
    """

    weights: Float[np.ndarray, "s s 3"]
    mask: Bool[np.ndarray, "s s"]
    box: tuple[int, int, int, int]


@cache
def sprite(shape: str, texture: str, side: int) -> Sprite:
    """The object's sprite; its edges are anti-aliased with 8 x 8 samples a pixel, its texture lies on whole pixels."""
    samples = 8
    points = (np.arange(side * samples) + 0.5) / (side * samples) * 2 - 1
    x, y = np.meshgrid(points, points)
    cover = SHAPES[shape](x, y).reshape(side, samples, side, samples).mean((1, 3))
    dark = TEXTURES[texture](side)
    mask = cover >= 0.5 * cover.max()
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)
    weights = np.stack([1 - cover, cover * ~dark, cover * dark], axis=-1).astype(np.float32)
    return Sprite(weights, mask, box)


@cache
def _palette(background: str, colour: str) -> Float[np.ndarray, "3 3"]:
    """RGB rows: background, the object's colour, its shade (half as bright; grey for black)."""
    rgb = np.array(COLOURS[colour], np.float32)
    shade = rgb + 110 if colour == "black" else rgb / 2
    return np.stack([np.array(COLOURS[background], np.float32), rgb, shade])
