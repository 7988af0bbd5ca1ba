"""Scorers: how the several texts of one class become scores of images.

An image is scored against columns: one text side a class, its texts averaged on the device, or one a text. Blocks of
these scores become class scores on the host, whatever the number of images.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llip_jax.config import Scorer as Name
from llip_jax.evaluation.classes import Layout
from llip_jax.ops.pair_scores import TextSide, normalize


class Scorer(NamedTuple):
    """What images are scored against, and what those scores make of the classes."""

    columns: Literal["classes", "texts"]
    """``mean_text`` of every class, or every text of every class, in the order of ``Layout``."""
    class_scores: Callable[[Float[np.ndarray, "n columns"], Layout], Float[np.ndarray, "n C"]]


class Attributes(NamedTuple):
    """Class scores and the evidence for them."""

    texts: Float[np.ndarray, "n T"]
    """Score of every text."""
    groups: Float[np.ndarray, "n G"]
    """Weighted mean over the texts of every group."""
    classes: Float[np.ndarray, "n C"]
    """Mean over the groups of every class."""


def mean_text(
    texts: TextSide, owner: Int[Array, "J"], classes: int, weights: Float[Array, "J"] | None = None
) -> TextSide:
    """One text side a class: its texts averaged *before* the image is mixed (arXiv 2405.00740, section 4).

    Embeddings are L2-normalised before they are averaged, as CLIP does with its prompts; queries, which have no
    normalisation of their own, are averaged as they are, and keep their type.

    Args:
        texts: J texts.
        owner: class of each text, 0 to classes - 1; every class owns a text.
        classes: how many there are.
        weights: of each text, above 0, only their ratios within a class count; None: all alike.
    """
    weight = jnp.ones(owner.shape[0]) if weights is None else jnp.asarray(weights, jnp.float32)
    totals = jax.ops.segment_sum(weight, owner, classes)

    def mean(x: Float[Array, "J *d"]) -> Float[Array, "C *d"]:
        def along(w: Float[Array, "n"]) -> Float[Array, "n *ones"]:
            return w.reshape(-1, *[1] * (x.ndim - 1))

        return jax.ops.segment_sum(x.astype(jnp.float32) * along(weight), owner, classes) / along(totals)

    queries = None if texts.queries is None else mean(texts.queries).astype(texts.queries.dtype)
    return TextSide(mean(normalize(texts.embedding)), queries)


def mean_score(scores: Float[np.ndarray, "n T"], layout: Layout) -> Float[np.ndarray, "n C"]:
    """Weighted mean of the scores of a class's texts, each text having mixed the image by itself."""
    return _sums(scores, layout.weight, layout.owner)


def max_score(scores: Float[np.ndarray, "n T"], layout: Layout) -> Float[np.ndarray, "n C"]:
    """Score of the best text of a class; weights do not count."""
    return np.maximum.reduceat(scores, _starts(layout.owner), axis=1)


def attributes(scores: Float[np.ndarray, "n T"], layout: Layout) -> Attributes:
    """Classification by description (arXiv 2210.07183): a class is as likely as its descriptors are, on average.

    Groups count alike however many texts each has. With one group a class, this is ``mean_score``.
    """
    order = np.argsort(layout.group, kind="stable")  # The texts of a group need not lie together.
    groups = _sums(scores[:, order], layout.group_weight[order], layout.group[order])
    share = 1 / np.bincount(layout.group_owner)[layout.group_owner]
    return Attributes(scores, groups, _sums(groups, share, layout.group_owner))


SCORERS: Mapping[Name, Scorer] = MappingProxyType(
    {
        "mean_text": Scorer("classes", lambda scores, layout: scores),
        "mean_score": Scorer("texts", mean_score),
        "max_score": Scorer("texts", max_score),
        "attributes": Scorer("texts", lambda scores, layout: attributes(scores, layout).classes),
    }
)
"""By the names of ``eval.scorers``."""


def _sums(
    columns: Float[np.ndarray, "n T"], weight: Float[np.ndarray, "T"], owner: Int[np.ndarray, "T"]
) -> Float[np.ndarray, "n C"]:
    """Weighted sums of the columns of each owner, in the type of the columns; owners ascend."""
    return np.add.reduceat(columns * weight.astype(columns.dtype), _starts(owner), axis=1)


def _starts(owner: Int[np.ndarray, "T"]) -> Int[np.ndarray, "C"]:
    """Where each owner's texts begin."""
    return np.flatnonzero(np.diff(owner, prepend=-1))
