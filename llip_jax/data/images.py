"""Image bytes to uint8 RGB of the model's size: exactly for evaluation, quickly for training.

Decoder and resampling were chosen by measurement (docs/data.md): libjpeg-turbo through simplejpeg for ordinary JPEGs,
Pillow for everything else; OpenCV shrinks training views, Pillow evaluation images.
"""

import io
import logging
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps, UnidentifiedImageError

from llip_jax.config import AugmentConfig, LimitsConfig
from llip_jax.data.records import BadSample

Pixels = UInt8[np.ndarray, "H W 3"]

# Raster formats only: some of Pillow's other plug-ins start external programs (EPS) or fetch what the file names.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
_ASPECT = 4 / 3
"""Crops are at most this much wider than high, or higher than wide."""
_BLURRED = 1.15
"""Up to this much shrinking, bicubic alone is still nearer to the antialiased one than bilinear is."""
_MOST_SCANS = 100
"""Ten are usual in a progressive JPEG; one of its thumbnails may bring as many."""
_METADATA_BYTES = 2**18
"""EXIF and XMP data are looked for at the beginning of a JPEG."""
_EXIF_ORIENTATION = 0x0112
_SIDEWAYS = range(5, 9)
"""EXIF orientations that exchange width and height."""

cv2.setNumThreads(0)  # Parallel over images; threads of its own would only get in their way.
# What matters about a picture is told as BadSample, at a bounded rate.
logging.getLogger("PIL").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", module=r"PIL\.")


class Picture(NamedTuple):
    """A picture whose size, as it is shown, is known.

    ``decode(scale)`` gives RGB: the first frame, upright, transparency laid on white, 16 bits cut to 8; colour profiles
    are ignored. ``scale`` is the share of its size that is needed: an ordinary JPEG comes out at 1, 1/2, 1/4 or 1/8 of
    its size, the smallest that is large enough, which is less work and shrinks well. Raises BadSample where the picture
    is damaged.
    """

    height: int
    width: int
    decode: Callable[[float], Pixels]


def open_picture(data: bytes, limits: LimitsConfig = LimitsConfig()) -> Picture:
    """Reads a picture's header and, except of an ordinary JPEG, the picture.

    Raises:
        BadSample: no known format, damaged, or more pixels or a shorter side than ``limits`` allow (by its header:
            then nothing is decoded).
    """
    if len(data) > limits.image_bytes:
        raise BadSample("image_too_large", f"image of {len(data)} bytes is larger than {limits.image_bytes}")
    # Each scan of a progressive JPEG costs as much as a whole picture and may take a hundred bytes.
    if data.startswith(b"\xff\xd8") and (scans := data.count(b"\xff\xda")) > _MOST_SCANS:
        raise BadSample("image_too_large", f"JPEG of {scans} scans, more than {_MOST_SCANS}")
    size = _jpeg_size(data)
    if size is None:
        pixels = _decode_any(data, limits)
        return Picture(pixels.shape[0], pixels.shape[1], lambda scale: pixels)
    check_size(*size, limits)
    turned = any(data.find(mark, 0, _METADATA_BYTES) >= 0 for mark in (b"Exif\0\0", b"tiff:Orientation"))
    orientation = _orientation(data) if turned else 1
    height, width = size[::-1] if orientation in _SIDEWAYS else size

    def decode(scale: float) -> Pixels:
        try:
            return _upright(_decode_jpeg(data, *size, scale), orientation)
        except ValueError:  # It is strict about damage that does not matter; Pillow has the last word.
            return _decode_any(data, limits)

    return Picture(height, width, decode)


def check_size(height: int, width: int, limits: LimitsConfig) -> None:
    """Raises BadSample where there are more pixels or a shorter side than ``limits`` allow."""
    if width * height > limits.pixels:
        raise BadSample("image_too_large", f"{width}x{height} is more than {limits.pixels} pixels")
    if min(width, height) < limits.image_side:
        raise BadSample("image_too_small", f"{width}x{height} has a side of fewer than {limits.image_side} pixels")


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of an ordinary JPEG; None where only Pillow will do."""
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    # Others need care with inverted inks and with what applications mean by them.
    return (height, width) if colours in ("YCbCr", "Gray") else None


def _decode_jpeg(data: bytes, height: int, width: int, scale: float) -> Pixels:
    # libjpeg-turbo has fast code for these fractions only.
    reduction = next(n for n in (8, 4, 2, 1) if n == 1 or scale <= 1 / n)
    return simplejpeg.decode_jpeg(
        data, min_height=-(-height // reduction), min_width=-(-width // reduction), min_factor=reduction
    )


def _orientation(data: bytes) -> int:
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # Damaged EXIF data is no reason to lose the picture.
        return 1
    return value if value in range(1, 9) else 1


def _decode_any(data: bytes, limits: LimitsConfig) -> Pixels:
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return from_pillow(image, limits)
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("image_too_large", f"cannot decode image: {error}") from error
    except UnidentifiedImageError as error:
        raise BadSample("not_an_image", "no known image format") from error
    except Exception as error:  # Pillow's plug-ins raise nearly any type on damaged files.
        raise BadSample("truncated_image", f"cannot decode image: {error}") from error


def from_pillow(image: Image.Image, limits: LimitsConfig = LimitsConfig()) -> Pixels:
    """Pixels of a picture that Pillow has opened, as :class:`Picture` describes them.

    Raises:
        BadSample: more pixels or a shorter side than ``limits`` allow, or pixels without a defined range.
        Exception: what Pillow raises on a damaged file.
    """
    check_size(image.height, image.width, limits)
    return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))


def _upright(image: Pixels, orientation: int) -> Pixels:
    """Undoes an EXIF orientation."""
    if orientation in _SIDEWAYS:
        image = image.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BadSample("not_an_image", "floating-point pixels have no defined range")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips it at 255.
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return image.convert("RGB")


def resize_for_eval(image: Pixels, size: int) -> UInt8[np.ndarray, "size size 3"]:
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


def training_view(
    image: bytes | Pixels,
    size: int,
    config: AugmentConfig,
    rng: np.random.Generator,
    limits: LimitsConfig = LimitsConfig(),
) -> UInt8[np.ndarray, "size size 3"]:
    """A random resized crop (or :func:`resize_for_eval` where cropping is off), flip and colour changes.

    Raises:
        BadSample: the picture cannot be decoded, or is beyond ``limits``.
    """
    if isinstance(image, bytes):
        height, width, decode = open_picture(image, limits)
    else:
        height, width, decode = *image.shape[:2], lambda scale: image
    if config.crop_scale == (1.0, 1.0):
        view = resize_for_eval(decode(size / min(height, width)), size)
    else:
        left, top, right, bottom = crop_box(height, width, config.crop_scale, rng)
        pixels = decode(size / min(right - left, bottom - top))
        # A JPEG may have come out smaller.
        y, x = pixels.shape[0] / height, pixels.shape[1] / width
        top, bottom, left, right = round(top * y), round(bottom * y), round(left * x), round(right * x)
        view = shrink(pixels[top : max(bottom, top + 1), left : max(right, left + 1)], size)
    if config.flip and rng.random() < 0.5:
        view = view[:, ::-1]
    if config.color > 0:
        colours = Image.fromarray(view)
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            colours = enhance(colours).enhance(rng.uniform(1 - config.color, 1 + config.color))
        view = np.asarray(colours)
    if config.grayscale > 0 and rng.random() < config.grayscale:
        view = np.asarray(Image.fromarray(view).convert("L").convert("RGB"))
    return view


def shrink(image: Pixels, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Resizes to a square about as Pillow's antialiased bicubic does, several times faster.

    A Gaussian against aliasing, then bicubic; averages over areas from a third on. The result is nearer to Pillow's
    bicubic than Pillow's antialiased bilinear is (photographs: 40 to 49 dB against 38 to 41; tests/test_images.py).
    """
    height, width = (side / size for side in image.shape[:2])
    if min(height, width) >= 3:
        return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    # Fitted to Pillow's bicubic on photographs and on noise with their spectrum.
    sigma_y, sigma_x = (0.34 * (factor - 1) + 0.38 if factor > _BLURRED else 0.01 for factor in (height, width))
    if max(height, width) > _BLURRED:
        kernel = (5, 5) if max(height, width) > 2.2 else (3, 3)
        image = cv2.GaussianBlur(image, kernel, sigma_x, sigmaY=sigma_y)
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)


def crop_box(
    height: int, width: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Random crop (left, top, right, bottom) in whole pixels.

    The area is uniform in ``scale`` times the image's. The aspect, width over height, is log-uniform in 3/4 .. 4/3,
    narrowed to what fits into the image at that area. Where nothing fits (long images), the crop is the largest one
    of the permitted aspect that is closest to the image's, and its area is smaller than asked. Sides are then rounded.
    """
    share = rng.uniform(*scale)
    low, high = max(1 / _ASPECT, share * width / height), min(_ASPECT, width / (share * height))
    if low <= high:
        aspect = math.exp(rng.uniform(math.log(low), math.log(high)))
        area = share * width * height
    else:
        aspect = _ASPECT if width > height else 1 / _ASPECT
        area = min(width**2 / aspect, height**2 * aspect)
    crop_width = min(max(round(math.sqrt(area * aspect)), 1), width)
    crop_height = min(max(round(math.sqrt(area / aspect)), 1), height)
    left, top = int(rng.integers(width - crop_width + 1)), int(rng.integers(height - crop_height + 1))
    return left, top, left + crop_width, top + crop_height
