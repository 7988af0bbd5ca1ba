"""Zero-shot classification and retrieval of a model on a source, with text-conditioned scores throughout."""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from llip_jax.config import Config, ConfigError, nearest
from llip_jax.data.fields import lookup
from llip_jax.data.pipeline import eval_images
from llip_jax.data.records import BadSample, Record, Source
from llip_jax.data.tokenizers import Tokenizer
from llip_jax.evaluation.classes import ClassSpec
from llip_jax.evaluation.classification import accuracy
from llip_jax.evaluation.retrieval import recall_at_k
from llip_jax.evaluation.scorers import mean_text
from llip_jax.evaluation.scoring import Progress, score_blocks
from llip_jax.evaluation.two_stage import shortlist, two_stage_figures
from llip_jax.ops.pair_scores import ImageSide, TextSide
from llip_jax.parallel.mesh import batch_shards
from llip_jax.parallel.sharding import batch_sharding


class Evaluator:
    """Evaluates parameters on one source; compiles once and is called as often as wanted.

    Every image is scored against every distinct specific caption of the source, and against the class texts where the
    source names classes. Blocks are padded to one shape, so that nothing recompiles; padding is cut off the results.
    With eval.shortlist, retrieval is reported in two stages too: shortlists by the unconditioned image embedding, which
    knows no text, then exact scores of the pairs on them. Those being at hand, the second stage costs nothing here.

    Raises:
        ConfigError: eval.batch_size does not divide over the mesh, a record lacks data.label_field, or no record can be
            read.
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
        if not self._texts:
            raise ConfigError(f"evaluation: none of the {len(source)} images can be read{self._first_problem}")
        self._rows, whole = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())

        def image_side(params: Any, images: Array) -> tuple[ImageSide, Float[Array, "n d"]]:
            model = nnx.merge(graph, params)
            output = model.encode_images(images)
            return model.image_side(output), model.unconditioned_embedding(output)

        def text_side(params: Any, tokens: Array, mask: Array) -> TextSide:
            return nnx.merge(graph, params).text_side(tokens, mask)

        self._image_side = jax.jit(image_side, out_shardings=(None, whole))
        self._text_side = jax.jit(text_side, out_shardings=whole)

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
        classes = None if labels is None else self._classes(labels)
        columns = self._columns(params, classes)
        scores, unconditioned, kept = self._score_images(params, columns, progress)
        column = {text: j for j, text in enumerate(texts)}
        positives = np.zeros((len(kept), len(texts)), bool)
        for row, index in enumerate(kept):
            positives[row, [column[text] for text in captions[index]]] = True
        # A text whose only image could not be read has no positive left.
        answerable = positives.any(axis=0)
        caption_scores, positives = scores[:, : len(texts)][:, answerable], positives[:, answerable]
        results: dict[str, Any] = {
            "images": len(kept),
            "unreadable_images": len(captions) - len(kept),
            "texts": int(answerable.sum()),
            "retrieval": recall_at_k(caption_scores, positives),
        }
        if self._config.eval.shortlist is not None:
            embedding = columns.embedding[: len(texts)][answerable]
            listed = shortlist(unconditioned, embedding, self._config.eval.shortlist)
            results["two_stage"] = two_stage_figures(caption_scores, positives, listed)
        if classes is not None and labels is not None:
            index_of = {name: label for label, name in enumerate(classes.names)}
            truth = np.asarray([index_of[labels[index]] for index in kept])
            results["classes"] = len(classes.names)
            results["zero_shot"] = accuracy(scores[:, len(texts) :], truth)
        return results

    def _annotations(self) -> tuple[list[str], list[tuple[str, ...]], list[str] | None]:
        """Distinct captions, the captions of each image, and the class name of each image where the source has one."""
        captions: list[tuple[str, ...]] = []
        labels: list[str] = []
        self._first_problem = ""
        for index in range(len(self._source)):
            try:
                record = self._source[index]
                label = self._label(record)
            except (BadSample, OSError) as error:  # left out of every evaluation, also should it become readable
                self._first_problem = self._first_problem or f"; the first: {error}"
                captions.append(())
                labels.append("")
            else:
                captions.append(record.captions[: record.specific])
                labels.append(label)
        texts = sorted({text for own in captions for text in own})
        return texts, captions, None if self._config.data.label_field is None else labels

    def _label(self, record: Record) -> str:
        """The record's class name; '' where the run has no classes."""
        field = self._config.data.label_field
        if field is None:
            return ""
        label = lookup(record.name, record.fields, field)
        if label is None:
            raise ConfigError(
                f"data.label_field: {record.name} has no field {field!r}.{nearest(field, list(record.fields))}"
            )
        name = label.decode(errors="replace") if isinstance(label, bytes) else str(label)
        if not name.strip():
            raise ConfigError(f"data.label_field: the {field!r} of {record.name} is blank, expected a class name")
        return name

    def _classes(self, labels: Sequence[str]) -> ClassSpec:
        return ClassSpec.from_names(sorted(set(labels) - {""}), self._config.eval.templates)

    def _columns(self, params: Any, classes: ClassSpec | None) -> TextSide:
        """What images are scored against: the captions, then the classes. On the host."""
        captions = self._encode_texts(params, self._texts)
        if classes is None:
            return captions
        owner = np.repeat(np.arange(len(classes.names)), [len(own) for own in classes.texts])
        prompts = self._encode_texts(params, [text for own in classes.texts for text in own])
        means = jax.device_get(mean_text(prompts, jnp.asarray(owner), len(classes.names)))
        return jax.tree.map(lambda *x: np.concatenate(x), captions, means)

    def _encode_texts(self, params: Any, texts: Sequence[str]) -> TextSide:
        size = self._config.eval.batch_size
        blocks = []
        for start in range(0, len(texts), size):
            tokens, mask = self._tokenizer.encode(texts[start : start + size], self._config.model.text.length)
            blocks.append(self._text_side(params, self._put(tokens), self._put(mask)))
        return jax.tree.map(lambda *x: np.concatenate(x)[: len(texts)], *jax.device_get(blocks))

    def _score_images(
        self, params: Any, texts: TextSide, progress: Progress
    ) -> tuple[Float[np.ndarray, "N J"], Float[np.ndarray, "N d"], list[int]]:
        """Of every readable image: cosines with all texts, unconditioned embedding, and index in the source."""
        size, data = self._config.eval.batch_size, self._config.data
        images = eval_images(self._source, self._config.model.image_size, size, data.threads, data.limits)
        batches, same_batches = itertools.tee(images)
        embeddings: deque[Array] = deque()

        def sides() -> Iterator[ImageSide]:
            for images, _ in batches:
                side, embedding = self._image_side(params, self._put(images))
                embeddings.append(embedding)
                yield side

        scores: list[np.ndarray] = []
        unconditioned: list[np.ndarray] = []
        kept: list[int] = []
        for (_, indices), block in zip(same_batches, score_blocks(sides(), texts), strict=True):
            annotated = [row for row, index in enumerate(indices) if self._captions[index]]
            scores.append(block[annotated])
            unconditioned.append(np.asarray(embeddings.popleft())[annotated])
            kept.extend(int(indices[row]) for row in annotated)
            progress(len(indices))
        if not kept:
            raise ConfigError(f"evaluation: none of the {len(self._captions)} images can be read{self._first_problem}")
        return np.concatenate(scores), np.concatenate(unconditioned), kept

    def _put(self, block: np.ndarray) -> Array:
        """A host block, padded with zeros to the block size, on the devices. Every process holds the whole block."""
        padding = self._config.eval.batch_size - len(block)
        padded = np.pad(block, [(0, padding)] + [(0, 0)] * (block.ndim - 1))
        return jax.make_array_from_callback(padded.shape, self._rows, lambda index: padded[index])
