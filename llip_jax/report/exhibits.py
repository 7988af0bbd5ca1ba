"""Exhibits of an evaluation: pictures, and what was said about them. Texts and names of files are untrusted."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import pydantic
from PIL import Image
from pydantic.dataclasses import dataclass

from llip_jax.config import ConfigError
from llip_jax.report.run_files import parsed


def _plain(name: str) -> str:
    if Path(name).name != name or Path(name).suffix != ".webp":
        raise ValueError(f"expected the plain name of a .webp file, got {name!r}")
    return name


PictureName = Annotated[str, pydantic.AfterValidator(_plain)]


@dataclass(frozen=True)
class TextAnswer:
    """A text that was found for an image."""

    text: str
    score: float
    right: bool


@dataclass(frozen=True)
class ImageAnswer:
    """An image that was found for a text."""

    image: PictureName
    name: str
    score: float
    right: bool


@dataclass(frozen=True)
class ImageQuery:
    """An image and the captions found for it; ``rank`` is that of the first right one."""

    image: PictureName
    name: str
    right: bool
    rank: int
    answers: Sequence[TextAnswer]
    captions: Sequence[str] = ()


@dataclass(frozen=True)
class TextQuery:
    """A caption and the images found for it; ``rank`` is that of the first right one."""

    text: str
    right: bool
    rank: int
    answers: Sequence[ImageAnswer]


@dataclass(frozen=True)
class Classified:
    """An image, its class, and the classes found for it."""

    image: PictureName
    name: str
    label: str
    right: bool
    answers: Sequence[TextAnswer]


@dataclass(frozen=True)
class CaptionMap:
    """What a caption makes the model look at."""

    text: str
    score: float
    map: PictureName


@dataclass(frozen=True)
class Mapped:
    """An image, its map without a caption, and those that captions make of it."""

    image: PictureName
    name: str
    uncaptioned: PictureName
    captions: Sequence[CaptionMap]


@dataclass(frozen=True)
class Attribution:
    """A caption whose words speak for (above 0) or against (below 0) the image."""

    image: PictureName
    name: str
    text: str
    score: float
    tokens: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Exhibits:
    """eval/STEP/exhibits.json."""

    image_to_text: Sequence[ImageQuery] = ()
    text_to_image: Sequence[TextQuery] = ()
    zero_shot: Sequence[Classified] = ()
    maps: Sequence[Mapped] = ()
    mismatch: Sequence[Attribution] = ()


class Picture(NamedTuple):
    """An image file as it is, and its size in pixels."""

    webp: bytes
    width: int
    height: int


_EXHIBITS = pydantic.TypeAdapter(Exhibits)


def read_exhibits(folder: Path) -> tuple[Exhibits, dict[str, Picture]]:
    """The exhibits of an evaluation's folder, and the pictures that they name; none where there are none.

    Raises:
        ConfigError: exhibits.json is damaged, or a picture is missing or none.
    """
    path = folder / "exhibits.json"
    if not path.exists():
        return Exhibits(), {}
    exhibits = parsed(_EXHIBITS, path)
    names = [query.image for query in exhibits.image_to_text]
    names += [query.image for query in exhibits.zero_shot]
    names += [shown.image for shown in exhibits.mismatch]
    names += [answer.image for query in exhibits.text_to_image for answer in query.answers]
    for mapped in exhibits.maps:
        names += [mapped.image, mapped.uncaptioned, *(caption.map for caption in mapped.captions)]
    return exhibits, {name: _picture(folder / name) for name in names}


def _picture(path: Path) -> Picture:
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=("WEBP",)) as image:
            return Picture(data, *image.size)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path}: no picture to show: {error}") from None
