"""From a source to host batches: the training order, examples, batches, and images for evaluation.

Training visits global positions g = 0, 1, 2, ...: step s of global batch size B holds g = s B .. s B + B - 1. The
sample at g and everything random about it are pure functions of (seed, g), so a run may continue from any step, on
any number of processes, threads and workers, and see the same batches.
"""

import hashlib
import itertools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import grain
import numpy as np
from absl import flags
from jaxtyping import Int, UInt8

from llip_jax.config import ConfigError, DataConfig, TokenizerConfig, nearest
from llip_jax.data.captions import choose_captions, generator
from llip_jax.data.folder import FolderSource
from llip_jax.data.images import ImageError, augment, decode, resize_for_eval
from llip_jax.data.records import Batch, Record, Source
from llip_jax.data.tokenizers import ClipTokenizer, Tokenizer, load_tokenizer, train_tokenizer
from llip_jax.data.toyworld import ToyWorld

MAX_UNREADABLE = 100
"""Unreadable records in a row after which training stops."""
TOKENIZER_CAPTIONS = 20_000
"""Most captions that a tokenizer is trained on."""

_logger = logging.getLogger(__name__)


def build_source(config: DataConfig, split: Literal["train", "eval"], image_size: int) -> Source:
    """The source that ``config`` names; :class:`ConfigError` where its data is not as expected."""
    if config.source == "toyworld":
        return ToyWorld(config.toyworld, split, image_size)
    if not config.path:
        raise ConfigError("data.path: is empty, expected the folder that holds captions.jsonl")
    return FolderSource(config.path, config.folder, split)


def build_tokenizer(config: TokenizerConfig, source: Source, path: str | Path) -> Tokenizer:
    """The tokenizer that ``config`` names.

    Args:
        config: name and size.
        source: 'trained' learns from its captions, up to ``TOKENIZER_CAPTIONS`` of randomly ordered records.
        path: where 'trained' keeps the tokenizer.json; used as it is if it exists.

    Raises:
        ConfigError: no such tokenizer, or ``config.vocabulary_size`` is smaller than its vocabulary.
    """
    tokenizer: Tokenizer
    if config.name == "clip":
        tokenizer = ClipTokenizer()
    elif config.name == "trained":
        if Path(path).exists():
            tokenizer = load_tokenizer(path)
        else:
            texts = itertools.islice(_shuffled_captions(source), TOKENIZER_CAPTIONS)
            tokenizer = train_tokenizer(texts, config.vocabulary_size, path)
    elif Path(config.name).is_file():
        tokenizer = load_tokenizer(config.name)
    else:
        raise ConfigError(
            f"data.tokenizer.name: {config.name!r} is neither 'clip' nor 'trained' nor an existing tokenizer.json."
            + nearest(config.name, ["clip", "trained"])
        )
    if tokenizer.vocabulary_size > config.vocabulary_size:
        raise ConfigError(
            f"data.tokenizer.vocabulary_size: {config.vocabulary_size} is too small for the tokenizer "
            f"{config.name!r}, which has {tokenizer.vocabulary_size} tokens"
        )
    return tokenizer


def _shuffled_captions(source: Source) -> Iterator[str]:
    """Captions of the readable records in one fixed random order of records."""
    order = sample_order(len(source), seed=0)
    for position in range(len(source)):
        try:
            record = source[order[position]]
        except (ImageError, OSError):
            continue
        yield from record.captions


def sample_order(size: int, seed: int) -> grain.MapDataset[int]:
    """Endless sample indices by global position: every run of ``size`` positions (epoch) is another permutation."""
    # Grain seeds epoch e with seed + e: drawing the seed keeps neighbouring seeds from repeating each other's epochs.
    start = int(generator(seed, "order", 0).integers(2**32))
    return grain.MapDataset.range(size).shuffle(start).repeat()


def make_example(
    record: Record,
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    image_size: int,
    text_length: int,
    seed: int,
    position: int,
) -> dict[str, np.ndarray]:
    """One row of a :class:`Batch`, less ``sample_id`` and ``replaced``: a pure function of its arguments.

    Empty caption slots have weight 0, padding tokens, and -1 as ``caption_source`` and ``text_group``.

    Args:
        record: image and captions.
        tokenizer: encodes the chosen captions to ``text_length`` tokens.
        config: how to augment and to choose captions.
        image_size: height and width of the result in pixels.
        text_length: tokens of a caption slot.
        seed: seed of the run.
        position: global position of the row.

    Raises:
        ImageError: the image cannot be decoded.
    """
    pixels = record.image
    if isinstance(pixels, bytes):
        # The smallest crop still has about the pixels that the view needs.
        pixels = decode(pixels, short_side=math.ceil(image_size / math.sqrt(config.augment.crop_scale[0])))
    chosen = choose_captions(record.captions, record.specific, config.captions, seed, position)
    texts = [record.captions[i] for i in chosen]
    slots, filled = config.captions.slots, len(chosen)
    text = np.zeros((slots, text_length), np.int32)
    text_mask = np.zeros((slots, text_length), np.int32)
    text[:filled], text_mask[:filled] = tokenizer.encode(texts, text_length)
    empty = [-1] * (slots - filled)
    return {
        "image": augment(pixels, image_size, config.augment, generator(seed, "augment", position)),
        "text": text,
        "text_mask": text_mask,
        "caption_weight": np.array([1 / filled] * filled + [0] * len(empty), np.float32),
        "caption_source": np.array([*chosen, *empty], np.int32),
        "image_group": np.array(group_hash(record.image_group), np.int32),
        "text_group": np.array([group_hash(" ".join(t.lower().split())) for t in texts] + empty, np.int32),
    }


def group_hash(text: str) -> int:
    """31 bits that are equal for equal strings, in every process and run."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1


@dataclass(frozen=True)
class BatchReader:
    """Reads this process's rows of any global batch; picklable, so that it runs in threads and in worker processes."""

    source: Source
    tokenizer: Tokenizer
    config: DataConfig
    image_size: int
    text_length: int
    seed: int
    batch_size: int
    rows: range
    order: grain.MapDataset[int]

    def __call__(self, step: int) -> Batch:
        """The rows of batch ``step``; :class:`ConfigError` after ``MAX_UNREADABLE`` unreadable samples in a row."""
        examples = [self._example(step * self.batch_size + row) for row in self.rows]
        return cast(Batch, {key: np.stack([example[key] for example in examples]) for key in examples[0]})

    def _example(self, position: int) -> dict[str, np.ndarray]:
        """The example at a global position, or of the next readable sample after that one in the source."""
        planned, size = self.order[position], len(self.source)
        for attempt in range(MAX_UNREADABLE):
            index = (planned + attempt) % size
            try:
                example = make_example(
                    self.source[index],
                    self.tokenizer,
                    self.config,
                    image_size=self.image_size,
                    text_length=self.text_length,
                    seed=self.seed,
                    position=position,
                )
            except (ImageError, OSError) as error:
                _logger.warning("sample %d is unreadable and replaced by the next one: %s", index, error)
                last_error = error
            else:
                replaced = np.array(attempt > 0, np.int32)
                return example | {"sample_id": np.array(index, np.int32), "replaced": replaced}
        raise ConfigError(
            f"{MAX_UNREADABLE} samples in a row, from sample {planned} on, are unreadable; the last one: {last_error}"
        )


def train_batches(
    source: Source,
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    image_size: int,
    text_length: int,
    seed: int,
    batch_size: int,
    start_step: int,
    stop_step: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Batches of the steps ``start_step`` up to and without ``stop_step``, read ahead in the background.

    ``batch_size`` is global; process p of P gets the rows p B/P up to and without (p + 1) B/P. A sample whose image
    is unreadable is replaced by the next in the source, which ``sample_id`` and ``replaced`` tell. ``close()`` of the
    iterator ends its threads and workers early.

    Raises:
        ConfigError: ``batch_size`` is not a multiple of ``process_count``; on reading, ``MAX_UNREADABLE`` samples in
            a row are unreadable.
    """
    if batch_size % process_count:
        raise ConfigError(f"train.batch_size: {batch_size} is not a multiple of the {process_count} processes")
    local = batch_size // process_count
    reader = BatchReader(
        source=source,
        tokenizer=tokenizer,
        config=config,
        image_size=image_size,
        text_length=text_length,
        seed=seed,
        batch_size=batch_size,
        rows=range(process_index * local, (process_index + 1) * local),
        order=sample_order(len(source), seed),
    )
    # A thread makes whole batches: more threads than batches ahead would have nothing to do.
    ahead = grain.ReadOptions(
        num_threads=min(config.threads, config.prefetch_batches), prefetch_buffer_size=config.prefetch_batches
    )
    batches = grain.MapDataset.range(start_step, stop_step).map(reader).to_iter_dataset(ahead)
    if config.workers:
        if not flags.FLAGS.is_parsed():  # Grain reads its flags to start workers; outside of absl.app nobody parses.
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=config.prefetch_batches)
        )
    return iter(batches)


def eval_images(
    source: Source, image_size: int, batch_size: int, threads: int
) -> Iterator[tuple[UInt8[np.ndarray, "b H W 3"], Int[np.ndarray, " b"]]]:
    """Images of all records in order, whole and centred, with their indices in the source.

    Unreadable images are left out, so their number is ``len(source)`` less the indices seen. The last batch may be
    smaller. Decoding runs ahead by one batch in ``threads`` threads.
    """

    def read(index: int) -> tuple[np.ndarray, np.ndarray] | None:
        try:
            record = source[index]
            pixels = decode(record.image) if isinstance(record.image, bytes) else record.image
        except (ImageError, OSError) as error:
            _logger.warning("sample %d is unreadable and left out: %s", index, error)
            return None
        return resize_for_eval(pixels, image_size), np.array(index, np.int32)

    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, batch_size))
    # Grain leaves out elements that are None.
    return iter(grain.MapDataset.range(len(source)).map(read).to_iter_dataset(ahead).batch(batch_size))
