"""Text to fixed-length token arrays: CLIP's vocabulary, or a Hugging Face tokenizer.json (perhaps trained here)."""

import gzip
import html
import importlib.util
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import ftfy
import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import models, normalizers, pre_tokenizers, trainers

from llip_jax.config import ConfigError

CLIP_VOCABULARY_SIZE = 49_408
_CLIP_START, _CLIP_END = CLIP_VOCABULARY_SIZE - 2, CLIP_VOCABULARY_SIZE - 1
_CLIP_FILE = "bpe_simple_vocab_16e6.txt.gz"
# One word, contraction, digit or run of other characters; the marks themselves are cut out before this applies.
_CLIP_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"

# The names that start and end of text go by in tokenizer.json files.
_MARKS = (
    ("<start>", "<end>"),
    ("<|startoftext|>", "<|endoftext|>"),
    ("<start_of_text>", "<end_of_text>"),
    ("<bos>", "<eos>"),
    ("<s>", "</s>"),
    ("[CLS]", "[SEP]"),
)


class Tokenizer(Protocol):
    """Encodes texts; can be pickled, and used from several threads at once."""

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest token."""
        ...

    def encode(
        self, texts: Sequence[str], length: int
    ) -> tuple[Int[np.ndarray, "n length"], Int[np.ndarray, "n length"]]:
        """Tokens (start, text, end, then zeros) and mask (1 up to and with the end), both int32.

        Text that does not fit in ``length`` >= 2 is cut so that the end token stays last.
        """
        ...


class ClipTokenizer:
    """CLIP's byte-pair encoding, equal to open_clip's ``SimpleTokenizer`` on characters that Unicode 14 assigns.

    Raises:
        ConfigError: neither instant-clip-tokenizer nor the vocabulary file of open_clip_torch is installed.
    """

    def __init__(self) -> None:
        self._words = _clip_encoder()

    def __reduce__(self) -> tuple[type["ClipTokenizer"], tuple[()]]:
        return ClipTokenizer, ()

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest token."""
        return CLIP_VOCABULARY_SIZE

    def encode(
        self, texts: Sequence[str], length: int
    ) -> tuple[Int[np.ndarray, "n length"], Int[np.ndarray, "n length"]]:
        """See :class:`Tokenizer`."""
        return _pack([self._words(clean(text)) for text in texts], _CLIP_START, _CLIP_END, length)


class HuggingFaceTokenizer:
    """A tokenizer.json. Texts get its normalisation; its own templates, truncation and padding are not used.

    Args:
        definition: contents of the file.
        name: what error messages call it.

    Raises:
        ConfigError: not a tokenizer definition, or one without known start and end tokens.
    """

    def __init__(self, definition: str, name: str):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # The library raises plain Exception.
            raise ConfigError(f"{name}: not a Hugging Face tokenizer.json ({error})") from error
        self._name = name
        vocabulary = self._tokenizer.get_vocab()
        pairs = [(vocabulary[start], vocabulary[end]) for start, end in _MARKS if {start, end} <= vocabulary.keys()]
        if not pairs:
            known = " or ".join(f"{start} {end}" for start, end in _MARKS)
            raise ConfigError(f"{name}: no start and end tokens; expected {known}")
        self._start, self._end = pairs[0]
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # A caption that spells a mark out stays plain text.
        self.vocabulary_size = max(vocabulary.values()) + 1

    def __reduce__(self) -> tuple[type["HuggingFaceTokenizer"], tuple[str, str]]:
        return HuggingFaceTokenizer, (self._tokenizer.to_str(), self._name)

    def encode(
        self, texts: Sequence[str], length: int
    ) -> tuple[Int[np.ndarray, "n length"], Int[np.ndarray, "n length"]]:
        """See :class:`Tokenizer`."""
        # One by one: encode_batch would start a thread pool of its own in every loader process.
        tokens = [self._tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        return _pack(tokens, self._start, self._end, length)


def load_tokenizer(path: str | Path) -> HuggingFaceTokenizer:
    """Reads a tokenizer.json; :class:`ConfigError` where it is missing or unfit."""
    try:
        definition = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read tokenizer ({error})") from error
    return HuggingFaceTokenizer(definition, str(path))


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
    return load_tokenizer(path)


def clean(text: str) -> str:
    """CLIP's text cleaning: mojibake and HTML entities repaired, white space collapsed, lower case."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def _pack(
    tokens: Sequence[Sequence[int]], start: int, end: int, length: int
) -> tuple[Int[np.ndarray, "n length"], Int[np.ndarray, "n length"]]:
    packed = np.zeros((len(tokens), length), np.int32)
    mask = np.zeros_like(packed)
    for row, text_tokens in enumerate(tokens):
        marked = [start, *text_tokens[: length - 2], end]
        packed[row, : len(marked)] = marked
        mask[row, : len(marked)] = 1
    return packed, mask


def _clip_encoder() -> Callable[[str], Sequence[int]]:
    """The fastest installed encoder of cleaned text, without start and end tokens."""
    try:
        import instant_clip_tokenizer
    except ImportError:
        pass
    else:
        return instant_clip_tokenizer.Tokenizer().encode

    # Found without importing open_clip, which would import torch.
    package = importlib.util.find_spec("open_clip")
    files = [Path(folder) / _CLIP_FILE for folder in (package and package.submodule_search_locations) or ()]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ConfigError(
            "data.tokenizer.name: 'clip' needs CLIP's vocabulary; install instant-clip-tokenizer, or open_clip_torch "
            "where that has no wheel"
        )
    tokenizer = _clip_from_vocabulary(file)
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def _clip_from_vocabulary(file: Path) -> tokenizers.Tokenizer:
    """Builds CLIP's encoding from its list of merges."""
    # All single bytes come first, alone and as the end of a word, then the merges: 512 of the tokens are bytes, two
    # are the marks. Further merges in the file were never part of CLIP.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    lines = gzip.decompress(file.read_bytes()).decode().splitlines()[1 : CLIP_VOCABULARY_SIZE - 512 - 2 + 1]
    merges = [(left, right) for left, right in map(str.split, lines)]
    names = [*alphabet, *(byte + "</w>" for byte in alphabet), *(left + right for left, right in merges)]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab={name: token for token, name in enumerate(names)}, merges=merges, end_of_word_suffix="</w>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_CLIP_WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(mark, normalized=False) for mark in ("<start_of_text>", "<end_of_text>")]
    )
    return tokenizer
