"""CLIP's text cleaning and byte-pair encoding, as open_clip does them."""

import functools
import gzip
import html
import importlib.util
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import ftfy
import tokenizers
from ftfy.badness import is_bad
from ftfy.chardata import CONTROL_CHARS, LIGATURES, WIDTH_MAP
from ftfy.fixes import uncurl_quotes
from tokenizers import models, pre_tokenizers

from llip_jax.config import ConfigError

VOCABULARY_SIZE = 49_408
START, END = VOCABULARY_SIZE - 2, VOCABULARY_SIZE - 1
FINGERPRINT = "67603cfda2e032ad77b5f8808af37789d590db664b26df8705d2bf8b3c553fc8"
"""SHA-256 of the text of CLIP's list of merges."""

_FILE = "bpe_simple_vocab_16e6.txt.gz"
_LONGEST_TOKEN = 32
"""Bytes of the longest entry of the vocabulary."""
_CACHED_RUNS = 2**14

# One word, contraction, digit or run of other characters.
_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
# What open_clip's pattern takes for one word and the back-ends do not, or not everywhere: the marks, and the long s
# (which it takes for an s). As any word, these only begin where a run of punctuation does not go on.
_EXACT = {
    "<start_of_text>": (START,),
    "<end_of_text>": (END,),
    "<ſtart_of_text>": (27, 129, 123, 16707, 62, 684, 62, 18169, 285),
    "'ſ": (6, 129, 379),
}
_EXACT_WORD = re.compile("|".join(_EXACT))
_EXACT_WORDS = re.compile(rf"(?<![^\s\w]|_)((?:{_EXACT_WORD.pattern})+)")

# ASCII that ftfy or html.unescape might change. Line breaks end as white space either way.
_CHANGED_ASCII = re.compile(r"[^\t\n\f\r -~]|&(?! )")
# Characters that a step of ftfy changes by themselves, or that divide the text for it (line breaks).
_CHANGED = re.compile(
    "&(?! )|[\n\r\x80-\x9f\u2028\u2029\ud800-\udfff"
    + re.escape("".join(map(chr, [*CONTROL_CHARS, *LIGATURES, *WIDTH_MAP])))
    + "]"
)


class ClipEncoder:
    """Tokens of one text, equal to open_clip's ``SimpleTokenizer`` on letters and numbers that Unicode 15 assigns.

    Younger ones may count as punctuation; open_clip's own answer for them depends on its release of `regex`.
    Both libraries take time that grows with the square of thousands of nested escapes (``&amp;amp;...``) or of
    combining marks in a row; with everything else it is linear.

    Raises:
        ConfigError: neither instant-clip-tokenizer nor the vocabulary file of open_clip_torch is installed.
    """

    def __init__(self) -> None:
        self._words = _word_encoder()
        # White space divides words, so the words of captions, which repeat, are looked up.
        self._cached = functools.lru_cache(_CACHED_RUNS)(self._run)

    def __call__(self, text: str, most: int) -> list[int]:
        """The first ``most`` tokens of ``text`` and perhaps some more, without start and end tokens."""
        tokens: list[int] = []
        for run in _repaired(text).lower().split():
            # Bounded, as merging takes quadratic time. What lies so far behind the cut has no effect before it.
            tokens += self._cached(run) if len(run) <= 32 else self._run(run[: 2 * _LONGEST_TOKEN * most])
            if len(tokens) >= most:
                break
        return tokens

    def _run(self, run: str) -> Sequence[int]:
        """Tokens of cleaned text without white space."""
        # open_clip's pattern matches this combining mark nowhere: as white space, it divides and leaves no token.
        run = run.replace("\u0345", " ")
        tokens: list[int] = []
        for position, part in enumerate(_EXACT_WORDS.split(run)):
            if position % 2:
                for word in _EXACT_WORD.findall(part):
                    tokens += _EXACT[word]
            else:
                tokens += self._words(part)
        return tuple(tokens)


def clean(text: str) -> str:
    """CLIP's text cleaning: mojibake and HTML entities repaired, white space collapsed, lower case."""
    return " ".join(_repaired(text).lower().split())


def _repaired(text: str) -> str:
    """``html.unescape(html.unescape(ftfy.fix_text(text)))``, which is slow, up to the kind of white space."""
    if text.isascii():
        if not _CHANGED_ASCII.search(text):
            return text
    elif not is_bad(text):
        # Quotes are the one repair that many captions need. Nothing else changes text that is not mojibake, is
        # normalised and has none of the characters above; ftfy goes round once more where quotes were changed.
        straight = uncurl_quotes(text)
        settled = straight == text or not is_bad(straight)
        if settled and not _CHANGED.search(straight) and unicodedata.is_normalized("NFC", straight):
            return straight
    return html.unescape(html.unescape(ftfy.fix_text(text)))


def _word_encoder() -> Callable[[str], Sequence[int]]:
    """The fastest installed encoder of cleaned text."""
    try:
        import instant_clip_tokenizer
    except ImportError:
        pass
    else:
        return instant_clip_tokenizer.Tokenizer().encode

    # Found without importing open_clip, which would import torch.
    package = importlib.util.find_spec("open_clip")
    files = [Path(folder) / _FILE for folder in (package and package.submodule_search_locations) or ()]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ConfigError(
            "data.tokenizer.name: 'clip' needs CLIP's vocabulary; install instant-clip-tokenizer, or open_clip_torch "
            "where that has no wheel"
        )
    tokenizer = _from_merges(gzip.decompress(file.read_bytes()).decode())
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def _from_merges(merges_file: str) -> tokenizers.Tokenizer:
    """CLIP's byte-pair encoding in the form of a Hugging Face tokenizer."""
    # All single bytes come first, alone and as the end of a word, then the merges: 512 of the tokens are bytes, two
    # are the marks. Further merges in the file were never part of CLIP.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    lines = merges_file.splitlines()[1 : VOCABULARY_SIZE - 512 - 2 + 1]
    merges = [(left, right) for left, right in map(str.split, lines)]
    names = [*alphabet, *(byte + "</w>" for byte in alphabet), *(left + right for left, right in merges)]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab={name: token for token, name in enumerate(names)}, merges=merges, end_of_word_suffix="</w>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer
