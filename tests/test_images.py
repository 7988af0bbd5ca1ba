"""Decoding, resizing and augmentation against Pillow used another way, PyTorch, and brute force."""

import contextlib
import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from llip_jax.config import AugmentConfig
from llip_jax.data.images import ImageError, augment, crop_box, decode, resize_for_eval

NO_CROP = (1.0, 1.0)


@pytest.fixture
def rng():
    return np.random.default_rng(20240517)


def pixels(rng, height, width, channels=3):
    return rng.integers(0, 256, (height, width, channels), np.uint8)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(rng, height, width):
    """A picture without sharp edges, so that lossy coding and resampling change it little."""
    coarse = Image.fromarray(pixels(rng, 5, 5))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def test_rgb_is_exact(rng):
    image = pixels(rng, 13, 7)
    decoded = decode(encoded(Image.fromarray(image)))
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, image)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_on_white(rng, kind):
    image = pixels(rng, 9, 11, 4)
    decoded = decode(
        encoded(Image.fromarray(image), kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    )
    alpha = image[..., 3:] / 255
    np.testing.assert_allclose(decoded, image[..., :3] * alpha + 255 * (1 - alpha), atol=1)


def test_palette_with_transparency_on_white(rng):
    indices = rng.integers(0, 4, (6, 5), np.uint8)
    colours = pixels(rng, 1, 4)[0]
    image = Image.fromarray(indices)
    image = image.convert("P")
    image.putdata(indices.ravel().tolist())
    image.putpalette(colours.ravel().tolist())
    shown = colours.copy()
    shown[2] = 255
    np.testing.assert_array_equal(decode(encoded(image, transparency=2)), shown[indices])
    np.testing.assert_array_equal(decode(encoded(image)), colours[indices])


def test_grey_bilevel_and_sixteen_bits(rng):
    grey = rng.integers(0, 256, (4, 6), np.uint8)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(grey))), np.stack([grey] * 3, -1))
    deep = rng.integers(0, 2**16, (4, 6)).astype(np.uint16)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(deep))), np.stack([deep >> 8] * 3, -1))
    bits = Image.fromarray(grey).convert("1")
    np.testing.assert_array_equal(decode(encoded(bits))[..., 0], np.asarray(bits) * 255)


def test_cmyk(rng):
    image = Image.fromarray(smooth(rng, 32, 32)).convert("CMYK")
    decoded = decode(encoded(image, "JPEG", quality=100, subsampling=0))
    ink = np.asarray(image).astype(float) / 255
    expected = 255 * (1 - ink[..., :3]) * (1 - ink[..., 3:])
    assert np.abs(decoded - expected).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(rng, orientation):
    image = pixels(rng, 3, 5)
    # What the camera's row 0 and column 0 are, by the EXIF standard.
    upright = {
        1: image,
        2: image[:, ::-1],
        3: image[::-1, ::-1],
        4: image[::-1],
        5: image.swapaxes(0, 1),
        6: np.rot90(image, -1),
        7: image[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(image),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(image), exif=exif)), upright)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("#ff0000", "#00ff00", "#0000ff")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(decode(data), np.full((8, 8, 3), (255, 0, 0)))


def test_short_side_saves_work_and_keeps_the_picture(rng):
    image = smooth(rng, 96, 160)
    data = encoded(Image.fromarray(image), "JPEG", quality=95)
    assert decode(data, short_side=49).shape == (96, 160, 3)
    half = decode(data, short_side=48)
    assert half.shape == (48, 80, 3)
    assert np.abs(half - image.reshape(48, 2, 80, 2, 3).mean((1, 3))).mean() < 4
    assert decode(encoded(Image.fromarray(image)), short_side=10).shape == (96, 160, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated(rng, kind):
    data = encoded(Image.fromarray(pixels(rng, 64, 64)), kind)
    for share in (0.02, 0.3, 0.9):
        with pytest.raises(ImageError, match="cannot decode image: "):
            decode(data[: int(len(data) * share)])


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_bytes_never_raise_anything_else(rng):
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"):
        data = np.frombuffer(encoded(Image.fromarray(pixels(rng, 16, 16)), kind), np.uint8)
        for _ in range(60):
            damaged = data.copy()
            damaged[rng.integers(0, len(data), 4)] = rng.integers(0, 256, 4)
            with contextlib.suppress(ImageError):
                assert decode(damaged.tobytes(), max_pixels=10**6).ndim == 3


@pytest.mark.parametrize("data", [b"", b"not a picture", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_unknown_format(data):
    with pytest.raises(ImageError, match="cannot identify image file"):
        decode(data)


def test_bomb_is_refused_from_the_header():
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    def header(width, height):
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))

    with pytest.raises(ImageError, match="9000x9000 is more than 67108864 pixels"):
        decode(header(9000, 9000) + chunk(b"IDAT", b""))
    with pytest.raises(ImageError, match="decompression bomb"):
        decode(header(2**20, 2**20) + chunk(b"IDAT", b""))
    data = encoded(Image.new("RGB", (10, 11)))
    with pytest.raises(ImageError, match="10x11 is more than 109 pixels"):
        decode(data, max_pixels=109)
    assert decode(data, max_pixels=110).shape == (11, 10, 3)


@pytest.mark.parametrize(("height", "width", "size"), [(50, 80, 24), (77, 41, 32), (64, 64, 20), (9, 13, 30)])
def test_resize_for_eval_against_torch(rng, height, width, size):
    torch = pytest.importorskip("torch")
    image = pixels(rng, height, width)
    short = min(height, width)
    shape = (size * height // short, size * width // short)
    planes = torch.from_numpy(image).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(planes, shape, mode="bicubic", antialias=True, align_corners=False)
    top, left = round((shape[0] - size) / 2), round((shape[1] - size) / 2)
    square = resized[0].permute(1, 2, 0).numpy()[top : top + size, left : left + size]
    np.testing.assert_allclose(resize_for_eval(image, size).astype(int), square, atol=1)


def test_resize_for_eval_leaves_the_right_size_alone(rng):
    image = pixels(rng, 12, 12)
    np.testing.assert_array_equal(resize_for_eval(image, 12), image)
    np.testing.assert_array_equal(augment(image, 12, AugmentConfig(crop_scale=NO_CROP), rng), image)


def test_crop_boxes_stay_inside_with_the_asked_area(rng):
    for _ in range(2000):
        height, width = (int(n) for n in rng.integers(20, 60, 2))
        low, high = sorted(rng.uniform(0.05, 1, 2))
        left, top, right, bottom = crop_box(height, width, (low, high), rng)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        crop_width, crop_height = right - left, bottom - top
        assert 3 / 4 - 1e-6 <= crop_width / crop_height <= 4 / 3 + 1e-6
        share = crop_width * crop_height / (width * height)
        assert share <= high + 1e-6
        if 3 / 4 <= width / height <= 4 / 3:
            assert share >= low - 1e-6
        elif share < low - 1e-6:  # the largest crop of the nearest aspect
            assert crop_width == pytest.approx(width) or crop_height == pytest.approx(height)


def test_crops_cover_the_range(rng):
    boxes = np.array([crop_box(40, 40, (0.25, 0.75), rng) for _ in range(3000)])
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    share = widths * heights / 1600
    assert share.min() < 0.26 and share.max() > 0.74
    assert abs(share.mean() - 0.5) < 4 * (0.5 / np.sqrt(12)) / np.sqrt(len(boxes))
    aspects = np.log(widths / heights)
    assert abs(aspects.mean()) < 0.02 and aspects.max() > 0.27 and aspects.min() < -0.27
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert np.abs(centres.mean(0) - 20).max() < 0.5


def test_crop_content(rng):
    """The crop shows the part of the picture that crop_box says: a ramp tells where each pixel comes from."""
    ramp = np.zeros((200, 200, 3), np.uint8)
    ramp[..., 0] = np.arange(200)
    ramp[..., 1] = np.arange(200)[:, None]
    for seed in range(20):
        config = AugmentConfig(crop_scale=(0.3, 0.6))
        view = augment(ramp, 16, config, np.random.default_rng(seed)).astype(float)
        left, top, right, bottom = crop_box(200, 200, (0.3, 0.6), np.random.default_rng(seed))
        middle = (np.arange(16) + 0.5) / 16
        inner = slice(2, -2)
        np.testing.assert_allclose(view[5, inner, 0], (left + middle * (right - left) - 0.5)[inner], atol=1)
        np.testing.assert_allclose(view[inner, 5, 1], (top + middle * (bottom - top) - 0.5)[inner], atol=1)


def test_flip_half(rng):
    image = pixels(rng, 8, 8)
    config = AugmentConfig(crop_scale=NO_CROP, flip=True)
    views = [augment(image, 8, config, rng) for _ in range(1000)]
    flipped = sum(np.array_equal(view, image[:, ::-1]) for view in views)
    assert flipped + sum(np.array_equal(view, image) for view in views) == 1000
    assert abs(flipped - 500) < 4 * np.sqrt(250)


def test_color_against_formulas(rng):
    image = rng.integers(90, 160, (10, 10, 3), np.uint8)
    config = AugmentConfig(crop_scale=NO_CROP, color=0.3)
    for seed in range(20):
        draws = np.random.default_rng(seed)
        brightness, contrast, saturation = draws.uniform(0.7, 1.3, 3)
        grey = np.array([0.299, 0.587, 0.114])
        expected = image * brightness
        mean = (expected @ grey).mean()
        expected = mean + contrast * (expected - mean)
        luma = (expected @ grey)[..., None]
        expected = luma + saturation * (expected - luma)
        view = augment(image, 10, config, np.random.default_rng(seed))
        assert not np.array_equal(view, image)
        np.testing.assert_allclose(view, expected.clip(0, 255), atol=4)


def test_grayscale_share(rng):
    image = pixels(rng, 8, 8)
    config = AugmentConfig(crop_scale=NO_CROP, grayscale=0.25)
    grey = np.asarray(Image.fromarray(image).convert("L"))
    views = [augment(image, 8, config, rng) for _ in range(1000)]
    count = sum(np.array_equal(view, np.stack([grey] * 3, -1)) for view in views)
    assert abs(count - 250) < 4 * np.sqrt(1000 * 0.25 * 0.75)


def test_augment_is_a_function_of_its_generator(rng):
    image = pixels(rng, 30, 40)
    config = AugmentConfig(crop_scale=(0.4, 0.9), flip=True, color=0.5, grayscale=0.2)
    views = [augment(image, 24, config, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert views[0].shape == (24, 24, 3) and views[0].dtype == np.uint8
    np.testing.assert_array_equal(views[0], views[1])
    assert not np.array_equal(views[0], views[2])


@pytest.mark.parametrize("shape", [(3, 9000, 3), (9000, 3, 3)])
def test_a_line_of_pixels_is_evaluated_in_bounded_memory(shape):
    image = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    tracemalloc.start()
    result = resize_for_eval(image, 224)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.shape == (224, 224, 3)
    middle = image[:, 4498:4502] if shape[1] == 9000 else image[4498:4502]
    assert abs(result.mean() - middle.mean()) < 12
    assert peak < 20 * 2**20
