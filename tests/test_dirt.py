"""Dirty web data: every sample of a large corpus of damaged pictures and captions is kept or replaced, and counted."""

import io
import json
import struct
import tarfile
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from llip_jax.config import AugmentConfig, ConfigError, DataConfig, FieldsConfig, LimitsConfig, PartConfig
from llip_jax.data.fields import RowsSource, make_record
from llip_jax.data.pipeline import train_batches
from llip_jax.data.records import REASONS, BadSample
from llip_jax.data.sources import build_source
from llip_jax.data.tokenizers import ClipTokenizer

KEPT = "kept"
BROKEN = {"truncated_image", "not_an_image"}
COUNT = 12
"""Samples of each kind of damage."""

# Pictures: bytes, and what may become of the sample.


def picture(rng, mode="RGB", size=None):
    width, height = size or (int(side) for side in rng.integers(8, 60, 2))
    image = Image.fromarray(rng.integers(0, 256, (4, 5, 4), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return image.convert(mode)


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of_size(width, height):
    """A small file that says it is large; half of them even hold that many compressed zeros."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    rows = zlib.compress(bytes(10**6))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def rotated(rng):
    exif = Image.Exif()
    exif[0x0112] = int(rng.integers(1, 10))  # 9 is not an orientation
    return saved(picture(rng), "JPEG", exif=exif)


def animated(rng):
    frames = [picture(rng, size=(20, 20)) for _ in range(3)]
    return saved(frames[0], "GIF" if rng.random() < 0.5 else "WEBP", save_all=True, append_images=frames[1:])


def truncated(rng):
    data = saved(picture(rng), str(rng.choice(["JPEG", "PNG", "WEBP", "GIF"])))
    return data[: int(len(data) * rng.uniform(0.01, 0.9))]


def flipped(rng):
    data = np.frombuffer(saved(picture(rng), str(rng.choice(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]))), np.uint8)
    data = data.copy()
    data[rng.integers(0, len(data), 5)] = rng.integers(0, 256, 5)
    return data.tobytes()


PICTURES = {
    "jpeg": (lambda rng: saved(picture(rng), "JPEG"), {KEPT}),
    "progressive": (lambda rng: saved(picture(rng), "JPEG", progressive=True), {KEPT}),
    "grey": (lambda rng: saved(picture(rng, "L"), "JPEG"), {KEPT}),
    "cmyk": (lambda rng: saved(picture(rng, "CMYK"), "JPEG"), {KEPT}),
    "png": (lambda rng: saved(picture(rng), "PNG"), {KEPT}),
    "alpha": (lambda rng: saved(picture(rng, "RGBA"), "PNG"), {KEPT}),
    "grey and alpha": (lambda rng: saved(picture(rng, "LA"), "PNG"), {KEPT}),
    "palette": (lambda rng: saved(picture(rng, "P"), "PNG", transparency=3), {KEPT}),
    "bilevel": (lambda rng: saved(picture(rng, "1"), "PNG"), {KEPT}),
    "16 bits": (lambda rng: saved(Image.fromarray(rng.integers(0, 2**16, (9, 9)).astype(np.uint16)), "PNG"), {KEPT}),
    "webp": (lambda rng: saved(picture(rng), "WEBP"), {KEPT}),
    "tiff": (lambda rng: saved(picture(rng), "TIFF"), {KEPT}),
    "rotated": (rotated, {KEPT}),
    "animated": (animated, {KEPT}),
    "line": (lambda rng: saved(picture(rng, size=(600, 2)), "JPEG"), {KEPT}),
    "one pixel": (lambda rng: saved(picture(rng, size=(1, 1)), "GIF"), {"image_too_small"}),
    "floats": (lambda rng: saved(picture(rng, "F"), "TIFF"), {"not_an_image"}),
    "bomb": (lambda rng: png_of_size(*(int(n) for n in rng.integers(9000, 60_000, 2))), {"image_too_large"}),
    "huge file": (lambda rng: saved(picture(rng), "PNG") + bytes(300_000), {"image_too_large"}),
    "empty": (lambda rng: b"", {"missing_image"}),
    "noise": (lambda rng: rng.bytes(500), {"not_an_image"}),
    "page": (lambda rng: b"<html><body>404 Not Found</body></html>", {"not_an_image"}),
    "script": (lambda rng: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", {"not_an_image"}),
    "truncated": (truncated, BROKEN),
    "flipped": (flipped, {KEPT, *BROKEN, "image_too_large", "image_too_small"}),
}
"""Damage -> (how it is made, what may become of it)."""

# Captions: of the txt member, or of the JSON.

TEXTS = {
    "plain": (b"a dog on the beach", {KEPT}),
    "other scripts": ("犬と海 🏖️ \u202eright to left".encode(), {KEPT}),
    "marked": (b"\xef\xbb\xbfa byte order mark", {KEPT}),
    "zeros": (b"a\0b\0c", {KEPT}),
    "long": (b"word " * 20_000, {KEPT}),
    "one long word": ("ü".encode() * 50_000, {KEPT}),
    "controls": (bytes(range(1, 32)) + b"x", {KEPT}),
    "empty": (b"", {"empty_caption"}),
    "blank": (" \t\n\u3000".encode(), {"empty_caption"}),
    "latin": ("Öl für Zürich".encode("latin-1"), {"caption_not_utf8"}),
    "half a letter": ("Zürich".encode()[:2], {"caption_not_utf8"}),
    "none": (None, {"missing_caption"}),
}
JSONS = {
    "plain": (b'{"caption": "a dog on the beach"}', {KEPT}),
    "list": (b'{"caption": ["", null, 3, "the last one", "the last one"]}', {KEPT}),
    "escaped": (b'{"caption": "\\u72ac \\ud83c\\udfd6"}', {KEPT}),
    "empty": (b'{"caption": ""}', {"empty_caption"}),
    "null": (b'{"caption": null}', {"missing_caption"}),
    "no list": (b'{"caption": []}', {"missing_caption"}),
    "absent": (b'{"title": "a dog"}', {"missing_caption"}),
    "number": (b'{"caption": 7}', {"caption_not_text"}),
    "object": (b'{"caption": {"en": "a dog"}}', {"caption_not_text"}),
    "half a pair": (b'{"caption": "a \\ud800 b"}', {"caption_not_utf8"}),
    "not json": (b'{"caption": "a dog', {"bad_metadata"}),
    "not utf-8": (b'{"caption": "\xff"}', {"bad_metadata"}),
    "an array": (b'["a dog"]', {"missing_caption"}),
    "deep": (b'{"caption": ' + b"[" * 30_000, {"bad_metadata"}),
    "none": (None, {"missing_caption"}),
}


def corpus(rng, extension, captions):
    """(members of the sample, what may become of it), shuffled: damaged pictures, damaged captions, and both."""
    good_picture, good_caption = PICTURES["jpeg"], captions["plain"]
    chosen = [(picture, good_caption) for picture in PICTURES.values() for _ in range(COUNT)]
    chosen += [(good_picture, caption) for caption in captions.values() for _ in range(COUNT)]
    picks = list(PICTURES.values()), list(captions.values())
    chosen += [tuple(pick[int(rng.integers(len(pick)))] for pick in picks) for _ in range(150)]
    samples = []
    for (make, pictures), (caption, texts) in chosen:
        members = {"jpg": make(rng)} | ({} if caption is None else {extension: caption})
        # Columns are looked at before the picture is decoded.
        at_once = (pictures & {"missing_image"}) or ({"image_too_large"} if len(members["jpg"]) > 200_000 else set())
        samples.append((members, at_once or (texts if texts != {KEPT} else pictures)))
    return [samples[i] for i in rng.permutation(len(samples))]


def write_tar(path, samples):
    with tarfile.open(path, "w") as archive:
        for number, (members, _) in enumerate(samples):
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{number:06d}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("threads", [1, 3])
def test_every_sample_is_kept_or_replaced_and_counted(tmp_path, threads, caplog):
    rng = np.random.default_rng(2026)
    corpora = {"json": corpus(rng, "json", JSONS), "texts": corpus(rng, "txt", TEXTS)}
    parts = {}
    for name, samples in corpora.items():
        write_tar(tmp_path / f"{name}.tar", samples)
        parts[name] = PartConfig(
            source="webdataset",
            path=str(tmp_path / f"{name}.tar"),
            weight=float(len(samples)),
            eval_samples=1,
            fields=FieldsConfig(captions=("json.caption",) if name == "json" else ()),
        )
    config = DataConfig(
        mixture=parts,
        index_dir=str(tmp_path / "index"),
        threads=threads,
        augment=AugmentConfig(crop_scale=(0.5, 1.0)),
        limits=LimitsConfig(image_bytes=200_000),
    )
    mixture, tokenizer = build_source(config, "train", 16), ClipTokenizer()
    total = len(mixture)
    assert total == sum(map(len, corpora.values())) - 2 and total > 1000
    batch_size = 50
    iterator = train_batches(
        mixture,
        tokenizer,
        config,
        image_size=16,
        text_length=12,
        seed=8,
        batch_size=batch_size,
        start_step=0,
        stop_step=total // batch_size,
    )
    order, outcomes, seen = mixture.order(8), Counter(), {}
    kept_of = {name: {} for name in corpora}
    for step, batch in enumerate(iterator):
        assert batch["image"].shape == (batch_size, 16, 16, 3) and batch["text_mask"][:, 0, :2].all()
        for row in range(batch_size):
            part, planned = order[step * batch_size + row]
            name = mixture.parts[part].name
            sample = planned + 1  # sample 0 is held out
            code, read = int(batch["replaced"][row]), int(batch["sample_id"][row]) - mixture.offsets[part]
            outcome = KEPT if code == 0 else REASONS[code - 1]
            assert outcome in corpora[name][sample][1], (name, sample)
            assert (read == planned) == (code == 0)
            outcomes[outcome] += 1
            kept_of[name][planned] = code == 0
            seen[name, planned] = read
    # Kept and replaced together are all that were asked for, and every kind of damage was met.
    assert outcomes.total() == total // batch_size * batch_size
    assert set(outcomes) == {KEPT, *REASONS} - {"unreadable"}
    # What stands in is the next sample that is kept.
    for (name, planned), read in seen.items():
        while planned != read:
            assert not kept_of[name].get(planned, False)
            planned = (planned + 1) % len(corpora[name])
            if planned == len(corpora[name]) - 1:
                planned = 0
        assert kept_of[name].get(read, True)
    told = [record for record in caplog.records if "is replaced by the next one" in record.getMessage()]
    assert len(told) == 10 and any("000" in record.getMessage() for record in told)


LIMITS = LimitsConfig()


def record_of(columns, captions=("txt",), **options):
    return make_record(
        "0.tar/7", {"jpg": b"x", **columns}, FieldsConfig(image=("png", "jpg"), captions=captions, **options), LIMITS
    )


def test_usable_captions_stay_where_others_are_not():
    columns = {"txt": b"one", "alt": [b"two", "\ud800", None, 5, " ", "one", b"\xff", "three"], "json": b"{"}
    record = record_of(columns, captions=("alt", "txt", "json.caption", "nothing"))
    assert record.captions == ("two", "one", "three") and record.kinds == ("alt", "alt", "alt")
    assert record_of(columns, captions=("txt", "alt")).kinds == ("txt", "alt", "alt")


def test_metadata_is_bounded():
    with pytest.raises(BadSample, match="json has 2000013 bytes, more than 1048576"):
        record_of({"json": b'{"caption":' + b" " * 2_000_000 + b"1}"}, captions=("json.caption",))


@pytest.mark.parametrize("first", [None, 7, b"[" * 200_000, b"{", b"[1]", "x" * 2_000_000])
def test_any_json_may_come_first(first):
    class OneRow:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return "0", {"json": first, "jpg": b"x"}

    source = RowsSource(OneRow(), FieldsConfig(image=("jpg",), captions=("txt",)), LIMITS)
    with pytest.raises(ConfigError, match=r"no.* column 'txt'; they have: jpg, json"):
        source.check("data")


def test_nested_columns_and_groups():
    metadata = json.dumps({"meta": {"texts": ["a", "b"]}, "sha": 12}).encode()
    record = record_of({"json": metadata, "png": b"y"}, captions=("json.meta.texts",), duplicate="json.sha")
    assert record.image == b"y" and record.captions == ("a", "b") and record.image_group == "duplicate:12"
    one, same, other = (record_of({"jpg": data, "txt": "a"}) for data in (b"1", b"1", b"2"))
    assert one.image_group == same.image_group != other.image_group
    dotted = record_of({"seg.caption": "dotted", "seg": {"caption": "nested"}}, captions=("seg.caption",))
    assert dotted.captions == ("dotted",)


def test_huggingface_images_without_bytes_are_missing():
    assert record_of({"txt": "a", "png": {"bytes": b"z", "path": None}}).image == b"z"
    with pytest.raises(BadSample, match="no image in 'png'"):
        make_record(
            "n",
            {"png": {"bytes": None, "path": "a.png"}, "txt": "a"},
            FieldsConfig(image=("png",), captions=("txt",)),
            LIMITS,
        )
