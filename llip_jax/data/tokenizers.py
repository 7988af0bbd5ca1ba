"""Text to fixed-length token arrays: CLIP's vocabulary, a Hugging Face tokenizer.json, a SentencePiece .model."""

import hashlib
import itertools
import os
import string
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import models, normalizers, pre_tokenizers, trainers

from llip_jax.config import ConfigError, TokenizerConfig
from llip_jax.data import clip_bpe
from llip_jax.data.clip_bpe import VOCABULARY_SIZE as CLIP_VOCABULARY_SIZE
from llip_jax.data.clip_bpe import clean

__all__ = [
    "CLIP_VOCABULARY_SIZE",
    "ClipTokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "canonicalize",
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

_WITHOUT_PUNCTUATION = str.maketrans("▁", " ", string.punctuation)

Tokens = Int[np.ndarray, "n length"]


def canonicalize(text: str) -> str:
    """SigLIP's cleaning, as transformers does it: lower case, no ASCII punctuation, white space and ▁ collapsed.

    open_clip also repairs mojibake and HTML entities before, and makes spaces of underscores.
    """
    return " ".join(text.lower().translate(_WITHOUT_PUNCTUATION).split())


_CLEANERS: dict[str, Callable[[str], str]] = {
    "none": str,
    # Letter by letter, as transformers does for SigLIP 2 (`str.lower` knows of the final sigma). big_vision, which
    # trained SigLIP and SigLIP 2 on lower case with punctuation, leaves capitals that are not ASCII.
    "lower": normalizers.Lowercase().normalize_str,
    "canonicalize": canonicalize,
}


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

    @property
    def file(self) -> tuple[str, bytes] | None:
        """Name and contents of the file that :func:`load_tokenizer` reads it from; None for 'clip'."""
        ...

    def encode(self, texts: Sequence[str], length: int) -> tuple[Tokens, Tokens]:
        """Tokens (start if there is one, text, end, then padding) and mask (1 up to and with the end), int32.

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
    file = None

    def __init__(self) -> None:
        self._encoder = clip_bpe.ClipEncoder()

    def __reduce__(self) -> tuple[type["ClipTokenizer"], tuple[()]]:
        return ClipTokenizer, ()

    def encode(self, texts: Sequence[str], length: int) -> tuple[Tokens, Tokens]:
        """See :class:`Tokenizer`."""
        tokens = [self._encoder(text, length - 2) for text in texts]
        return _pack(tokens, [clip_bpe.START], clip_bpe.END, 0, length)


class _FileTokenizer(ABC):
    """What the tokenizers read from files have in common.

    Args:
        definition: contents of the file.
        name: what error messages call it.
        clean: what is done to texts first, as ``data.tokenizer.clean``.
        pad: the token behind the end of a text.
    """

    _file_name: ClassVar[str]
    _start: list[int]
    _end: int
    vocabulary_size: int

    def __init__(self, definition: bytes, name: str, clean: str = "none", pad: int = 0):
        self._arguments = (definition, name, clean, pad)
        self._clean, self._pad = _CLEANERS[clean], pad
        settings = b"" if (clean, pad) == ("none", 0) else f"\0{clean} {pad}".encode()
        self.fingerprint = hashlib.sha256(definition + settings).hexdigest()
        self.file = (self._file_name, definition)

    def __reduce__(self) -> tuple[type["_FileTokenizer"], tuple[bytes, str, str, int]]:
        return type(self), self._arguments

    def encode(self, texts: Sequence[str], length: int) -> tuple[Tokens, Tokens]:
        """See :class:`Tokenizer`."""
        tokens = self._tokenize([self._clean(text) for text in texts])
        return _pack(tokens, self._start, self._end, self._pad, length)

    @abstractmethod
    def _tokenize(self, texts: list[str]) -> Sequence[Sequence[int]]:
        """Tokens without start and end."""


class HuggingFaceTokenizer(_FileTokenizer):
    """A tokenizer.json. Texts get its normalisation; its own truncation and padding are not used.

    Start and end tokens are found by their usual names; with an end token alone (T5, GPT-2), or where the file's own
    template has no start token (SigLIP 2), texts have none.

    Equal to transformers' but for two things: a mark that a text spells out (``<eos>``) stays plain text here, and
    added tokens (Gemma's ``<table>``) are looked for in the cleaned text, as big_vision does.

    Raises:
        ConfigError: not a tokenizer definition, or one without a known end token.
    """

    _file_name = "tokenizer.json"

    def __init__(self, definition: bytes, name: str, clean: str = "none", pad: int = 0):
        super().__init__(definition, name, clean, pad)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(definition)
        except Exception as error:  # The library raises plain Exception.
            raise ConfigError(f"{name}: not a Hugging Face tokenizer.json ({error})") from error
        vocabulary = self._tokenizer.get_vocab()
        ends = [(end,) for _, end in _MARKS]
        marks = next((marks for marks in (*_MARKS, *ends) if vocabulary.keys() >= set(marks)), None)
        if marks is None:
            known = " or ".join(f"{start} {end}" for start, end in _MARKS)
            raise ConfigError(f"{name}: no start and end tokens; expected {known}, or one of these end tokens alone")
        *start, self._end = (vocabulary[mark] for mark in marks)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        template = self._tokenizer.encode("").ids
        self._start = [token for token in start if not template or token in template]
        self._tokenizer.encode_special_tokens = True  # A caption that spells a mark out stays plain text.
        self.vocabulary_size = max(vocabulary.values()) + 1

    def _tokenize(self, texts: list[str]) -> Sequence[Sequence[int]]:
        # One by one: encode_batch would start a thread pool of its own in every loader process.
        return [self._tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


class SentencePieceTokenizer(_FileTokenizer):
    """A SentencePiece .model. Texts get its own normalisation.

    Texts begin with the model's bos token if it defines one (T5 and SigLIP define none; Gemma's does, which SigLIP 2
    leaves out: read its tokenizer.json) and end with its eos token. With ``clean="canonicalize", pad=1`` and a model
    of SentencePiece's default normalisation, equal to transformers' SiglipTokenizer, except that a mark which a text
    spells out (``</s>``) stays plain text.

    Raises:
        ConfigError: `sentencepiece` is not installed, not such a model, or one without an eos token.
    """

    _file_name = "tokenizer.model"

    def __init__(self, definition: bytes, name: str, clean: str = "none", pad: int = 0):
        super().__init__(definition, name, clean, pad)
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
        start, self._end = self._processor.bos_id(), self._processor.eos_id()
        if self._end < 0:
            raise ConfigError(f"{name}: no end token; expected a SentencePiece model with an eos piece")
        self._start = [start] if start >= 0 else []
        self.vocabulary_size = self._processor.vocab_size()

    def _tokenize(self, texts: list[str]) -> Sequence[Sequence[int]]:
        # Otherwise the library starts a thread for every core.
        return self._processor.encode(texts, out_type=int, num_threads=1)


def load_tokenizer(
    path: str | Path, clean: str = "none", pad: int = 0
) -> HuggingFaceTokenizer | SentencePieceTokenizer:
    """Reads a SentencePiece model (``.model``) or else a tokenizer.json.

    Args:
        path: of the file.
        clean: what is done to texts first, as ``data.tokenizer.clean``.
        pad: the token behind the end of a text.

    Raises:
        ConfigError: the file is missing or unfit.
    """
    kind = SentencePieceTokenizer if Path(path).suffix == ".model" else HuggingFaceTokenizer
    try:
        definition = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read tokenizer ({error})") from error
    return kind(definition, str(path), clean, pad)


def check_tokenizer(tokenizer: Tokenizer, config: TokenizerConfig, length: int) -> None:
    """Raises :class:`ConfigError` where a model cannot hold the tokens.

    Args:
        tokenizer: what encodes its texts.
        config: the tokenizer's name and padding, and rows of the token table.
        length: tokens of a text (``model.text.length``).
    """
    if tokenizer.vocabulary_size > config.vocabulary_size:
        raise ConfigError(
            f"data.tokenizer.vocabulary_size: {config.vocabulary_size} is too small for the tokenizer "
            f"{config.name!r}, which has {tokenizer.vocabulary_size} tokens"
        )
    if config.pad >= config.vocabulary_size:
        raise ConfigError(
            f"data.tokenizer.pad: {config.pad} is no token; expected one below data.tokenizer.vocabulary_size, "
            f"{config.vocabulary_size}"
        )
    if length < 3:
        raise ConfigError(
            f"model.text.length: {length} is too small for the tokenizer {config.name!r}; "
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
    return HuggingFaceTokenizer(path.read_bytes(), str(path))


def _pack(tokens: Sequence[Sequence[int]], start: list[int], end: int, pad: int, length: int) -> tuple[Tokens, Tokens]:
    """Puts texts between start and end tokens and into rows."""
    rows = [[*start, *text[: length - len(start) - 1], end] for text in tokens]
    sizes = np.fromiter(map(len, rows), np.int32, len(rows))
    filled = np.arange(length) < sizes[:, None]
    packed = np.full(filled.shape, pad, np.int32)
    packed[filled] = np.fromiter(itertools.chain.from_iterable(rows), np.int32, sizes.sum())
    return packed, filled.astype(np.int32)
