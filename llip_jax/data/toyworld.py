"""ToyWorld: an endless supply of small scenes with exact attributes, boxes, masks and captions."""

import dataclasses
import hashlib
from collections.abc import Mapping
from random import Random
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8

from llip_jax.config import ConfigError, ToyWorldConfig
from llip_jax.data.records import Record
from llip_jax.data.toyworld_captions import ASPECTS, describe, distract
from llip_jax.data.toyworld_render import (
    COLOURS,
    COUNTS,
    POSITIONS,
    SHAPES,
    SIZES,
    SMALLEST_IMAGE,
    TEXTURES,
    Group,
    Scene,
    class_id,
    place,
)
from llip_jax.data.toyworld_shelf import draw_shelf, plain_shelf_captions, shelf_captions, shelf_choices

_SHAPES, _COLOURS, _SIZES, _TEXTURES, _POSITIONS = map(tuple, (SHAPES, COLOURS, SIZES, TEXTURES, POSITIONS))
_CAPTION_ATTEMPTS = 8
"""Draws after which a caption may repeat another one of the same record."""


class _Caption(NamedTuple):
    text: str
    scene: int
    aspects: tuple[str, ...]


class ToyWorld:
    """A source of generated records; each is a pure function of the configuration, the split and its index.

    Scene k of a split is drawn from a random stream of its own. Sample k shows scene k, unless ``duplicates`` makes it
    repeat the picture of an earlier sample. ``duplicates`` and ``caption_noise`` act on the training split only, so
    that evaluation stays a clean measure of what they do.

    The fields of a record: ``groups`` (a tuple with a dictionary of shape, colour, size, texture, count and position
    for each group), the same of the first group as fields of their own, ``background``, ``boxes`` [n, 4] and
    ``entities`` [n] (see Scene), ``label`` (index into ``classes()``), ``scene`` (number of the scene shown), and for
    each caption ``caption_scenes`` (number of the scene it was written for: another one where it is noise) and
    ``caption_aspects`` (what it mentions; of a shelf, the shape it speaks of). Evaluation adds ``choices`` (a true
    caption and a false one) and ``choice_aspect`` (in which the two differ).
    """

    def __init__(self, config: ToyWorldConfig, split: Literal["train", "eval"], image_size: int) -> None:
        """Raises ConfigError for an image size below 16 pixels, ValueError for an unknown split."""
        if split not in ("train", "eval"):
            raise ValueError(f"expected split 'train' or 'eval', got {split!r}")
        if image_size < SMALLEST_IMAGE:
            raise ConfigError(f"model.image_size is {image_size}: ToyWorld draws {SMALLEST_IMAGE} pixels or more.")
        self.config = config
        self.split = split
        self.image_size = image_size
        self._size = config.train_size if split == "train" else config.eval_size
        self._duplicates = config.duplicates if split == "train" else 0.0
        self._caption_noise = config.caption_noise if split == "train" else 0.0

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Record:
        """The record; raises IndexError outside of 0 <= index < len."""
        number = self._scene_number(index)
        scene = self._draw_scene(number)
        image = self._draw_picture(scene, number)
        captions = self._write_captions(index, number, scene)
        class_name = self.classes()[class_id(scene.groups[0])]
        return Record(
            image=image,
            captions=tuple(caption.text for caption in captions),
            kinds=("captions",) * len(captions),
            specific=len(captions),
            image_group=_digest(image.tobytes()),
            name=f"toyworld/{self.split}/{index}",
            fields={
                **vars(scene.groups[0]),
                "groups": tuple(dict(vars(group)) for group in scene.groups),
                "background": scene.background,
                "boxes": scene.boxes,
                "entities": scene.entities,
                "label": class_id(scene.groups[0]),
                "class_name": class_name,
                "scene_name": f"{class_name} on a {scene.background} background",
                "scene": number,
                "caption_scenes": tuple(caption.scene for caption in captions),
                "caption_aspects": tuple(caption.aspects for caption in captions),
                **(self._write_choices(index, scene) if self.split == "eval" else {}),
            },
        )

    def scene(self, index: int) -> Scene:
        """The scene that sample ``index`` shows, with boxes and masks; raises IndexError outside of the split."""
        return self._draw_scene(self._scene_number(index))

    def classes(self) -> tuple[str, ...]:
        """The 64 class names in label order, such as 'red circle'."""
        return tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)

    def identity(self) -> Mapping[str, str]:
        """Changes with the configuration, the split, the image size, and whatever changes the first records."""
        config = dataclasses.asdict(self.config)
        if self.config.layout == "scattered":  # Runs from before there was a shelf go on.
            del config["layout"], config["topics"]
        parts = [repr((config, self.split, self.image_size))]
        for index in range(min(16, len(self))):
            record = self[index]
            parts += [record.image_group, *record.captions]
        return {f"toyworld/{self.split}": f"{len(self)} samples, {_digest(chr(10).join(parts).encode())}"}

    def _stream(self, purpose: str, number: int) -> Random:
        """A random stream of its own for each seed, split, purpose and number, the same on every machine."""
        return Random(f"toyworld/{self.config.seed}/{self.split}/{purpose}/{number}")

    def _scene_number(self, index: int) -> int:
        """Number of the scene shown by a sample: that of the first sample with this picture."""
        if not 0 <= index < len(self):
            raise IndexError(f"toyworld/{self.split}: index {index} outside of 0 <= index < {len(self)}")
        while self._duplicates and index > 0:
            rng = self._stream("duplicate", index)
            if rng.random() >= self._duplicates:
                break
            index = rng.randrange(index)
        return index

    def _draw_scene(self, number: int) -> Scene:
        """Draws every attribute uniformly; groups of one scene differ in shape, colour and position."""
        rng = self._stream("scene", number)
        if self.config.layout == "shelf":
            return draw_shelf(self.image_size, rng)
        count = self.config.groups
        background, *colours = rng.sample(_COLOURS, 1 + count)
        shapes = rng.sample(_SHAPES, count)
        # The center overlaps the quadrants, so only a group without neighbours can lie there.
        positions = rng.sample(_POSITIONS if count == 1 else [p for p in _POSITIONS if p != "center"], count)
        groups = tuple(
            Group(shape, colour, rng.choice(_SIZES), rng.choice(_TEXTURES), rng.choice(COUNTS), position)
            for shape, colour, position in zip(shapes, colours, positions, strict=True)
        )
        corners = tuple(
            place(group.position, group.count, group.size, groups=count, image_size=self.image_size, rng=rng)
            for group in groups
        )
        return Scene(self.image_size, background, groups, corners)

    def _draw_picture(self, scene: Scene, number: int) -> UInt8[np.ndarray, "H W 3"]:
        """The scene with its pixel noise, which belongs to the picture: samples that repeat it repeat the noise."""
        image = scene.draw()
        if not self.config.pixel_noise:
            return image
        generator = np.random.default_rng(self._stream("pixel noise", number).getrandbits(64))
        noisy = generator.standard_normal(image.shape, np.float32)
        noisy *= 255 * self.config.pixel_noise
        noisy += image
        np.rint(noisy, out=noisy)
        return np.clip(noisy, 0, 255, out=noisy).astype(np.uint8)

    def _write_captions(self, index: int, number: int, scene: Scene) -> list[_Caption]:
        """The sample's captions, different where the grammar allows.

        Noise captions describe a scene drawn uniformly from the other ones of the split. By chance they may fit.
        """
        rng = self._stream("captions", index)
        if self.config.layout == "shelf":
            return self._write_shelf_captions(number, scene, rng)
        fewest, most = self.config.aspects
        captions: list[_Caption] = []
        for _ in range(self.config.captions):
            source, described = self._described(number, scene, rng)
            for _ in range(_CAPTION_ATTEMPTS):
                aspects = tuple(rng.sample(ASPECTS, rng.randint(fewest, most)))
                text = describe(described, aspects, rng)
                if all(text != caption.text for caption in captions):
                    break
            captions.append(_Caption(text, source, aspects))
        return captions

    def _write_shelf_captions(self, number: int, scene: Scene, rng: Random) -> list[_Caption]:
        topics = self.config.topics
        if self.split == "eval":
            return [_Caption(text, number, (shape,)) for text, shape in plain_shelf_captions(scene, topics)]
        captions = []
        for text, shape in shelf_captions(scene, topics, self.config.captions, rng):
            source, described = self._described(number, scene, rng)
            if source != number:
                [(text, shape)] = shelf_captions(described, topics, 1, rng)
            captions.append(_Caption(text, source, (shape,)))
        return captions

    def _described(self, number: int, scene: Scene, rng: Random) -> tuple[int, Scene]:
        """The scene that a caption is written for: the own one, or with ``caption_noise`` any other."""
        if not self._caption_noise or rng.random() >= self._caption_noise:
            return number, scene
        source = rng.randrange(max(len(self), 2) - 1)
        source += source >= number
        return source, self._draw_scene(source)

    def _write_choices(self, index: int, scene: Scene) -> dict[str, Any]:
        # Two only: of several captions that each change another aspect, the true one lies in the middle, and a model
        # that sees no difference would choose it less often than one in so many times.
        rng = self._stream("choices", index)
        if self.config.layout == "shelf":
            return {"choices": shelf_choices(scene, self.config.topics, rng), "choice_aspect": "colour"}
        false: dict[str, str] = {}
        while not false:  # A caption of sizes alone may have no false variant.
            aspects = rng.sample(ASPECTS, rng.randint(*self.config.aspects))
            true, false = distract(scene, aspects, rng.getrandbits(64))
        aspect = rng.choice(list(false))
        return {"choices": (true, false[aspect]), "choice_aspect": aspect}


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
