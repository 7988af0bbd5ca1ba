"""Tokenizers against open_clip's, and what training and loading promise."""

import gzip
import hashlib
import html
import importlib.util
import io
import json
import os
import pickle
import random
import subprocess
import sys
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ftfy
import numpy as np
import pytest
import regex
import sentencepiece
import tokenizers as hf
import transformers

from llip_jax.config import ConfigError, TokenizerConfig
from llip_jax.data import tokenizers
from llip_jax.data.tokenizers import (
    ClipTokenizer,
    HuggingFaceTokenizer,
    check_tokenizer,
    load_tokenizer,
    train_tokenizer,
)

TEXTS = [
    f"A {size} {colour} {shape} on the {place}."
    for size in ("small", "large", "tiny")
    for colour in ("red", "blue", "green", "Yellow")
    for shape in ("circle", "square", "star")
    for place in ("left", "right", "ground")
]


@pytest.fixture(scope="module")
def open_clip_tokenizer():
    """open_clip's tokenizer module by itself: the package would import torchvision."""
    pytest.importorskip("torch")
    package = importlib.util.find_spec("open_clip")
    if package is None:
        pytest.skip("open_clip_torch is not installed")
    file = Path(package.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


@pytest.fixture(scope="module", params=["instant_clip_tokenizer", "open_clip"])
def clip_tokenizer(request):
    """ClipTokenizer with either source of the vocabulary."""
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "open_clip":
            patch.setitem(sys.modules, "instant_clip_tokenizer", None)
        yield ClipTokenizer()


WORDS = """
    don't it'S We’ll 'D ₂'LL cafés naïve İstanbul ŞELALE ΑΣ １２３ Ⅷ x2y 3.14 ² ǅ ﬁne œ a_b _ ' < <b> #tag @me !!! …
    'ſ 's <start_of_text> <end_of_text> <ſtart_of_text> <|endoftext|> photograph “ ” ‘ ʼ ｶﾞ 🇫🇷 שלום مرحبا 中文 한국어
    &amp; &amp;lt; &lt; &#60; &eacute; &EACUTE; &amp;eacute; schÃ¶n â€™ â€œ Ã Â
"""
MARKS = " \n\t\0\x0b\x0c\x1c\x85\xa0\u200b\u2028\u3000\ufeff\ufffd\ud800\u0301\u0327\u0345"
PIECES = [
    *WORDS.split(),
    *MARKS,
    "\r\n",
    "\x1b[31m",
    "\udc00\ud800",
    "\ud83d\ude00",
    "i\u0307",
    "👨\u200d👩",
    "Ã ",
    "Ã\n",
]


def is_young(character):
    """A letter or number for `regex`, which open_clip uses, that Python's Unicode tables do not have."""
    return unicodedata.category(character) == "Cn" and regex.match(r"[\p{L}\p{N}]", character) is not None


def random_texts(count, rng):
    """Hostile strings: all planes, mojibake, entities, marks, control characters."""

    def character(end=0x110000):
        while is_young(choice := chr(rng.randrange(end))):
            pass
        return choice

    latin = [*map(chr, range(0x20, 0x250)), *"’‘“”–—…€™†‡•‰‹›°"]
    mixed = [*"abc def " * 20, *latin]
    kinds = [
        lambda n: "".join(chr(rng.randrange(128)) for _ in range(n)),
        lambda n: "".join(character(0x3100) for _ in range(n)),
        lambda n: "".join(character() for _ in range(n)),
        lambda n: rng.choice(["", " "]).join(rng.choice(PIECES) for _ in range(n)),
        lambda n: "".join(rng.choice(latin) for _ in range(n)),
        lambda n: "".join(rng.choices(mixed, k=n)),
        lambda n: "".join(rng.choice("aA' s.tT1é&;#x\n\t’") for _ in range(n)),
        lambda n: "".join(character(0x800) for _ in range(n)).encode().decode(rng.choice(["latin-1", "cp437"])),
    ]
    texts = [rng.choice(kinds)(rng.randrange(40)) for _ in range(count)]
    # Repairs may put a young letter together from others.
    return [text for text in texts if not any(map(is_young, slow_clean(text)))]


def slow_clean(text):
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


@pytest.fixture(scope="module")
def rng():
    seed = random.SystemRandom().randrange(2**32)
    print(f"random texts of seed {seed}")
    return random.Random(seed)


@pytest.fixture(scope="module")
def hostile(rng):
    return [*random_texts(10_000, rng), *TEXTS, "", "  ", "\u200b"]


@pytest.fixture(scope="module")
def open_clip_tokens(hostile, open_clip_tokenizer):
    return open_clip_tokenizer(hostile, context_length=77).numpy()


def test_cleaning_takes_short_cuts_without_a_difference(hostile):
    texts = [*hostile, " Caf&amp;eacute;\n  SCHÃ–N ’ "]
    assert [text for text in texts if tokenizers.clean(text) != slow_clean(text)] == []
    assert tokenizers.clean(texts[-1]) == "café schön '"


def test_clip_equals_open_clip(clip_tokenizer, open_clip_tokenizer, hostile, open_clip_tokens):
    texts, expected = hostile, open_clip_tokens
    for length in (77, 8, 3):
        if length != 77:
            texts = texts[-2000:]
            expected = open_clip_tokenizer(texts, context_length=length).numpy()
        tokens, mask = clip_tokenizer.encode(texts, length)
        assert tokens.dtype == mask.dtype == np.int32
        wrong = [texts[row] for row in np.flatnonzero((tokens != expected).any(1))]
        assert not wrong, wrong[:5]
        np.testing.assert_array_equal(mask.argmin(1) % length, np.where(mask.all(1), 0, mask.sum(1)))
        np.testing.assert_array_equal(tokens[np.arange(len(texts)), mask.sum(1) - 1], np.full(len(texts), 49407))
        assert not tokens[mask == 0].any()


def test_clip_takes_young_letters_as_open_clip_does_or_for_punctuation(clip_tokenizer, open_clip_tokenizer, rng):
    letters = regex.findall(r"[\p{L}\p{N}]", "".join(map(chr, range(0x110000))))
    texts = [f"cat{young}dog" for young in rng.sample([c for c in letters if is_young(c)], 200)]
    tokens, mask = clip_tokenizer.encode(texts, 12)
    expected = open_clip_tokenizer(texts, 12).numpy()
    cat, dog = (clip_tokenizer.encode([word], 3)[0][0, 1] for word in ("cat", "dog"))
    is_apart = (tokens[:, 1] == cat) & (tokens[np.arange(len(texts)), mask.sum(1) - 2] == dog)
    assert (is_apart | (tokens == expected).all(1)).all()


def long_texts(rng):
    """Strings of 100 kB; the second value says whether open_clip can encode them in a moment."""
    size = 100_000
    return {
        "words": ("hello big world " * (size // 16), True),
        "unicode": ("".join(random_texts(7000, rng))[:size], True),
        "zeros": ("\0" * size + "cat", True),
        "spaces": (" \u3000" * (size // 2) + "cat", True),
        "entities": ("&amp;eacute; " * (size // 13), True),
        "marks": ("<start_of_text>" * (size // 15), True),
        "digits": ("7" * size, True),
        "one letter": ("a" * size, False),
        "letters": ("".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(size)), False),
        "ideographs": ("".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(size // 3)), False),
        "emoji": ("👨\u200d👩\u200d👧" * (size // 18), False),
        "punctuation": ("!?" * (size // 2), False),
    }


def test_clip_of_100_kilobytes(clip_tokenizer, open_clip_tokenizer, rng):
    for kind, (text, is_easy) in long_texts(rng).items():
        started = time.process_time()
        ours = clip_tokenizer.encode([text], 77)[0]
        assert time.process_time() - started < 1, kind
        if not is_easy:
            # open_clip's time is quadratic; what comes so much later has no effect on the first tokens.
            text = text[:2000]
        np.testing.assert_array_equal(ours, open_clip_tokenizer([text]).numpy(), err_msg=kind)


def test_clip_marks_spelt_out(clip_tokenizer, open_clip_tokenizer):
    texts = ["<start_of_text> a cat", "a cat <end_of_text> a dog"]
    np.testing.assert_array_equal(clip_tokenizer.encode(texts, 16)[0], open_clip_tokenizer(texts, 16).numpy())


def test_clip_empty_text(clip_tokenizer):
    tokens, mask = clip_tokenizer.encode(["", " \n "], 5)
    assert tokens.tolist() == [[49406, 49407, 0, 0, 0]] * 2
    assert mask.tolist() == [[1, 1, 0, 0, 0]] * 2


def test_clip_without_a_vocabulary(monkeypatch):
    monkeypatch.setitem(sys.modules, "instant_clip_tokenizer", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="'clip' needs CLIP's vocabulary; install instant-clip-tokenizer, or open_cl"):
        ClipTokenizer()


def test_clip_vocabulary_is_read_without_importing_open_clip():
    code = (
        "import sys; sys.modules['instant_clip_tokenizer'] = None\n"
        "from llip_jax.data.tokenizers import ClipTokenizer\n"
        "print(ClipTokenizer().encode(['a photo of a cat'], 8)[0].tolist())\n"
        "assert not {'open_clip', 'torch', 'jax', 'flax'} & set(sys.modules)"
    )
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip_torch is not installed")
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(output) == [[49406, 320, 1125, 539, 320, 2368, 49407, 0]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_tokenizer(TEXTS, 300, tmp_path_factory.mktemp("trained") / "tokenizer.json")


def test_trained_round_trip(trained, tmp_path):
    texts = ["a SMALL  red\tcircle on the left.", "Été 東京 🎈 <start>", " "]
    tokens, mask = trained.encode(texts, 64)
    raw = hf.Tokenizer.from_str(trained._tokenizer.to_str())
    raw.decoder = hf.decoders.ByteLevel()
    decoded = [
        raw.decode(row[1 : keep.sum() - 1].tolist(), skip_special_tokens=False).strip()
        for row, keep in zip(tokens, mask, strict=True)
    ]
    assert decoded == ["a small red circle on the left.", "été 東京 🎈 <start>", ""]
    assert tokens[:, 0].tolist() == [1, 1, 1]
    assert tokens[np.arange(3), mask.sum(1) - 1].tolist() == [2, 2, 2]
    assert tokens[2].tolist() == [1, 2] + [0] * 62
    assert not tokens[mask == 0].any() and (tokens[mask == 1] > 0).all()
    assert trained.vocabulary_size == 300


def test_trained_learns_words_and_truncates(trained):
    (full,), _ = trained.encode(["a small red circle on the left."], 64)
    assert np.count_nonzero(full) < 26
    (short,), (mask,) = trained.encode(["a small red circle on the left."], 5)
    assert short.tolist() == [*full[:4], 2] and mask.tolist() == [1] * 5


def test_training_is_deterministic_across_processes(tmp_path):
    code = (
        "import sys; from llip_jax.data.tokenizers import train_tokenizer\n"
        f"train_tokenizer({TEXTS!r}, 320, sys.argv[1])"
    )
    files = [tmp_path / "runs" / name / "tokenizer.json" for name in ("a", "b")]
    for file in files:
        subprocess.run([sys.executable, "-c", code, str(file)], check=True)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [entry.name for entry in files[0].parent.iterdir()] == ["tokenizer.json"]
    assert 300 < load_tokenizer(files[0]).vocabulary_size <= 320


@pytest.mark.parametrize("kind", ["clip", "trained", "sentencepiece"])
def test_pickle_and_threads(trained, sentencepiece_file, kind):
    if kind == "sentencepiece":
        tokenizer = load_tokenizer(sentencepiece_file)
    else:
        tokenizer = ClipTokenizer() if kind == "clip" else trained
    copy = pickle.loads(pickle.dumps(tokenizer))
    texts = [*TEXTS, "<end> of <start_of_text>"]
    expected = tokenizer.encode(texts, 12)
    assert copy.vocabulary_size == tokenizer.vocabulary_size
    assert copy.fingerprint == tokenizer.fingerprint
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: copy.encode(texts, 12), range(8)):
            np.testing.assert_array_equal(result, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_loader_processes_encode_after_a_fork(tmp_path):
    code = (
        "import os, sys; from llip_jax.data.tokenizers import load_tokenizer, train_tokenizer\n"
        f"texts = {TEXTS!r}\n"
        "train_tokenizer(texts, 300, sys.argv[1])\n"
        "tokenizer = load_tokenizer(sys.argv[1])\n"
        "expected = tokenizer.encode(texts, 20)[0].tolist()\n"
        "child = os.fork()\n"
        "if not child: os._exit(tokenizer.encode(texts, 20)[0].tolist() != expected)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "tokenizer.json")], check=True, timeout=60)


@pytest.mark.parametrize("marks", [("<s>", "</s>"), ("</s>",), ("<|endoftext|>",)])
def test_tokenizer_json_equals_transformers(tmp_path, marks, rng):
    """Truncation with the end token kept, with and without a start token."""
    library = hf.Tokenizer(hf.models.BPE())
    library.pre_tokenizer = hf.pre_tokenizers.ByteLevel()
    library.train_from_iterator(
        TEXTS,
        hf.trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<pad>", *marks],
            initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    library.post_processor = hf.processors.TemplateProcessing(
        single=" ".join([*marks[:-1], "$A", marks[-1]]),
        special_tokens=[(mark, library.token_to_id(mark)) for mark in marks],
    )
    library.save(str(tmp_path / "tokenizer.json"))
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token="<pad>")
    texts = [*TEXTS, *utf8(random_texts(1000, rng)), ""]
    texts = [text for text in texts if not any(mark in text for mark in marks)]
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    for length in (4, 16, 64):
        tokens, mask = tokenizer.encode(texts, length)
        expected = reference(texts, truncation=True, max_length=length, padding="max_length", return_tensors="np")
        np.testing.assert_array_equal(tokens, expected["input_ids"])
        np.testing.assert_array_equal(mask, expected["attention_mask"])


def utf8(texts):
    """Those without lone surrogates."""
    return [text for text in texts if not any(unicodedata.category(c) == "Cs" for c in text)]


def sentencepiece_model(rng, **settings):
    """A model trained on random words."""
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyzéи中", k=rng.randrange(1, 8))) for _ in range(300)]
    texts = [" ".join(rng.choices(words, k=10)) for _ in range(500)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=200, minloglevel=2, **settings
    )
    return model.getvalue(), texts


T5_MARKS = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory, rng):
    file = tmp_path_factory.mktemp("sentencepiece") / "spiece.model"
    file.write_bytes(sentencepiece_model(rng, **T5_MARKS)[0])
    return file


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("marks", [T5_MARKS, {"pad_id": 3, "bos_id": 1, "eos_id": 2, "unk_id": 0}])
def test_sentencepiece_equals_the_library(tmp_path, rng, marks, kind):
    model, texts = sentencepiece_model(rng, model_type=kind, **marks)
    (tmp_path / "c4.model").write_bytes(model)
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = load_tokenizer(tmp_path / "c4.model")
    texts = [*texts, *utf8(random_texts(500, rng)), "", "</s> <s>", "nul\0nul"]
    start = [1] if marks["bos_id"] == 1 else []
    for length in (2, 3, 8, 64):
        rows, masks = tokenizer.encode(texts, length)
        for text, row, mask in zip(texts, rows.tolist(), masks.tolist(), strict=True):
            tokens = [*start, *library.encode(text)[: length - 1 - len(start)], marks["eos_id"]]
            assert row == tokens + [0] * (length - len(tokens))
            assert mask == [1] * len(tokens) + [0] * (length - len(tokens))
    assert tokenizer.vocabulary_size == 200
    assert tokenizer.fingerprint == hashlib.sha256(model).hexdigest()


def test_sentencepiece_equals_transformers(tmp_path, rng):
    model, texts = sentencepiece_model(rng, **T5_MARKS)
    (tmp_path / "spiece.model").write_bytes(model)
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    # T5's is an implementation of its own, SigLIP's calls the library.
    pieces = [(library.id_to_piece(i), library.get_score(i)) for i in range(200)]
    t5 = transformers.T5Tokenizer(vocab=pieces, extra_ids=0)
    siglip = transformers.SiglipTokenizer(str(tmp_path / "spiece.model"), pad_token="<pad>")
    for length in (4, 64):
        tokens, mask = load_tokenizer(tmp_path / "spiece.model").encode(texts, length)
        for reference in (t5, siglip):
            expected = reference(texts, truncation=True, max_length=length, padding="max_length")
            np.testing.assert_array_equal(tokens, expected["input_ids"])
            np.testing.assert_array_equal(mask, np.array(expected["input_ids"]) != 0)


def test_unfit_sentencepiece_models_are_refused(tmp_path, rng, monkeypatch):
    for data in (b"", b"junk", b'{"model": 3}'):
        (tmp_path / "broken.model").write_bytes(data)
        with pytest.raises(ConfigError, match=r"broken.model: not a SentencePiece model \("):
            load_tokenizer(tmp_path / "broken.model")
    (tmp_path / "endless.model").write_bytes(sentencepiece_model(rng, eos_id=-1)[0])
    with pytest.raises(ConfigError, match=r"endless.model: no end token; expected"):
        load_tokenizer(tmp_path / "endless.model")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ConfigError, match=r"endless.model: .* needs sentencepiece; pip install 'llip_jax\[sent"):
        load_tokenizer(tmp_path / "endless.model")


def test_fingerprints_are_of_the_definition(trained, tmp_path):
    package = importlib.util.find_spec("open_clip")
    if package is None:
        pytest.skip("open_clip_torch is not installed")
    merges = Path(package.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    assert ClipTokenizer().fingerprint == hashlib.sha256(gzip.decompress(merges.read_bytes())).hexdigest()
    other = train_tokenizer(TEXTS[:20], 300, tmp_path / "tokenizer.json")
    assert other.fingerprint != trained.fingerprint
    assert other.fingerprint == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()


def test_check_tokenizer(trained):
    def config(size):
        return TokenizerConfig(name="trained", vocabulary_size=size)

    check_tokenizer(trained, config(300), 3)
    other = hf.Tokenizer(hf.models.WordLevel(vocab={"<s>": 0, "</s>": 400}))
    with pytest.raises(
        ConfigError, match=r"vocabulary_size: 300 is too small for the tokenizer 'trained', which has 401 tok"
    ):
        check_tokenizer(HuggingFaceTokenizer(other.to_str().encode(), "t"), config(300), 77)
    with pytest.raises(ConfigError, match=r"model.text.length: 2 is too small .* 'trained'; expected at least 3,"):
        check_tokenizer(trained, config(400), 2)


def test_saved_padding_and_truncation_are_not_used(trained, tmp_path):
    other = hf.Tokenizer.from_str(trained._tokenizer.to_str())
    other.enable_truncation(3)
    other.enable_padding(length=20)
    other.save(str(tmp_path / "tokenizer.json"))
    np.testing.assert_array_equal(
        load_tokenizer(tmp_path / "tokenizer.json").encode(TEXTS, 15), trained.encode(TEXTS, 15)
    )


def test_load_refuses_what_is_unfit(tmp_path):
    with pytest.raises(ConfigError, match=r"missing.json: cannot read tokenizer \(.*No such file"):
        load_tokenizer(tmp_path / "missing.json")
    (tmp_path / "broken.json").write_text('{"model": 3}')
    with pytest.raises(ConfigError, match=r"broken.json: not a Hugging Face tokenizer.json \("):
        load_tokenizer(tmp_path / "broken.json")
    bare = hf.Tokenizer(hf.models.BPE(vocab={"a": 0, "<start>": 1}, merges=[]))
    bare.save(str(tmp_path / "bare.json"))
    with pytest.raises(
        ConfigError, match=r"bare.json: no start and end tokens; expected <start> <end> or .*startoftext"
    ):
        load_tokenizer(tmp_path / "bare.json")


def test_gaps_in_the_vocabulary(tmp_path):
    sparse = hf.Tokenizer(hf.models.WordLevel(vocab={"[CLS]": 4, "[SEP]": 9, "cat": 70, "[UNK]": 2}, unk_token="[UNK]"))
    sparse.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    sparse.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.vocabulary_size == 71
    assert tokenizer.encode(["cat dog"], 6)[0].tolist() == [[4, 70, 2, 9, 0, 0]]
