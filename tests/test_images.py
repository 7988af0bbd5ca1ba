"""Decoding, resizing and augmentation against Pillow used another way, PyTorch, and brute force."""

import contextlib
import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from llip_jax.config import AugmentConfig, LimitsConfig
from llip_jax.data.images import crop_box, open_picture, resize_for_eval, shrink, training_view
from llip_jax.data.records import BadSample

NO_CROP = (1.0, 1.0)


@pytest.fixture
def rng():
    return np.random.default_rng(20240517)


def pixels(rng, height, width, channels=3):
    return rng.integers(0, 256, (height, width, channels), np.uint8)


def decode(data, **limits):
    return open_picture(data, LimitsConfig(image_side=1, **limits)).decode(1.0)


def bad(reason, message=""):
    """Refused for this reason with this message."""
    return pytest.raises(BadSample, match=message, check=lambda error: error.reason == reason)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(rng, height, width):
    """A picture without sharp edges, so that lossy coding and resampling change it little."""
    coarse = Image.fromarray(pixels(rng, 5, 5))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def photograph(rng, height, width):
    """Noise whose amplitude falls off with frequency, as photographs' does."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)) + 1 / max(height, width)
    planes = np.fft.rfft2(rng.standard_normal((3, height, width))) / frequency
    image = np.moveaxis(np.fft.irfft2(planes, (height, width)), 0, -1)
    return (128 + 50 * image / image.std()).clip(0, 255).astype(np.uint8)


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


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(96, 160), (97, 161), (33, 50)])
def test_jpegs_come_out_at_the_smallest_size_that_is_enough(rng, mode, size):
    data = encoded(Image.fromarray(smooth(rng, *size)).convert(mode), "JPEG", quality=95)
    picture = open_picture(data)
    assert (picture.height, picture.width) == size
    for scale, reduction in ((1.0, 1), (0.51, 1), (0.5, 2), (0.26, 2), (0.25, 4), (0.1, 8), (0.01, 8)):
        shape = tuple(-(-side // reduction) for side in size)
        with Image.open(io.BytesIO(data)) as image:
            image.draft(mode, (size[1] // reduction, size[0] // reduction))
            expected = np.asarray(image.convert("RGB")).astype(int)
        decoded = picture.decode(scale)
        assert decoded.shape == (*shape, 3)
        assert np.abs(decoded - expected).max() <= 2
    rows, columns = (side // 2 for side in size)
    half, full = picture.decode(0.5), picture.decode(1.0).astype(float)
    means = full[: 2 * rows, : 2 * columns].reshape(rows, 2, columns, 2, 3).mean((1, 3))
    assert np.abs(half[:rows, :columns] - means).mean() < 4


def test_jpegs_are_decoded_as_pillow_does(rng):
    for kind in ({"subsampling": 0}, {"subsampling": 2}, {"progressive": True}, {"quality": 40}):
        data = encoded(Image.fromarray(smooth(rng, 41, 67)), "JPEG", **kind)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        assert np.abs(decode(data) - expected).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_jpegs(rng, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(smooth(rng, 32, 56)), "JPEG", quality=95, exif=exif)
    picture = open_picture(data)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")).astype(int)
    assert (picture.height, picture.width) == upright.shape[:2]
    assert np.abs(picture.decode(1.0) - upright).max() <= 2
    assert picture.decode(0.5).shape == (upright.shape[0] // 2, upright.shape[1] // 2, 3)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_view_of_a_jpeg_is_that_of_its_pixels(rng, orientation):
    """Decoded at a fraction of its size, the crop is from the same place; seen as sharply as it can be."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(smooth(rng, 301, 402)), "JPEG", quality=95, exif=exif)
    pixels = decode(data)
    config = AugmentConfig(crop_scale=(0.2, 1.0), flip=True)
    for seed in range(30):
        for size in (16, 60, 100):
            views = [training_view(x, size, config, np.random.default_rng(seed)).astype(int) for x in (data, pixels)]
            # The edges of a crop are whole pixels of the picture as it was decoded.
            assert np.abs(views[0] - views[1]).mean() < 9


def test_a_view_of_a_jpeg_is_as_sharp_as_it_can_be(rng):
    """Mean differences: 8 for crops at half the size (their edges are whole pixels), 15 where it came out smaller."""
    fine = photograph(rng, 400, 400)
    data = encoded(Image.fromarray(fine), "JPEG", quality=95)
    pixels, config = decode(data), AugmentConfig(crop_scale=(0.9, 1.0))
    pairs = [
        [training_view(x, 150, config, np.random.default_rng(seed)).astype(int) for x in (data, pixels)]
        for seed in range(20)
    ]
    assert np.mean([np.abs(left - right).mean() for left, right in pairs]) < 11
    view = training_view(data, 190, AugmentConfig(crop_scale=NO_CROP), rng)
    assert np.abs(view - resize_for_eval(fine, 190).astype(int)).mean() < 7


def test_jpegs_of_endless_scans_are_refused(rng):
    data = encoded(Image.fromarray(smooth(rng, 64, 64)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    assert 2 < data.count(b"\xff\xda") < 30
    with bad("image_too_large", "JPEG of .* scans, more than 100"):
        open_picture(data[:-2] + 100 * data[last:-2] + data[-2:])


def test_xmp_orientation_counts_however_a_jpeg_is_decoded(rng):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/"><tiff:Orientation>6</tiff:Orientation></rdf:Description></rdf:RDF></x:xmpmeta>'  # noqa: E501
    image = smooth(rng, 32, 64)
    data = encoded(Image.fromarray(image), "JPEG", quality=95, xmp=xmp)
    picture = open_picture(data)
    assert (picture.height, picture.width) == (64, 32) == decode(data).shape[:2]
    damaged = data[:-2] + bytes(7) + data[-2:]
    assert np.abs(decode(damaged).astype(int) - np.rot90(image, -1)).mean() < 4


def test_harmless_damage_does_not_lose_a_jpeg(rng):
    """Garbage between markers: libjpeg warns, and goes on."""
    data = encoded(Image.fromarray(smooth(rng, 40, 40)), "JPEG")
    expected = decode(data).astype(int)
    assert np.abs(decode(data[:-2] + bytes(7) + data[-2:]) - expected).max() <= 2


@pytest.mark.parametrize(
    ("height", "width"), [(240, 230), (250, 256), (300, 320), (440, 447), (448, 600), (640, 660), (900, 1200)]
)
def test_shrinking_is_nearer_to_bicubic_than_bilinear_is(rng, height, width):
    """All antialiased, the references Pillow's; pictures with photographs' spectrum."""

    def noise(image, other):
        return np.sqrt(np.mean((image.astype(float) - other) ** 2))

    image = photograph(rng, height, width)
    bicubic, bilinear = (
        np.asarray(Image.fromarray(image).resize((224, 224), method))
        for method in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR)
    )
    assert noise(shrink(image, 224), bicubic) < noise(bilinear, bicubic)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated(rng, kind):
    data = encoded(Image.fromarray(pixels(rng, 64, 64)), kind)
    for share in (0.02, 0.3, 0.9):
        with pytest.raises(BadSample, match=r"cannot decode image: |no known image format") as error:
            decode(data[: int(len(data) * share)])
        assert error.value.reason == "truncated_image" or share < 0.1


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_bytes_never_raise_anything_else(rng):
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"):
        data = np.frombuffer(encoded(Image.fromarray(pixels(rng, 16, 16)), kind), np.uint8)
        for _ in range(60):
            damaged = data.copy()
            damaged[rng.integers(0, len(data), 4)] = rng.integers(0, 256, 4)
            with contextlib.suppress(BadSample):
                assert decode(damaged.tobytes(), pixels=10**6).ndim == 3


@pytest.mark.parametrize("data", [b"", b"not a picture", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_unknown_format(data):
    with bad("not_an_image", "no known image format"):
        decode(data)


def test_bomb_is_refused_from_the_header():
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    def header(width, height):
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))

    with bad("image_too_large", "9000x9000 is more than 67108864 pixels"):
        decode(header(9000, 9000) + chunk(b"IDAT", b""))
    with bad("image_too_large", "decompression bomb"):
        decode(header(2**20, 2**20) + chunk(b"IDAT", b""))
    data = encoded(Image.new("RGB", (10, 11)))
    with bad("image_too_large", "10x11 is more than 109 pixels"):
        decode(data, pixels=109)
    assert decode(data, pixels=110).shape == (11, 10, 3)
    with bad("image_too_large", f"image of {len(data)} bytes is larger than {len(data) - 1}"):
        decode(data, image_bytes=len(data) - 1)
    for shape in ((1, 1), (1, 50), (50, 1)):
        tiny = encoded(Image.new("RGB", shape))
        with bad("image_too_small", "has a side of fewer than 2 pixels"):
            open_picture(tiny)
        assert decode(tiny).shape == (*shape[::-1], 3)


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
    np.testing.assert_array_equal(training_view(image, 12, AugmentConfig(crop_scale=NO_CROP), rng), image)


def test_crop_boxes_stay_inside_with_the_asked_area(rng):
    for _ in range(2000):
        height, width = (int(n) for n in rng.integers(20, 60, 2))
        low, high = sorted(rng.uniform(0.05, 1, 2))
        left, top, right, bottom = crop_box(height, width, (low, high), rng)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        crop_width, crop_height = right - left, bottom - top
        # Either side is at most half a pixel from what was asked.
        assert 3 / 4 * (crop_height - 0.5) - 0.5 <= crop_width <= 4 / 3 * (crop_height + 0.5) + 0.5
        assert (crop_width - 0.5) * (crop_height - 0.5) <= high * width * height + 1e-6
        largest = (crop_width + 0.5) * (crop_height + 0.5)
        if 3 / 4 <= width / height <= 4 / 3:
            assert largest >= low * width * height - 1e-6
        elif largest < low * width * height - 1e-6:  # the largest crop of the nearest aspect
            assert crop_width == width or crop_height == height


def test_crops_cover_the_range(rng):
    boxes = np.array([crop_box(400, 400, (0.25, 0.75), rng) for _ in range(3000)])
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    share = widths * heights / 400**2
    assert share.min() < 0.26 and share.max() > 0.74
    assert abs(share.mean() - 0.5) < 4 * (0.5 / np.sqrt(12)) / np.sqrt(len(boxes))
    aspects = np.log(widths / heights)
    assert abs(aspects.mean()) < 0.02 and aspects.max() > 0.27 and aspects.min() < -0.27
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert np.abs(centres.mean(0) - 200).max() < 5


def test_crop_content(rng):
    """The crop shows the part of the picture that crop_box says: a ramp tells where each pixel comes from."""
    ramp = np.zeros((200, 200, 3), np.uint8)
    ramp[..., 0] = np.arange(200)
    ramp[..., 1] = np.arange(200)[:, None]
    for seed in range(20):
        config = AugmentConfig(crop_scale=(0.3, 0.6))
        view = training_view(ramp, 16, config, np.random.default_rng(seed)).astype(float)
        left, top, right, bottom = crop_box(200, 200, (0.3, 0.6), np.random.default_rng(seed))
        middle = (np.arange(16) + 0.5) / 16
        inner = slice(2, -2)
        np.testing.assert_allclose(view[5, inner, 0], (left + middle * (right - left) - 0.5)[inner], atol=1)
        np.testing.assert_allclose(view[inner, 5, 1], (top + middle * (bottom - top) - 0.5)[inner], atol=1)


def test_flip_half(rng):
    image = pixels(rng, 8, 8)
    config = AugmentConfig(crop_scale=NO_CROP, flip=True)
    views = [training_view(image, 8, config, rng) for _ in range(1000)]
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
        view = training_view(image, 10, config, np.random.default_rng(seed))
        assert not np.array_equal(view, image)
        np.testing.assert_allclose(view, expected.clip(0, 255), atol=4)


def test_grayscale_share(rng):
    image = pixels(rng, 8, 8)
    config = AugmentConfig(crop_scale=NO_CROP, grayscale=0.25)
    grey = np.asarray(Image.fromarray(image).convert("L"))
    views = [training_view(image, 8, config, rng) for _ in range(1000)]
    count = sum(np.array_equal(view, np.stack([grey] * 3, -1)) for view in views)
    assert abs(count - 250) < 4 * np.sqrt(1000 * 0.25 * 0.75)


def test_augment_is_a_function_of_its_generator(rng):
    image = pixels(rng, 30, 40)
    config = AugmentConfig(crop_scale=(0.4, 0.9), flip=True, color=0.5, grayscale=0.2)
    views = [training_view(image, 24, config, np.random.default_rng(seed)) for seed in (1, 1, 2)]
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
