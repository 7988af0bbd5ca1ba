"""From a source to host batches: examples, batches, and images for evaluation.

Training visits global positions g = 0, 1, 2, ...: step s of global batch size B holds g = s B .. s B + B - 1. The
sample at g and everything random about it are pure functions of (seed, g), so a run may continue from any step, on
any number of processes, threads and workers, and see the same batches.
"""

import errno
import hashlib
import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, cast

import grain
import numpy as np
from absl import flags
from jaxtyping import Bool, UInt8

from llip_jax.config import ConfigError, DataConfig, LimitsConfig, TokenizerConfig, nearest
from llip_jax.data.captions import Choice, choose_captions, generator
from llip_jax.data.images import open_picture, resize_for_eval, training_view
from llip_jax.data.order import epochs
from llip_jax.data.records import REASONS, BadSample, Batch, Reason, Record, Source, batch_shapes
from llip_jax.data.sources import Mixture, Part
from llip_jax.data.tokenizers import ClipTokenizer, Tokenizer, check_tokenizer, load_tokenizer, train_tokenizer

MAX_BAD = 100
"""Samples in a row that cannot be used after which training stops."""
TOKENIZER_CAPTIONS = 20_000
"""Most captions that a tokenizer is trained on."""

_LOGGED_AT_ONCE, _LOG_EVERY_S = 10, 60.0
_DELAYS_S = (0.1, 1.0, 10.0)
_PASSING = {
    errno.EIO, errno.EAGAIN, errno.EINTR, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT, errno.ESTALE,
    errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH,
}  # fmt: skip
"""Errors that say nothing about the file."""

_logger = logging.getLogger(__name__)


def build_tokenizer(config: TokenizerConfig, source: Source, path: str | Path, length: int) -> Tokenizer:
    """The tokenizer that ``config`` names.

    Args:
        config: name, size, cleaning and padding.
        source: 'trained' learns from its captions, up to ``TOKENIZER_CAPTIONS`` of randomly ordered records.
        path: where 'trained' keeps the tokenizer.json; used as it is if it exists.
        length: tokens of a text.

    Raises:
        ConfigError: no such tokenizer, or one that does not fit the rest of ``config`` or ``length``.
    """
    tokenizer: Tokenizer
    if config.name == "clip":
        for field, built_in in {"clean": "none", "pad": 0}.items():
            if (value := getattr(config, field)) != built_in:
                raise ConfigError(
                    f"data.tokenizer.{field}: {value!r} does not go with the tokenizer 'clip', whose cleaning and "
                    f"padding are built in; expected {built_in!r}"
                )
        tokenizer = ClipTokenizer()
    elif config.name == "trained":
        if not Path(path).exists():
            texts = itertools.islice(_shuffled_captions(source), TOKENIZER_CAPTIONS)
            train_tokenizer(texts, config.vocabulary_size, path)
        tokenizer = load_tokenizer(path, config.clean, config.pad)
    elif Path(config.name).is_file():
        tokenizer = load_tokenizer(config.name, config.clean, config.pad)
    else:
        raise ConfigError(
            f"data.tokenizer.name: {config.name!r} is neither 'clip' nor 'trained' nor an existing tokenizer.json or "
            "SentencePiece .model." + nearest(config.name, ["clip", "trained"])
        )
    check_tokenizer(tokenizer, config, length)
    return tokenizer


def _shuffled_captions(source: Source) -> Iterator[str]:
    """Captions of the readable records in one fixed random order of records."""
    order = epochs(len(source), seed=0)
    for position in range(len(source)):
        try:
            record = source[order[position]]
        except (BadSample, OSError):
            continue
        yield from record.captions


class Example(NamedTuple):
    """One image with the texts chosen for it, before they are tokens."""

    image: UInt8[np.ndarray, "size size 3"]
    texts: tuple[Choice, ...]
    image_group: str


def make_example(
    record: Record, part: Part, config: DataConfig, *, image_size: int, seed: int, position: int
) -> Example:
    """The example that a record gives at a global position: a pure function of its arguments.

    Raises:
        BadSample: the picture cannot be used.
    """
    rng = generator(seed, "augment", position)
    try:
        image = training_view(record.image, image_size, config.augment, rng, config.limits)
    except BadSample as error:
        raise BadSample(error.reason, f"{record.name}: {error}") from error
    return Example(
        image=image,
        texts=choose_captions(
            record.captions, record.kinds, record.specific, part.rules, config.captions.slots, seed, position
        ),
        image_group=record.image_group,
    )


def group_hash(text: str) -> int:
    """31 bits that are equal for equal strings, in every process and run."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=4).digest(), "big") >> 1


@dataclass
class BatchReader:
    """Reads this process's rows of any global batch; picklable, so that it runs in threads and in worker processes."""

    mixture: Mixture
    tokenizer: Tokenizer
    config: DataConfig
    image_size: int
    text_length: int
    seed: int
    batch_size: int
    rows: range

    def __post_init__(self) -> None:
        self._order = self.mixture.order(self.seed)
        self._log = RateLimit(_LOGGED_AT_ONCE, _LOG_EVERY_S, time.monotonic)
        self._pool = ThreadPoolExecutor(self.config.threads, "decode")

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.__post_init__()

    def __call__(self, step: int) -> Batch:
        """The rows of batch ``step``; :class:`ConfigError` after ``MAX_BAD`` unusable samples in a row."""
        shapes = batch_shapes(len(self.rows), self.config.captions.slots, self.image_size, self.text_length)
        batch = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
        start = step * self.batch_size + self.rows.start
        if self.config.threads == 1:
            self._fill(batch, start, range(len(self.rows)))
        else:
            # Several pieces a thread, so that none waits long for the slowest.
            size = -(-len(self.rows) // (4 * self.config.threads))
            pieces = [range(first, min(first + size, len(self.rows))) for first in range(0, len(self.rows), size)]
            for _ in self._pool.map(lambda rows: self._fill(batch, start, rows), pieces):
                pass
        return cast(Batch, batch)

    def _fill(self, batch: dict[str, np.ndarray], start: int, rows: Sequence[int]) -> None:
        """Fills rows of a batch whose row 0 is at global position ``start``."""
        texts: list[str] = []
        slots: list[tuple[int, int]] = []
        batch["caption_source"][rows] = batch["text_group"][rows] = -1
        for row in rows:
            example, batch["sample_id"][row], batch["replaced"][row] = self._example(start + row)
            batch["image"][row] = example.image
            batch["image_group"][row] = group_hash(example.image_group)
            batch["caption_weight"][row, : len(example.texts)] = 1 / len(example.texts)
            for slot, (caption, whole) in enumerate(example.texts):
                text = whole[: self.config.limits.caption_characters]
                batch["caption_source"][row, slot] = caption
                batch["text_group"][row, slot] = group_hash(" ".join(text.lower().split()))
                texts.append(text)
                slots.append((row, slot))
        index = tuple(np.array(slots).T)
        batch["text"][index], batch["text_mask"][index] = self.tokenizer.encode(texts, self.text_length)

    def _example(self, position: int) -> tuple[Example, int, int]:
        """The example at a global position, its sample, and 0, or 1 + the number of the reason for a replacement.

        A sample that cannot be used gives way to the next one of its source.
        """
        number, planned = self._order[position]
        part, offset = self.mixture.parts[number], self.mixture.offsets[number]
        first: Reason | None = None
        for attempt in range(MAX_BAD):
            index = (planned + attempt) % len(part.source)
            try:
                example = make_example(
                    read_patiently(part.source, index, time.sleep),
                    part,
                    self.config,
                    image_size=self.image_size,
                    seed=self.seed,
                    position=position,
                )
            except (BadSample, OSError) as error:
                last_error = error
                first = first or reason_of(error)
                if (unsaid := self._log.admit()) is not None:
                    _logger.warning(
                        "%ssample %d is replaced by the next one: %s: %s%s",
                        f"{part.name}: " if part.name else "",
                        offset + index,
                        reason_of(error),
                        error,
                        f" ({unsaid} more were not told)" if unsaid else "",
                    )
            else:
                return example, offset + index, 0 if first is None else 1 + REASONS.index(first)
        raise ConfigError(
            f"{MAX_BAD} samples in a row, from sample {offset + planned} on, cannot be used; the last one: {last_error}"
        )


def read_patiently(source: Source, index: int, sleep: Callable[[float], None]) -> Record:
    """``source[index]``, once more after 0.1, 1 and 10 s where the machine or network fails, which will pass.

    A replacement would make the batch depend on the weather.

    Raises:
        BadSample, OSError: as the source does.
    """
    for delay in _DELAYS_S:
        try:
            return source[index]
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            sleep(delay)
    return source[index]


def reason_of(error: BadSample | OSError) -> Reason:
    """Why a sample cannot be used."""
    return error.reason if isinstance(error, BadSample) else "unreadable"


class RateLimit:
    """Admits ``at_once`` events, then one every ``every_s`` seconds; thread-safe."""

    def __init__(self, at_once: int, every_s: float, clock: Callable[[], float]):
        self._left, self._every_s, self._clock = at_once, every_s, clock
        self._next, self._refused = 0.0, 0
        self._lock = threading.Lock()

    def admit(self) -> int | None:
        """How many events were refused since the last one admitted; None if this one is refused."""
        with self._lock:
            now = self._clock()
            if self._left > 0:
                self._left -= 1
            elif now < self._next:
                self._refused += 1
                return None
            self._next = now + self._every_s
            refused, self._refused = self._refused, 0
            return refused


def train_batches(
    mixture: Mixture,
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

    ``batch_size`` is global; process p of P gets the rows p B/P up to and without (p + 1) B/P. A sample that cannot be
    used is replaced by the next of its source, which ``sample_id`` and ``replaced`` tell. ``close()`` of the
    iterator ends its threads and workers early.

    Raises:
        ConfigError: ``batch_size`` is not a multiple of ``process_count``; on reading, ``MAX_BAD`` samples in a row
            cannot be used.
    """
    if batch_size % process_count:
        raise ConfigError(f"train.batch_size: {batch_size} is not a multiple of the {process_count} processes")
    local = batch_size // process_count
    reader = BatchReader(
        mixture=mixture,
        tokenizer=tokenizer,
        config=config,
        image_size=image_size,
        text_length=text_length,
        seed=seed,
        batch_size=batch_size,
        rows=range(process_index * local, (process_index + 1) * local),
    )
    # Rows are shared out among threads by the reader. A second batch begins while the last rows of one are made.
    ahead = grain.ReadOptions(
        num_threads=min(2, config.threads, config.prefetch_batches), prefetch_buffer_size=config.prefetch_batches
    )
    batches = grain.MapDataset.range(start_step, stop_step).map(reader).to_iter_dataset(ahead)
    if config.workers:
        if not flags.FLAGS.is_parsed():  # Grain reads its flags to start workers; outside of absl.app nobody parses.
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=config.prefetch_batches),
            worker_init_fn=_begin_worker,
        )
    return iter(batches)


def _begin_worker(index: int, count: int) -> None:
    """Signals to a whole group of processes are the main process's business: the batches of its last steps still come.

    A worker whose parent was killed would run for ever.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def eval_blocks(
    source: Source,
    image_size: int,
    batch_size: int,
    threads: int,
    limits: LimitsConfig = LimitsConfig(),
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[tuple[UInt8[np.ndarray, "b H W 3"], Bool[np.ndarray, " b"]]]:
    """Images of all records, whole and centred, in blocks on a fixed grid, each with whether it can be used.

    Block i holds the samples from i * ``batch_size`` on; process p of P decodes the rows p b up to and without
    (p + 1) b of every block, where b = ``batch_size`` / P. Images that cannot be used, and rows beyond the last sample,
    are zeros and False, so every process yields the same number of blocks. Decoding runs ahead by about one block in
    ``threads`` threads.

    Raises:
        ConfigError: ``batch_size`` is not a multiple of ``process_count``.
    """
    if batch_size % process_count:
        raise ConfigError(f"eval.batch_size: {batch_size} is not a multiple of the {process_count} processes")
    local = batch_size // process_count
    blocks = -(-len(source) // batch_size)
    log = RateLimit(_LOGGED_AT_ONCE, _LOG_EVERY_S, time.monotonic)

    def read(row: int) -> tuple[np.ndarray, np.bool_]:
        block, offset = divmod(row, local)
        index = block * batch_size + process_index * local + offset
        if index < len(source):
            try:
                image = read_patiently(source, index, time.sleep).image
                pixels = open_picture(image, limits).decode(1.0) if isinstance(image, bytes) else image
                return resize_for_eval(pixels, image_size), np.True_
            except (BadSample, OSError) as error:
                if log.admit() is not None:
                    _logger.warning("sample %d is left out: %s: %s", index, reason_of(error), error)
        return np.zeros((image_size, image_size, 3), np.uint8), np.False_

    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, local))
    return iter(grain.MapDataset.range(blocks * local).map(read).to_iter_dataset(ahead).batch(local))
