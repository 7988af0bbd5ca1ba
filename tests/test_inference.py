"""Inference against every pair scored by itself, and all that must not show in its results."""

import functools
import inspect
import io
import re
import sys
import textwrap
import types
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import fast_to_compile, relative_error
from PIL import Image
from run_helpers import run, temporary_folder
from test_pretrained import SIGLIP, tiny_weights, tokenizer_file

import llip_jax
from llip_jax import inference
from llip_jax.config import ConfigError, EvalConfig, resolve
from llip_jax.data.pipeline import eval_blocks
from llip_jax.data.records import Record
from llip_jax.data.tokenizers import load_tokenizer
from llip_jax.evaluation.scorers import mean_text
from llip_jax.inference import Images, Model, Texts, load
from llip_jax.models.dual_encoder import DualEncoder, abstract_model
from llip_jax.ops.pair_scores import TextSide

TEXTS = ["a dog on grass", "a cat", "number 7, on grass: a dog and a cat", "", "grass", "a", "number 3"]
CLASSES = ["dog", "cat", "{}"]


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    """Smooth pictures of several sizes, unlike each other."""
    rng = np.random.default_rng(seed)
    sizes = [(20 + 7 * (i % 4), 16 + 5 * (i % 3)) for i in range(count)]
    coarse = (Image.fromarray(rng.integers(256, size=(4, 4, 3), dtype=np.uint8)) for _ in sizes)
    return [np.asarray(image.resize(size, Image.Resampling.BICUBIC)) for image, size in zip(coarse, sizes, strict=True)]


@functools.cache
def model_of(batch_size: int = 4, **model: Any) -> Model:
    return Model(tiny_weights(**model), batch_size=batch_size)


class OneByOne:
    """The same model, every picture, text and pair by itself: no batch, no padding, no streaming."""

    def __init__(self, **model: Any):
        weights = tiny_weights(**model)
        self.config = resolve(weights.config)
        graph: nnx.GraphDef[Any] = nnx.split(abstract_model(self.config), nnx.Param)[0]
        self.model: DualEncoder = nnx.merge(graph, jax.tree.map(jnp.asarray, weights.params))  # type: ignore[assignment]
        self.tokenizer = load_tokenizer(tokenizer_file(), "lower", 1)
        self.encode = fast_to_compile(self.model.encode_images)
        self.read = fast_to_compile(self.model.text_side)
        self.logits = fast_to_compile(lambda output, texts: self.model.logits(self.model.image_side(output), texts))

    def outputs(self, images: list[np.ndarray]) -> list[Any]:
        records = [Record(image, ("",), ("",), 1, "", "") for image in images]
        resized = eval_blocks(records, self.config.model.image_size, 1, 1)  # type: ignore[arg-type]
        return [self.encode(jnp.asarray(image)) for image, _ in resized]

    def side(self, text: str) -> TextSide:
        return self.read(*map(jnp.asarray, self.tokenizer.encode([text], self.config.model.text.length)))

    def cosines(self, outputs: list[Any], sides: list[TextSide]) -> np.ndarray:
        scale, bias = self.model.affine()
        return np.array([[float((self.logits(o, t)[0, 0] - bias) / scale) for t in sides] for o in outputs])

    def class_side(self, name: str) -> TextSide:
        sides = [self.side(template.replace("{}", name)) for template in EvalConfig().templates]
        unit = [np.asarray(s.embedding) / np.linalg.norm(s.embedding) for s in sides]
        queries = None if sides[0].queries is None else jnp.mean(jnp.stack([s.queries for s in sides]), axis=0)
        return TextSide(jnp.asarray(np.mean(unit, axis=0)), queries)


@pytest.mark.parametrize("model", [{}, SIGLIP, {"pooler": "average"}], ids=["mixer", "siglip", "average"])
def test_results_are_those_of_every_picture_and_text_by_itself(model: dict[str, Any]) -> None:
    images, alone, batched = pictures(6), OneByOne(**model), model_of(**model)
    outputs = alone.outputs(images)
    expected = alone.cosines(outputs, [alone.side(text) for text in TEXTS])
    assert np.ptp(expected, axis=1).min() > 0.05 and np.ptp(expected, axis=0).min() > 0.01  # pictures and texts differ
    assert relative_error(batched.score(images, TEXTS), expected) < 1e-5

    encoded, texts = batched.encode_image(images), batched.encode_text(TEXTS)
    assert relative_error(encoded.mixture, np.concatenate([o.mixture for o in outputs])) < 1e-5
    single = np.concatenate([alone.model.unconditioned_embedding(o) for o in outputs])
    assert relative_error(encoded.unconditioned, single / np.linalg.norm(single, axis=1, keepdims=True)) < 1e-5
    np.testing.assert_allclose(np.linalg.norm(texts.embedding, axis=1), 1, rtol=1e-5)
    assert (texts.queries is None) == bool(model)

    class_scores = alone.cosines(outputs, [alone.class_side(name) for name in CLASSES])
    exponentials = np.exp(float(alone.model.affine().scale) * class_scores)
    probabilities = batched.classify(images, CLASSES)
    assert relative_error(probabilities, exponentials / exponentials.sum(axis=1, keepdims=True)) < 1e-5
    assert relative_error(probabilities.sum(axis=1), np.ones(6)) < 1e-6
    assert all(x.dtype == np.float32 for x in (probabilities, encoded.mixture, encoded.unconditioned, texts.embedding))


@pytest.mark.parametrize("model", [model_of, functools.partial(model_of, **SIGLIP)], ids=["mixer", "siglip"])
def test_texts_of_a_class_are_averaged_as_in_evaluation(model: Callable[[], Model]) -> None:
    templates, images = ("a {}", "number 7: {}", "{}"), pictures(5)
    texts = model().encode_text(template.replace("{}", name) for name in CLASSES for template in templates)
    means = mean_text(TextSide(texts.embedding, texts.queries), np.repeat(np.arange(3), 3), 3)  # type: ignore[arg-type]
    cosines = model().score(images, Texts(*means))  # type: ignore[arg-type]
    expected = jax.nn.softmax(model().logit_scale * cosines, axis=1)
    assert relative_error(model().classify(images, CLASSES, templates), expected) < 1e-6


@pytest.mark.parametrize(("batch_size", "counts"), [(1, [3]), (3, [1, 3, 7]), (8, [5, 9])])
def test_neither_batches_nor_padding_show(batch_size: int, counts: list[int]) -> None:
    images, whole, model = pictures(9), model_of(16), model_of(batch_size)
    scores = whole.score(images, TEXTS)
    for count in counts:
        assert relative_error(model.score(images[:count], TEXTS[:count]), scores[:count, :count]) < 1e-5


@pytest.mark.slow
def test_maps_are_of_each_picture_and_text_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    images, texts, model = pictures(5), TEXTS[:3], Model(tiny_weights(), batch_size=4)
    maps = model.maps(images, texts)
    assert maps.shape == (5, 3, 4, 4) and maps.dtype == np.float32
    monkeypatch.setattr(inference, "_MAP_BYTES", 1)  # one picture at a time, however large
    alone = Model(tiny_weights(), batch_size=4)
    for i, j in ((0, 2), (4, 0)):
        assert relative_error(alone.maps(images[i], texts[j]), maps[i : i + 1, j : j + 1]) < 1e-4
    assert model.maps(images).shape == (5, 1, 4, 4)
    assert relative_error(alone.maps(images[3]), model.maps(images)[3:4]) < 1e-4
    with pytest.raises(ConfigError, match="images: expected at least one, got none"):
        model.maps([], texts)


def test_what_was_encoded_scores_as_what_it_was_encoded_from() -> None:
    images, model = pictures(7), model_of()
    encoded, texts = model.encode_image(images), model.encode_text(TEXTS)
    scores = model.score(images, TEXTS)
    for left in (images, encoded):
        for right in (TEXTS, texts):
            np.testing.assert_array_equal(model.score(left, right), scores)
    np.testing.assert_array_equal(model.classify(encoded, CLASSES), model.classify(images, CLASSES))
    some = Images(encoded.mixture[2:4], encoded.unconditioned[2:4])
    assert relative_error(model.score(some, texts), scores[2:4]) < 1e-5


def test_every_kind_of_picture_gives_the_same(tmp_path: Path) -> None:
    model, pixels = model_of(), pictures(1)[0]
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    opened = Image.open(path)  # not decoded yet, and given twice
    kinds = [pixels, path, str(path), path.read_bytes(), opened, opened, Image.fromarray(pixels)]
    together = model.encode_image(kinds).mixture
    assert all(np.array_equal(row, together[0]) for row in together)
    for kind in kinds:
        assert relative_error(model.encode_image(kind).mixture[0], together[0]) < 1e-5
    four = model.encode_image(np.stack([pixels] * 3))  # one array of several
    assert four.mixture.shape[0] == 3 and four.unconditioned.shape[0] == 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "I;16"])
def test_pictures_opened_by_pillow_are_read_as_their_files(mode: str) -> None:
    rng, file = np.random.default_rng(1), io.BytesIO()
    if mode == "I;16":
        image = Image.fromarray(rng.integers(65536, size=(24, 20), dtype=np.uint16))
    else:
        image = Image.fromarray(rng.integers(256, size=(24, 20, 4), dtype=np.uint8), "RGBA").convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    image.save(file, "TIFF", exif=exif)
    one, other = (model_of().encode_image(x).mixture for x in (file.getvalue(), Image.open(file)))
    np.testing.assert_array_equal(one, other)


def test_pictures_stream_in_order_and_are_not_kept() -> None:
    count, alive, most = 60, 0, 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def stream() -> Iterator[np.ndarray]:
        nonlocal alive, most
        for picture in pictures(count):
            copied = picture.copy()
            weakref.finalize(copied, gone)
            alive += 1
            most = max(most, alive)
            yield copied

    scores = model_of().score(stream(), TEXTS)
    assert relative_error(scores, model_of(16).score(pictures(count), TEXTS)) < 1e-5
    assert most <= 3 * 4  # batches of four


def test_sizes_share_programs_and_none_compiles_twice() -> None:
    compiled: list[str] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        compiled.extend([event] if event == "/jax/core/compile/backend_compile_duration" else [])

    model, images = Model(tiny_weights(embed_dim=64), batch_size=8), pictures(21)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        model.score(images[:5], TEXTS[:3])
        model.classify(images[:5], CLASSES)
        assert len(compiled) == 5  # image, side, text (of 4 and of 8 rows), cosines
        compiled.clear()
        for count, texts in ((6, 4), (7, 3), (8, 4)):  # five to eight of one, three or four of the other
            model.score(images[:count], TEXTS[:texts])
            model.score(model.encode_image(images[:count]), model.encode_text(TEXTS[:texts]))
        model.classify(images[:8], CLASSES)
        model.classify(images[:8], [*CLASSES, "cow"], ["a {}", "the {}", "{}"])
        model.score(images, TEXTS[:3])  # batches of 8, 8 and 5
        assert not compiled
        model.score(images[:4], TEXTS[:3])
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_one_text_may_be_given_as_a_string_and_texts_as_a_generator() -> None:
    model = model_of()
    whole = model.encode_text(TEXTS).embedding
    assert relative_error(model.encode_text(TEXTS[0]).embedding, whole[:1]) < 1e-5
    np.testing.assert_array_equal(model.encode_text(text for text in TEXTS).embedding, whole)


def test_scale_and_bias_turn_cosines_into_the_models_logits() -> None:
    alone, model = OneByOne(), model_of()
    scale, bias = alone.model.affine()
    assert model.logit_scale == pytest.approx(float(scale)) and model.logit_bias == pytest.approx(float(bias))
    assert model_of(logit_bias=None).logit_bias == 0


def test_bfloat16_comes_close_and_is_given_as_float32() -> None:
    images, exact = pictures(5), model_of().score(pictures(5), TEXTS)
    rough = Model(tiny_weights(), batch_size=4, dtype="bfloat16")
    scores = rough.score(images, TEXTS)
    assert scores.dtype == np.float32 and 1e-5 < np.abs(scores - exact).max() < 0.05
    np.testing.assert_array_equal(rough.score(rough.encode_image(images), rough.encode_text(TEXTS)), scores)


def test_threads_may_share_a_model() -> None:
    model, images = Model(tiny_weights(), batch_size=4), pictures(12)
    expected = model_of().score(images, TEXTS)
    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(model.score, images[start:], TEXTS) for start in range(4)]
    assert all(relative_error(results[start].result(), expected[start:]) < 1e-5 for start in range(4))


def closed_picture() -> Image.Image:
    image = Image.new("RGB", (8, 8))
    image.close()
    return image


@pytest.mark.parametrize(
    ("images", "problem"),
    [
        ([], "images: expected at least one, got none"),
        (7, "images: expected a picture or several, got int"),
        ([np.zeros((8, 8, 3), np.uint8), None], r"images\[1\]: expected an image of Pillow.*got NoneType"),
        (np.zeros((8, 8), np.uint8), r"images\[0\]: .*got uint8 \[8, 8\]"),
        (np.zeros((8, 8, 4), np.uint8), r"images\[0\]: .*got uint8 \[8, 8, 4\]"),
        (np.zeros((2, 8, 8, 3)), r"images\[0\]: .*got float64 \[8, 8, 3\]"),
        (np.zeros((0, 8, 3), np.uint8), r"images\[0\]: 8x0 has a side of fewer than 2 pixels"),
        (np.zeros((1, 9, 3), np.uint8), r"images\[0\]: 9x1 has a side of fewer than 2 pixels"),
        (Image.new("RGB", (0, 8)), r"images\[0\]: 0x8 has a side of fewer than 2 pixels"),
        (closed_picture(), r"images\[0\]: Operation on closed image"),
        (Image.new("La", (8, 8)), r"images\[0\]: conversion from La"),
        (Image.new("F", (8, 8)), r"images\[0\]: floating-point pixels"),
        (["no\0name"], r"images\[0\] \(no\0name\): .*null"),
        (["gone.jpg"], r"images\[0\] \(gone\.jpg\): .*No such file"),
        ([pictures(1)[0]] * 9 + [b"not a picture"], r"images\[9\]: no known image format"),
        (Images(np.zeros((2, 3, 32), np.float32), np.zeros((2, 32), np.float32)), r"\[N, 4, 32\].*got \[2, 3, 32\]"),
    ],
)
def test_what_is_no_picture_is_named(images: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        model_of().score(images, TEXTS)


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)).save(file, "PNG")
    (tmp_path / "half.png").write_bytes(file.getvalue()[:2000])
    for half in (tmp_path / "half.png", Image.open(tmp_path / "half.png")):
        with pytest.raises(ConfigError, match=r"images\[1\].*truncated"):
            model_of().encode_image([pictures(1)[0], half])


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda model: model.encode_text([]), "texts: expected at least one, got none"),
        (lambda model: model.encode_text(["a", b"b"]), r"texts\[1\]: expected a string, got bytes"),
        (lambda model: model.encode_text(None), r"texts\[0\]: expected a string, got NoneType"),
        (lambda model: model.classify(pictures(1), "dog"), "classes: expected several names, got 'dog'"),
        (lambda model: model.classify(pictures(1), ["a", "a"]), "more than once: 'a'"),
        (lambda model: model.classify(pictures(1), ["a"], "no place"), "no place"),
        (lambda model: model.score(pictures(1), Texts(np.ones((2, 32), np.float32), None)), "pooler 'mixer'"),
        (lambda model: model.score(pictures(1), Texts(np.ones((2, 7)), np.ones((2, 4, 8)))), r"^texts: .*got \(2, 7\)"),
        (lambda model: model.encode_text(["a", "\ud83d"]), r"texts\[1\] has half of a surrogate"),
        (lambda model: Model(tiny_weights(), batch_size=0), "batch_size: 0 is not valid"),
        (lambda model: Model(tiny_weights(), batch_size=8.0), "batch_size: 8.0 is not valid"),  # type: ignore[arg-type]
        (lambda model: Model(tiny_weights(), batch_size=None), "batch_size: None is not valid"),  # type: ignore[arg-type]
        (lambda model: Model(tiny_weights(), dtype="float16"), "model.dtype: 'float16' is not valid"),
        (lambda model: load("nowhere"), "nowhere: no such file or folder"),
    ],
)
def test_other_mistakes_say_what_was_expected(call: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        call(model_of())


def test_weights_without_a_tokenizer_still_encode_pictures() -> None:
    model = Model(tiny_weights(tokenizer=""))
    assert len(model.encode_image(pictures(1)).mixture) == 1
    with pytest.raises(ConfigError, match=r"without a tokenizer; put its tokenizer\.json"):
        model.encode_text(TEXTS)


def test_saved_and_loaded_a_model_is_the_same_bit_by_bit(tmp_path: Path) -> None:
    model, images = model_of(), pictures(5)
    model.save_pretrained(tmp_path / "folder")
    loaded = load(tmp_path / "folder", batch_size=4)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)
    np.testing.assert_array_equal(loaded.score(images, TEXTS), model.score(images, TEXTS))
    np.testing.assert_array_equal(loaded.classify(images, CLASSES), model.classify(images, CLASSES))


def test_a_run_directory_is_read_by_the_training_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = types.ModuleType("llip_jax.training.start")
    asked: list[Path] = []
    start.read_weights = lambda path: asked.append(path) or tiny_weights()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llip_jax.training.start", start)
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    for path in (tmp_path, tmp_path / "checkpoints" / "10"):
        assert load(path).config == model_of().config
    assert asked == [tmp_path, tmp_path / "checkpoints" / "10"]


@functools.cache
def folder_of_the_example() -> Path:
    """What the example of ``llip_jax.load`` expects to find."""
    folder = temporary_folder()
    Model(tiny_weights(tokenizer="clip")).save_pretrained(folder / "llip-b32")
    for name, picture in zip(("dog.jpg", "street.png"), pictures(2), strict=True):
        Image.fromarray(picture).save(folder / name)
    return folder


def test_the_documented_example_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    example = textwrap.dedent(re.split(r"::\n\n|\n\n    Args:", inspect.getdoc(load) or "")[1].split("\n\nArgs:")[0])
    assert 10 <= len(example.strip().splitlines()) <= 14
    monkeypatch.chdir(folder_of_the_example())
    names: dict[str, Any] = {}
    exec(compile(example, "the example of llip_jax.load", "exec"), names)
    assert names["scores"].shape == (2, 3) and names["probabilities"].shape == (2, 3)
    np.testing.assert_allclose(names["probabilities"].sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(names["again"], names["scores"])
    assert names["best"] == [names["texts"][j] for j in names["scores"].argmax(axis=1)]
    assert (folder_of_the_example() / "copy-of-llip-b32" / "README.md").exists()


_ALONE = """
import sys
blocked = ("orbax", "orbax.checkpoint", "torch", "tensorflow", "grain", "tensorboardX")
sys.modules.update(dict.fromkeys(blocked))  # importing them fails
import llip_jax
import llip_jax.data.images, llip_jax.data.tokenizers
assert not {{"jax", "flax"}} & sys.modules.keys()
scores = llip_jax.load({folder!r}).score({picture!r}, ["a dog", "a cat"])
assert scores.shape == (1, 2) and isinstance(llip_jax.load({folder!r}), llip_jax.Model)
assert all(sys.modules[name] is None for name in blocked)
"""


def test_loading_needs_neither_orbax_nor_torch_and_the_package_alone_not_even_jax() -> None:
    folder = folder_of_the_example()
    done = run(["-c", _ALONE.format(folder=str(folder / "llip-b32"), picture=str(folder / "dog.jpg"))])
    assert (done.returncode, done.stderr) == (0, "")


def test_the_package_offers_what_it_lists() -> None:
    assert all(getattr(llip_jax, name) is getattr(inference, name) for name in llip_jax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = llip_jax.lod  # type: ignore[attr-defined]
