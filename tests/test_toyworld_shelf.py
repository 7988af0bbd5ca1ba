"""ToyWorld's shelf: what is on it, what captions say of it, and how diverse they are."""

from collections import Counter

import numpy as np
import pytest

from llip_jax.config import ConfigError, ToyWorldConfig, resolve
from llip_jax.data.toyworld import ToyWorld
from llip_jax.data.toyworld_captions import COLOUR_WORDS, SHAPE_WORDS
from llip_jax.data.toyworld_render import COLOURS
from llip_jax.data.toyworld_shelf import BACKGROUND, OBJECTS

SEED = int(np.random.default_rng().integers(2**31))


def shelf(split: str = "train", image_size: int = 24, **fields) -> ToyWorld:
    return ToyWorld(ToyWorldConfig(layout="shelf", seed=SEED, **fields), split, image_size)


def said(text: str) -> tuple[str, str]:
    """Colour and shape that a caption speaks of, by its words."""
    words = text.split()
    [colour] = [name for name, forms in COLOUR_WORDS.items() if set(forms) & set(words)]
    [shape] = [name for name, forms in SHAPE_WORDS.items() if any(f" {form}" in f" {text}" for form in forms)]
    return colour, shape


@pytest.mark.parametrize("image_size", [24, 48, 65])
def test_six_objects_lie_in_places_of_their_own_in_their_colours(image_size: int) -> None:
    world = shelf(image_size=image_size, pixel_noise=0.0)
    for index in range(20):
        scene, record = world.scene(index), world[index]
        assert [group.shape for group in scene.groups] == list(OBJECTS)
        assert np.unique(scene.masks).tolist() == [-1, 0, 1, 2, 3, 4, 5]
        for number, group in enumerate(scene.groups):
            y0, x0, y1, x1 = scene.boxes[number]
            row, column = divmod(number, 3)
            assert row * image_size // 2 <= y0 < y1 <= (row + 1) * image_size / 2
            assert column * (image_size // 3) <= x0 < x1 <= (column + 1) * (image_size // 3)
            assert group.colour != BACKGROUND
            inside = record.image[scene.masks == number].astype(int)
            nearest = np.abs(inside - np.array(COLOURS[group.colour])).sum(axis=1).min()
            assert nearest < 12


def test_colours_are_drawn_independently_and_all_alike() -> None:
    world = shelf(train_size=3000)
    colours = np.array([[group.colour for group in world.scene(i).groups] for i in range(3000)])
    for column in colours.T:
        counts = Counter(column)
        assert len(counts) == len(COLOURS) - 1
        assert max(abs(n - 3000 / 7) for n in counts.values()) < 5 * (3000 / 7) ** 0.5
    same = (colours[:, 0] == colours[:, 1]).mean()
    assert abs(same - 1 / 7) < 5 * (1 / 7 * 6 / 7 / 3000) ** 0.5


@pytest.mark.parametrize("topics", [1, 2, 4, 6])
def test_every_caption_names_one_of_the_topics_and_is_true(topics: int) -> None:
    world = shelf(topics=topics)
    names = list(OBJECTS)[:topics]
    for index in range(100):
        record = world[index]
        colours = {group["shape"]: group["colour"] for group in record.fields["groups"]}
        assert len(set(record.captions)) == len(record.captions) == 6
        counts = Counter()
        for text, aspects in zip(record.captions, record.fields["caption_aspects"], strict=True):
            colour, shape = said(text)
            assert aspects == (shape,)
            assert colours[shape] == colour
            counts[shape] += 1
        assert set(counts) == set(names)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_to_evaluate_equal_captions_are_what_is_equally_true() -> None:
    world = shelf("eval", topics=4, eval_size=60)
    records = [world[i] for i in range(60)]
    for record in records:
        assert [said(text)[1] for text in record.captions] == list(OBJECTS)[:4]
    for text in {text for record in records for text in record.captions}:
        colour, shape = said(text)
        for record in records:
            true = any(group["shape"] == shape and group["colour"] == colour for group in record.fields["groups"])
            assert (text in record.captions) == true


def test_choices_differ_in_the_colour_and_one_is_true() -> None:
    world = shelf("eval", topics=3)
    for index in range(50):
        record = world[index]
        colours = {group["shape"]: group["colour"] for group in record.fields["groups"]}
        (true, shape), (false, other) = (said(text) for text in record.fields["choices"])
        assert shape == other
        assert shape in list(OBJECTS)[:3]
        assert colours[shape] == true != false


def test_caption_noise_speaks_of_other_scenes() -> None:
    world = shelf(caption_noise=0.5, train_size=400)
    for index in range(200):
        record = world[index]
        for text, scene in zip(record.captions, record.fields["caption_scenes"], strict=True):
            colour, shape = said(text)
            assert colour == next(g.colour for g in world._draw_scene(scene).groups if g.shape == shape)
    noisy = [scene != i for i in range(200) for scene in world[i].fields["caption_scenes"]]
    assert abs(np.mean(noisy) - 0.5) < 5 * (0.25 / len(noisy)) ** 0.5


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"layout": "shelf", "groups": 2}, "groups=2 has no effect with layout='shelf'"),
        ({"layout": "shelf", "aspects": (1, 1)}, "aspects=(1, 1) has no effect with layout='shelf'"),
        ({"topics": 2}, "topics=2 has no effect with layout='scattered'"),
        ({"layout": "shelf", "topics": 7}, "topics"),
    ],
)
def test_fields_of_the_other_layout_are_refused(fields: dict, said: str) -> None:
    with pytest.raises(ConfigError, match="toyworld") as refused:
        resolve({"data": {"source": "toyworld", "toyworld": fields}})
    assert said in str(refused.value)
