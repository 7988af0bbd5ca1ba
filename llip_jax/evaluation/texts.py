"""The texts of an evaluation set in one list, so that each is encoded once, and which of them belong to which image."""

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from llip_jax.config import Task
from llip_jax.evaluation.annotations import Annotated

OWN_CAPTIONS = 8
"""Captions of one image that diagnostics look at, the first ones."""


class SetTexts(NamedTuple):
    """T texts: the distinct captions in alphabetical order, then choices that are no captions, then class texts.

    captions: how many captions.
    prompts: how many class texts.
    own: by name (``captions``, ``choices``) the rows of the texts that an image is looked at with, -1 where it has
        fewer than others. Images by their index in the set.
    """

    listed: list[str]
    captions: int
    prompts: int
    own: dict[str, Int[np.ndarray, "N C"]]


def texts_of(known: Annotated, tasks: Collection[Task]) -> SetTexts:
    """The texts that ``tasks`` need."""
    annotations = [
        (annotation.captions, annotation.choices) if annotation else ((), ()) for annotation in known.annotations
    ]
    captions: list[str] = []
    if needs_captions(tasks):
        captions = sorted({text for own, _ in annotations for text in own})
    choices: list[str] = []
    if "choice" in tasks:
        choices = sorted({text for _, own in annotations for text in own} - {*captions})
    row = {text: number for number, text in enumerate([*captions, *choices])}
    own = {}
    if captions and "diagnostics" in tasks:
        own["captions"] = _rows(row, [texts[:OWN_CAPTIONS] for texts, _ in annotations])
    if "choice" in tasks and any(texts for _, texts in annotations):
        own["choices"] = _rows(row, [texts for _, texts in annotations])
    prompts: Sequence[str] = ()
    if known.classes is not None and "zero_shot" in tasks:
        prompts = [text for texts in known.classes.texts for text in texts]
    return SetTexts([*captions, *choices, *prompts], len(captions), len(prompts), own)


def needs_captions(tasks: Collection[Task]) -> bool:
    """Whether any of the tasks looks at all captions of the set."""
    return not {"retrieval", "diagnostics", "exhibits"}.isdisjoint(tasks)


def _rows(row: dict[str, int], texts: Iterable[Sequence[str]]) -> Int[np.ndarray, "N C"]:
    numbers = [[row[text] for text in own] for own in texts]
    filled = np.full((len(numbers), max(map(len, numbers))), -1, np.int32)
    for image, own in enumerate(numbers):
        filled[image, : len(own)] = own
    return filled
