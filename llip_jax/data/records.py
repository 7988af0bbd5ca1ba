"""What a sample is on its way to the device: record -> example -> host batch (numpy only)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict

import numpy as np
from jaxtyping import Float, Int, UInt8


@dataclass(frozen=True)
class Record:
    """One image with its captions, as a source stores it.

    image: encoded file contents (PNG, JPEG, WebP, ...) or decoded RGB pixels.
    captions: at least one non-empty string.
    specific: how many leading captions are specific to the image; the rest are weak (keywords).
    image_group: equal for identical pictures, so that they need not count as each other's negatives.
    name: what an error or a log line calls this sample.
    fields: everything else the source knows (labels, boxes, masks, ...).
    """

    image: bytes | UInt8[np.ndarray, "H W 3"]
    captions: tuple[str, ...]
    specific: int
    image_group: str
    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """Random access to records. Reading an index twice gives equal records; nothing depends on call order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def fingerprint(self) -> str:
        """Changes when the data does; compared when a run is resumed."""
        ...


class Batch(TypedDict):
    """Host batch of B images with C caption slots of L tokens.

    caption_weight sums to 1 over the filled slots of an image; 0 marks an empty slot, whose text and text_mask are 0
    and whose caption_source and text_group are -1.
    image_group and text_group are hashes: equal pictures and equal captions have equal values.
    sample_id is the index in the source of the record that was read; replaced is 1 where it stands in for an
    unreadable one.
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
