"""The evaluator against scoring every pair by itself, and all that must not show in its figures."""

import dataclasses
import io
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image
from run_helpers import call_on_devices, call_on_processes, temporary_folder, tiny_config

from llip_jax.config import Config, ConfigError, MeshConfig
from llip_jax.data.evaluation_sets import EvalSet
from llip_jax.data.pipeline import build_tokenizer
from llip_jax.data.records import Record
from llip_jax.data.tokenizers import Tokenizer
from llip_jax.data.toyworld import ToyWorld
from llip_jax.evaluation.evaluator import Evaluator
from llip_jax.evaluation.looks import Looks
from llip_jax.evaluation.scorers import mean_text
from llip_jax.evaluation.scoring import silent
from llip_jax.models.dual_encoder import DualEncoder
from llip_jax.ops.pair_scores import TextSide, normalize
from llip_jax.parallel.mesh import make_mesh

IMAGES = 19


class Records:
    """A source of records in memory."""

    def __init__(self, records: list[Record]):
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]

    def identity(self) -> dict[str, str]:
        return {"memory": str(len(self))}


@cache
def world() -> Records:
    """Pictures with specific captions, one weak caption, and two captions that several pictures share."""
    world = ToyWorld(tiny_config().data.toyworld, "eval", 16)
    records = []
    for index in range(IMAGES):
        record = world[index]
        captions = (*record.captions[:2], f"shared by {index % 2}", "weak and left out")
        records.append(dataclasses.replace(record, captions=captions, specific=3, fields={"kind": f"kind {index % 5}"}))
    return Records(records)


def config_of(block: int, pooler: str = "mixer", **data: Any) -> Config:
    data = {"label_field": "kind"} | data
    templates = "('a picture of a {}', '{}', 'one {} here')"
    model = {
        "pooler": pooler,
        "mixture_tokens": 1 if pooler == "class_token" else 4,
        "mixer_temperature": 0.3,
        "text.length": 64,  # cut texts would be equal, and their scores level
    }
    return tiny_config(data=data, eval={"batch_size": block, "templates": templates}, model=model)


@cache
def tokenizer() -> Tokenizer:
    config = tiny_config().data.tokenizer
    return build_tokenizer(config, world(), temporary_folder() / "tokenizer.json", 12)


@cache
def model_of(pooler: str = "mixer") -> tuple[nnx.GraphDef[Any], Any]:
    """A model with large enough weights that images and texts differ, and its parameters."""
    graph, params = nnx.split(DualEncoder(config_of(8, pooler), rngs=nnx.Rngs(3)), nnx.Param)
    return graph, jax.tree.map(lambda x: x * 2 if x.ndim > 1 else x, nnx.to_pure_dict(params))


def own_set(config: Config, source: Records) -> EvalSet:
    return EvalSet("", source, None, config.data.label_field, None, None)


def evaluate(config: Config, source: Records, devices: int = 1) -> dict[str, Any]:
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    graph, params = model_of(config.model.pooler)
    with jax.set_mesh(mesh):
        params = jax.device_put(jax.device_get(params), NamedSharding(mesh, PartitionSpec()))
        return Evaluator(config, graph, mesh, own_set(config, source), tokenizer())(params)


def one_by_one(config: Config, source: Records) -> tuple[np.ndarray, list[str], np.ndarray, list[str]]:
    """Logits [image, text] and [image, class], each pair scored by itself, and the names of texts and classes."""
    model = nnx.merge(*model_of(config.model.pooler))
    encode = jax.jit(lambda image: model.image_side(model.encode_images(image)))
    read = jax.jit(model.text_side)
    score = jax.jit(model.logits)
    texts = sorted({text for record in source.records for text in record.captions[: record.specific]})
    kinds = sorted({record.fields["kind"] for record in source.records})

    def side(text: str) -> TextSide:
        return read(*map(jnp.asarray, tokenizer().encode([text], config.model.text.length)))

    def class_side(kind: str) -> TextSide:
        sides = [side(template.replace("{}", kind)) for template in config.eval.templates]
        unit = [np.asarray(s.embedding) / np.linalg.norm(s.embedding) for s in sides]
        queries = None if sides[0].queries is None else jnp.mean(jnp.stack([s.queries for s in sides]), axis=0)
        return TextSide(jnp.asarray(np.mean(unit, axis=0)), queries)

    images = [encode(jnp.asarray(record.image)[None]) for record in source.records]
    columns = [side(text) for text in texts], [class_side(kind) for kind in kinds]
    scores = [np.array([[float(score(i, t)[0, 0]) for t in sides] for i in images]) for sides in columns]
    return scores[0], texts, scores[1], kinds


def recall(scores: np.ndarray, positives: np.ndarray, k: int) -> float:
    """Share of rows with a positive among the k best; no two scores are equal here."""
    best = np.argsort(-scores, axis=1)[:, :k]
    return float(np.mean(np.take_along_axis(positives, best, axis=1).any(axis=1)))


@pytest.mark.parametrize("pooler", ["mixer", "class_token"])
def test_figures_equal_scoring_each_pair_by_itself(pooler: str) -> None:
    config = config_of(8, pooler)
    results = evaluate(config, world())
    scores, texts, class_scores, kinds = one_by_one(config, world())
    assert len(np.unique(scores)) == scores.size, "ties would need another way of counting"
    positives = np.array([[text in record.captions[:3] for text in texts] for record in world().records])
    for k in (1, 5, 10):
        assert results["retrieval"][f"image_to_text_recall_at_{k}"] == pytest.approx(recall(scores, positives, k))
        assert results["retrieval"][f"text_to_image_recall_at_{k}"] == pytest.approx(recall(scores.T, positives.T, k))
    labels = [kinds.index(record.fields["kind"]) for record in world().records]
    assert results["zero_shot"]["top_1_accuracy"] == pytest.approx(np.mean(class_scores.argmax(axis=1) == labels))
    assert results["classes"] == 5
    assert (results["images"], results["texts"], results["unreadable_images"]) == (IMAGES, len(texts), 0)
    assert "weak and left out" not in texts
    assert positives.sum(axis=0).max() > 1, "some texts must belong to several images"


@cache
def expected() -> dict[str, Any]:
    return evaluate(config_of(8), world())


@pytest.mark.parametrize("block", [5, 64])
def test_blocks_and_their_padding_do_not_show(block: int) -> None:
    """19 images, 40 texts and 5 classes with 15 texts fit none of the blocks."""
    assert evaluate(config_of(block), world()) == expected()


def evaluate_on_eight() -> dict[str, Any]:
    return evaluate(config_of(8), world(), devices=8)


@pytest.mark.slow
def test_devices_do_not_show() -> None:
    assert call_on_devices(evaluate_on_eight, devices=8) == expected()


def evaluate_in_this_process() -> dict[str, Any]:
    return evaluate(config_of(8), torn(), devices=4)


@pytest.mark.slow
def test_processes_do_not_show() -> None:
    """Two processes of two devices: each decodes its rows alone, some of which cannot be read."""
    alone = evaluate(config_of(8), torn())
    assert alone["unreadable_images"] == 3
    assert call_on_processes(evaluate_in_this_process, processes=2, devices=2) == [alone, alone]


def looks_of(devices: int) -> list[Any]:
    """What needs the model again: maps, attributed words, inversion."""
    config, mesh = config_of(8), make_mesh(MeshConfig(), jax.devices()[:devices])
    graph, params = model_of()
    with jax.set_mesh(mesh):
        params = jax.device_put(jax.device_get(params), NamedSharding(mesh, PartitionSpec()))
        source = own_set(config, world())
        reading = Evaluator(config, graph, mesh, source, tokenizer()).read(params)
        looks = Looks(config, graph, params, tokenizer(), source.source, reading)
        _, uncaptioned, captioned = looks.maps(3, reading.annotations[3].captions[:2])
        figures, exhibits = looks.words(lambda _: None)
        words = [weight for shown in exhibits for _, weight in shown["tokens"]]
        inverted = looks.inversion(silent)
    numbers = [value for value in (*figures.values(), *inverted.values()) if isinstance(value, float)]
    return [uncaptioned.tolist(), captioned.tolist(), words, numbers]


def looks_in_this_process() -> list[Any]:
    return looks_of(devices=4)


@pytest.mark.slow
def test_processes_do_not_show_in_maps_words_and_inversion() -> None:
    alone = looks_of(devices=1)
    for found in call_on_processes(looks_in_this_process, processes=2, devices=2):
        for ours, theirs in zip(alone, found, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-2, atol=1e-3)


def torn() -> Records:
    """19 images of which three cannot be read."""
    gone = {0, 7, 18}
    records = world().records
    return Records([dataclasses.replace(r, image=b"torn") if i in gone else r for i, r in enumerate(records)])


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def test_unreadable_images_are_left_out_and_counted() -> None:
    records = [dataclasses.replace(record, image=png(record.image)) for record in world().records]
    assert evaluate(config_of(8), Records(records)) == expected(), "PNG files must give the same as pixels"

    rest = evaluate(config_of(8), Records([record for i, record in enumerate(records) if i not in {0, 7, 18}]))
    assert evaluate(config_of(8), torn()) == rest | {"unreadable_images": 3}

    with pytest.raises(ConfigError, match="none of the 19 images can be read"):
        evaluate(config_of(8), Records([dataclasses.replace(record, image=b"torn") for record in records]))


class Unopenable(Records):
    """Records of which some cannot even be opened."""

    def __getitem__(self, index: int) -> Record:
        if index in (0, 7, 18):
            raise OSError("permission denied")
        return super().__getitem__(index)


def test_files_that_cannot_be_opened_are_left_out_and_counted() -> None:
    results = evaluate(config_of(8), Unopenable(world().records))
    rest = [record for index, record in enumerate(world().records) if index not in (0, 7, 18)]
    assert results == evaluate(config_of(8), Records(rest)) | {"unreadable_images": 3}

    with pytest.raises(ConfigError, match="none of the 1 images can be read"):
        evaluate(config_of(8), Unopenable(world().records[:1]))


def test_one_evaluator_serves_many_parameters() -> None:
    config, mesh = config_of(8), make_mesh(MeshConfig())
    graph, params = model_of()
    other = jax.tree.map(lambda x: x + 0.05, params)
    seen: list[int] = []
    with jax.set_mesh(mesh):
        evaluator = Evaluator(config, graph, mesh, own_set(config, world()), tokenizer())
        first = evaluator(params, seen.append)
        assert evaluator(other, seen.append) != first
        assert evaluator(params, seen.append) == first
    assert sum(seen) == 3 * evaluator.work == 3 * (IMAGES + first["texts"] + 5 * 3)


def test_without_classes() -> None:
    results = evaluate(config_of(8, label_field=None), world())
    assert "zero_shot" not in results
    assert results["retrieval"] == expected()["retrieval"]


def test_unknown_label_field() -> None:
    with pytest.raises(ConfigError, match=r"data\.label_field: .* has no field 'kinds'\. Did you mean 'kind'"):
        evaluate(config_of(8, label_field="kinds"), world())


def test_blank_label() -> None:
    records = [dataclasses.replace(record, fields={"kind": " "}) for record in world().records]
    with pytest.raises(ConfigError, match=r"data\.label_field: the 'kind' of .* is blank"):
        evaluate(config_of(8), Records(records))


def test_mean_text_is_the_mean_of_unit_embeddings_and_of_raw_queries() -> None:
    rng = np.random.default_rng(0)
    texts = TextSide(jnp.asarray(rng.normal(size=(5, 6))), jnp.asarray(rng.normal(size=(5, 2, 3))))
    owner = jnp.asarray([1, 0, 1, 1, 2])  # in no order; classes 0 and 2 have one text
    means = mean_text(texts, owner, 3)
    unit = np.asarray(texts.embedding) / np.linalg.norm(texts.embedding, axis=1, keepdims=True)
    for label, own in enumerate(([1], [0, 2, 3], [4])):
        np.testing.assert_allclose(means.embedding[label], unit[own].mean(axis=0), rtol=1e-5)
        assert means.queries is not None
        np.testing.assert_allclose(means.queries[label], np.asarray(texts.queries)[own].mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(normalize(means.embedding)[0], unit[1], rtol=1e-5)


def test_mean_text_without_queries() -> None:
    means = mean_text(TextSide(jnp.ones((2, 4))), jnp.asarray([0, 0]), 1)
    assert means.queries is None
    np.testing.assert_allclose(means.embedding, np.full((1, 4), 0.5), rtol=1e-6)
