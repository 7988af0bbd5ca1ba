"""What the explorer shows of a picture, captions and classes; it knows no page."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8

from llip_jax.config import ConfigError, LimitsConfig
from llip_jax.data.images import Pixels, open_picture, resize_for_eval
from llip_jax.data.records import BadSample
from llip_jax.evaluation.classes import ClassSpec
from llip_jax.evaluation.maps import overlay
from llip_jax.inference import TEMPLATES, Model, Texts

UPLOAD = LimitsConfig(image_bytes=2**25)
"""What an uploaded picture may be."""
MOST_CAPTIONS = 16
MOST_CLASSES = 1000
MOST_CHARACTERS = 300
"""Of a caption or a class name."""
GUESSES = 5
BLOCK = 4
"""Captions go through the model so many at a time, blanks behind the last ones: it is compiled for one number alone,
before anybody waits. On a CPU a ViT-B/32 makes 4 maps in a third of the time of 16 (2.3 s, 6.8 s), one in 0.9 s."""

_SHOWN = 384
"""Pictures are shown at about so many pixels."""


class Subject(NamedTuple):
    """The central square of a picture, as it is ``seen`` by the model and ``shown`` to people."""

    seen: UInt8[np.ndarray, "S S 3"]
    shown: UInt8[np.ndarray, "D D 3"]


class Comparison(NamedTuple):
    """A picture and captions.

    shown: the picture.
    chance: if ``by_itself``, a sigmoid-trained model's probability that the caption matches; otherwise the softmax over
        these captions.
    maps: the picture under the map of no caption, then under each caption's; none where the tower has no maps.
    """

    shown: Pixels
    captions: Sequence[str]
    cosines: Float[np.ndarray, "J"]
    chance: Float[np.ndarray, "J"]
    by_itself: bool
    maps: Sequence[Pixels]


class Example(NamedTuple):
    """A picture of the run's evaluation set and some of its captions, one a line."""

    subject: Subject
    captions: str


@dataclass(frozen=True)
class Exhibit:
    """A model, what it is called, and what its run has to offer the page."""

    model: Model
    name: str
    examples: Sequence[Example] = ()
    classes: Sequence[str] = ()
    templates: Sequence[str] = TEMPLATES


def read_picture(image: bytes | Pixels, size: int, limits: LimitsConfig = UPLOAD) -> Subject:
    """A picture, from a file's contents or decoded, for a model of ``size`` pixels.

    Raises:
        ConfigError: it cannot be read or is beyond ``limits``.
    """
    try:
        pixels = open_picture(image, limits).decode(1.0) if isinstance(image, bytes) else image
    except BadSample as error:
        raise ConfigError(f"this file cannot be used as a picture: {error}.") from error
    shown = resize_for_eval(pixels, min(_SHOWN, *pixels.shape[:2]))
    factor = max(1, _SHOWN // len(shown))
    return Subject(resize_for_eval(pixels, size), shown.repeat(factor, axis=0).repeat(factor, axis=1))


def read_lines(text: str, what: str, most: int) -> list[str]:
    """The lines of a text, without blank and repeated ones.

    Raises:
        ConfigError: there are none or too many, or one is too long.
    """
    lines = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not lines:
        raise ConfigError(f"Type a {what}, or several, one a line.")
    if len(lines) > most:
        raise ConfigError(f"These are {len(lines):,} lines; expected at most {most:,}, one {what} each.")
    if long := next((line for line in lines if len(line) > MOST_CHARACTERS), None):
        raise ConfigError(f"A {what} has {len(long):,} characters, expected at most {MOST_CHARACTERS}: {long[:40]}...")
    return lines


def compare(model: Model, subject: Subject, captions: Sequence[str]) -> Comparison:
    """Scores of captions, and the patches that each agrees with.

    Raises:
        ConfigError: see :meth:`Model.score`.
    """
    has_maps = model.config.model.vision.big_vision is None  # whose tower hides its attention
    image = model.encode_image(subject.seen)
    maps = [*model.maps(subject.seen)[0]] if has_maps else []
    rows = []
    for start in range(0, len(captions), BLOCK):
        some = captions[start : start + BLOCK]
        texts = model.encode_text([*some, *[""] * (BLOCK - len(some))])
        rows.append(model.score(image, texts)[0, : len(some)])
        if has_maps:
            maps += [*model.maps(subject.seen, texts)[0, : len(some)]]
    cosines = np.concatenate(rows)
    by_itself = model.config.objective.sigmoid is not None
    logits = model.logit_scale * cosines
    chance = 1 / (1 + np.exp(-(logits + model.logit_bias))) if by_itself else _softmax(logits)
    overlays = [overlay(subject.shown, one) for one in maps]
    return Comparison(subject.shown, captions, cosines, chance, by_itself, overlays)


def guess(model: Model, subject: Subject, classes: Sequence[str], templates: Sequence[str]) -> list[tuple[str, float]]:
    """The most probable classes with their probabilities, which are those of :meth:`Model.classify`.

    Raises:
        ConfigError: see :meth:`Model.classify`.
    """
    cosines = model.score(subject.seen, _class_texts(model, tuple(classes), tuple(templates)))[0]
    probabilities = _softmax(model.logit_scale * cosines)
    best = np.argsort(-probabilities, kind="stable")[:GUESSES]
    return [(classes[index], float(probabilities[index])) for index in best]


def warm_up(exhibit: Exhibit) -> None:
    """Compiles what a first comparison would wait for."""
    side = exhibit.model.config.model.image_size
    subject = read_picture(np.zeros((side, side, 3), np.uint8), side)
    compare(exhibit.model, subject, ["a"])
    if exhibit.classes:
        guess(exhibit.model, subject, exhibit.classes, exhibit.templates)


@functools.lru_cache(maxsize=4)
def _class_texts(model: Model, classes: tuple[str, ...], templates: tuple[str, ...]) -> Texts:
    """A class's texts averaged, kept from one picture to the next: there may be thousands."""
    spec = ClassSpec.from_names(classes, templates)
    texts = model.encode_text(text for own in spec.texts for text in own)

    def mean(x: Float[np.ndarray, "J *d"]) -> Float[np.ndarray, "C *d"]:
        return x.reshape(len(classes), -1, *x.shape[1:]).mean(axis=1)

    return Texts(*jax.tree.map(mean, (texts.embedding, texts.queries)))


def _softmax(logits: Float[np.ndarray, "C"]) -> Float[np.ndarray, "C"]:
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()
