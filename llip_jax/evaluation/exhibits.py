"""Examples to look at: queries that were answered right and wrong, with the pictures."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from llip_jax.evaluation.figures import Outcome
from llip_jax.evaluation.reading import Reading, spread

QUERIES = 6
"""Queries answered right, and as many answered wrong, of each gallery."""
ANSWERS = 5
MAPPED = 6
"""Pictures with a map for each of their first ``CAPTIONS`` captions."""
CAPTIONS = 3
MISMATCHES = 6
"""Pictures with a caption that is not theirs, word by word."""
PICTURE_SIDE = 128
"""Pixels of the longer side of pictures in galleries, at most; small ones are enlarged by whole factors."""

Picture = UInt8[np.ndarray, "H W 3"]
Maps = Callable[[int, Sequence[str]], tuple[Picture, Float[np.ndarray, "h w"], Float[np.ndarray, "C h w"]]]


class Pictures:
    """Writes pictures into a folder, each once, and names them."""

    def __init__(self, folder: Path, look: Callable[[int], Picture]):
        """Args:
        folder: where to.
        look: the pixels of an image by its row in the reading.
        """
        self._folder, self._look, self._written = folder, look, set[str]()

    def of(self, row: int) -> str:
        """Name of the picture of a row."""
        name = f"i{row}.webp"
        if name not in self._written:
            self.write(name, self._look(row))
        return name

    def write(self, name: str, pixels: Picture) -> str:
        """Writes a picture under a name, which it returns."""
        self._written.add(name)
        image = Image.fromarray(pixels)
        factor = PICTURE_SIDE // max(image.size)
        if factor > 1:  # whole factors keep the edges of tiny pictures, and lossless files their colours
            image = image.resize([side * factor for side in image.size], Image.Resampling.NEAREST)
        elif factor < 1:
            image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
        image.save(self._folder / name, lossless=factor > 1, quality=85, method=4)
        return name


def galleries(reading: Reading, outcomes: Mapping[str, Outcome], pictures: Pictures) -> dict[str, list[dict[str, Any]]]:
    """Queries answered right and wrong, evenly spread over the set, with their best answers.

    ``image_to_text``, ``text_to_image`` and ``zero_shot``; what the set has nothing for is left out.
    """
    shown: dict[str, list[dict[str, Any]]] = {}
    scores, positives = reading.caption_scores, reading.positives
    if (hits := outcomes.get("retrieval/image_to_text_recall_at_1")) is not None:
        shown["image_to_text"] = [
            _image_query(reading, int(hits.unit[query]), hits.values[query], pictures)
            for query in _right_and_wrong(hits.values)
        ]
    if (hits := outcomes.get("retrieval/text_to_image_recall_at_1")) is not None:
        described = np.flatnonzero(positives.any(axis=1))  # other images are no answers
        shown["text_to_image"] = []
        for column in _right_and_wrong(hits.values):
            own_scores, right = scores[described, column], positives[described, column]
            answers = [
                {"image": pictures.of(row), "name": reading.annotations[row].name, "score": score, "right": match}
                for row, score, match in (
                    (int(described[i]), score, match) for i, score, match in _best(own_scores, right)
                )
            ]
            ranked = _ranked(own_scores, right, hits.values[column])
            shown["text_to_image"].append({"text": reading.texts[column], **ranked, "answers": answers})
    if (hits := outcomes.get("zero_shot/top_1_accuracy")) is not None and reading.classes is not None:
        names, class_scores = reading.classes.names, reading.class_scores["mean_text"]
        shown["zero_shot"] = [
            {
                "image": pictures.of(row),
                "name": reading.annotations[row].name,
                "label": names[label],
                "right": bool(hits.values[row] > 0.5),
                "answers": [
                    {"text": names[answer], "score": score, "right": right}
                    for answer, score, right in _best(class_scores[row], np.arange(len(names)) == label)
                ],
            }
            for row, label in ((int(row), reading.labels()[row]) for row in _right_and_wrong(hits.values))
        ]
    return shown


def _image_query(reading: Reading, row: int, hit: float, pictures: Pictures) -> dict[str, Any]:
    scores, positives = reading.caption_scores[row], reading.positives[row]
    return {
        "image": pictures.of(row),
        "name": reading.annotations[row].name,
        **_ranked(scores, positives, hit),
        "captions": list(reading.annotations[row].captions),
        "answers": [
            {"text": reading.texts[column], "score": score, "right": right}
            for column, score, right in _best(scores, positives)
        ],
    }


def _ranked(scores: Float[np.ndarray, "A"], positives: Bool[np.ndarray, "A"], hit: float) -> dict[str, Any]:
    """Whether the query counts as right, and the rank of its best positive; ``hit`` is below 1 where it ties."""
    return {"right": bool(hit > 0.5), "rank": 1 + int(np.count_nonzero(scores > scores[positives].max()))}


def _best(scores: Float[np.ndarray, "A"], right: Bool[np.ndarray, "A"]) -> list[tuple[int, float, bool]]:
    """The best answers: index, score, whether it is right."""
    order = np.argsort(-scores, kind="stable")[:ANSWERS]
    return [(int(answer), round(float(scores[answer]), 4), bool(right[answer])) for answer in order]


def _right_and_wrong(hits: Float[np.ndarray, "Q"]) -> Int[np.ndarray, "q"]:
    """Queries of both kinds, as evenly spread as there are."""
    kinds = (np.flatnonzero(hits > 0.5), np.flatnonzero(hits <= 0.5))
    return np.concatenate([spread(kind, QUERIES) for kind in kinds])


def mapped(
    reading: Reading, maps: Maps, overlay: Callable[[Picture, Any], Picture], pictures: Pictures
) -> list[dict[str, Any]]:
    """Pictures evenly spread over the set, each with its map without a caption and those of its first captions.

    Args:
        reading: of the set.
        maps: of the picture of a row and captions: the map without caption [h, w], and those of the captions [C, h, w].
        overlay: a map laid over a picture.
        pictures: where they are written.
    """
    captioned = [row for row, own in enumerate(reading.annotations) if own.captions]
    shown = []
    for row in map(int, spread(captioned, MAPPED)):
        captions = reading.annotations[row].captions[:CAPTIONS]
        seen, uncaptioned, of_captions = maps(row, captions)
        scores = [float(reading.caption_scores[row, reading.texts.index(text)]) for text in captions]
        written = [
            pictures.write(f"m{row}_{number}.webp", overlay(seen, one)) for number, one in enumerate(of_captions)
        ]
        shown.append(
            {
                "image": pictures.write(f"s{row}.webp", seen),
                "name": reading.annotations[row].name,
                "uncaptioned": pictures.write(f"m{row}_u.webp", overlay(seen, uncaptioned)),
                "captions": [
                    {"text": text, "score": round(score, 4), "map": picture}
                    for text, score, picture in zip(captions, scores, written, strict=True)
                ],
            }
        )
    return shown
