"""ToyWorld's shelf: six objects in places of their own, of which every caption names one.

Perception is made easy, so that a small model in a short run is limited by what the Llip paper (arXiv 2405.00740) is
about: many true captions of one image, each of something else, and one vector to match them all. Shape, place and size
of an object never change; its colour is drawn, independently of the other colours.
"""

from random import Random

from llip_jax.data.toyworld_captions import describe, distract, plain
from llip_jax.data.toyworld_render import COLOURS, Group, Scene, object_side

OBJECTS = {
    "circle": "top left",
    "square": "top",
    "triangle": "top right",
    "star": "bottom left",
    "cross": "bottom",
    "ring": "bottom right",
}
"""Where each of them lies. The first n are the n topics of captions."""
BACKGROUND = "white"
_COLUMNS, _ROWS = 3, 2
_SAID = ("colour", "shape")
_ATTEMPTS = 64
"""Draws after which a caption may repeat another one."""


def draw_shelf(image_size: int, rng: Random) -> Scene:
    """A scene: a colour for each object, none of them the background's."""
    colours = [colour for colour in COLOURS if colour != BACKGROUND]
    groups = tuple(Group(shape, rng.choice(colours), "large", "solid", 1, place) for shape, place in OBJECTS.items())
    cell = image_size // _COLUMNS
    margin = cell - object_side("large", cell)
    height = image_size // _ROWS
    corners = []
    for number in range(len(OBJECTS)):
        row, column = divmod(number, _COLUMNS)
        y = row * height + (height - cell) // 2 + int(rng.random() * (margin + 1))
        corners.append(((y, column * cell + int(rng.random() * (margin + 1))),))
    return Scene(image_size, BACKGROUND, groups, tuple(corners))


def shelf_captions(scene: Scene, topics: int, count: int, rng: Random) -> list[tuple[str, str]]:
    """Captions with the shape each speaks of: every topic as often as the others, in random order and words."""
    captions: list[tuple[str, str]] = []
    while len(captions) < count:
        for number in rng.sample(range(topics), topics):
            for _ in range(_ATTEMPTS):
                caption = describe(_alone(scene, number), _SAID, rng), scene.groups[number].shape
                if caption not in captions:
                    break
            captions.append(caption)
    return captions[:count]


def plain_shelf_captions(scene: Scene, topics: int) -> list[tuple[str, str]]:
    """One caption for each topic, equal for what is equal."""
    return [(plain(group), group.shape) for group in scene.groups[:topics]]


def shelf_choices(scene: Scene, topics: int, rng: Random) -> tuple[str, str]:
    """A true caption, and a false one that differs in the colour."""
    true, false = distract(_alone(scene, rng.randrange(topics)), _SAID, rng.getrandbits(64))
    return true, false["colour"]


def _alone(scene: Scene, number: int) -> Scene:
    """A scene of one object, so that a caption speaks of this one only."""
    return Scene(scene.image_size, scene.background, (scene.groups[number],), (scene.corners[number],))
