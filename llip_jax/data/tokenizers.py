"""Text to fixed-length token arrays: CLIP's vocabulary, a Hugging Face tokenizer.json, a SentencePiece .model."""

import hashlib
import itertools
import os
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import models, normalizers, pre_tokenizers, trainers

from llip_jax.config import ConfigError
from llip_jax.data import clip_bpe
from llip_jax.data.clip_bpe import VOCABULARY_SIZE as CLIP_VOCABULARY_SIZE
from llip_jax.data.clip_bpe import clean

__all__ = [
    "CLIP_VOCABULARY_SIZE",
    "ClipTokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "check_tokenizer",
    "clean",
    "load_tokenizer",
    "train_tokenizer",
]

# The names that start and end of text go by in tokenizer.json files.
_MARKS = (
    ("<start>", "<end>"),
    ("<|startoftext|>", "<|endoftext|>"),
    ("<start_of_text>", "<end_of_text>"),
    ("<bos>", "<eos>"),
    ("<s>", "</s>"),
    ("[CLS]", "[SEP]"),
)

Tokens = Int[np.ndarray, "n length"]


class Tokenizer(Protocol):
    """Encodes texts; can be pickled, and used from several threads at once."""

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest token."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the definition: a run goes on only with the tokenizer that it began with."""
        ...

    def encode(self, texts: Sequence[str], length: int) -> tuple[Tokens, Tokens]:
        """Tokens (start if the vocabulary has one, text, end, then zeros) and mask (1 up to and with the end), int32.

        Text that does not fit in ``length`` >= 2 is cut so that the end token stays last.
        """
        ...


class ClipTokenizer:
    """CLIP's byte-pair encoding with its cleaning; see :class:`llip_jax.data.clip_bpe.ClipEncoder`.

    Raises:
        ConfigError: neither instant-clip-tokenizer nor the vocabulary file of open_clip_torch is installed.
    """

    vocabulary_size = CLIP_VOCABULARY_SIZE
    fingerprint = clip_bpe.FINGERPRINT

    def __init__(self) -> None:
        self._encoder = clip_bpe.ClipEncoder()

    def __reduce__(self) -> tuple[type["ClipTokenizer"], tuple[()]]:
        return ClipTokenizer, ()

    def encode(self, texts: Sequence[str], length: int) -> tuple[Tokens, Tokens]:
        """See :class:`Tokenizer`."""
        tokens = [self._encoder(text, length - 2) for text in texts]
        return _pack(tokens, [clip_bpe.START], clip_bpe.END, length)


class HuggingFaceTokenizer:
    """A tokenizer.json. Texts get its normalisation; its own templates, truncation and padding are not used.

    Start and end tokens are found by their usual names; with an end token alone (T5, GPT-2), texts have no start token.

    Args:
        definition: contents of the file.
        name: what error messages call it.

    Raises:
        ConfigError: not a tokenizer definition, or one without a known end token.
    """

    def __init__(self, definition: str, name: str):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # The library raises plain Exception.
            raise ConfigError(f"{name}: not a Hugging Face tokenizer.json ({error})") from error
        self._definition, self._name = definition, name
        vocabulary = self._tokenizer.get_vocab()
        ends = [(end,) for _, end in _MARKS]
        marks = next((marks for marks in (*_MARKS, *ends) if vocabulary.keys() >= set(marks)), None)
        if marks is None:
            known = " or ".join(f"{start} {end}" for start, end in _MARKS)
            raise ConfigError(f"{name}: no start and end tokens; expected {known}, or one of these end tokens alone")
        *self._start, self._end = (vocabulary[mark] for mark in marks)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # A caption that spells a mark out stays plain text.
        self.vocabulary_size = max(vocabulary.values()) + 1
        self.fingerprint = hashlib.sha256(definition.encode()).hexdigest()

    def __reduce__(self) -> tuple[type["HuggingFaceTokenizer"], tuple[str, str]]:
        return HuggingFaceTokenizer, (self._definition, self._name)

    def encode(self, texts: Sequence[str], length: int) -> tuple[Tokens, Tokens]:
        """See :class:`Tokenizer`."""
        # One by one: encode_batch would start a thread pool of its own in every loader process.
        tokens = [self._tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        return _pack(tokens, self._start, self._end, length)


class SentencePieceTokenizer:
    """A SentencePiece .model. Texts get its own normalisation only (not CLIP's cleaning, no lower-casing).

    Texts begin with the model's bos token if it defines one (T5 and SigLIP define none) and end with its eos token.

    Args:
        definition: contents of the file, a serialized protocol buffer.
        name: what error messages call it.

    Raises:
        ConfigError: `sentencepiece` is not installed, not such a model, or one without an eos token.
    """

    def __init__(self, definition: bytes, name: str):
        try:
            import sentencepiece
        except ImportError as error:
            raise ConfigError(
                f"{name}: reading a SentencePiece model needs sentencepiece; pip install 'llip_jax[sentencepiece]'"
            ) from error
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(definition)
        except RuntimeError as error:
            raise ConfigError(f"{name}: not a SentencePiece model ({error})") from error
        self._definition, self._name = definition, name
        start, self._end = self._processor.bos_id(), self._processor.eos_id()
        if self._end < 0:
            raise ConfigError(f"{name}: no end token; expected a SentencePiece model with an eos piece")
        self._start = [start] if start >= 0 else []
        self.vocabulary_size: int = self._processor.vocab_size()
        self.fingerprint = hashlib.sha256(definition).hexdigest()

    def __reduce__(self) -> tuple[type["SentencePieceTokenizer"], tuple[bytes, str]]:
        return SentencePieceTokenizer, (self._definition, self._name)

    def encode(self, texts: Sequence[str], length: int) -> tuple[Tokens, Tokens]:
        """See :class:`Tokenizer`."""
        # Otherwise the library starts a thread for every core.
        tokens = self._processor.encode(list(texts), out_type=int, num_threads=1)
        return _pack(tokens, self._start, self._end, length)


def load_tokenizer(path: str | Path) -> HuggingFaceTokenizer | SentencePieceTokenizer:
    """Reads a SentencePiece model (``.model``) or else a tokenizer.json.

    Raises:
        ConfigError: the file is missing or unfit.
    """
    try:
        definition = Path(path).read_bytes()
        if Path(path).suffix == ".model":
            return SentencePieceTokenizer(definition, str(path))
        return HuggingFaceTokenizer(definition.decode(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read tokenizer ({error})") from error


def check_tokenizer(tokenizer: Tokenizer, vocabulary_size: int, length: int, name: str) -> None:
    """Raises :class:`ConfigError` where a model cannot hold the tokens.

    Args:
        tokenizer: what encodes its texts.
        vocabulary_size: rows of the token table (``data.tokenizer.vocabulary_size``).
        length: tokens of a text (``model.text.length``).
        name: the tokenizer's name in the configuration.
    """
    if tokenizer.vocabulary_size > vocabulary_size:
        raise ConfigError(
            f"data.tokenizer.vocabulary_size: {vocabulary_size} is too small for the tokenizer "
            f"{name!r}, which has {tokenizer.vocabulary_size} tokens"
        )
    if length < 3:
        raise ConfigError(
            f"model.text.length: {length} is too small for the tokenizer {name!r}; "
            "expected at least 3, for start, one token and end"
        )


def train_tokenizer(texts: Iterable[str], vocabulary_size: int, path: str | Path) -> HuggingFaceTokenizer:
    """Learns a lower-casing byte-level BPE of at most ``vocabulary_size`` tokens and writes it to ``path``.

    The same texts in the same order always give the same file. It is put in place in one piece, so that processes
    training it at the same time never see half of it. Tokens 0, 1 and 2 are <pad>, <start> and <end>.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Lowercase(),
            normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=["<pad>", "<start>", "<end>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    os.replace(temporary, path)
    return HuggingFaceTokenizer(path.read_text(encoding="utf-8"), str(path))


def _pack(tokens: Sequence[Sequence[int]], start: list[int], end: int, length: int) -> tuple[Tokens, Tokens]:
    """Puts texts between start and end tokens and into rows."""
    rows = [[*start, *text[: length - len(start) - 1], end] for text in tokens]
    sizes = np.fromiter(map(len, rows), np.int32, len(rows))
    filled = np.arange(length) < sizes[:, None]
    packed = np.zeros(filled.shape, np.int32)
    packed[filled] = np.fromiter(itertools.chain.from_iterable(rows), np.int32, sizes.sum())
    return packed, filled.astype(np.int32)
