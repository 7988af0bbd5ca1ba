"""Figures, bootstrap intervals and paired differences against SciPy and simulated truth."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from llip_jax.config import ConfigError
from llip_jax.evaluation import figures
from llip_jax.evaluation.figures import (
    Outcome,
    by_group,
    figure,
    figures_of,
    intervals,
    load_outcomes,
    paired_difference,
    robustness,
    save_outcomes,
)


def plain(values: np.ndarray, unit: np.ndarray | None = None, chance: float | None = None) -> Outcome:
    """A plain mean; each query of its own image unless told otherwise."""
    return Outcome(
        values=np.asarray(values, float),
        unit=np.arange(len(values)) if unit is None else unit,
        weight=np.ones(len(values)),
        chance=None if chance is None else np.full(len(values), chance),
    )


def random_outcome(rng: np.random.Generator, queries: int = 40, units: int = 15) -> Outcome:
    values, weight, chance = rng.random((3, queries))
    return Outcome(values, rng.integers(units, size=queries), weight, chance)


def width(interval: tuple[float, float]) -> float:
    return interval[1] - interval[0]


def test_figures_are_weighted_means() -> None:
    outcome = Outcome(np.array([1.0, 0.0, 0.5]), np.arange(3), np.array([1.0, 2.0, 1.0]), np.array([0.2, 0.1, 0.4]))
    assert figure(outcome) == pytest.approx(1.5 / 4)
    assert figures_of({"a": outcome, "b": outcome._replace(chance=None)}) == pytest.approx(
        {"a": 1.5 / 4, "a_chance": 0.8 / 4, "b": 1.5 / 4}
    )


def test_intervals_equal_scipy_on_a_plain_mean() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=80)
    ours = intervals({"mean": plain(values)}, draws=20_000, level=0.9)["mean"]
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, confidence_level=0.9, method="percentile", rng=1
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.05 * (theirs.high - theirs.low))


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """400 data sets of 60 images with 1 to 5 captions each, right or wrong together more often than not."""
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(400):
        unit = np.repeat(np.arange(60), rng.integers(1, 6, size=60))
        values = rng.random(len(unit)) < rng.beta(0.7 * 2, 0.3 * 2, size=60)[unit]
        low, high = intervals({"a": plain(values, unit)}, draws=300, seed=seed, level=0.9)["a"]
        covered += low <= 0.7 <= high
    # Five standard deviations of the share of 400 data sets, and what 60 images fall short of infinitely many.
    assert covered / 400 == pytest.approx(0.9, abs=0.075)


def test_captions_of_one_image_are_not_independent() -> None:
    rng = np.random.default_rng(2)
    unit = np.repeat(np.arange(50), 5)
    values = (rng.random(50) < 0.5)[unit]
    clustered, ignored = (intervals({"a": plain(values, u)})["a"] for u in (unit, None))
    assert width(clustered) / width(ignored) == pytest.approx(np.sqrt(5), rel=0.15)


def test_outcomes_share_the_draws() -> None:
    rng = np.random.default_rng(3)
    outcome = random_outcome(rng)
    both = intervals({"a": outcome, "b": outcome._replace(values=1 - outcome.values)})
    assert both["a"] == pytest.approx((1 - both["b"][1], 1 - both["b"][0]))


def test_blocks_and_row_numbers_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = random_outcome(np.random.default_rng(4))
    whole = intervals({"a": outcome})
    assert intervals({"a": outcome._replace(unit=outcome.unit * 1000 + 7)}) == whole
    monkeypatch.setattr(figures, "_BLOCK_DRAWS", 100)
    assert intervals({"a": outcome})["a"] == pytest.approx(whole["a"])


def test_a_figure_of_few_of_the_images_has_an_interval() -> None:
    """Samples that draw none of its images are no samples of it."""
    rare = Outcome(np.array([1.0, 0.0]), np.array([3, 90]), np.ones(2), None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert intervals({"all": plain(np.ones(100)), "rare": rare}) == {"all": (1, 1), "rare": (0, 1)}


def test_one_image_has_an_interval_without_width() -> None:
    assert intervals({"a": plain(np.array([0.3]))}) == {"a": (0.3, 0.3)}
    assert intervals({}) == {}


def test_groups_are_figures_of_their_own_queries() -> None:
    rng = np.random.default_rng(5)
    outcomes = {"captions": random_outcome(rng), "images": plain(rng.random(15), chance=0.25)}
    groups = [("red", "blue", "3")[i % 3] for i in range(15)]
    result = by_group(outcomes, groups)
    assert list(result) == ["3", "blue", "red"]
    for name, own in result.items():
        assert own["queries"] == 5
        assert own["images"] == pytest.approx(
            np.mean([v for v, g in zip(outcomes["images"].values, groups, strict=True) if g == name])
        )
        assert own["images_chance"] == 0.25
        rows = [row for row, unit in enumerate(outcomes["captions"].unit) if groups[unit] == name]
        values, weight = outcomes["captions"].values[rows], outcomes["captions"].weight[rows]
        assert own["captions"] == pytest.approx(sum(values * weight) / sum(weight))


def test_groups_without_queries_of_a_figure_leave_it_out() -> None:
    outcomes = {"all": plain(np.array([1.0, 0.0, 1.0])), "some": plain(np.array([0.5]))}
    assert by_group(outcomes, ["a", "b", "b"]) == {
        "a": {"queries": 1, "all": 1.0, "some": 0.5},
        "b": {"queries": 2, "all": 0.5},
    }
    assert list(by_group({"some": outcomes["some"]}, ["a", "b", "b"])) == ["a"]


def test_equal_models_do_not_differ() -> None:
    outcome = random_outcome(np.random.default_rng(6))
    assert paired_difference(outcome, outcome) == {"difference": 0, "low": 0, "high": 0, "p": 1}


def test_paired_differences_agree_with_scipy() -> None:
    rng = np.random.default_rng(7)
    a, b = (rng.random(120) < p for p in (0.55, 0.5))
    found = paired_difference(plain(a), plain(b), draws=20_000)
    swapped = paired_difference(plain(b), plain(a), draws=20_000)
    assert found["difference"] == pytest.approx(a.mean() - b.mean())
    assert [swapped[name] for name in ("difference", "low", "high", "p")] == pytest.approx(
        [-found["difference"], -found["high"], -found["low"], found["p"]]
    )
    difference = a.astype(float) - b
    theirs = stats.bootstrap((difference,), np.mean, n_resamples=20_000, method="percentile", rng=1)
    assert (found["low"], found["high"]) == pytest.approx(tuple(theirs.confidence_interval), abs=0.012)
    permuted = stats.permutation_test((difference,), np.mean, permutation_type="samples", n_resamples=20_000, rng=2)
    assert 0.005 < permuted.pvalue < 0.5  # neither clear nor nothing, so that agreeing says something
    assert found["p"] == pytest.approx(permuted.pvalue, rel=0.3)


def test_pairing_sees_what_separate_intervals_do_not() -> None:
    rng = np.random.default_rng(8)
    b = rng.random(300)
    a = b + 0.01 + 0.01 * rng.normal(size=300)
    found = paired_difference(plain(a), plain(b))
    assert found["low"] > 0
    assert found["p"] == pytest.approx(2 / 1001)
    both = intervals({"a": plain(a), "b": plain(b)})
    assert both["a"][0] < both["b"][1]


def test_robustness_is_mean_and_worst() -> None:
    assert robustness("top_1_accuracy", {"own": 0.75, "sketch": 0.25, "blurred": 0.5}) == {
        "members": ["own", "sketch", "blurred"],
        "top_1_accuracy_mean": 0.5,
        "top_1_accuracy_worst": 0.25,
        "worst_member": "sketch",
    }


def test_outcomes_survive_a_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    outcomes = {
        "retrieval/image_to_text_recall_at_1": random_outcome(rng),
        "zero_shot/top_1_accuracy": random_outcome(rng)._replace(chance=None),
    }
    names = ["toyworld/eval/0", "Ünïcode ☃", ""]
    digests = ["a", "b", "a"]
    save_outcomes(tmp_path / "5.npz", names, digests, outcomes)
    assert [path.name for path in tmp_path.iterdir()] == ["5.npz"]
    read_names, read_digests, read = load_outcomes(tmp_path / "5.npz")
    assert (read_names, read_digests) == (names, digests)
    assert list(read) == list(outcomes)
    for name, outcome in outcomes.items():
        for part, expected in outcome._asdict().items():
            np.testing.assert_equal(getattr(read[name], part), expected)
    save_outcomes(tmp_path / "empty.npz", [], [], {})
    assert load_outcomes(tmp_path / "empty.npz") == ([], [], {})


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "5.npz"
    with pytest.raises(ConfigError, match="No such file"):
        load_outcomes(path)
    good = {f"a/{part}": np.ones(3) for part in ("values", "unit", "weight")}
    for arrays in (
        {"names": np.array([object()])},
        {"a/values": np.ones(3)},
        {"names": np.array(["x"]), "a/values": np.ones(3)},
        {"names": np.array(["x"]), "digests": np.array(["x"]), **good, "a/unit": np.ones(2)},
    ):
        np.savez(path, **arrays)
        with pytest.raises(ConfigError, match=r"5\.npz: not the outcomes of an evaluation"):
            load_outcomes(path)
    np.save(tmp_path / "array.npy", np.ones(3))
    (tmp_path / "cut.npz").write_bytes(path.read_bytes()[:-30])
    (tmp_path / "blank.npz").write_bytes(b"")
    for name in ("array.npy", "cut.npz", "blank.npz"):
        with pytest.raises(ConfigError, match="not the outcomes of an evaluation"):
            load_outcomes(tmp_path / name)


def test_bad_outcomes_are_refused() -> None:
    empty = plain(np.ones(0))
    for function in (figure, lambda o: intervals({"a": o})):
        with pytest.raises(ValueError, match="at least one query"):
            function(empty)
        with pytest.raises(ValueError, match=r"expected arrays \[Q\]"):
            function(plain(np.ones(3))._replace(weight=np.ones(2)))
    with pytest.raises(ValueError, match="same queries twice"):
        paired_difference(plain(np.ones(3)), plain(np.ones(4)))
