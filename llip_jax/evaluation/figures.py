"""Figures of an evaluation query by query: their means, chance levels, bootstrap intervals, groups and differences."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from llip_jax.config import ConfigError
from llip_jax.interop.files import replacing

_BLOCK_DRAWS = 2**20
"""Units drawn together: bounds the memory of the bootstrap to a few MiB."""


class Outcome(NamedTuple):
    """One figure, the weighted mean of what each query got."""

    values: Float[np.ndarray, "Q"]
    """Usually in [0, 1]: whether the query was answered right, or how probably where scores tie."""
    unit: Int[np.ndarray, "Q"]
    """Row of the image that the query belongs to. The bootstrap draws images: captions of one image go together."""
    weight: Float[np.ndarray, "Q"]
    """Not negative. All alike for a plain mean, 1 / (images of the class) for mean per-class recall."""
    chance: Float[np.ndarray, "Q"] | None
    """What random scores would get; None: there is no such level."""


class Result(NamedTuple):
    """What a task reports."""

    figures: dict[str, Any]
    """For JSON: NAME, NAME_chance, and further numbers."""
    outcomes: dict[str, Outcome]
    """By NAME, for the figures that are means over queries."""


def figure(outcome: Outcome) -> float:
    """The weighted mean.

    Raises:
        ValueError: there is no query, or none with any weight.
    """
    _check(outcome)
    return float(np.average(outcome.values, weights=outcome.weight))


def figures_of(outcomes: Mapping[str, Outcome]) -> dict[str, float]:
    """NAME and, where there is a chance level, NAME_chance of every outcome."""
    figures = {}
    for name, outcome in outcomes.items():
        figures[name] = figure(outcome)
        if outcome.chance is not None:
            figures[f"{name}_chance"] = figure(outcome._replace(values=outcome.chance))
    return figures


def intervals(
    outcomes: Mapping[str, Outcome], *, draws: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap over units: all queries of an image are drawn together.

    Weights stay those of the whole set, so that for a mean per-class recall classes vary as images do, which makes the
    interval wider rather than narrower. Where all values are equal, or there is one unit, the interval has no width:
    it says how the figure varies between images, and there nothing varies.

    Args:
        outcomes: figures over the same images; they share the draws.
        draws: samples of as many units as there are, with replacement.
        seed: of the draws.
        level: share of the draws inside the interval.

    Returns:
        (low, high) by NAME.
    """
    if not outcomes:
        return {}
    samples = _bootstrap(list(outcomes.values()), draws, seed)
    return {name: _interval(sample, level) for name, sample in zip(outcomes, samples.T, strict=True)}


def by_group(outcomes: Mapping[str, Outcome], groups: Sequence[str]) -> dict[str, dict[str, float]]:
    """Figures of the queries of each group alone, against the answers and with the weights of the whole set.

    Args:
        outcomes: figures over the same images.
        groups: of each image (``Outcome.unit`` indexes it).

    Returns:
        By group, in sorted order: ``queries``, its images that have any query, and ``figures_of`` its outcomes (those
        that it has queries of). Small groups are kept.
    """
    names, group_of = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    result = {}
    for index, name in enumerate(names):
        own = {}
        for key, outcome in outcomes.items():
            inside = group_of[outcome.unit] == index
            if outcome.weight[inside].any():
                own[key] = _take(outcome, inside)
        if own:
            images = np.unique(np.concatenate([outcome.unit for outcome in own.values()]))
            result[str(name)] = {"queries": len(images), **figures_of(own)}
    return result


def paired_difference(
    a: Outcome, b: Outcome, *, draws: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, float]:
    """Difference of one figure between two models on the same queries, by a bootstrap over units.

    Args:
        a: of the one model.
        b: of the other, row by row the same queries.
        draws: samples of units; both models see the same ones.
        seed: of the draws.
        level: share of the draws between ``low`` and ``high``.

    Returns:
        ``difference`` (figure of ``a`` less figure of ``b``), ``low`` and ``high``, and ``p``: twice the share of draws
        on the other side of 0, the two-sided p-value that goes with the interval; at least 2 / (draws + 1).

    Raises:
        ValueError: the units of the queries are not the same.
    """
    if not np.array_equal(a.unit, b.unit):
        raise ValueError(f"expected the same queries twice, got {len(a.unit)} and {len(b.unit)} of different units")
    samples = _bootstrap([a, b], draws, seed)
    difference = samples[:, 0] - samples[:, 1]
    low, high = _interval(difference, level)
    tail = int(min(np.count_nonzero(difference <= 0), np.count_nonzero(difference >= 0)))
    p = min(1.0, 2 * (tail + 1) / (draws + 1))
    return {"difference": figure(a) - figure(b), "low": low, "high": high, "p": p}


def robustness(name: str, members: Mapping[str, float]) -> dict[str, Any]:
    """Mean and worst of the figure ``name`` over a set and its variants; the worst is the first of equals."""
    worst = min(members, key=lambda member: members[member])
    return {
        "members": list(members),
        f"{name}_mean": float(np.mean(list(members.values()))),
        f"{name}_worst": members[worst],
        "worst_member": worst,
    }


class Saved(NamedTuple):
    """Outcomes of a set, and the images that their units are: names, and digests of what the images are."""

    names: list[str]
    digests: list[str]
    outcomes: dict[str, Outcome]


def save_outcomes(path: Path, names: Sequence[str], digests: Sequence[str], outcomes: Mapping[str, Outcome]) -> None:
    """Writes an .npz file, whole or not at all: see ``Saved``; an outcome NAME is NAME/values, /unit, /weight, /chance.

    Args:
        path: where to.
        names: of the images, in the order of ``Outcome.unit``.
        digests: of the images.
        outcomes: by TASK/FIGURE.
    """
    arrays = {
        f"{name}/{part}": array
        for name, outcome in outcomes.items()
        for part, array in outcome._asdict().items()
        if array is not None
    }
    arrays |= {"names": np.asarray(names, dtype=np.str_), "digests": np.asarray(digests, dtype=np.str_)}
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)


def load_outcomes(path: Path) -> Saved:
    """What ``save_outcomes`` has written.

    Raises:
        ConfigError: the file is missing, damaged or another.
    """
    try:
        with np.lib.npyio.NpzFile(str(path), allow_pickle=False) as stored:  # type: ignore[arg-type]  # np.load takes other files
            names, digests = (stored[name].tolist() for name in ("names", "digests"))
            keys = [key.removesuffix("/values") for key in stored.files if key.endswith("/values")]
            outcomes = {
                key: Outcome(
                    stored[f"{key}/values"],
                    stored[f"{key}/unit"],
                    stored[f"{key}/weight"],
                    stored[f"{key}/chance"] if f"{key}/chance" in stored.files else None,
                )
                for key in keys
            }
        for outcome in outcomes.values():
            _check(outcome)
    except Exception as error:  # zipfile and zlib have errors of their own
        raise ConfigError(f"{path}: not the outcomes of an evaluation: {error}") from error
    return Saved(names, digests, outcomes)


def _check(outcome: Outcome) -> None:
    if len({array.shape for array in outcome if array is not None}) != 1 or outcome.values.ndim != 1:
        raise ValueError(f"expected arrays [Q], got {[array.shape for array in outcome if array is not None]}")
    if not outcome.weight.any():
        raise ValueError(f"expected at least one query with some weight, got {len(outcome.weight)} without")


def _take(outcome: Outcome, rows: np.ndarray) -> Outcome:
    return Outcome(*(None if array is None else array[rows] for array in outcome))  # type: ignore[arg-type]


def _bootstrap(outcomes: Sequence[Outcome], draws: int, seed: int) -> Float[np.ndarray, "draws F"]:
    """The figures of samples of units; NaN where a sample has no query of a figure."""
    for outcome in outcomes:
        _check(outcome)
    units, unit_of = np.unique(np.concatenate([outcome.unit for outcome in outcomes]), return_inverse=True)
    # Of each unit: sums of weights and of weighted values. A sample's figure is a quotient of sums of these.
    ends = np.cumsum([len(outcome.unit) for outcome in outcomes])[:-1]
    weights, values = (np.empty((len(units), len(outcomes))) for _ in range(2))
    for f, (outcome, own) in enumerate(zip(outcomes, np.split(unit_of, ends), strict=True)):
        weights[:, f] = np.bincount(own, outcome.weight, len(units))
        values[:, f] = np.bincount(own, outcome.weight * outcome.values, len(units))
    blocks = []
    for counts in _samples(len(units), draws, seed):
        with np.errstate(invalid="ignore"):
            blocks.append((counts @ values) / (counts @ weights))
    return np.concatenate(blocks)


def _samples(units: int, draws: int, seed: int) -> Iterator[Float[np.ndarray, "b U"]]:
    """How often each unit is in each sample, a block of samples at a time."""
    rng = np.random.default_rng(seed)
    size = max(1, _BLOCK_DRAWS // units)
    for start in range(0, draws, size):
        b = min(size, draws - start)
        drawn = rng.integers(units, size=(b, units)) + np.arange(0, b * units, units)[:, None]
        yield np.bincount(drawn.ravel(), minlength=b * units).reshape(b, units).astype(np.float64)


def _interval(sample: Float[np.ndarray, "draws"], level: float) -> tuple[float, float]:
    low, high = np.nanquantile(sample, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
