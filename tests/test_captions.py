"""Caption choice against exact probabilities and its determinism."""

import itertools
from collections import Counter

import numpy as np
import pytest

from llip_jax.config import CaptionConfig
from llip_jax.data.captions import choose_captions, generator


def exact_probabilities(count, specific, slots, probability):
    """Probability of each ordered choice, by walking the tree of draws."""
    result = Counter()
    for order in itertools.permutations(range(count), min(slots, count)):
        chance = 1.0
        for position, pick in enumerate(order):
            remaining = set(range(count)) - set(order[:position])
            preferred = {i for i in remaining if i < specific}
            share = probability if preferred else 0.0
            chance *= share * (pick in preferred) / max(len(preferred), 1) + (1 - share) / len(remaining)
        result[order] = chance
    return result


@pytest.mark.parametrize(
    ("count", "specific", "slots", "probability"), [(5, 2, 1, 0.7), (4, 2, 3, 0.6), (4, 1, 2, 1.0), (3, 3, 2, 0.0)]
)
def test_frequencies_match_exact_probabilities(count, specific, slots, probability):
    config = CaptionConfig(slots=slots, specific_probability=probability)
    captions = [f"caption {i}" for i in range(count)]
    draws = 6000
    seed = int(np.random.default_rng(11).integers(2**31))
    seen = Counter(choose_captions(captions, specific, config, seed, index) for index in range(draws))
    expected = exact_probabilities(count, specific, slots, probability)
    assert sum(expected.values()) == pytest.approx(1)
    for order, chance in expected.items():
        sigma = np.sqrt(draws * chance * (1 - chance))
        assert abs(seen[order] - draws * chance) <= 4 * sigma + 1e-9, (order, seen[order], draws * chance)


def test_fewer_captions_than_slots():
    chosen = choose_captions(["a", "b", "c"], 2, CaptionConfig(slots=8, specific_probability=0.5), seed=3, index=9)
    assert sorted(chosen) == [0, 1, 2]


def test_pure_and_varied():
    captions = [str(i) for i in range(20)]
    config = CaptionConfig(slots=4)

    def choose(seed, index):
        return choose_captions(captions, 20, config, seed, index)

    first = [choose(5, index) for index in range(200)]
    assert [choose(5, index) for index in reversed(range(200))] == first[::-1]
    assert len(set(first)) > 190
    assert sum(a == b for a, b in zip(first, (choose(6, index) for index in range(200)), strict=True)) < 5


def test_generator_streams_differ():
    draws = {
        generator(seed, stream, index).integers(2**62)
        for seed in (0, 1, 2**31 - 1)
        for stream in ("captions", "augment")
        for index in (0, 1, 2**32, 2**40)
    }
    assert len(draws) == 3 * 2 * 4
