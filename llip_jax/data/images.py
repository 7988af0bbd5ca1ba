"""Image bytes to uint8 RGB, and the two ways to bring a picture to the model's size."""

import io
import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps

from llip_jax.config import AugmentConfig

MAX_PIXELS = 64 * 2**20
"""Largest picture decoded by default: 8192 x 8192, 192 MiB of RGB."""

# Raster formats only: some of Pillow's other plug-ins start external programs (EPS) or fetch what the file names.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
_ASPECT = 4 / 3
"""Crops are at most this much wider than high, or higher than wide."""


class ImageError(ValueError):
    """Bytes that are not a readable picture; the message says why."""


def decode(data: bytes, *, short_side: int | None = None, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "H W 3"]:
    """Decodes the first frame to RGB: EXIF orientation applied, transparency laid on white, 16 bits cut to 8.

    Colour profiles are ignored.

    Args:
        data: contents of the file.
        short_side: pixels that the shorter side needs at least; a larger JPEG may then come out at 1/2, 1/4 or 1/8
            of its size, which is faster. None: full size.
        max_pixels: the largest picture to decode.

    Raises:
        ImageError: no known format, damaged or truncated, or more than ``max_pixels`` by the header (then nothing
            is decoded).
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise ImageError(f"{image.width}x{image.height} is more than {max_pixels} pixels")
            if short_side is not None:
                image.draft(None, (short_side, short_side))
            return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))
    except ImageError:
        raise
    except Exception as error:  # Pillow's plug-ins raise nearly any type on damaged files.
        raise ImageError(f"cannot decode image: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageError("floating-point pixels have no defined range")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips it at 255.
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return image.convert("RGB")


def resize_for_eval(image: UInt8[np.ndarray, "H W 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Antialiased bicubic resize of the shorter side to ``size`` pixels, then the central square."""
    height, width = image.shape[:2]
    if height == width == size:
        return image
    short = min(height, width)
    if max(height, width) > 4 * short:
        # Far from the square that is kept, and resized whole a line of pixels would fill the memory.
        top, left = max(0, height - 4 * short) // 2, max(0, width - 4 * short) // 2
        image = image[top : top + 4 * short, left : left + 4 * short]
        height, width = image.shape[:2]
    # The longer side rounds down and the margin to the nearest, as in torchvision's Resize and CenterCrop.
    new_height, new_width = size * height // short, size * width // short
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    resized = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BICUBIC)
    return np.asarray(resized)[top : top + size, left : left + size]


def augment(
    image: UInt8[np.ndarray, "H W 3"], size: int, config: AugmentConfig, rng: np.random.Generator
) -> UInt8[np.ndarray, "size size 3"]:
    """A training view: random resized crop (or :func:`resize_for_eval` where cropping is off), flip and colour."""
    height, width = image.shape[:2]
    if config.crop_scale == (1.0, 1.0):
        image = resize_for_eval(image, size)
    else:
        box = crop_box(height, width, config.crop_scale, rng)
        image = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=box))
    if config.flip and rng.random() < 0.5:
        image = image[:, ::-1]
    if config.color > 0:
        picture = Image.fromarray(image)
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            picture = enhance(picture).enhance(rng.uniform(1 - config.color, 1 + config.color))
        image = np.asarray(picture)
    if config.grayscale > 0 and rng.random() < config.grayscale:
        image = np.asarray(Image.fromarray(image).convert("L").convert("RGB"))
    return image


def crop_box(
    height: int, width: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """Random crop (left, top, right, bottom) in fractional pixels.

    The area is uniform in ``scale`` times the image's. The aspect, width over height, is log-uniform in 3/4 .. 4/3,
    narrowed to what fits into the image at that area. Where nothing fits (long images), the crop is the largest one
    of the permitted aspect that is closest to the image's, and its area is smaller than asked.
    """
    share = rng.uniform(*scale)
    low, high = max(1 / _ASPECT, share * width / height), min(_ASPECT, width / (share * height))
    if low <= high:
        aspect = math.exp(rng.uniform(math.log(low), math.log(high)))
        area = share * width * height
    else:
        aspect = _ASPECT if width > height else 1 / _ASPECT
        area = min(width**2 / aspect, height**2 * aspect)
    # Rounding may put a side a hair beyond the image, which Pillow refuses.
    crop_width, crop_height = min(math.sqrt(area * aspect), width), min(math.sqrt(area / aspect), height)
    left, top = rng.uniform(0, width - crop_width), rng.uniform(0, height - crop_height)
    return left, top, min(left + crop_width, width), min(top + crop_height, height)
