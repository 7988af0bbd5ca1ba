"""Token arrays of SigLIP, SigLIP 2 and CLIP against transformers, open_clip and big_vision's recipe.

Vocabularies are trained here, laid out as theirs: c4_en (SigLIP) and Gemma (SigLIP 2). CLIP's comes with open_clip.
"""

import hashlib
import importlib.util
import io
import itertools
import pickle
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import transformers
from test_tokenizers import TEXTS, random_texts, utf8
from transformers.tokenization_utils_sentencepiece import SentencePieceExtractor

from llip_jax.config import ConfigError, TokenizerConfig
from llip_jax.data import tokenizers
from llip_jax.data.pipeline import build_tokenizer
from llip_jax.data.tokenizers import ClipTokenizer, canonicalize, load_tokenizer, train_tokenizer

C4_EN = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
GEMMA = {
    **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "eos_piece": "<eos>", "bos_piece": "<bos>"},
    **{"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"},
    **{"add_dummy_prefix": False, "remove_extra_whitespaces": False},
}
MARKS = ["</s>", "a </s> b", "x</s>", "<unk>", "<pad> x", "<eos>", "a<bos><EOS>b", "<|endoftext|> a", "<|startoftext|>"]
ODDITIES = [
    *["", " ", "▁", "▁▁a ▁B▁", " ▁ ", "  a  Dog ", "a\n\nb\t", "A, B. C!", "...", "a_b", "don't", "\u200b", "\u3000a"],
    *[
        "🎈 emoji 👨\u200d👩",
        "İ ΑΣ ΟΔΟΣ",
        "ﬁne ①",
        "a．b",
        "…",
        "\0a",
        "Zürich ÉTÉ",
        "中文。",
        "cat " * 5000,
        "!?" * 5000,
    ],
]


@pytest.fixture(scope="module")
def rng():
    seed = random.SystemRandom().randrange(2**32)
    print(f"random texts of seed {seed}")
    return random.Random(seed)


@pytest.fixture(scope="module")
def captions(rng):
    """Ordinary ones, hostile ones, and those with something to trip over; none spells a mark out."""
    texts = [*TEXTS, *utf8(random_texts(3000, rng)), *ODDITIES]
    return [text for text in texts if not any(mark in text.lower() for mark in ("</s>", "oftext|>"))]


@pytest.fixture(scope="module")
def open_clip():
    """open_clip's tokenizer module by itself: the package would import torchvision."""
    pytest.importorskip("torch")
    package = importlib.util.find_spec("open_clip")
    if package is None:
        pytest.skip("open_clip_torch is not installed")
    file = Path(package.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train_sentencepiece(file, rng, **settings):
    """Writes a model of random words in both cases, with punctuation."""
    letters = "abcdefghijklmnopqrstuvwxyzéи中" + "AEÉИ" + "',.!-_"
    words = ["".join(rng.choices(letters, k=rng.randrange(1, 8))) for _ in range(300)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(rng.choices(words, k=10)) for _ in range(500)),
        model_writer=model,
        vocab_size=500 if "byte_fallback" in settings else 220,
        minloglevel=2,
        **settings,
    )
    file.write_bytes(model.getvalue())
    return file


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def siglip_file(request, rng, tmp_path_factory):
    file = tmp_path_factory.mktemp("siglip") / "spiece.model"
    return train_sentencepiece(file, rng, model_type=request.param, **C4_EN)


@pytest.fixture(scope="module")
def siglip2_folder(rng, tmp_path_factory):
    """As in the SigLIP 2 repositories: Gemma's tokenizer.json, whose template adds the end token alone."""
    folder = tmp_path_factory.mktemp("siglip2")
    vocabulary, _, merges = SentencePieceExtractor(
        str(train_sentencepiece(folder / "gemma.model", rng, **GEMMA))
    ).extract()
    settings = {"add_bos_token": False, "add_eos_token": True, "padding_side": "right"}
    transformers.GemmaTokenizer(vocab=vocabulary, merges=merges, **settings).save_pretrained(folder)
    return folder


def padded(tokenizer, texts, length, **settings):
    ids = tokenizer(texts, padding="max_length", truncation=True, max_length=length, **settings)["input_ids"]
    return np.array(ids)


def assert_tokens(tokenizer, texts, expected):
    """The tokens are the expected ones, and the mask says where each text ends."""
    tokens, mask = tokenizer.encode(texts, expected.shape[1])
    wrong = [texts[row] for row in np.flatnonzero((tokens != expected).any(1))]
    assert not wrong, (len(wrong), [text[:80] for text in wrong[:5]])
    (empty,), (kept,) = tokenizer.encode([""], 3)
    ends = np.full(len(texts), empty[kept.sum() - 1])
    np.testing.assert_array_equal(tokens[np.arange(len(texts)), mask.sum(1) - 1], ends)
    assert (tokens[mask == 0] == empty[-1]).all() and (np.diff(mask) <= 0).all()


@pytest.mark.parametrize("length", [4, 16, 64])
def test_siglip_equals_transformers(siglip_file, captions, length):
    reference = transformers.SiglipTokenizer(str(siglip_file))
    tokenizer = load_tokenizer(siglip_file, "canonicalize", pad=1)
    # transformers puts "<unk>" before a text and cuts it off again, which shows in about one of 70,000 hostile texts.
    library = reference.sp_model
    by_itself = {text: [*library.encode(reference.canonicalize_text(text)), 1] for text in captions}
    plain = [
        text for text, ids in zip(captions, reference(captions)["input_ids"], strict=True) if ids == by_itself[text]
    ]
    assert len(plain) >= len(captions) - 2
    assert_tokens(tokenizer, plain, padded(reference, plain, length))
    rest = [text for text in captions if text not in set(plain) and len(by_itself[text]) <= 64]
    if rest:
        expected = np.array([by_itself[text] + [1] * (64 - len(by_itself[text])) for text in rest])
        assert_tokens(tokenizer, rest, expected)
    # A mark that a caption spells out is text; transformers does so if told to.
    assert_tokens(tokenizer, MARKS, padded(reference, MARKS, length, split_special_tokens=True))


def test_siglip_equals_open_clip_but_for_its_repairs_and_underscores(siglip_file, captions, open_clip, tmp_path):
    library = sentencepiece.SentencePieceProcessor(model_file=str(siglip_file))
    pieces = [(library.id_to_piece(token), library.get_score(token)) for token in range(library.vocab_size())]
    transformers.T5Tokenizer(vocab=pieces, extra_ids=0, pad_token="</s>").save_pretrained(tmp_path)
    reference = open_clip.HFTokenizer(str(tmp_path), context_length=64, clean="canonicalize")
    plain = [text for text in captions if is_plain(text, open_clip)]
    assert len(plain) > 1000 and set(TEXTS) < set(plain)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json", "canonicalize", pad=1)
    assert_tokens(tokenizer, plain, reference(plain).numpy())


def is_plain(text, open_clip):
    """open_clip's other steps leave it as it is."""
    # open_clip lower-cases last; where punctuation follows a capital sigma, that decides which small one it is.
    return open_clip.basic_clean(text).split() == text.split() and not {"_", "▁", "Σ"} & set(text)


def test_canonicalize_equals_open_clip_but_for_its_repairs_and_underscores(captions, open_clip):
    texts = [text for text in captions if "Σ" not in text]  # as in is_plain
    spaced = [text.replace("_", " ").replace("▁", " ") for text in texts]
    assert list(map(canonicalize, spaced)) == list(map(open_clip.canonicalize_text, spaced))
    assert (
        canonicalize(" A photo-graph of\n“Ed's” snow_man, &amp; 3.5▁DOGS! ")
        == "a photograph of “eds” snowman amp 35 dogs"
    )


def test_siglip_of_big_vision_is_lower_case(siglip_file, captions):
    """big_vision's tokenize(eos="sticky", pad_value=1): ASCII lower case, punctuation stays."""
    library = sentencepiece.SentencePieceProcessor(model_file=str(siglip_file))
    texts = [text for text in captions if text.encode().lower().decode() == tokenizers._CLEANERS["lower"](text)]
    assert len(texts) > 1000
    rows = [[*library.encode(text.encode().lower().decode())[:15], 1] for text in texts]
    expected = np.array([row + [1] * (16 - len(row)) for row in rows])
    assert_tokens(load_tokenizer(siglip_file, "lower", pad=1), texts, expected)


@pytest.mark.parametrize("length", [4, 64])
def test_siglip2_equals_transformers(siglip2_folder, captions, length):
    reference = transformers.Siglip2Tokenizer.from_pretrained(siglip2_folder)
    texts = [*captions, *MARKS]
    tokenizer = load_tokenizer(siglip2_folder / "tokenizer.json", "lower")
    assert_tokens(tokenizer, texts, padded(reference, texts, length, split_special_tokens=True))


def test_added_tokens_of_siglip2_are_found_after_lower_casing(siglip2_folder, tmp_path):
    """As by big_vision; transformers looks for them before."""
    reference = transformers.Siglip2Tokenizer.from_pretrained(siglip2_folder)
    reference.add_tokens([transformers.AddedToken("<table>", normalized=False)])
    reference.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json", "lower")
    expected = padded(reference, ["a <table>, B", "a <table>, B"], 16)
    assert reference.convert_tokens_to_ids("<table>") in expected
    assert_tokens(tokenizer, ["a <table>, B", "a <TABLE>, B"], expected)


def test_siglip2_equals_open_clip_but_for_its_repairs_and_underscores(siglip2_folder, captions, open_clip):
    reference = open_clip.HFTokenizer(str(siglip2_folder), context_length=64, clean="canonicalize")
    plain = [text for text in captions if is_plain(text, open_clip)]
    tokenizer = load_tokenizer(siglip2_folder / "tokenizer.json", "canonicalize")
    assert_tokens(tokenizer, plain, reference(plain).numpy())


def test_start_token_is_that_of_the_template(siglip2_folder, captions, tmp_path):
    reference = transformers.GemmaTokenizer.from_pretrained(siglip2_folder, add_bos_token=True, add_eos_token=True)
    reference.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert_tokens(tokenizer, captions, padded(reference, captions, 16))
    start = tokenizer.encode([""], 3)[0][0, 0]
    assert start == reference.bos_token_id != load_tokenizer(siglip2_folder / "tokenizer.json").encode([""], 3)[0][0, 0]


def test_clip_equals_transformers_on_clean_text(captions, open_clip, tmp_path):
    source = open_clip.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(name, name): token for name, token in source.encoder.items()}
    reference = transformers.CLIPTokenizer(vocab=vocabulary, merges=list(source.bpe_ranks))
    reference.save_pretrained(tmp_path)
    texts = [*captions, *MARKS]
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json", pad=49407)
    assert_tokens(tokenizer, captions, padded(reference, captions, 77))

    # Where mending again changes nothing, and without what only one of the two knows.
    texts = [clean for clean in map(tokenizers.clean, texts) if tokenizers.clean(clean) == clean]
    texts = [text for text in texts if not any(odd in text for odd in ("_text>", "text|>", "\u0345", "ſ"))]
    assert len(texts) > 1000
    tokens, mask = ClipTokenizer().encode(texts, 77)
    np.testing.assert_array_equal(np.where(mask, tokens, 49407), padded(reference, texts, 77))


def file_tokenizers(siglip_file, siglip2_folder):
    settings = itertools.product(
        (siglip_file, siglip2_folder / "tokenizer.json"), ("none", "lower", "canonicalize"), (0, 1, 11)
    )
    return {setting: load_tokenizer(*setting) for setting in settings}


def test_fingerprint_and_pickle_carry_cleaning_and_padding(siglip_file, siglip2_folder):
    loaded = file_tokenizers(siglip_file, siglip2_folder)
    assert len({tokenizer.fingerprint for tokenizer in loaded.values()}) == len(loaded) == 18
    texts = ["A  Dog, a CAT.", ""]
    for (file, clean, pad), tokenizer in loaded.items():
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.fingerprint == tokenizer.fingerprint
        np.testing.assert_array_equal(copy.encode(texts, 64), tokenizer.encode(texts, 64))
        plain, mask = load_tokenizer(file).encode([tokenizers._CLEANERS[clean](text) for text in texts], 64)
        np.testing.assert_array_equal(tokenizer.encode(texts, 64), (np.where(mask, plain, pad), mask))
        if (clean, pad) == ("none", 0):
            assert tokenizer.fingerprint == hashlib.sha256(file.read_bytes()).hexdigest()


def test_file_can_be_written_out_and_read_again(siglip_file, siglip2_folder, tmp_path):
    for (file, clean, pad), tokenizer in file_tokenizers(siglip_file, siglip2_folder).items():
        name, contents = tokenizer.file
        assert (name, contents) == (f"tokenizer{file.suffix}", file.read_bytes())
        (tmp_path / name).write_bytes(contents)
        assert load_tokenizer(tmp_path / name, clean, pad).fingerprint == tokenizer.fingerprint
    assert ClipTokenizer().file is None


class Captions:
    """A source of captions alone."""

    def __len__(self):
        return len(TEXTS)

    def __getitem__(self, index):
        return SimpleNamespace(captions=[TEXTS[index]])


def test_build_tokenizer_passes_cleaning_and_padding_on(siglip_file, tmp_path):
    text = "A  Red, CIRCLE."
    for name in ("trained", str(siglip_file)):
        config = TokenizerConfig(name=name, vocabulary_size=300, clean="canonicalize", pad=7)
        for _ in range(2):  # 'trained' is trained, then read
            tokenizer = build_tokenizer(config, Captions(), tmp_path / "tokenizer.json", 20)
            file = tmp_path / "tokenizer.json" if name == "trained" else siglip_file
            expected, mask = load_tokenizer(file).encode(["a red circle"], 20)
            np.testing.assert_array_equal(tokenizer.encode([text], 20)[0], np.where(mask, expected, 7))


def test_build_tokenizer_refuses_what_does_not_fit(tmp_path):
    def build(**settings):
        return build_tokenizer(TokenizerConfig(**settings), Captions(), tmp_path / "tokenizer.json", 20)

    assert build(name="clip").fingerprint == ClipTokenizer().fingerprint
    with pytest.raises(
        ConfigError, match=r"data.tokenizer.clean: 'lower' does not go with .* 'clip', .* expected 'none'"
    ):
        build(name="clip", clean="lower")
    with pytest.raises(ConfigError, match=r"data.tokenizer.pad: 1 does not go with .* 'clip', .* expected 0"):
        build(name="clip", pad=1)
    train_tokenizer(TEXTS, 300, tmp_path / "tokenizer.json")
    assert build(name="trained", vocabulary_size=300, pad=299)
    with pytest.raises(ConfigError, match=r"data.tokenizer.pad: 300 is no token; expected one below .*_size, 300"):
        build(name="trained", vocabulary_size=300, pad=300)
