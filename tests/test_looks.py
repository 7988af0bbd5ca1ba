"""Close looks at a reading whose rows are not the indices of its source: the right pictures, captions and scores."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from oracles import fast_to_compile, random_params
from PIL import Image
from test_evaluator import Records, config_of, tokenizer

from llip_jax.config import EvalConfig
from llip_jax.data.records import Record
from llip_jax.evaluation.classes import ClassSpec
from llip_jax.evaluation.diagnostics import attribution
from llip_jax.evaluation.diagnostics.attribution import Words
from llip_jax.evaluation.exhibits import ANSWERS, CAPTIONS, MAPPED, MISMATCHES, Pictures, galleries, mapped
from llip_jax.evaluation.looks import Looks
from llip_jax.evaluation.maps import caption_maps, uncaptioned_maps
from llip_jax.evaluation.reading import Annotation, Reading
from llip_jax.evaluation.tasks import run_tasks
from llip_jax.models.dual_encoder import abstract_model

IMAGES, SIDE = 24, 16
GONE, BARE = {0, 3, 9}, {5, 14}
"""Images that could not be read, and images without captions."""
READ = [index for index in range(IMAGES) if index not in GONE]


def number_of(shown: Any) -> int:
    """The image that something is shown of, by its name."""
    return int(shown["name"].removeprefix("image "))


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def captions_of(index: int) -> tuple[str, ...]:
    """One to four; pairs of neighbours have their first one in common, so that it is foreign to neither."""
    own = tuple(f"caption {slot} of {index}" for slot in range(index % 4))
    return () if index in BARE else (f"shared by the pair {index // 2}", *own)


class World:
    """A source, its pictures and a reading of it with random scores, of which many tie."""

    def __init__(self) -> None:
        rng = np.random.default_rng()
        self.pictures = [rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8) for _ in range(IMAGES)]
        self.source = Records(
            [
                Record(png(pixels) if index % 2 else pixels, captions_of(index), (), 0, "", f"image {index}")
                for index, pixels in enumerate(self.pictures)
            ]
        )
        texts = sorted({text for index in READ for text in captions_of(index)})
        positives = np.array([[text in captions_of(index) for text in texts] for index in READ])
        scores = rng.integers(-9, 10, positives.shape) / 10 + 0.5 * positives
        scores[[READ.index(index) for index in BARE]] = 5  # they would be the best answers to all
        scores[0, positives[0].argmax()] = scores[1, positives[2].argmax()] = 3  # one hit and one miss at least
        class_scores = rng.integers(0, 4, (len(READ), 3)).astype(np.float32)
        class_scores[[0, 1], [READ[0] % 3, (READ[1] + 1) % 3]] = 9
        self.reading = Reading(
            rows=np.array(READ),
            annotations=[Annotation(f"image {index}", captions_of(index), (index % 3,), (), {}) for index in READ],
            unreadable=len(GONE),
            texts=texts,
            positives=positives,
            caption_scores=scores.astype(np.float32),
            text_embedding=np.zeros((len(texts), 4), np.float32),
            classes=ClassSpec.from_names([f"class {number}" for number in range(3)], ["{}"]),
            multi_label=False,
            class_scores={"mean_text": class_scores},
            embeddings={},
            captions=None,
            choices=None,
            train=None,
        )
        self.config = config_of(8)
        self.graph = nnx.graphdef(abstract_model(self.config))
        self.params = random_params(self.config, int(rng.integers(1000)))
        self.looks = Looks(self.config, self.graph, self.params, tokenizer(), self.source, self.reading)

    def score(self, index: int, text: str) -> float:
        return float(self.reading.caption_scores[READ.index(index), self.reading.texts.index(text)])


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def test_a_row_has_its_own_picture(world: World) -> None:
    for row, index in enumerate(READ):
        np.testing.assert_array_equal(world.looks.pixels(row), world.pictures[index])


class Spy:
    """In place of ``attribute_words``: which pictures it is given with which texts; cosines are random."""

    def __init__(self, pictures: list[np.ndarray]):
        self.number = {picture.tobytes(): index for index, picture in enumerate(pictures)}
        self.calls: list[list[tuple[int, str]]] = []
        self.cosines: list[list[float]] = []

    def __call__(self, graph: Any, params: Any, images: Any, texts: Sequence[str], *_: Any, **__: Any) -> list[Words]:
        self.calls.append(list(zip([self.number[image.tobytes()] for image in images], texts, strict=True)))
        self.cosines.append(np.random.default_rng().random(len(texts)).tolist())
        return [Words(text, cosine, []) for text, cosine in zip(texts, self.cosines[-1], strict=True)]


def test_words_are_of_an_own_a_following_and_the_best_foreign_caption(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(world.pictures)
    monkeypatch.setattr(attribution, "attribute_words", spy)
    figures, exhibits = world.looks.words(lambda _: None)
    own, other, best = spy.calls
    described = [index for index in READ if index not in BARE]
    assert own == [(index, captions_of(index)[0]) for index in described]
    assert [index for index, _ in other] == described
    for index, text in other:
        after = [following % IMAGES for following in range(index + 1, index + IMAGES)]
        foreign = [one for i in after if i in READ for one in captions_of(i) if one not in captions_of(index)]
        assert text == foreign[0]
    for name, cosines in (("own", spy.cosines[0]), ("other", spy.cosines[1])):
        assert figures[f"cosine_{name}"] == pytest.approx(np.mean(cosines))

    assert len({index for index, _ in best}) == MISMATCHES
    assert (best[0][0], best[-1][0]) == (described[0], described[-1]), "evenly spread"
    for (index, text), shown, cosine in zip(best, exhibits, spy.cosines[2], strict=True):
        assert (READ[shown["row"]], shown["name"], shown["text"]) == (index, f"image {index}", text)
        assert shown["score"] == round(cosine, 4)
        foreign = [one for one in world.reading.texts if one not in captions_of(index)]
        assert text in foreign
        assert world.score(index, text) == max(world.score(index, one) for one in foreign)


def test_maps_are_of_the_picture_and_each_caption_in_turn(world: World) -> None:
    model = nnx.merge(world.graph, world.params)
    texts = fast_to_compile(model.text_side)
    of_caption = fast_to_compile(lambda image, side: caption_maps(model, image[None], side)[0, 0])
    of_none = fast_to_compile(lambda image: uncaptioned_maps(model, image[None])[0])
    for row in (0, READ.index(11)):
        captions = world.reading.annotations[row].captions[:CAPTIONS]
        seen, uncaptioned, captioned = world.looks.maps(row, captions)
        picture = world.pictures[READ[row]]
        np.testing.assert_array_equal(seen, picture)
        np.testing.assert_allclose(uncaptioned, of_none(picture), rtol=1e-3, atol=1e-5)
        assert len(captioned) == len(captions)
        for text, found in zip(captions, captioned, strict=True):
            expected = of_caption(picture, texts(*tokenizer().encode([text], world.config.model.text.length)))
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_shown_maps_carry_the_scores_of_their_captions(world: World, tmp_path: Path) -> None:
    def maps(row: int, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Maps of one value: the caption's number among the texts."""
        levels = [world.reading.texts.index(text) for text in captions]
        return world.looks.seen(row), np.full((4, 4), 255), np.stack([np.full((4, 4), level) for level in levels])

    def overlay(pixels: np.ndarray, level: np.ndarray) -> np.ndarray:
        """The map's value in the corner of the picture."""
        marked = pixels.copy()
        marked[0, 0] = level[0, 0]
        return marked

    shown = mapped(world.reading, maps, overlay, Pictures(tmp_path, world.looks.pixels))
    assert len({one["name"] for one in shown}) == MAPPED
    for one in shown:
        index = number_of(one)
        assert index not in BARE
        picture = world.pictures[index]
        np.testing.assert_array_equal(written(tmp_path / one["image"]), picture)
        np.testing.assert_array_equal(written(tmp_path / one["uncaptioned"]), overlay(picture, np.full((1, 1), 255)))
        assert [own["text"] for own in one["captions"]] == list(captions_of(index)[:CAPTIONS])
        for own in one["captions"]:
            assert own["score"] == pytest.approx(world.score(index, own["text"]), abs=1e-4)
            level = np.full((1, 1), world.reading.texts.index(own["text"]))
            np.testing.assert_array_equal(written(tmp_path / own["map"]), overlay(picture, level))


def written(path: Path) -> np.ndarray:
    """A picture that was enlarged by whole factors, in its own size."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return pixels[:: len(pixels) // SIDE, :: len(pixels) // SIDE]


def test_galleries_say_right_where_the_outcome_does(world: World, tmp_path: Path) -> None:
    """Images without captions score best with all texts, and are no answers."""
    reading = world.reading
    outcomes = run_tasks(reading, ("retrieval", "zero_shot"), EvalConfig()).outcomes
    shown = galleries(reading, outcomes, Pictures(tmp_path, world.looks.pixels))
    described = [row for row, index in enumerate(READ) if index not in BARE]
    assert set(shown) == {"image_to_text", "text_to_image", "zero_shot"}
    for name, queries in shown.items():
        assert {query["right"] for query in queries} == {True, False}
        for query in queries:
            if name == "text_to_image":
                column = reading.texts.index(query["text"])
                names = [reading.annotations[row].name for row in described]
                scores, right = reading.caption_scores[described, column], reading.positives[described, column]
            elif name == "image_to_text":
                names, row = reading.texts, READ.index(number_of(query))
                assert query["captions"] == list(captions_of(number_of(query)))
                scores, right = reading.caption_scores[row], reading.positives[row]
            else:
                names, row = list(reading.classes.names), READ.index(number_of(query))
                scores, right = reading.class_scores["mean_text"][row], np.arange(3) == READ[row] % 3
                assert query["label"] == names[right.argmax()]
            assert query["right"] == (right[scores == scores.max()].mean() > 0.5)
            if name != "zero_shot":
                assert query["rank"] == 1 + sum(scores > scores[right].max())
            answers = query["answers"]
            assert [one["score"] for one in answers] == pytest.approx(sorted(scores, reverse=True)[:ANSWERS], abs=1e-4)
            for one in answers:
                place = names.index(one.get("name", one.get("text")))
                assert (one["score"], one["right"]) == (pytest.approx(scores[place], abs=1e-4), right[place])
            for pictured in [one for one in (query, *answers) if "image" in one]:
                np.testing.assert_array_equal(
                    written(tmp_path / pictured["image"]), world.pictures[number_of(pictured)]
                )
