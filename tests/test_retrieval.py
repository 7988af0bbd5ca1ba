"""Retrieval figures against every possible order of ties, CLIP_benchmark's own, and hand-made cases."""

from itertools import permutations

import numpy as np
import pytest
from jaxtyping import Bool, Float

from llip_jax.evaluation import retrieval
from llip_jax.evaluation.figures import figures_of
from llip_jax.evaluation.retrieval import positives_from_owners, recall_at_k, retrieve


def brute_force(scores: Float[np.ndarray, "Q A"], positives: Bool[np.ndarray, "Q A"], ks: list[int]) -> list[float]:
    """Recall at each k and then the median rank, by going through all orders of the answers."""
    ranks = np.array(
        [
            [
                1 + min(place for place, answer in enumerate(sorted(order, key=lambda a: -row[a])) if positive[answer])
                for order in permutations(range(len(row)))  # sorted() keeps equal scores in the order given
            ]
            for row, positive in zip(scores, positives, strict=True)
        ]
    )
    return [*(float(np.mean(ranks <= k)) for k in ks), float(np.median(ranks.mean(axis=1)))]


def clip_benchmark_recalls(
    scores: Float[np.ndarray, "N J"], positives: Bool[np.ndarray, "N J"], ks: list[int]
) -> dict[str, float]:
    """As clip_benchmark.metrics.zeroshot_retrieval.evaluate has it, under our names."""
    torch = pytest.importorskip("torch")
    recall = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval").recall_at_k
    by_image, positive = torch.from_numpy(scores.copy()), torch.from_numpy(positives.copy())
    return {
        f"{name}_recall_at_{k}": (recall(s, p, k) > 0).float().mean().item()
        for name, s, p in (("image_to_text", by_image, positive), ("text_to_image", by_image.T, positive.T))
        for k in ks
    }


def random_case(seed: int, images: int, texts: int) -> tuple[Float[np.ndarray, "N J"], Bool[np.ndarray, "N J"]]:
    """Scores with many ties, and positives with several for some queries and at least one for each."""
    rng = np.random.default_rng(seed)
    positives = rng.random((images, texts)) < 0.3
    positives[np.arange(images), rng.integers(texts, size=images)] = True
    positives[rng.integers(images, size=texts), np.arange(texts)] = True
    return rng.integers(3, size=(images, texts)).astype(np.float32), positives


@pytest.mark.parametrize("seed", range(5))
def test_equals_brute_force_over_all_tie_orders(seed: int) -> None:
    scores, positives = random_case(seed, images=4, texts=6)
    ks = [1, 2, 5, 10]
    figures = recall_at_k(scores, positives, ks)
    for name, s, p in (("image_to_text", scores, positives), ("text_to_image", scores.T, positives.T)):
        *recalls, median_rank = brute_force(s, p, ks)
        *chances, _ = brute_force(np.zeros(s.shape), p, ks)
        for k, recall, chance in zip(ks, recalls, chances, strict=True):
            assert figures[f"{name}_recall_at_{k}"] == pytest.approx(recall)
            assert figures[f"{name}_recall_at_{k}_chance"] == pytest.approx(chance)
        assert figures[f"{name}_median_rank"] == pytest.approx(median_rank)
    assert len(figures) == 2 * (2 * len(ks) + 1)


def test_equals_clip_benchmark_without_ties() -> None:
    _, positives = random_case(5, images=40, texts=90)
    positives &= np.random.default_rng(6).random(positives.shape) < 0.1
    positives |= positives_from_owners(np.arange(90) % 40, images=40)
    assert positives.sum(axis=0).max() > 1
    scores = np.random.default_rng(7).permutation(40 * 90).reshape(40, 90).astype(np.float32)
    figures = recall_at_k(scores, positives, ks=(1, 5, 10))
    theirs = clip_benchmark_recalls(scores, positives, [1, 5, 10])
    assert 0.01 < theirs["text_to_image_recall_at_1"] < theirs["image_to_text_recall_at_10"] < 0.99
    assert {name: figures[name] for name in theirs} == pytest.approx(theirs)


def test_is_the_mean_of_clip_benchmark_over_orders_of_ties() -> None:
    """Theirs takes equal scores in some order: the mean over 300 random tiny changes that decide it."""
    scores, positives = random_case(8, images=12, texts=18)
    positives &= positives_from_owners(np.arange(18) % 12, images=12)
    positives[np.arange(18) % 12, np.arange(18)] = True
    rng = np.random.default_rng(9)
    figures, runs = recall_at_k(scores, positives, ks=(1, 3)), []
    for _ in range(300):
        runs.append(clip_benchmark_recalls(scores + rng.random(scores.shape) / 2, positives, [1, 3]))
    for name in runs[0]:
        theirs = np.array([run[name] for run in runs])
        assert theirs.std() > 0.02
        assert figures[name] == pytest.approx(theirs.mean(), abs=5 * theirs.std() / np.sqrt(300))


def test_outcomes_say_what_each_query_got() -> None:
    scores = np.array([[9.0, 1.0, 2.0], [5.0, 4.0, 2.0]])
    positives = np.array([[True, False, True], [False, True, True]])  # text 2 describes both images
    figures, outcomes = retrieve(scores, positives, ks=(1,))
    images, texts = outcomes["image_to_text_recall_at_1"], outcomes["text_to_image_recall_at_1"]
    np.testing.assert_array_equal(images.values, [1, 0])
    np.testing.assert_array_equal(images.unit, [0, 1])
    np.testing.assert_allclose(images.chance, [2 / 3, 2 / 3])
    np.testing.assert_array_equal(texts.values, [1, 1, 1])
    np.testing.assert_array_equal(texts.unit, [0, 1, 0])
    np.testing.assert_allclose(texts.chance, [1 / 2, 1 / 2, 1])
    assert figures_of(outcomes).items() <= figures.items()
    assert figures == recall_at_k(scores, positives, ks=(1,))


def test_by_hand() -> None:
    scores = np.array([[9.0, 1.0, 2.0, 8.0], [5.0, 4.0, 3.0, 6.0]])
    figures = recall_at_k(scores, positives_from_owners(np.array([0, 0, 1, 1]), images=2), ks=(1, 2))
    assert figures == pytest.approx(
        {
            "image_to_text_recall_at_1": 1.0,
            "image_to_text_recall_at_1_chance": 1 / 2,
            "image_to_text_recall_at_2": 1.0,
            "image_to_text_recall_at_2_chance": 1 - 1 / 6,
            "image_to_text_median_rank": 1.0,
            "text_to_image_recall_at_1": 2 / 4,
            "text_to_image_recall_at_1_chance": 1 / 2,
            "text_to_image_recall_at_2": 1.0,
            "text_to_image_recall_at_2_chance": 1.0,
            "text_to_image_median_rank": 1.5,
        }
    )


def test_equal_scores_reach_chance() -> None:
    _, positives = random_case(0, images=30, texts=70)
    for scores in (np.zeros((30, 70)), np.full((30, 70), -np.inf)):
        figures = recall_at_k(scores, positives)
        for name in (name for name in figures if f"{name}_chance" in figures):
            assert figures[name] == pytest.approx(figures[f"{name}_chance"])


def test_random_scores_come_near_chance() -> None:
    rng = np.random.default_rng(1)
    positives = positives_from_owners(np.repeat(np.arange(400), 2), images=400)
    figures = recall_at_k(rng.normal(size=positives.shape), positives, ks=(100,))
    for name in ("image_to_text", "text_to_image"):
        # Five standard deviations of a share of 400 or more queries.
        assert figures[f"{name}_recall_at_100"] == pytest.approx(figures[f"{name}_recall_at_100_chance"], abs=0.11)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, positives = random_case(2, images=13, texts=29)
    whole = recall_at_k(scores, positives)
    monkeypatch.setattr(retrieval, "_BLOCK_PAIRS", 64)
    assert recall_at_k(scores, positives) == whole


def test_transposing_swaps_the_directions() -> None:
    scores, positives = random_case(3, images=8, texts=12)
    figures, swapped = recall_at_k(scores, positives), recall_at_k(scores.T, positives.T)
    for name, figure in figures.items():
        if name.startswith("image_to_text"):
            assert swapped[name.replace("image_to_text", "text_to_image")] == figure


def test_nan_scores_are_refused() -> None:
    scores, positives = random_case(4, images=3, texts=5)
    scores[2, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        recall_at_k(scores, positives)


def test_queries_without_positives_are_counted() -> None:
    positives = positives_from_owners(np.array([0, 0, 3]), images=4)
    with pytest.raises(ValueError, match="2 of 4 images have no positive among the texts"):
        recall_at_k(np.zeros((4, 3)), positives)
    with pytest.raises(ValueError, match="2 of 4 texts have no positive among the images"):
        recall_at_k(np.zeros((3, 4)), positives.T)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        recall_at_k(np.zeros((2, 3)), np.ones((3, 2), dtype=bool))
    with pytest.raises(ValueError, match="one shape"):
        recall_at_k(np.zeros((0, 0)), np.ones((0, 0), dtype=bool))
    with pytest.raises(ValueError, match="at least 1"):
        recall_at_k(np.zeros((2, 2)), np.ones((2, 2), dtype=bool), ks=(0, 1))
    for owner in (-1, 3):
        with pytest.raises(ValueError, match=r"\[0, 3\)"):
            positives_from_owners(np.array([0, owner]), images=3)
