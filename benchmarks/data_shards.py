"""Tar shards of pictures with the statistics of photographs, and of sentences that could describe them.

Pictures are crops of scenes: overlapping flat shapes of all sizes (the edges), lit unevenly and covered by noise whose
amplitude falls with frequency (the texture), some parts smooth and others rough. Equal seeds give equal pictures.
"""

import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFilter

SHARDS = 4
CROPS = 48
"""Pictures of one scene."""
SCENE_SIDE = 960


class ShardSet(NamedTuple):
    """``path`` / {00000..00003}.tar, in the layout of img2dataset: jpg, json and txt of each sample."""

    path: Path
    samples: int
    mean_jpeg_bytes: int

    @property
    def pattern(self) -> str:
        return str(self.path / f"{{00000..{SHARDS - 1:05d}}}.tar")

    @property
    def files(self) -> list[Path]:
        return [self.path / f"{shard:05d}.tar" for shard in range(SHARDS)]


def shard_set(folder: Path, pixels: int, samples: int) -> ShardSet:
    """The set of pictures 256 x 256, or 640 x 480 and 480 x 640, made in ``folder`` unless it is there already."""
    path = folder / f"{pixels}px_{samples}"
    description = path / "set.json"
    if not description.exists():
        making = path.with_suffix(".making")
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        sizes = _write(ShardSet(making, samples, 0), pixels)
        (making / description.name).write_text(json.dumps({"mean_jpeg_bytes": round(float(np.mean(sizes)))}))
        making.rename(path)
    return ShardSet(path, samples, json.loads(description.read_text())["mean_jpeg_bytes"])


def _write(shards: ShardSet, pixels: int) -> list[int]:
    """Writes the tars; bytes of each JPEG."""
    sizes = []
    pictures = _pictures(pixels)
    for number, file in enumerate(shards.files):
        with tarfile.open(file, "w") as tar:
            for row in range(shards.samples // SHARDS):
                picture, caption = next(pictures)
                stream = io.BytesIO()
                picture.save(stream, "JPEG", quality=90)
                sizes.append(stream.tell())
                key = f"{number:05d}{row:04d}"
                facts = {
                    "caption": caption,
                    "url": f"https://example.org/{key}.jpg",
                    "key": key,
                    "status": "success",
                    "error_message": None,
                    "width": picture.width,
                    "height": picture.height,
                    "original_width": picture.width,
                    "original_height": picture.height,
                    "exif": "{}",
                    "sha256": f"{number * shards.samples + row:064x}",
                }
                members = {"jpg": stream.getvalue(), "json": json.dumps(facts).encode(), "txt": caption.encode()}
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return sizes


def _pictures(pixels: int) -> Iterator[tuple[Image.Image, str]]:
    """Endless pictures with captions."""
    scene_number = 0
    while True:
        rng = np.random.default_rng([pixels, scene_number])
        scene = _scene(rng)
        if pixels == 256:  # Small copies of photographs are sharper than cuttings of large ones.
            scene = scene.resize((SCENE_SIDE // 2, SCENE_SIDE // 2), Image.Resampling.BICUBIC)
        for crop in range(CROPS):
            width, height = (256, 256) if pixels == 256 else ((640, 480), (480, 640))[crop % 2]
            left, top = (int(rng.integers(scene.width - side + 1)) for side in (width, height))
            picture = scene.crop((left, top, left + width, top + height))
            if rng.random() < 0.5:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            yield picture, _caption(rng)
        scene_number += 1


def _scene(rng: np.random.Generator) -> Image.Image:
    side = SCENE_SIDE
    palette = rng.normal(120, 20, 3) + rng.normal(0, 45, (8, 1)) + rng.normal(0, 18, (8, 3))
    canvas = Image.new("RGB", (side, side), _color(palette[0]))
    draw = ImageDraw.Draw(canvas)
    for size in side / 3 * rng.uniform(0.1, 1, 500) ** 2:
        x, y = rng.uniform(0, side, 2)
        color = _color(palette[rng.integers(8)] + rng.normal(0, 12, 3))
        if rng.random() < 0.5:
            width, height = size * rng.uniform(0.3, 1, 2)
            draw.ellipse((x - width, y - height, x + width, y + height), fill=color)
        else:
            angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 7)))
            draw.polygon([(x + size * np.cos(a), y + size * np.sin(a)) for a in angles], fill=color)
    shapes = np.asarray(canvas.filter(ImageFilter.GaussianBlur(0.8)), np.float32)
    light = 0.85 + 0.15 * _noise(rng, 2.0)
    roughness = 18 * rng.lognormal(0, 0.4) * np.clip(_noise(rng, 1.8) + 0.5, 0, 2)
    texture = roughness * _noise(rng, 1.0) + rng.normal(0, 2, (side, side))
    tint = 5 * np.stack([_noise(rng, 1.4) for _ in range(3)], axis=-1)
    return Image.fromarray((shapes * light[..., None] + texture[..., None] + tint).clip(0, 255).astype(np.uint8))


def _color(values: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in values.clip(15, 240))
    return red, green, blue


def _noise(rng: np.random.Generator, exponent: float) -> Float[np.ndarray, "SCENE_SIDE SCENE_SIDE"]:
    """Noise of mean 0 and standard deviation 1 whose amplitude falls as 1 / frequency ** ``exponent``."""
    vertical, horizontal = np.fft.fftfreq(SCENE_SIDE)[:, None], np.fft.rfftfreq(SCENE_SIDE)
    amplitude = np.maximum(np.hypot(vertical, horizontal), 1 / SCENE_SIDE) ** -exponent
    amplitude[0, 0] = 0
    noise = np.fft.irfft2(amplitude * np.exp(2j * np.pi * rng.random(amplitude.shape)), s=(SCENE_SIDE, SCENE_SIDE))
    return (noise / noise.std()).astype(np.float32)


_ADJECTIVES = ("old", "small", "red", "wooden", "snowy", "narrow", "vintage", "rusty", "colorful", "crowded", "foggy")
_NOUNS = (
    "dog",
    "bicycle",
    "harbor",
    "sailboat",
    "tram",
    "staircase",
    "lighthouse",
    "living-room",
    "waterfall",
    "guitar",
)
_VERBS = ("standing", "leaning", "resting", "waiting", "shining", "photographed", "painted", "parked", "seen")
_PLACES = (
    "near the river",
    "in downtown Lisbon",
    "under a cloudy sky",
    "at sunset",
    "on a gravel road",
    "next to an old wall",
    "by the sea",
    "against a white background",
)
_ENDINGS = (
    "",
    ".",
    ", stock photo",
    ", Germany, 2014",
    " - free shipping!",
    " (12 pieces)",
    ", oil on canvas",
    " #travel",
)


def _caption(rng: np.random.Generator) -> str:
    """An alt text of about 8 to 25 words."""

    def thing() -> str:
        return f"{rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}"

    parts = [f"A {thing()} {rng.choice(_VERBS)} {rng.choice(_PLACES)}"]
    for _ in range(rng.integers(3)):
        parts.append(f"with a {thing()} and the {thing()} {rng.choice(_PLACES)}")
    return " ".join(parts) + str(rng.choice(_ENDINGS))
