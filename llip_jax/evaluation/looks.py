"""A model looked at closely, on some images of a set: maps, attributed words, inversion."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from llip_jax.config import Config, ConfigError
from llip_jax.data.images import open_picture, resize_for_eval
from llip_jax.data.pipeline import read_patiently
from llip_jax.data.records import BadSample, Source
from llip_jax.data.tokenizers import Tokenizer
from llip_jax.evaluation.diagnostics import attribution, inversion
from llip_jax.evaluation.exhibits import CAPTIONS, MISMATCHES, Picture
from llip_jax.evaluation.maps import caption_maps, uncaptioned_maps
from llip_jax.evaluation.reading import Reading, spread
from llip_jax.evaluation.scoring import Bar, Progress
from llip_jax.evaluation.tasks import LeftOut
from llip_jax.ops.pair_scores import TextSide
from llip_jax.parallel.sharding import whole

ATTRIBUTED = 64
"""Images whose words are attributed, at most, evenly spread over the set."""


class Looks:
    """Functions of one model on one set.

    Args:
        config: of the run.
        graph: of the model.
        params: its parameters.
        tokenizer: what it reads texts with.
        source: the set.
        reading: what a pass has made of it.
    """

    def __init__(
        self,
        config: Config,
        graph: nnx.GraphDef[Any],
        params: Any,
        tokenizer: Tokenizer,
        source: Source,
        reading: Reading,
    ):
        self._config, self._graph, self._params, self._tokenizer = config, graph, params, tokenizer
        self._source, self._reading = source, reading

        def maps(params: Any, images: UInt8[Array, "1 H W 3"], tokens: Array, mask: Array) -> tuple[Array, Array]:
            model = nnx.merge(graph, params)
            texts: TextSide = model.text_side(tokens, mask)
            return whole((uncaptioned_maps(model, images)[0], caption_maps(model, images, texts)[0]))

        self._maps = jax.jit(maps)

    @property
    def has_maps(self) -> bool:
        """Whether the vision tower shows what it attends to: not big_vision's."""
        return self._config.model.vision.big_vision is None

    def pixels(self, row: int) -> Picture:
        """The picture of a row as it is."""
        try:
            image = read_patiently(self._source, int(self._reading.rows[row]), time.sleep).image
        except (BadSample, OSError) as error:
            name = self._reading.annotations[row].name
            raise ConfigError(f"{name}: was read before, and cannot be read again: {error}") from error
        return open_picture(image, self._config.data.limits).decode(1.0) if isinstance(image, bytes) else image

    def seen(self, row: int) -> Picture:
        """The picture of a row as the model takes it."""
        return resize_for_eval(self.pixels(row), self._config.model.image_size)

    def maps(
        self, row: int, captions: Sequence[str]
    ) -> tuple[Picture, Float[np.ndarray, "h w"], Float[np.ndarray, "C h w"]]:
        """The picture as the model takes it, its map without a caption, and those of captions (evaluation/maps.py)."""
        seen = self.seen(row)
        # One number of captions, so that one shape is compiled.
        filled = np.resize(np.asarray(captions, object), CAPTIONS).tolist()
        tokens, mask = self._tokenizer.encode(filled, self._config.model.text.length)
        uncaptioned, of_captions = jax.device_get(self._maps(self._params, seen[None], tokens, mask))
        return seen, uncaptioned, of_captions[: len(captions)]

    def words(self, progress: Progress) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Attribution figures of images evenly spread over the set, held against a caption of their own and against
        one of a following image; and exhibits: some of them with the foreign caption that scores best."""
        reading, rows = self._reading, self.attributed
        pictures = {row: self.seen(row) for row in rows}

        def attributed(rows: Sequence[int], texts: Sequence[str]) -> list[attribution.Words]:
            return attribution.attribute_words(
                self._graph,
                self._params,
                np.stack([pictures[row] for row in rows]),
                texts,
                self._tokenizer,
                self._config.model.text.length,
                progress=progress,
            )

        own_texts = [reading.annotations[row].captions[0] for row in rows]
        figures = attribution.attribution_figures(
            attributed(rows, own_texts), attributed(rows, [self._foreign(row) for row in rows])
        )
        shown = spread(rows, MISMATCHES).tolist()
        best = attribution.hardest_mismatches(reading.caption_scores[shown], reading.positives[shown])
        exhibits = [
            {"row": row, "name": reading.annotations[row].name, **attribution.exhibit(pair)}
            for row, pair in zip(shown, attributed(shown, [reading.texts[column] for column in best]), strict=True)
        ]
        return figures, exhibits

    def _foreign(self, row: int) -> str:
        """The first caption of the images that follow, in a circle, that is none of the row's own."""
        own = self._reading.annotations[row].captions
        following = [*self._reading.annotations[row + 1 :], *self._reading.annotations[:row]]
        return next(text for other in following for text in other.captions if text not in own)

    @property
    def attributed(self) -> list[int]:
        """The images whose words are attributed: some that have captions and that not all captions belong to."""
        own = self._reading.positives
        return spread(np.flatnonzero(own.any(axis=1) & ~own.all(axis=1)), ATTRIBUTED).tolist()

    def inversion(self, bar: Bar) -> dict[str, Any]:
        """Image to image retrieval by embeddings and by pseudo-words (evaluation/diagnostics/inversion.py).

        Raises:
            LeftOut: images do not have one class each, or no two have the same.
        """
        reading = self._reading
        if reading.classes is None or reading.multi_label:
            raise LeftOut("images do not have one class each: data.label_field names the record field with it")
        labels = reading.labels()
        shared = int((np.bincount(labels)[labels] > 1).sum())
        if not shared:
            raise LeftOut("no two images are of one class")
        with bar(min(shared, inversion.IMAGES), "image", "inverting") as progress:
            return inversion.inversion_figures(
                self._graph,
                self._params,
                reading.embeddings["unconditioned"],
                labels,
                self._tokenizer,
                self._config.model.text.length,
                progress=progress,
            )
