"""Two-stage retrieval against brute force in NumPy, by hand, and through the evaluator."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array, Bool, Float, UInt8
from oracles import fast_to_compile, relative_error
from run_helpers import call_on_devices, tiny_config
from test_evaluator import config_of, evaluate, expected, model_of, tokenizer, world
from test_scoring import exact, fixed, mixture

from llip_jax.config import Config, ConfigError, MeshConfig
from llip_jax.evaluation import two_stage
from llip_jax.evaluation.results import summary
from llip_jax.evaluation.retrieval import positives_from_owners, recall_at_k
from llip_jax.evaluation.scoring import by_image
from llip_jax.evaluation.two_stage import Shortlist, rescore, shortlist, two_stage_figures
from llip_jax.ops.pair_scores import ImageSide, MixtureSide, TextSide, cosines
from llip_jax.parallel.mesh import make_mesh

TOLERANCE = 1e-5


def unconditioned(images: MixtureSide) -> Float[np.ndarray, "N d"]:
    """Mean of the mixture tokens through values and output projection."""
    mean = images.values.mean(axis=1)
    return mean.reshape(len(mean), -1) @ images.output


def nearest(
    images: Float[np.ndarray, "N d"], texts: Float[np.ndarray, "J d"], length: int
) -> list[Bool[np.ndarray, "N J"]]:
    """Whether a text is among the nearest of an image, and an image among the nearest of a text, query by query."""
    cosine = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in texts] for a in images])
    of_images, of_texts = (np.zeros(cosine.shape, bool) for _ in range(2))
    for i, row in enumerate(cosine):
        of_images[i, np.argsort(-row)[:length]] = True
    for j, column in enumerate(cosine.T):
        of_texts[np.argsort(-column)[:length], j] = True
    return [of_images, of_texts]


def pieces(images: ImageSide, *lengths: int) -> list[ImageSide]:
    ends = np.cumsum(lengths)
    return [
        by_image(lambda x, s=slice(end - length, end): x[s], images) for end, length in zip(ends, lengths, strict=True)
    ]


@pytest.mark.parametrize("block", [5, 256])
@pytest.mark.parametrize("length", [1, 4, 12, 100])
def test_shortlists_are_the_nearest(block: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """23 images and 17 texts: 12 is more than a block of images, 100 more than there are."""
    monkeypatch.setattr(two_stage, "_BLOCK", block)
    images, texts = mixture(20, 23, 17)
    embeddings = unconditioned(images)
    listed = shortlist(embeddings, texts.embedding, length)
    assert (listed.texts.shape, listed.images.shape) == ((23, min(length, 17)), (17, min(length, 23)))
    of_images, of_texts = nearest(embeddings, texts.embedding, length)
    np.testing.assert_array_equal(listed.of_images(), of_images)
    np.testing.assert_array_equal(listed.of_texts(), of_texts)
    np.testing.assert_array_equal(listed.pairs(), of_images | of_texts)


@pytest.mark.parametrize("task_texts", [3, 32])
@pytest.mark.parametrize("kind", ["mixture", "fixed"])
def test_shortlisted_pairs_get_their_exact_score(task_texts: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_stage, "_TASK_TEXTS", task_texts)
    images, texts = (mixture if kind == "mixture" else fixed)(21, 23, 17)
    pairs = np.random.default_rng(22).random((23, 17)) < 0.3
    pairs[[4, 5, 22]] = False  # images without a pair
    pairs[7] = True
    correct = exact(images, texts)
    for sides in (pieces(images, 23), pieces(images, 9, 9, 5)):
        scores = rescore(sides, texts, pairs)
        assert scores.dtype == np.float32
        assert np.all(scores[~pairs] == -np.inf)
        assert relative_error(scores[pairs], correct[pairs]) < TOLERANCE
    assert np.all(rescore([images], texts, np.zeros((23, 17), bool)) == -np.inf)


def test_small_calls_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images, texts = mixture(23, 9, 17)
    pairs = np.random.default_rng(24).random((9, 17)) < 0.7
    scores = rescore([images], texts, pairs)
    monkeypatch.setattr(two_stage, "block_bytes", lambda: 1)  # one task a call
    np.testing.assert_allclose(rescore([images], texts, pairs), scores, rtol=1e-5)


def test_shortlists_of_everything_give_the_exact_result() -> None:
    images, texts = mixture(25, 11, 13)
    listed = shortlist(unconditioned(images), texts.embedding, 13)
    assert relative_error(rescore([images], texts, listed.pairs()), exact(images, texts)) < TOLERANCE
    positives = positives_from_owners(np.arange(13) % 11, images=11)
    scores = exact(images, texts)
    figures = two_stage_figures(scores, positives, listed)
    assert figures == recall_at_k(scores, positives) | {
        "shortlist": 13,
        "rescored_share": 1.0,
        "image_to_text_best_in_shortlist": 1.0,
        "image_to_text_top_10_overlap": 1.0,
        "text_to_image_best_in_shortlist": 1.0,
        "text_to_image_top_10_overlap": 1.0,
    }


def brute_force(scores: np.ndarray, own: np.ndarray, pairs: np.ndarray, positives: np.ndarray) -> dict[str, float]:
    """One direction, query by query; no two scores are equal."""
    hits: dict[int, list[bool]] = {1: [], 5: [], 10: []}
    best, overlap = [], []
    for row, mine, rescored, positive in zip(scores, own, pairs, positives, strict=True):
        order = sorted(range(len(row)), key=lambda a: -row[a])
        second = [a for a in order if rescored[a]]
        for k, found in hits.items():
            found.append(any(positive[a] for a in second[:k]))
        best.append(mine[order[0]])
        overlap.append(len(set(order[:10]) & set(second[:10])) / 10)
    return {f"recall_at_{k}": np.mean(found) for k, found in hits.items()} | {
        "best_in_shortlist": np.mean(best),
        "top_10_overlap": np.mean(overlap),
    }


@pytest.mark.parametrize("length", [1, 3, 8])
def test_figures_equal_brute_force(length: int) -> None:
    """With shortlists so short that many queries have all their positives outside."""
    images, texts = mixture(26, 37, 41)
    positives = positives_from_owners(np.arange(41) % 37, images=37)
    listed = shortlist(unconditioned(images), texts.embedding, length)
    scores = exact(images, texts)
    figures = two_stage_figures(scores, positives, listed)
    of_images, of_texts = nearest(unconditioned(images), texts.embedding, length)
    pairs = of_images | of_texts
    assert figures["shortlist"] == length
    assert figures["rescored_share"] == pytest.approx(pairs.mean())
    assert (positives & ~pairs).any(axis=1).any()
    for direction, by_hand in (
        ("image_to_text", brute_force(scores, of_images, pairs, positives)),
        ("text_to_image", brute_force(scores.T, of_texts.T, pairs.T, positives.T)),
    ):
        assert {name: figures[f"{direction}_{name}"] for name in by_hand} == pytest.approx(by_hand)


def test_by_hand() -> None:
    exact_scores = np.array([[0.9, 0.1, 0.5], [0.2, 0.8, 0.7]], np.float32)
    positives = np.array([[True, False, True], [False, True, False]])
    # Image 0 gets text 1, image 1 text 1; text 0 gets image 1, texts 1 and 2 image 1: image 0 meets text 1 alone.
    listed = Shortlist(np.array([[1], [1]]), np.array([[1], [1], [1]]))
    figures = two_stage_figures(exact_scores, positives, listed)
    assert figures["rescored_share"] == pytest.approx(4 / 6)
    assert figures["image_to_text_recall_at_1"] == 1 / 2  # image 0 loses both its texts, at 10 as well
    assert figures["image_to_text_recall_at_10"] == 1 / 2
    assert figures["text_to_image_recall_at_1"] == pytest.approx(1 / 3)  # texts 0 and 2 lose their image
    assert figures["text_to_image_recall_at_10"] == pytest.approx(1 / 3)
    assert figures["image_to_text_best_in_shortlist"] == 1 / 2  # image 1: text 1
    assert figures["text_to_image_best_in_shortlist"] == pytest.approx(2 / 3)  # texts 1 and 2: image 1
    assert figures["image_to_text_top_10_overlap"] == pytest.approx((1 / 3 + 3 / 3) / 2)
    assert figures["text_to_image_top_10_overlap"] == pytest.approx((1 / 2 + 2 / 2 + 1 / 2) / 3)


def test_equally_good_answers_count_by_their_share() -> None:
    scores = np.ones((2, 4), np.float32)
    positives = np.eye(2, 4, dtype=bool) | (np.arange(4) >= 2)
    listed = Shortlist(np.array([[0], [2]]), np.array([[0], [0], [0], [1]]))
    figures = two_stage_figures(scores, positives, listed)
    assert figures["image_to_text_best_in_shortlist"] == 1 / 4
    assert figures["text_to_image_best_in_shortlist"] == 1 / 2


def test_positives_that_were_not_scored_are_misses_and_not_ties() -> None:
    """In a random order of what was not scored, image 0 would find its text now and then, and always at 4."""
    none = -np.inf
    scores = np.array([[0.3, none, none, none], [0.9, 0.1, 0.2, 0.4]])
    positives = positives_from_owners(np.array([1, 0, 1, 1]), images=2)
    figures = recall_at_k(scores, positives, ks=(1, 2, 4))
    for k in (1, 2, 4):
        assert figures[f"image_to_text_recall_at_{k}"] == 1 / 2
        assert figures[f"text_to_image_recall_at_{k}"] == 3 / 4
    assert figures["image_to_text_median_rank"] == (3 + 1) / 2


def errors_on_devices() -> list[float]:
    images, texts = mixture(27, 23, 17)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, tensor=2))):
        listed = shortlist(unconditioned(images), texts.embedding, 3)
        scores = rescore(pieces(images, 16, 7), texts, listed.pairs())
    wrong = np.count_nonzero(listed.pairs() != np.logical_or(*nearest(unconditioned(images), texts.embedding, 3)))
    return [int(wrong), relative_error(scores[listed.pairs()], exact(images, texts)[listed.pairs()])]


def test_devices_do_not_show() -> None:
    wrong, error = call_on_devices(errors_on_devices, devices=8)
    assert wrong == 0
    assert error < TOLERANCE


def test_bad_arguments_are_refused() -> None:
    images, texts = mixture(28, 6, 5)
    embeddings, pairs = unconditioned(images), np.ones((6, 5), bool)
    with pytest.raises(ValueError, match="shortlists of at least 1, got 0"):
        shortlist(embeddings, texts.embedding, 0)
    with pytest.raises(ValueError, match="at least one image"):
        shortlist(embeddings[:0], texts.embedding, 2)
    with pytest.raises(ValueError, match=r"image embedding: expected \[N, 8\], got \(6, 7\)"):
        shortlist(embeddings[:, :7], texts.embedding, 2)
    with pytest.raises(ValueError, match=r"expected pairs \[N, 5\], got \(6, 4\)"):
        rescore([images], texts, pairs[:, :4])
    with pytest.raises(ValueError, match="expected 5 images, one for each row of pairs, got more"):
        rescore(pieces(images, 3, 3), texts, pairs[:5])
    with pytest.raises(ValueError, match="expected 6 images, one for each row of pairs, got 3"):
        rescore(pieces(images, 3), texts, pairs)
    with pytest.raises(ValueError, match="queries"):
        rescore([images], TextSide(texts.embedding), pairs)
    images.keys[4] = np.nan
    with pytest.raises(ValueError, match=r"5 of 15 cosines are not finite, those of 1 images: rows 4$"):
        rescore(pieces(images, 3, 3), texts, pairs)


# The evaluator.


def with_shortlist(length: int, pooler: str = "mixer") -> Config:
    config = config_of(8, pooler)
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, shortlist=length))


@pytest.mark.slow
def test_the_evaluator_reports_both() -> None:
    config = with_shortlist(3)
    results = evaluate(config, world())
    assert {name: value for name, value in results.items() if name != "two_stage"} == expected()

    def sides(pixels: UInt8[Array, "N H W 3"], tokens: Array, mask: Array) -> tuple[Array, Array, Array]:
        model = nnx.merge(*model_of())
        output, texts = model.encode_images(pixels), model.text_side(tokens, mask)
        return model.unconditioned_embedding(output), texts.embedding, cosines(model.image_side(output), texts)

    names = sorted({text for record in world().records for text in record.captions[:3]})
    pixels = np.stack([record.image for record in world().records])
    images, texts, scores = map(np.asarray, fast_to_compile(sides)(pixels, *tokenizer().encode(names, 64)))
    positives = np.array([[text in record.captions[:3] for text in names] for record in world().records])
    of_images, of_texts = nearest(images, texts, 3)
    pairs = of_images | of_texts
    figures = results["two_stage"]
    assert figures["rescored_share"] == pytest.approx(pairs.mean())
    for direction, by_hand in (
        ("image_to_text", brute_force(scores, of_images, pairs, positives)),
        ("text_to_image", brute_force(scores.T, of_texts.T, pairs.T, positives.T)),
    ):
        assert {name: figures[f"{direction}_{name}"] for name in by_hand} == pytest.approx(by_hand)
    json.dumps(results, allow_nan=False)

    table = summary({"step": 5, **results})
    assert "two stage image to text recall at 1 " in table
    assert f"two stage: {pairs.mean():.2%} of all pairs rescored, on shortlists of 3 by image embeddings that" in table
    assert f"{figures['text_to_image_top_10_overlap']:.2%} of the top 10 kept" in table


def test_where_no_text_conditions_images_the_first_stage_is_exact() -> None:
    figures = evaluate(with_shortlist(2, "class_token"), world())["two_stage"]
    assert figures["image_to_text_best_in_shortlist"] == figures["text_to_image_best_in_shortlist"] == 1


def test_a_shortlist_has_a_length() -> None:
    with pytest.raises(ConfigError, match=r"eval\.shortlist"):
        tiny_config(eval={"shortlist": 0})
