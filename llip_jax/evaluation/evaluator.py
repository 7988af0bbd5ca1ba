"""Zero-shot classification and retrieval of a model on a source, with text-conditioned scores throughout."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from llip_jax.config import Config, ConfigError, nearest
from llip_jax.data.images import ImageError
from llip_jax.data.pipeline import eval_images
from llip_jax.data.records import Record, Source
from llip_jax.data.tokenizers import Tokenizer
from llip_jax.evaluation.classes import ClassSpec
from llip_jax.evaluation.classification import accuracy
from llip_jax.evaluation.retrieval import recall_at_k
from llip_jax.evaluation.scorers import mean_text
from llip_jax.ops.pair_scores import ImageSide, TextSide, cosines
from llip_jax.parallel.mesh import batch_shards
from llip_jax.parallel.sharding import batch_sharding

Progress = Callable[[int], Any]
"""Called with the number of images done since the last call."""


class Evaluator:
    """Evaluates parameters on one source; compiles once and is called as often as wanted.

    Every image is scored against every distinct specific caption of the source, and against the class texts where the
    source names classes. Blocks are padded to one shape, so that nothing recompiles; padding is cut off the results.

    Raises:
        ConfigError: eval.batch_size does not divide over the mesh, or a record lacks data.label_field.
    """

    def __init__(self, config: Config, graph: nnx.GraphDef[Any], mesh: Mesh, source: Source, tokenizer: Tokenizer):
        shards = batch_shards(mesh)
        if config.eval.batch_size % shards:
            raise ConfigError(
                f"eval.batch_size={config.eval.batch_size} does not divide over the {shards} devices of "
                "mesh.data x mesh.fsdp"
            )
        self._config, self._source, self._tokenizer = config, source, tokenizer
        self._texts, self._captions, self._labels = self._annotations()
        self._rows, self._whole = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())

        def image_side(params: Any, images: Array) -> ImageSide:
            model = nnx.merge(graph, params)
            return model.image_side(model.encode_images(images))

        def text_side(params: Any, tokens: Array, mask: Array) -> TextSide:
            return nnx.merge(graph, params).text_side(tokens, mask)

        self._image_side = jax.jit(image_side)
        self._text_side = jax.jit(text_side, out_shardings=self._whole)
        self._scores = jax.jit(cosines, out_shardings=self._whole)

    @property
    def images(self) -> int:
        """Images of the source."""
        return len(self._source)

    def __call__(self, params: Any, progress: Progress = lambda _: None) -> dict[str, Any]:
        """Figures by task, each with its chance level beside it.

        Raises:
            ConfigError: no image of the source can be read.
        """
        texts, captions, labels = self._texts, self._captions, self._labels
        blocks = list(self._text_blocks(params, texts))
        classes = None if labels is None else self._classes(labels)
        if classes is not None:
            blocks += self._class_blocks(params, classes)
        scores, kept = self._image_scores(params, blocks, progress)
        if not len(kept):
            raise ConfigError(f"evaluation: none of the {len(captions)} images can be read")

        column = {text: j for j, text in enumerate(texts)}
        positives = np.zeros((len(kept), len(texts)), bool)
        for row, index in enumerate(kept):
            positives[row, [column[text] for text in captions[index]]] = True
        # A text whose only image could not be read has no positive left.
        answerable = positives.any(axis=0)
        results: dict[str, Any] = {
            "images": len(kept),
            "unreadable_images": len(captions) - len(kept),
            "texts": int(answerable.sum()),
            "retrieval": recall_at_k(scores[:, : len(texts)][:, answerable], positives[:, answerable]),
        }
        if classes is not None and labels is not None:
            start = self._padded(len(texts))
            index_of = {name: label for label, name in enumerate(classes.names)}
            truth = np.asarray([index_of[labels[index]] for index in kept])
            results["classes"] = len(classes.names)
            results["zero_shot"] = accuracy(scores[:, start : start + len(classes.names)], truth)
        return results

    def _annotations(self) -> tuple[list[str], list[tuple[str, ...]], list[str] | None]:
        """Distinct captions, the captions of each image, and the class name of each image where the source has one."""
        captions: list[tuple[str, ...]] = []
        labels: list[str] = []
        for index in range(len(self._source)):
            try:
                record = self._source[index]
            except (ImageError, OSError):  # left out of every evaluation, also should it become readable
                captions.append(())
                labels.append("")
            else:
                captions.append(record.captions[: record.specific])
                labels.append(self._label(record))
        texts = sorted({text for own in captions for text in own})
        return texts, captions, None if self._config.data.label_field is None else labels

    def _label(self, record: Record) -> str:
        """The record's class name; '' where the run has no classes."""
        field = self._config.data.label_field
        if field is None:
            return ""
        if field not in record.fields:
            raise ConfigError(
                f"data.label_field: {record.name} has no field {field!r}.{nearest(field, list(record.fields))}"
            )
        name = str(record.fields[field])
        if not name.strip():
            raise ConfigError(f"data.label_field: the {field!r} of {record.name} is blank, expected a class name")
        return name

    def _classes(self, labels: Sequence[str]) -> ClassSpec:
        return ClassSpec.from_names(sorted(set(labels) - {""}), self._config.eval.templates)

    def _padded(self, n: int) -> int:
        """n rounded up to whole blocks."""
        return -(-n // self._config.eval.batch_size) * self._config.eval.batch_size

    def _text_blocks(self, params: Any, texts: Sequence[str]) -> Iterator[TextSide]:
        size = self._config.eval.batch_size
        for start in range(0, len(texts), size):
            tokens, mask = self._tokenizer.encode(texts[start : start + size], self._config.model.text.length)
            yield self._text_side(params, self._put(tokens), self._put(mask))

    def _class_blocks(self, params: Any, classes: ClassSpec) -> list[TextSide]:
        texts = [text for own in classes.texts for text in own]
        owner = np.repeat(np.arange(len(classes.names)), [len(own) for own in classes.texts])
        blocks = list(self._text_blocks(params, texts))
        joined = jax.tree.map(lambda *x: np.concatenate(x)[: len(texts)], *jax.device_get(blocks))
        means = jax.device_get(mean_text(joined, jnp.asarray(owner), len(classes.names)))
        size = self._config.eval.batch_size
        return [
            jax.tree.map(lambda x, start=start: self._put(x[start : start + size], self._whole), means)
            for start in range(0, len(classes.names), size)
        ]

    def _image_scores(
        self, params: Any, blocks: Sequence[TextSide], progress: Progress
    ) -> tuple[Float[np.ndarray, "N J"], list[int]]:
        """Cosines of every readable image with every text of the blocks (padding included), and the images' indices."""
        rows: list[np.ndarray] = []
        kept: list[int] = []
        size, threads = self._config.eval.batch_size, self._config.data.threads
        for images, indices in eval_images(self._source, self._config.model.image_size, size, threads):
            side = self._image_side(params, self._put(images))
            scores = jax.device_get([self._scores(side, block) for block in blocks])
            annotated = [row for row, index in enumerate(indices) if self._captions[index]]
            rows.append(np.concatenate(scores, axis=1)[annotated])
            kept.extend(int(indices[row]) for row in annotated)
            progress(len(indices))
        width = len(blocks) * size
        return np.concatenate(rows) if rows else np.zeros((0, width), np.float32), kept

    def _put(self, block: np.ndarray, sharding: NamedSharding | None = None) -> Array:
        """A host block, padded with zeros to the block size, on the devices. Every process holds the whole block."""
        padding = self._config.eval.batch_size - len(block)
        padded = np.pad(block, [(0, padding)] + [(0, 0)] * (block.ndim - 1))
        return jax.make_array_from_callback(padded.shape, sharding or self._rows, lambda index: padded[index])
