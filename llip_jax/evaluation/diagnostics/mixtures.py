"""How texts mix images: entropy and use of the mixture tokens, and what a caption changes.

Whether the caption or the image decides the mixture is read from two mean squared distances between mixing weights: of
two captions of one image, and of captions of two images, each mixing its own. Their ratio, ``caption_share``, is 0
where the image decides alone, and 1 where two captions of one image are as far apart as those of two images: then
knowing the image says nothing. Captions of one image resemble each other, so a mixture that captions decide alone may
stay below 1. The figure is ours: an analysis of variance by image.
"""

from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

DEAD = 0.01
"""A token is dead in a head that gives it, on average, less than this part of an equal share."""

_BLOCK_WEIGHTS = 2**20
"""Numbers of a block of weights: 8 MiB."""


class _Rows:
    """Of vectors in groups (one a caption, grouped by image): how near two of one group are, and two of two groups.

    All sums are over groups, those within one being means, so that an image with many captions counts once.
    """

    def __init__(self, width: int):
        self._groups, self._square, self._means, self._squared_means = 0, 0.0, np.zeros(width), 0.0
        self._several, self._inner = 0, 0.0

    def add(self, rows: Float[np.ndarray, "n C d"], mask: Bool[np.ndarray, "n C"]) -> None:
        """Takes in groups, each with at least one row."""
        number = mask.sum(axis=1)
        means = np.einsum("ncd,nc->nd", rows, mask) / number[:, None]
        self._groups += len(rows)
        self._square += float(np.sum(np.einsum("ncd,ncd,nc->n", rows, rows, mask) / number))
        self._means += means.sum(axis=0)
        self._squared_means += float(np.sum(means**2))
        several = number > 1
        spread = np.einsum("ncd,nc->n", (rows - means[:, None]) ** 2, mask)[several]
        self._several += int(several.sum())
        self._inner += float(np.sum(2 * spread / (number[several] - 1)))

    @property
    def within(self) -> float | None:
        """Mean squared distance of two rows of one group; None where no group has two."""
        return self._inner / self._several if self._several else None

    @property
    def between(self) -> float | None:
        """Mean squared distance of rows of two groups; None where there is one group."""
        inner = self.between_product
        return None if inner is None else max(0.0, 2 * (self._square / self._groups - inner))

    @property
    def between_product(self) -> float | None:
        """Mean inner product of rows of two groups; None where there is one group."""
        if self._groups < 2:
            return None
        return (float(np.sum(self._means**2)) - self._squared_means) / (self._groups * (self._groups - 1))


class Mixtures:
    """Running statistics of mixing weights (Llip, arXiv 2405.00740, section 3); blocks of images in, figures out."""

    def __init__(self, heads: int, tokens: int):
        self._pairs, self._moved = 0, 0
        self._entropy, self._movement = np.zeros(heads), np.zeros(heads)
        self._use, self._largest = np.zeros((heads, tokens)), np.zeros((heads, tokens))
        self._weights = _Rows(heads * tokens)
        self._mixed: _Rows | None = None

    def add(
        self,
        weights: Float[np.ndarray, "n C M K"],
        mask: Bool[np.ndarray, "n C"],
        mixed: Float[np.ndarray, "n C d"] | None = None,
    ) -> None:
        """Takes in a block of images.

        Args:
            weights: of the K tokens in M heads, for each of an image's own captions.
            mask: which captions there are; an image may have none.
            mixed: the images mixed by these captions, L2-normalised; in every block or in none.
        """
        captioned = mask.any(axis=1)
        mask = mask[captioned]
        weights = np.where(mask[..., None, None], np.asarray(weights[captioned], np.float64), 0)
        each = weights[mask]
        self._pairs += len(each)
        self._entropy -= np.sum(each * np.log(np.where(each > 0, each, 1)), axis=(0, 2))
        self._use += each.sum(axis=0)
        largest = each == each.max(axis=2, keepdims=True)
        self._largest += np.sum(largest / largest.sum(axis=2, keepdims=True), axis=0)
        self._weights.add(weights.reshape(*mask.shape, self._use.size), mask)
        self._move(weights, mask)
        if mixed is not None:
            if self._mixed is None:
                self._mixed = _Rows(mixed.shape[2])
            self._mixed.add(np.where(mask[..., None], np.asarray(mixed[captioned], np.float64), 0), mask)

    def _move(self, weights: Float[np.ndarray, "n C M K"], mask: Bool[np.ndarray, "n C"]) -> None:
        """Total variation distances of the captions of each image, two by two."""
        couples = np.zeros(len(mask))
        distances = np.zeros(weights.shape[::2])
        for a, b in combinations(range(mask.shape[1]), 2):
            both = mask[:, a] & mask[:, b]
            couples += both
            distances += both[:, None] * np.abs(weights[:, a] - weights[:, b]).sum(axis=2) / 2
        several = couples > 0
        self._moved += int(several.sum())
        self._movement += np.sum(distances[several] / couples[several, None], axis=0)

    def figures(self) -> dict[str, Any]:
        """See ``mixture_figures``."""
        heads, tokens = self._use.shape
        use = self._use / max(1, self._pairs)
        dead = use < DEAD / tokens
        within, between = self._weights.within, self._weights.between
        movement = self._movement / max(1, self._moved)
        seen, moved = self._pairs > 0, self._moved > 0
        figures: dict[str, Any] = {
            "pairs": self._pairs,
            "images_of_several_captions": self._moved,
            "entropy": (self._entropy / (self._pairs * np.log(tokens))).tolist() if seen and tokens > 1 else None,
            "token_use": use.tolist() if seen else None,
            "token_largest": (self._largest / self._pairs).tolist() if seen else None,
            "dead_tokens": dead.sum(axis=1).tolist() if seen else None,
            "dead_in_all_heads": int(dead.all(axis=0).sum()) if seen else None,
            "movement": float(movement.mean()) if moved else None,
            "movement_by_head": movement.tolist() if moved else None,
            # Below 1e-12 a head's weights are alike but for rounding.
            "caption_share": within / between if within is not None and between and between > 1e-12 * heads else None,
        }
        if self._mixed is not None:
            distance = self._mixed.within
            figures["mixed_cosine"] = None if distance is None else 1 - distance / 2
            figures["mixed_cosine_between_images"] = self._mixed.between_product
        return figures


def mixture_figures(
    weights: Float[np.ndarray, "N C M K"],
    mask: Bool[np.ndarray, "N C"],
    mixed: Float[np.ndarray, "N C d"] | None = None,
) -> dict[str, Any]:
    """Statistics of the mixing weights of images and their own captions.

    Returns:
        ``entropy`` [M]: mean entropy of each head's weights over log K, from 0 (one token) to 1 (all alike).
        ``token_use`` [M, K]: mean weight; ``token_largest`` [M, K]: how often the token has the largest weight, ties
        shared. ``dead_tokens`` [M]: how many tokens a head hardly uses (see DEAD); ``dead_in_all_heads``.
        ``movement``: total variation distance of the weights of two captions of one image, in [0, 1], over captions,
        heads and images; ``movement_by_head`` [M]; ``caption_share``: see the top of this file.
        ``mixed_cosine``: cosine of an image mixed by two of its captions; ``mixed_cosine_between_images``: of two
        images, each mixed by a caption of its own. ``pairs`` and ``images_of_several_captions``: what these
        are means over. None for what is not defined: entropy of one token, movement where no image has two captions.
    """
    block = max(1, _BLOCK_WEIGHTS // max(1, weights[:1].size))
    mixtures = Mixtures(*weights.shape[2:])
    for start in range(0, len(weights), block):
        rows = slice(start, start + block)
        mixtures.add(weights[rows], mask[rows], None if mixed is None else mixed[rows])
    return mixtures.figures()
