"""What a pass leaves on the host, field by field, against the model on one image and one text at a time."""

import dataclasses
import json
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import fast_to_compile, random_params
from run_helpers import temporary_folder
from test_evaluator import Records, config_of, tokenizer

from llip_jax.config import Config, MeshConfig
from llip_jax.data.evaluation_sets import EvalSet
from llip_jax.data.records import BadSample, Record
from llip_jax.evaluation.classes import ClassSpec
from llip_jax.evaluation.diagnostics.figures import diagnostic_figures
from llip_jax.evaluation.evaluator import Evaluator
from llip_jax.evaluation.reading import Reading
from llip_jax.evaluation.texts import OWN_CAPTIONS
from llip_jax.models.dual_encoder import abstract_model
from llip_jax.ops.pair_scores import MixtureSide, TextSide
from llip_jax.parallel.mesh import make_mesh

TORN, CLOSED = (0, 13), (5,)
"""Images whose files hold no picture, and whose records cannot be read."""
COUNTS = (2, 0, 1, 3, OWN_CAPTIONS + 1, 2, 1, 4, 2, 3, 1, 2, 5, 2)
"""Specific captions of each image."""
READ = [row for row in range(len(COUNTS)) if row not in TORN + CLOSED]
CLASSES: dict[str, dict[str, dict[str, float]]] = {
    "kind 2": {"shape": {"a red circle": 3, "round": 1}, "texture": {"striped": 1}},
    "kind 0": {"shape": {"a star": 1}, "look": {"dotted": 0.5, "small and blue": 2, "large": 1}},
    "kind 1": {"all": {"a green square": 1, "on a white background": 5}},
}
"""Texts by class and group, with weights; labels do not follow the alphabet."""
TASKS = ("zero_shot", "retrieval", "choice", "knn", "diagnostics")
WORDS = ("red", "blue", "green", "large", "small", "circle", "square", "star", "striped", "dotted", "left", "above")
close = {"rtol": 1e-3, "atol": 3e-5}


class Torn(Records):
    """Records of which some cannot be read, and some hold no picture."""

    def __init__(self, records: list[Record], torn: tuple[int, ...], closed: tuple[int, ...]):
        super().__init__(
            [dataclasses.replace(record, image=b"torn") if i in torn else record for i, record in enumerate(records)]
        )
        self.closed = closed

    def __getitem__(self, index: int) -> Record:
        if index in self.closed:
            raise BadSample("unreadable", "closed")
        return super().__getitem__(index)


def picture(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (4, 4, 3), np.uint8).repeat(4, axis=0).repeat(4, axis=1)


@cache
def pictures_and_captions() -> tuple[list[np.ndarray], list[tuple[str, ...]]]:
    """The captions of image 0, which cannot be read, come first in the alphabet; every third image shares one."""
    rng = np.random.default_rng()
    captions = [
        tuple(f"{row}.{slot} {' '.join(rng.choice(WORDS, 4))}" for slot in range(count - (row % 3 == 0)))
        + ("shared by some",) * (row % 3 == 0)
        for row, count in enumerate(COUNTS)
    ]
    return [picture(rng) for _ in COUNTS], captions


def options(row: int) -> list[str] | None:
    """Captions to choose from: of others, of none, and of an image that cannot be read."""
    _, captions = pictures_and_captions()
    of_kind = {
        0: None,
        1: [f"true {row}", captions[0][0]],
        2: [f"true {row}", "a red circle", captions[4][2], captions[7][1]],
        3: ["nothing to choose from"],
    }
    return of_kind[row % 4]


@cache
def source() -> Torn:
    records = [
        Record(pixels, (*own, "weak"), ("",) * (len(own) + 1), len(own), "", f"image {row}", fields)
        for row, (pixels, own) in enumerate(zip(*pictures_and_captions(), strict=True))
        for fields in [{"kind": f"kind {row % 3}", "options": options(row)}]
    ]
    return Torn(records, TORN, CLOSED)


@cache
def training() -> Torn:
    """Of 15 images, 8 evenly spread: 0, 2, ... 14; of these two cannot be read, one has no class and one has two."""
    rng = np.random.default_rng()
    labels: list[Any] = ["kind 9"] * 15  # of those that should not be looked at
    labels[0:15:2] = ["kind 1", "kind of its own", "kind 1", ["kind 0", "kind 1"], "kind 1", 1, 99, "kind 2"]
    records = [
        Record(picture(rng), ("x",), ("",), 1, "", f"train {i}", {"kind": label}) for i, label in enumerate(labels)
    ]
    return Torn(records, (4,), (8,))


TRAINED = {0: 2, 2: 3, 10: 1, 14: 0}
"""Class numbers of the training images that remain."""


def config_with_classes(pooler: str) -> Config:
    file = temporary_folder() / "classes.json"
    file.write_text(json.dumps(CLASSES))
    config = config_of(4, pooler)
    scorers = ("attributes", "max_score", "mean_text", "mean_score")
    changes: dict[str, Any] = {"classes": str(file), "scorers": scorers, "choice_field": "options", "probe_images": 8}
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, **changes))


@cache
def model_of(pooler: str) -> tuple[nnx.GraphDef[Any], Any]:
    config = config_of(4, pooler)
    return nnx.graphdef(abstract_model(config)), random_params(config, int(np.random.default_rng().integers(1000)))


@cache
def reading_of(pooler: str) -> Reading:
    config, mesh = config_with_classes(pooler), make_mesh(MeshConfig(), jax.devices()[:1])
    graph, params = model_of(pooler)
    with jax.set_mesh(mesh):
        eval_set = EvalSet("", source(), training, "kind", None, None)
        return Evaluator(config, graph, mesh, eval_set, tokenizer(), TASKS).read(params)


class Seen(NamedTuple):
    """One image through the model."""

    side: Any
    tokens: np.ndarray
    patches: np.ndarray


class Alone:
    """The model on one image and one text at a time."""

    def __init__(self, pooler: str):
        model = nnx.merge(*model_of(pooler))
        length = config_of(4, pooler).model.text.length

        @fast_to_compile
        def see(pixels: Any) -> Seen:
            output = model.encode_images(pixels[None])
            return Seen(model.image_side(output), output.mixture[0], output.patches[0])

        read, logit = fast_to_compile(model.text_side), fast_to_compile(model.logits)
        self.scale, self.bias = map(float, model.affine())
        self._logit = lambda side, text: float(logit(side, text)[0, 0])
        self.see = lambda pixels: jax.device_get(see(jnp.asarray(pixels)))
        self.text = cache(lambda text: jax.device_get(read(*tokenizer().encode([text], length))))

    def cosine(self, side: Any, text: str | TextSide) -> float:
        return (self._logit(side, self.text(text) if isinstance(text, str) else text) - self.bias) / self.scale

    def unit(self, text: str) -> np.ndarray:
        return unit(self.text(text).embedding[0])

    def mean_of(self, texts: dict[str, float]) -> TextSide:
        """Weighted means of unit embeddings and of raw queries."""
        weights = np.array([*texts.values()]) / sum(texts.values())
        sides = [self.text(text) for text in texts]
        queries = None
        if sides[0].queries is not None:
            queries = sum(weight * side.queries for weight, side in zip(weights, sides, strict=True))
        return TextSide(sum(w * self.unit(text) for w, text in zip(weights, texts, strict=True))[None], queries)

    def mixed_by(self, side: Any, text: str) -> tuple[np.ndarray, np.ndarray | None]:
        """The image mixed by a text, of length 1, and the mixing weights."""
        if not isinstance(side, MixtureSide):
            return unit(side.embedding[0]), None
        products = np.einsum("mh,kmh->mk", self.text(text).queries[0], side.keys[0]) / side.temperature
        powers = np.exp(products - products.max(axis=1, keepdims=True))
        weights = powers / powers.sum(axis=1, keepdims=True)
        return unit(np.einsum("mk,kmh->mh", weights, side.values[0]).ravel() @ side.output), weights


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


@cache
def alone(pooler: str) -> tuple[Alone, list[Seen]]:
    """And the images of the set that can be read."""
    model = Alone(pooler)
    return model, [model.see(pictures_and_captions()[0][row]) for row in READ]


poolers = pytest.mark.parametrize("pooler", ["mixer", "registers"])


@poolers
def test_rows_are_the_images_that_can_be_read_with_their_annotations(pooler: str) -> None:
    reading, (_, captions) = reading_of(pooler), pictures_and_captions()
    assert reading.rows.tolist() == READ
    assert reading.unreadable == 3
    assert not reading.multi_label
    labels = {name: number for number, name in enumerate(CLASSES)}
    for row, own in zip(READ, reading.annotations, strict=True):
        assert (own.name, own.captions) == (f"image {row}", captions[row])
        assert own.labels == (labels[f"kind {row % 3}"],)
        assert own.choices == (tuple(options(row) or ()) if row % 4 in (1, 2) else ())
        assert own.fields == {"kind": f"kind {row % 3}", "options": options(row)}


@poolers
def test_captions_of_readable_images_are_the_texts_and_each_pair_has_its_score(pooler: str) -> None:
    reading, (_, captions), (model, seen) = reading_of(pooler), pictures_and_captions(), alone(pooler)
    assert reading.texts == sorted({text for row in READ for text in captions[row]})
    expected = [[text in captions[row] for text in reading.texts] for row in READ]
    np.testing.assert_array_equal(reading.positives, expected)
    scores = [[model.cosine(image.side, text) for text in reading.texts] for image in seen]
    np.testing.assert_allclose(reading.caption_scores, scores, **close)
    own = [model.unit(text) for text in reading.texts]
    np.testing.assert_allclose(reading.text_embedding[: len(own)], own, **close)


@poolers
def test_classes_are_scored_by_each_scorer_with_weights_and_groups(pooler: str) -> None:
    reading, (model, seen) = reading_of(pooler), alone(pooler)
    flat = {name: {t: w for own in groups.values() for t, w in own.items()} for name, groups in CLASSES.items()}
    assert reading.classes == ClassSpec(
        tuple(CLASSES),
        tuple(map(tuple, flat.values())),
        tuple(tuple(texts.values()) for texts in flat.values()),
        tuple(tuple(group for group, own in groups.items() for _ in own) for groups in CLASSES.values()),
    )

    def mean(image: Seen, texts: dict[str, float]) -> np.floating:
        return np.average([model.cosine(image.side, text) for text in texts], weights=[*texts.values()])

    expected = {
        "attributes": [
            [np.mean([mean(image, texts) for texts in groups.values()]) for groups in CLASSES.values()]
            for image in seen
        ],
        "max_score": [[max(model.cosine(image.side, t) for t in texts) for texts in flat.values()] for image in seen],
        "mean_text": [[model.cosine(image.side, model.mean_of(texts)) for texts in flat.values()] for image in seen],
        "mean_score": [[mean(image, texts) for texts in flat.values()] for image in seen],
    }
    assert list(reading.class_scores) == list(expected)
    for name, scores in expected.items():
        np.testing.assert_allclose(reading.class_scores[name], scores, err_msg=name, **close)


def check_embeddings(found: dict[str, np.ndarray], seen: list[Seen]) -> None:
    """Of the mixer the tower's output is the mean of the tokens, otherwise the class token."""
    expected: dict[str, list[np.ndarray]] = {"unconditioned": [], "tower": [], "patches": []}
    for side, tokens, patches in seen:
        mixes = isinstance(side, MixtureSide)
        expected["unconditioned"].append(
            side.values[0].mean(axis=0).ravel() @ side.output if mixes else side.embedding[0]
        )
        expected["tower"].append(tokens.mean(axis=0) if mixes else tokens[0])
        expected["patches"].append(patches.mean(axis=0))
    assert set(found) == set(expected)
    for name, rows in expected.items():
        np.testing.assert_allclose(found[name], rows, rtol=1e-3, atol=1e-4, err_msg=name)


@poolers
def test_embeddings_are_those_of_the_images(pooler: str) -> None:
    check_embeddings(reading_of(pooler).embeddings, alone(pooler)[1])


@poolers
def test_training_images_are_evenly_spread_and_have_their_own_labels(pooler: str) -> None:
    reading, (model, _) = reading_of(pooler), alone(pooler)
    assert reading.train is not None
    assert reading.train.labels.tolist() == list(TRAINED.values())
    check_embeddings(reading.train.embeddings, [model.see(training().records[row].image) for row in TRAINED])


@poolers
def test_images_meet_their_own_captions(pooler: str) -> None:
    own, (_, captions), (model, seen) = reading_of(pooler).captions, pictures_and_captions(), alone(pooler)
    assert own is not None and own.mixed is not None
    assert (own.weights is None) == (pooler != "mixer")
    for i, (row, image) in enumerate(zip(READ, seen, strict=True)):
        texts = captions[row][:OWN_CAPTIONS]
        np.testing.assert_array_equal(own.mask[i], np.arange(own.mask.shape[1]) < len(texts))
        assert [reading_of(pooler).texts[text] for text in own.text[i, : len(texts)]] == list(texts)
        assert not own.text[i, len(texts) :].any()
        for slot, text in enumerate(texts):
            mixed, weights = model.mixed_by(image.side, text)
            np.testing.assert_allclose(own.cosines[i, slot], model.cosine(image.side, text), **close)
            np.testing.assert_allclose(own.cosines[i, slot], mixed @ model.unit(text), **close)
            np.testing.assert_allclose(own.mixed[i, slot], mixed, **close)
            if own.weights is not None:
                np.testing.assert_allclose(own.weights[i, slot], weights, **close)


@poolers
def test_images_meet_their_own_choices(pooler: str) -> None:
    own, (model, seen) = reading_of(pooler).choices, alone(pooler)
    assert own is not None
    for i, (row, image) in enumerate(zip(READ, seen, strict=True)):
        texts = options(row) if row % 4 in (1, 2) else None
        count = len(texts or ())
        np.testing.assert_array_equal(own.mask[i], np.arange(own.mask.shape[1]) < count)
        np.testing.assert_allclose(
            own.cosines[i, :count], [model.cosine(image.side, text) for text in texts or ()], **close
        )


def singular_values(rows: list[np.ndarray]) -> np.ndarray:
    """Of rows of length 1, centred."""
    unit_rows = np.stack([unit(row.astype(np.float64)) for row in rows])
    return np.linalg.svd((unit_rows - unit_rows.mean(axis=0)) / np.sqrt(len(rows)), compute_uv=False)


@poolers
def test_spectra_are_those_of_captions_and_of_images_mixed_by_their_own(pooler: str) -> None:
    reading, (_, captions), (model, seen) = reading_of(pooler), pictures_and_captions(), alone(pooler)
    spectra = diagnostic_figures(reading)["spectra"]
    expected = {"text": [model.unit(text) for text in reading.texts]}
    if pooler == "mixer":
        expected["mixed"] = [
            model.mixed_by(image.side, text)[0]
            for row, image in zip(READ, seen, strict=True)
            for text in captions[row][:OWN_CAPTIONS]
        ]
    assert set(spectra) == {"unconditioned", "tower", "patches", *expected}
    for name, rows in expected.items():
        assert spectra[name]["images"] == len(rows)
        values = singular_values(rows)
        found = spectra[name]["singular_values"]
        np.testing.assert_allclose(found[: len(values)], values[: len(found)], rtol=1e-3, atol=1e-4)
