"""One pass of a model over an evaluation set, with text-conditioned scores throughout."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt8

from llip_jax.config import Config, ConfigError, Task
from llip_jax.data.evaluation_sets import EvalSet
from llip_jax.data.pipeline import eval_blocks
from llip_jax.data.records import Source
from llip_jax.data.tokenizers import Tokenizer
from llip_jax.evaluation.annotations import annotate, training_labels
from llip_jax.evaluation.reading import Annotation, Labelled, Own, Reading, digest_of
from llip_jax.evaluation.scorers import SCORERS, mean_text
from llip_jax.evaluation.scoring import Bar, Progress, own_scores, score_blocks, silent, to_all_devices
from llip_jax.evaluation.tasks import run_tasks
from llip_jax.evaluation.texts import texts_of
from llip_jax.ops.pair_scores import ImageSide, TextSide, normalize
from llip_jax.parallel.mesh import batch_shards
from llip_jax.parallel.sharding import batch_sharding

EMBEDDINGS = ("unconditioned", "tower", "patches")
"""Of an image; see ``Reading.embeddings``."""


class _Block(NamedTuple):
    """What the model made of the usable images of one block, on the host.

    rows: their indices in the source.
    captions: cosines with every caption.
    classes: class scores by scorer.
    own: OwnScores with texts of their own, by name.
    """

    rows: Int[np.ndarray, "n"]
    captions: Float[np.ndarray, "n J"]
    classes: dict[str, Float[np.ndarray, "n C"]]
    embeddings: dict[str, Float[np.ndarray, "n _"]]
    own: dict[str, Any]


class _Columns(NamedTuple):
    """What images are scored with, None for nothing; and which of it are captions, class means, class texts."""

    side: TextSide | None
    parts: dict[str, slice]


class Evaluator:
    """Evaluates parameters on one set; compiles once and is called as often as wanted.

    Every image is scored against every distinct specific caption of the set, and against the texts of its classes.
    Blocks cover fixed positions of the set and have one shape, so that nothing recompiles and every process decodes its
    own rows only; what fills them up is cut off the results.

    Args:
        tasks: what is done; None: ``eval.tasks``.
        bar: of the progress of reading annotations.

    Raises:
        ConfigError: eval.batch_size does not divide over the mesh, or the set's annotations cannot be used (annotate).
    """

    def __init__(
        self,
        config: Config,
        graph: nnx.GraphDef[Any],
        mesh: Mesh,
        eval_set: EvalSet,
        tokenizer: Tokenizer,
        tasks: Sequence[Task] | None = None,
        bar: Bar = silent,
    ):
        shards = batch_shards(mesh)
        if config.eval.batch_size % shards:
            raise ConfigError(
                f"eval.batch_size={config.eval.batch_size} does not divide over the {shards} devices of "
                "mesh.data x mesh.fsdp"
            )
        self._config, self._tokenizer, self._set = config, tokenizer, eval_set
        self._tasks = frozenset(config.eval.tasks if tasks is None else tasks)
        own = config.eval.sets[eval_set.name] if eval_set.name else config.eval
        self._field = f"eval.sets.{eval_set.name}" if eval_set.name else "eval"
        self._known = annotate(eval_set, own, config.eval.templates, self._field, bar)
        self._texts = texts_of(self._known, self._tasks)
        self._train = None
        if self._tasks & {"knn", "linear_probe"} and self._known.classes is not None and not self._known.multi_label:
            self._train = training_labels(
                eval_set, self._known.classes, self._known.numbered, config.eval.probe_images, bar
            )
        if jax.process_count() > 1:  # Else shapes may differ, and processes wait for each other for ever.
            known = digest_of(*(own.digest if own else "" for own in self._known.annotations), *self._texts.listed)
            multihost_utils.assert_equal(
                np.frombuffer(known.encode(), np.uint8), f"{self._field}: processes have read different annotations"
            )
        self._rows, whole = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())

        def images_of(params: Any, images: UInt8[Array, "n H W 3"]) -> tuple[ImageSide, dict[str, Float[Array, "n _"]]]:
            model = nnx.merge(graph, params)
            output = model.encode_images(images)
            of_class_token = config.model.pooler in ("class_token", "registers")
            embeddings = {
                "unconditioned": model.unconditioned_embedding(output),
                "tower": output.mixture[:, 0] if of_class_token else output.mixture.mean(axis=1),
                "patches": output.patches.mean(axis=1),
            }
            return model.image_side(output), jax.tree.map(lambda x: x.astype(jnp.float32), embeddings)

        def texts_of_block(params: Any, tokens: Int[Array, "n L"], mask: Int[Array, "n L"]) -> TextSide:
            side = nnx.merge(graph, params).text_side(tokens, mask)
            return side._replace(embedding=normalize(side.embedding))

        # What goes to the host is gathered onto every device; image sides stay divided.
        self._images_of = jax.jit(images_of, out_shardings=(None, whole))
        self._texts_of = jax.jit(texts_of_block, out_shardings=whole)
        self._own_scores = jax.jit(own_scores, out_shardings=whole)
        self._gathered = jax.jit(lambda x: x, out_shardings=whole)

    @property
    def work(self) -> int:
        """What a pass reports to ``progress`` in all: images and texts that go through the towers."""
        train = 0 if self._train is None else len(self._train.source)
        return len(self._set.source) + train + len(self._texts.listed)

    @property
    def fields(self) -> set[str]:
        """Names of the fields that records have."""
        return {name for annotation in self._known.annotations if annotation for name in annotation.fields}

    def has_field(self, field: str) -> bool:
        """Whether any record has a field, or a nested one by dots."""
        known = (annotation for annotation in self._known.annotations if annotation)
        return any(own.value(field) is not None for own in known)

    def __call__(self, params: Any, progress: Progress = lambda _: None) -> dict[str, Any]:
        """Figures by task, each with its chance level beside it.

        Raises:
            ConfigError: no image of the set can be read.
        """
        return run_tasks(self.read(params, progress), self._tasks, self._config.eval).figures

    def read(self, params: Any, progress: Progress = lambda _: None) -> Reading:
        """The pass: everything that the tasks need.

        Raises:
            ConfigError: no image of the set can be read.
        """
        known, own_texts = self._known, self._texts
        texts = self._encode_texts(params, progress)
        usable = np.asarray([annotation is not None for annotation in known.annotations])
        read = _joined(self._pass(params, self._set.source, usable, texts, progress))
        if read is None:
            first = f"; the first: {known.first_problem}" if known.first_problem else ", as the log says"
            raise ConfigError(f"{self._field}: none of the {len(usable)} images can be read{first}")
        annotations = [annotation for row in read.rows if (annotation := known.annotations[row])]
        captions = own_texts.listed[: own_texts.captions]
        positives = _positives(annotations, captions)
        # A text whose only image could not be read is nobody's caption here.
        answerable = np.any(positives, axis=0)
        kept = np.concatenate([answerable, np.full(len(own_texts.listed) - len(captions), True)])
        new_row = np.cumsum(kept) - 1
        own = {
            name: Own(rows >= 0, None if name == "choices" else np.where(rows >= 0, new_row[rows], 0), *read.own[name])
            for name, rows in ((name, rows[read.rows]) for name, rows in own_texts.own.items())
        }
        return Reading(
            rows=read.rows,
            annotations=annotations,
            unreadable=len(known.annotations) - len(annotations),
            texts=[text for text, answers in zip(captions, answerable, strict=True) if answers],
            positives=positives[:, answerable],
            caption_scores=read.captions[:, answerable],
            text_embedding=np.zeros((0, 0), np.float32) if texts is None else np.asarray(texts.embedding)[kept],
            classes=known.classes,
            multi_label=known.multi_label,
            # jax sorts names; reports keep the order in which they are given.
            class_scores={name: read.classes[name] for name in self._config.eval.scorers if name in read.classes},
            embeddings={name: read.embeddings[name] for name in EMBEDDINGS},
            captions=own.get("captions"),
            choices=own.get("choices"),
            train=self._labelled(params, progress),
        )

    def _labelled(self, params: Any, progress: Progress) -> Labelled | None:
        """Embeddings of the training images that probes learn from."""
        if self._train is None:
            return None
        source, labels, digest = self._train
        read = _joined(self._pass(params, source, np.ones(len(source), bool), None, progress))
        return None if read is None else Labelled(read.embeddings, labels[read.rows], digest)

    def _encode_texts(self, params: Any, progress: Progress) -> TextSide | None:
        """All texts, on the host; None where there is none."""
        texts, size = self._texts.listed, self._config.eval.batch_size
        blocks = []
        for start in range(0, len(texts), size):
            some = texts[start : start + size]
            tokens, mask = self._tokenizer.encode(some, self._config.model.text.length)
            blocks.append(self._texts_of(params, self._put(tokens), self._put(mask)))
            progress(len(some))
        if not blocks:
            return None
        return jax.tree.map(lambda *x: np.concatenate(x)[: len(texts)], *jax.device_get(blocks))

    def _pass(
        self, params: Any, source: Source, wanted: Bool[np.ndarray, "N"], texts: TextSide | None, progress: Progress
    ) -> Iterator[_Block]:
        """All images of a source, block by block; with ``texts`` their scores too."""
        size, data = self._config.eval.batch_size, self._config.data
        columns = _Columns(None, {}) if texts is None else self._columns(texts)
        on_devices = None if texts is None else to_all_devices(texts)
        waiting: deque[Any] = deque()

        def sides() -> Iterator[ImageSide]:
            processes = jax.process_index(), jax.process_count()
            blocks = eval_blocks(source, self._config.model.image_size, size, data.threads, data.limits, *processes)
            for start, (images, usable) in zip(range(0, len(source), size), blocks, strict=True):
                side, embeddings = self._images_of(params, self._put_own(images))
                own = {}
                if on_devices is not None:
                    for name, rows in self._texts.own.items():
                        texts_of_images = self._put(np.maximum(rows[start : start + size], 0))
                        own[name] = self._own_scores(side, on_devices, texts_of_images)
                        if name == "choices":  # of which nothing else is asked
                            own[name] = own[name]._replace(mixed=None, weights=None)
                waiting.append((self._gathered(self._put_own(usable)), embeddings, own))
                yield side

        nothing = np.zeros((size, 0), np.float32)
        scores = (nothing for _ in sides()) if columns.side is None else score_blocks(sides(), columns.side)
        for start, block in zip(range(0, len(source), size), scores, strict=True):
            usable, *made = jax.device_get(waiting.popleft())
            count = min(size, len(source) - start)
            kept = np.flatnonzero(usable[:count] & wanted[start : start + count])
            scores_of_kept = block[kept]
            captions, classes = (
                scores_of_kept[:, columns.parts.get("captions", slice(0))],
                self._class_scores(scores_of_kept, columns.parts),
            )
            yield _Block(start + kept, captions, classes, *jax.tree.map(lambda x, kept=kept: x[kept], made))
            progress(count)

    def _columns(self, texts: TextSide) -> _Columns:
        """What images are scored with: captions and, where a scorer wants them, means of class texts and the texts."""
        classes, captions, prompts = self._known.classes, self._texts.captions, self._texts.prompts
        sides = {"captions": _rows(texts, slice(captions))}
        wanted = {SCORERS[name].columns for name in self._config.eval.scorers}
        if classes is not None and prompts:
            of_classes = _rows(texts, slice(-prompts, None))
            if "classes" in wanted:
                layout = classes.layout
                means = mean_text(of_classes, jnp.asarray(layout.owner), len(classes.names), jnp.asarray(layout.weight))
                sides["classes"] = jax.device_get(means)
            if "texts" in wanted:
                sides["texts"] = of_classes
        ends = np.cumsum([len(side.embedding) for side in sides.values()]).tolist()
        if not ends[-1]:
            return _Columns(None, {})
        parts = dict(zip(sides, map(slice, [0, *ends], ends), strict=False))
        return _Columns(jax.tree.map(lambda *x: np.concatenate(x), *sides.values()), parts)

    def _class_scores(
        self, block: Float[np.ndarray, "n J"], parts: Mapping[str, slice]
    ) -> dict[str, Float[np.ndarray, "n C"]]:
        """By scorer."""
        if self._known.classes is None:
            return {}
        layout = self._known.classes.layout
        scorers = {name: SCORERS[name] for name in self._config.eval.scorers}
        return {
            name: scorer.class_scores(block[:, parts[scorer.columns]], layout)
            for name, scorer in scorers.items()
            if scorer.columns in parts
        }

    def _put(self, block: np.ndarray) -> Array:
        """A host block that every process holds whole, filled up with zeros to the block size, on the devices."""
        padding = self._config.eval.batch_size - len(block)
        padded = np.pad(block, [(0, padding)] + [(0, 0)] * (block.ndim - 1))
        return jax.make_array_from_callback(padded.shape, self._rows, lambda index: padded[index])

    def _put_own(self, rows: np.ndarray) -> Array:
        """This process's rows of a block, on the devices."""
        return jax.make_array_from_process_local_data(self._rows, rows)


def _positives(annotations: Sequence[Annotation], captions: Sequence[str]) -> Bool[np.ndarray, "N J"]:
    """Which captions are an image's own."""
    column = {text: number for number, text in enumerate(captions)}
    positives: np.ndarray = np.full((len(annotations), len(captions)), False)
    for row, annotation in enumerate(annotations if captions else ()):
        positives[row, [column[text] for text in annotation.captions]] = True
    return positives


def _joined(blocks: Iterator[_Block]) -> _Block | None:
    """All blocks as one; None where none has an image."""
    filled = [block for block in blocks if len(block.rows)]
    return jax.tree.map(lambda *x: np.concatenate(x), *filled) if filled else None


def _rows(side: TextSide, rows: slice) -> TextSide:
    return jax.tree.map(lambda x: x[rows], side)
