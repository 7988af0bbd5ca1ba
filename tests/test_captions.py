"""Caption choice against exact probabilities and its determinism."""

import itertools
from collections import Counter

import numpy as np
import pytest

from llip_jax.config import CaptionRules
from llip_jax.data.captions import choose_captions, generator


def choose(captions, rules, slots, seed, index, *, specific=None, kinds=None):
    kinds = kinds or ["captions"] * len(captions)
    return choose_captions(captions, kinds, len(captions) if specific is None else specific, rules, slots, seed, index)


def indices(choices):
    return tuple(choice.caption for choice in choices)


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
    rules = CaptionRules(specific_probability=probability)
    captions = [f"caption {i}" for i in range(count)]
    draws = 6000
    seed = int(np.random.default_rng(11).integers(2**31))
    seen = Counter(indices(choose(captions, rules, slots, seed, i, specific=specific)) for i in range(draws))
    expected = exact_probabilities(count, specific, slots, probability)
    assert sum(expected.values()) == pytest.approx(1)
    for order, chance in expected.items():
        sigma = np.sqrt(draws * chance * (1 - chance))
        assert abs(seen[order] - draws * chance) <= 4 * sigma + 1e-9, (order, seen[order], draws * chance)


def test_fewer_captions_than_slots():
    chosen = choose(["a", "b", "c"], CaptionRules(specific_probability=0.5), 8, seed=3, index=9, specific=2)
    assert sorted(indices(chosen)) == [0, 1, 2]
    assert all(choice.text == "abc"[choice.caption] for choice in chosen)


def test_pure_and_varied():
    captions = [str(i) for i in range(20)]

    def draw(seed, index):
        return choose(captions, CaptionRules(), 4, seed, index)

    first = [draw(5, index) for index in range(200)]
    assert [draw(5, index) for index in reversed(range(200))] == first[::-1]
    assert len(set(first)) > 190
    assert sum(a == b for a, b in zip(first, (draw(6, index) for index in range(200)), strict=True)) < 5


def shares(draws):
    counts = Counter(draws)
    return {key: count / counts.total() for key, count in counts.items()}


def close(share, chance, draws):
    return abs(share - chance) <= 4 * np.sqrt(chance * (1 - chance) / draws)


def test_kinds_by_weight():
    """VeCLIP's choice of original or enriched captions, however many there are of either."""
    captions, kinds = ["o", "e1", "e2", "e3", "x"], ["alt", "enriched", "enriched", "enriched", "other"]
    rules = CaptionRules(weights={"alt": 1.0, "enriched": 3.0})
    seen = shares(choose(captions, rules, 1, 7, i, kinds=kinds)[0].text for i in range(6000))
    assert close(seen["o"], 0.25, 6000) and all(close(seen[e], 0.25, 6000) for e in ("e1", "e2", "e3"))
    assert "x" not in seen
    # Kinds that are not named come last; kinds that have run out leave their share to the others.
    everything = choose(captions, rules, 9, 7, 1, kinds=kinds)
    assert len(everything) == 5 and everything[-1].text == "x"


def test_original_in_place_of_rewrites_of_too_few_words():
    """LaCLIP: uniform over original and rewrites; the original where the draw has fewer than two words."""
    captions = ["an original", "dog", "a rewrite", ""]
    rules = CaptionRules(min_words=2)
    seen = shares(choose(captions, rules, 1, 3, i)[0] for i in range(6000))
    assert close(seen[(0, "an original")], 0.75, 6000) and close(seen[(2, "a rewrite")], 0.25, 6000)
    for i in range(50):  # never the same text in two slots
        both = choose(captions, rules, 4, 3, i)
        assert sorted(both) == [(0, "an original"), (2, "a rewrite")]


def test_first_slot_of_its_own_kind():
    captions, kinds = ["a", "b", "c"], ["long", "raw", "long"]
    rules = CaptionRules(first="raw")
    draws = [indices(choose(captions, rules, 3, 1, i, kinds=kinds)) for i in range(50)]
    assert all(draw[0] == 1 for draw in draws) and {draw[1] for draw in draws} == {0, 2}
    assert len(choose(captions, CaptionRules(first="absent"), 3, 1, 0, kinds=kinds)) == 3


def test_slots_are_filled_while_anything_is_left():
    threes, twos = (CaptionRules(sentences={"captions": (length, length)}) for length in (3, 2))
    for index in range(100):
        chosen = choose(["two words", "x", "three more words"], CaptionRules(min_words=2), 2, 4, index)
        assert sorted(chosen) == [(0, "two words"), (2, "three more words")]
        runs = {text for _, text in choose(["A. B. C. D. E."], threes, 3, 4, index)}
        assert runs <= {"A. B. C.", "B. C. D.", "C. D. E."} and len(runs) >= 1
    assert sum(len(choose(["A. B. C. D. E."], threes, 2, 4, index)) == 2 for index in range(100)) > 90
    ends = shares(choose(["A. B. C. D. E."], twos, 1, 4, index)[0].text for index in range(4000))
    assert len(ends) == 4 and all(close(share, 1 / 4, 4000) for share in ends.values())


def test_sentences_of_scripts_without_spaces():
    rules = CaptionRules(sentences={"captions": (1, 1)})
    runs = {choose(["狗在跑。天很蓝！海呢？"], rules, 1, 4, index)[0].text for index in range(60)}
    assert runs == {"狗在跑。", "天很蓝！", "海呢？"}


def test_runs_of_sentences():
    """Sub-captions of long captions (DreamLIP, FLAIR), beside whole short ones."""
    long = "A dog runs. It is brown! Is it wet? The sea is blue. Waves."
    sentences = ["A dog runs.", "It is brown!", "Is it wet?", "The sea is blue.", "Waves."]
    captions, kinds = ["short one. or two.", long], ["raw", "long"]
    rules = CaptionRules(weights={"long": 1.0}, sentences={"long": (1, 3)})
    lengths, starts = Counter(), Counter()
    for i in range(3000):
        drawn = choose(captions, rules, 3, 2, i, kinds=kinds)
        assert len(set(drawn)) == len(drawn) == 3
        *drawn, last = drawn if drawn[-1].caption == 1 else (*drawn[:-1], drawn[-2])  # the other one when none is left
        for choice in (*drawn, last):
            found = [
                (start, length)
                for length in (1, 2, 3)
                for start in range(6 - length)
                if " ".join(sentences[start : start + length]) == choice.text
            ]
            assert len(found) == 1
        lengths[found[0][1]] += 1
        starts[found[0][0]] += 1
    assert all(close(lengths[n] / 3000, 1 / 3, 3000) for n in (1, 2, 3)) and len(starts) == 5
    whole = choose(captions, CaptionRules(), 2, 2, 0, kinds=kinds)
    assert sorted(choice.text for choice in whole) == sorted(captions)


def test_generator_streams_differ():
    draws = {
        generator(seed, stream, index).integers(2**62)
        for seed in (0, 1, 2**31 - 1)
        for stream in ("captions", "augment")
        for index in (0, 1, 2**32, 2**40)
    }
    assert len(draws) == 3 * 2 * 4
