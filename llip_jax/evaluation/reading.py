"""What one pass of a model over an evaluation set leaves on the host: all that tasks are computed from."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from llip_jax.data.fields import lookup
from llip_jax.data.records import BadSample
from llip_jax.evaluation.classes import ClassSpec

NO_VALUE = "(none)"
"""The group of images that lack a field."""


class Annotation(NamedTuple):
    """What is known of an image besides its pixels.

    labels: class numbers; one, several of a multi-label set (or none), empty where the set has no classes.
    choices: captions of an image-caption choice, the true one first.
    digest: of picture, captions and choices: what two evaluations must have in common for the image to be the same.
    """

    name: str
    captions: tuple[str, ...]
    labels: tuple[int, ...]
    choices: tuple[str, ...]
    fields: Mapping[str, Any]
    digest: str = ""

    def value(self, field: str) -> Any:
        """Of a record field, or of a nested one by dots; None where there is none or it cannot be read."""
        try:
            return lookup(self.name, self.fields, field)
        except BadSample:
            return None


class Own(NamedTuple):
    """Every image with some texts of its own (its captions, or the choices it is offered), filled up to C.

    mask: which of the C there are.
    text: their rows in ``Reading.text_embedding``, 0 where there is none; None for choices, which may have none there.
    cosines: of the image, mixed by the text, with the text.
    mixed: the image mixed by the text, L2-normalised.
    weights: of the mixture tokens, head by head; None where texts do not mix images.
    """

    mask: Bool[np.ndarray, "N C"]
    text: Int[np.ndarray, "N C"] | None
    cosines: Float[np.ndarray, "N C"]
    mixed: Float[np.ndarray, "N C d"] | None
    weights: Float[np.ndarray, "N C M K"] | None


class Labelled(NamedTuple):
    """Named embeddings of images and their class numbers, for probes to learn from."""

    embeddings: dict[str, Float[np.ndarray, "n d"]]
    labels: Int[np.ndarray, "n"]
    digest: str


@dataclass(frozen=True)
class Reading:
    """The usable images of a set, in order (rows), with everything the model made of them.

    Embeddings by name: ``unconditioned`` (DualEncoder.unconditioned_embedding), ``tower`` (what the pooler reads,
    before any projection: the class token, or the mean of the mixture tokens) and ``patches`` (the patch tokens' mean).
    Parts that no task asked for are None or empty.
    """

    rows: Int[np.ndarray, "N"]
    """Indices in the set's source."""
    annotations: list[Annotation]
    unreadable: int
    texts: list[str]
    """J distinct captions: the columns of ``positives`` and ``caption_scores``."""
    positives: Bool[np.ndarray, "N J"]
    caption_scores: Float[np.ndarray, "N J"]
    text_embedding: Float[np.ndarray, "T d"]
    """Of the J captions, then of other texts; L2-normalised."""
    classes: ClassSpec | None
    multi_label: bool
    class_scores: dict[str, Float[np.ndarray, "N C"]]
    """By scorer."""
    embeddings: dict[str, Float[np.ndarray, "N _"]]
    captions: Own | None
    choices: Own | None
    train: Labelled | None

    def labels(self) -> Int[np.ndarray, "N"]:
        """The class number of each image of a set with one label an image."""
        return np.asarray([own.labels[0] for own in self.annotations])

    def targets(self) -> Bool[np.ndarray, "N C"]:
        """Which classes each image belongs to."""
        assert self.classes is not None
        targets = np.zeros((len(self.annotations), len(self.classes.names)), bool)
        for row, own in enumerate(self.annotations):
            targets[row, list(own.labels)] = True
        return targets

    def groups(self, field: str) -> list[str]:
        """Value of a record field for each image, as text; ``NO_VALUE`` where it has none."""
        values = [own.value(field) for own in self.annotations]
        return [NO_VALUE if value is None else str(value) for value in values]

    def asked(self) -> dict[str, str]:
        """Digests of what figures depend on besides the model: equal ones were asked the same.

        ``images`` in their order; ``texts``, the captions they were scored with; ``classes``, names and texts;
        ``training``, the labelled images that probes learned from. What there is none of is left out.
        """
        parts = {
            "images": [own.digest for own in self.annotations],
            "texts": self.texts,
            "classes": [] if self.classes is None else [repr(self.classes)],
            "training": [] if self.train is None else [self.train.digest],
        }
        return {name: digest_of(*part) for name, part in parts.items() if part}


def spread(items: Sequence[int] | Int[np.ndarray, "n"], most: int) -> Int[np.ndarray, "m"]:
    """At most so many of the items, evenly spaced."""
    items = np.asarray(items, int)
    return items[np.unique(np.linspace(0, max(len(items) - 1, 0), min(most, len(items))).astype(int))]


def digest_of(*parts: str | bytes) -> str:
    """One digest of several texts or bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
