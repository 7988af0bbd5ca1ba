"""What a sample is on its way to the device: row -> record -> example -> host batch (numpy only)."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypedDict, get_args

import numpy as np
from jaxtyping import Float, Int, UInt8

Reason = Literal[
    "unreadable",
    "bad_metadata",
    "missing_image",
    "not_an_image",
    "truncated_image",
    "image_too_large",
    "image_too_small",
    "missing_caption",
    "empty_caption",
    "caption_not_text",
    "caption_not_utf8",
]
"""Why a sample cannot be used, in the order in which a sample is examined."""

REASONS: tuple[Reason, ...] = get_args(Reason)


class BadSample(ValueError):
    """A sample that cannot be used; training takes the next one in its place and counts it by ``reason``."""

    def __init__(self, reason: Reason, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["BadSample"], tuple[Reason, str]]:
        return type(self), (self.reason, str(self))


@dataclass(frozen=True)
class Record:
    """One image with its captions.

    image: encoded file contents (PNG, JPEG, WebP, ...) or decoded RGB pixels.
    captions: non-empty strings; at least one, but for evaluation sets that are for classification only.
    kinds: for each caption the column it comes from ("txt", "rewrites", ...), which caption rules refer to.
    specific: how many leading captions are specific to the image; the rest are weak (keywords).
    image_group: equal for identical pictures, so that they need not count as each other's negatives.
    name: what an error or a log line calls this sample.
    fields: everything else the source knows (labels, boxes, masks, ...).
    """

    image: bytes | UInt8[np.ndarray, "H W 3"]
    captions: tuple[str, ...]
    kinds: tuple[str, ...]
    specific: int
    image_group: str
    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)


class Rows(Protocol):
    """A data format: random access to samples as it stores them. Nothing depends on the order of calls.

    Can be pickled (for worker processes) and read from several threads at once. Files are opened when they are read.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[str, Mapping[str, Any]]:
        """The sample's name and its columns; columns may be nested mappings.

        Raises:
            BadSample: the stored data is damaged.
            OSError: a file cannot be read.
        """
        ...

    def identity(self) -> Mapping[str, str]:
        """See :meth:`Source.identity`."""
        ...


class Source(Protocol):
    """Random access to records. Reading an index twice gives equal records; nothing depends on call order.

    Can be pickled (for worker processes) and read from several threads at once.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Reads a record; the picture is not decoded yet.

        Raises:
            BadSample: the sample cannot be used.
            OSError: a file cannot be read.
        """
        ...

    def identity(self) -> Mapping[str, str]:
        """What the data is, part by part (a shard's name -> its samples, size and digest), without where it lies.

        Changes when the data does; compared, and the difference told, when a run is resumed.
        """
        ...


def fingerprint(identity: Mapping[str, str]) -> str:
    """SHA-256 of a source's identity."""
    digest = hashlib.sha256()
    for part, value in identity.items():
        digest.update(f"{part}\0{value}\0".encode(errors="surrogatepass"))
    return digest.hexdigest()


class Batch(TypedDict):
    """Host batch of B images with C caption slots of L tokens.

    caption_weight sums to 1 over the filled slots of an image; 0 marks an empty slot, whose text and text_mask are 0
    and whose caption_source and text_group are -1.
    image_group and text_group are hashes: equal pictures and equal captions have equal values.
    sample_id is the index of the record that was read, counted through all parts of a mixture.
    replaced is 0 where the planned sample was read, otherwise 1 + the index in REASONS of what was wrong with it.
    """

    image: UInt8[np.ndarray, "B H W 3"]
    text: Int[np.ndarray, "B C L"]
    text_mask: Int[np.ndarray, "B C L"]
    caption_weight: Float[np.ndarray, "B C"]
    caption_source: Int[np.ndarray, "B C"]
    image_group: Int[np.ndarray, "B"]
    text_group: Int[np.ndarray, "B C"]
    sample_id: Int[np.ndarray, "B"]
    replaced: Int[np.ndarray, "B"]


def batch_shapes(
    batch_size: int, slots: int, image_size: int, text_length: int
) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
    """Shape and type of each column of a :class:`Batch`."""
    return {
        "image": ((batch_size, image_size, image_size, 3), np.uint8),
        "text": ((batch_size, slots, text_length), np.int32),
        "text_mask": ((batch_size, slots, text_length), np.int32),
        "caption_weight": ((batch_size, slots), np.float32),
        "caption_source": ((batch_size, slots), np.int32),
        "image_group": ((batch_size,), np.int32),
        "text_group": ((batch_size, slots), np.int32),
        "sample_id": ((batch_size,), np.int64),
        "replaced": ((batch_size,), np.int32),
    }
