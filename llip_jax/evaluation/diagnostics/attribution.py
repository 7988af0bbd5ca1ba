"""Which words of a caption contradict the picture: signed attributions (CLIP4DM, arXiv 2412.18404, AAAI 2025).

Attention times the gradient of the pair's cosine by it, token by token, in the last layers of the text tower, at the
row that the tower is read at, with its sign: a word below zero lowers the score, it speaks against the picture. Layers,
means over heads and layers, the mean over a word's tokens, the threshold and the F-CLIPScore are those of the authors'
released code (github.com/naver-ai/CLIP4DM: src/clip4dm.py, main.py); the paper's own equations we did not verify. Their
code puts "A photo depicts" in front of captions; here captions are read as they are.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from llip_jax.data.tokenizers import Tokenizer
from llip_jax.evaluation.scoring import Progress, own_scores
from llip_jax.parallel.sharding import whole

LAYERS = 3
"""How many of the text tower's last layers are looked at (all, if it has fewer)."""
THRESHOLD = -5e-5
"""A word with an attribution below counts as misaligned."""


class Attributions(NamedTuple):
    """Of J pairs: the cosine, and what each token adds to it; 0 on the padding."""

    cosines: Float[Array, "J"]
    tokens: Float[Array, "J L"]


class Words(NamedTuple):
    """A text held against an image: the cosine of the pair, and its words with their attributions."""

    text: str
    cosine: float
    words: list[tuple[str, float]]


@functools.partial(jax.jit, static_argnames=("graph", "through_queries"))
def token_attributions(
    graph: nnx.GraphDef[Any],
    params: Any,
    images: UInt8[Array, "J H W 3"],
    tokens: Int[Array, "J L"],
    mask: Int[Array, "J L"],
    *,
    through_queries: bool = True,
) -> Attributions:
    """Attributions of the tokens of text j, held against image j.

    A Llip's text takes part in its cosine twice: its queries mix the image, and its embedding is what the mixture is
    compared with. By default the gradient is that of the whole score and flows through both; without
    ``through_queries`` the mixture is held fixed. Memory grows with J x layers x heads x L^2.

    Args:
        graph: of a DualEncoder.
        params: its parameters.
        images: raw pixels.
        tokens: of the texts.
        mask: 1 on their real tokens.
        through_queries: see above; without effect where texts do not mix images.
    """
    model = nnx.merge(graph, params)
    sides = model.image_side(model.encode_images(images))
    embedded = model.text.embed(tokens)

    def score(offsets: Float[Array, "layers J heads L L"]) -> tuple[Array, tuple[Array, Array]]:
        pooled, weights = model.text.observed(embedded, mask, offsets)
        texts = model.pooler.texts(pooled)
        if not through_queries:
            texts = texts._replace(queries=jax.lax.stop_gradient(texts.queries))
        each = own_scores(sides, texts, jnp.arange(len(tokens))[:, None]).cosines[:, 0]
        return each.sum(), (each, weights)

    transformer, (j, length) = model.text.transformer, tokens.shape
    offsets = jnp.zeros((transformer.layers, j, transformer.blocks.qkv.shape[-2], length, length), jnp.float32)
    gradient, (each, weights) = jax.grad(score, has_aux=True)(offsets)
    by_key = (gradient * weights)[-LAYERS:].mean(axis=(0, 2))
    read = jnp.take_along_axis(by_key, model.text.read_at(mask)[:, None, None], axis=1)[:, 0]
    return whole(Attributions(each, read * mask))


def word_spans(text: str, tokenizer: Tokenizer, length: int) -> list[tuple[str, int, int]]:
    """The words of a text (divided by white space), each with its first token and the one after its last.

    Tokenizers differ in what they can tell of where tokens come from, so words are found by encoding the beginnings of
    the text. Words whose tokens depend on what follows are joined with it. A word without tokens is left out: cut off,
    or removed by the tokenizer's cleaning.
    """
    words = text.split()
    beginnings = [" ".join(words[:count]) for count in range(min(len(words), length) + 1)]
    tokens, mask = tokenizer.encode([*beginnings, text], length)
    ends = mask.sum(axis=1) - 1  # Behind the last token of the text, at the mark of its end.
    spans, first, start = [], 0, int(ends[0])
    for count, end in enumerate(ends[:-1].tolist()):
        if end >= start and (tokens[count, :end] == tokens[-1, :end]).all():
            if end > start:
                spans.append((" ".join(words[first:count]), start, end))
            first, start = count, end
    return spans


def word_attributions(text: str, attributions: Float[np.ndarray, "L"], tokenizer: Tokenizer) -> list[tuple[str, float]]:
    """The words of a text with the means of their tokens' attributions; see :func:`word_spans`."""
    spans = word_spans(text, tokenizer, len(attributions))
    return [(word, float(attributions[start:end].mean())) for word, start, end in spans]


def f_clip_score(pair: Words, threshold: float = THRESHOLD) -> float:
    """The sum of the misaligned words' attributions, times 1 - max(cosine, 0): 0 where all words fit, else below."""
    misaligned = sum(attribution for _, attribution in pair.words if attribution < threshold)
    return (1 - max(pair.cosine, 0.0)) * misaligned


def attribute_words(
    graph: nnx.GraphDef[Any],
    params: Any,
    images: UInt8[np.ndarray, "J H W 3"],
    texts: Sequence[str],
    tokenizer: Tokenizer,
    length: int,
    *,
    through_queries: bool = True,
    batch_size: int = 32,
    progress: Progress = lambda _: None,
) -> list[Words]:
    """Words of text j, held against image j, with their attributions.

    Args:
        graph: of a DualEncoder.
        params: its parameters.
        images: raw pixels.
        texts: one an image.
        tokenizer: of the model.
        length: tokens of its texts.
        through_queries: see :func:`token_attributions`.
        batch_size: pairs on the device at a time, at most.
        progress: called after each batch with the pairs in it.
    """
    pairs: list[Words] = []
    size = min(batch_size, len(texts))
    for start in range(0, len(texts), max(size, 1)):
        some = texts[start : start + size]
        # Filled up with the first pair, so that one shape is compiled.
        rows = [*range(start, start + len(some)), *[start] * (size - len(some))]
        tokens, mask = tokenizer.encode([texts[row] for row in rows], length)
        found = token_attributions(graph, params, images[rows], tokens, mask, through_queries=through_queries)
        for text, cosine, own in zip(some, *jax.device_get(found), strict=False):
            pairs.append(Words(text, float(cosine), word_attributions(text, own, tokenizer)))
        progress(len(some))
    return pairs


def hardest_mismatches(scores: Float[np.ndarray, "N J"], positives: Bool[np.ndarray, "N J"]) -> Int[np.ndarray, "N"]:
    """For each image the text that scores best of those that are not its own."""
    return np.where(positives, -np.inf, scores).argmax(axis=1)


def attribution_figures(own: Sequence[Words], other: Sequence[Words]) -> dict[str, Any]:
    """How well mismatches show in words; for images of the caller's choice.

    Args:
        own: images with a caption of their own, at least one.
        other: the same images with a caption of another image. (Not :func:`hardest_mismatches`, which are the best of
            many: against those, cosines do worse than chance.)

    Returns:
        For ``own`` and ``other``: mean cosine, mean F-CLIPScore, and the share of words below the threshold. And how
        often a pair of ``own`` beats one of ``other`` (AUROC; chance is 0.5) by cosine and by F-CLIPScore.
    """
    figures: dict[str, Any] = {"images": len(own), "threshold": THRESHOLD}
    for name, pairs in (("own", own), ("other", other)):
        values = [attribution for pair in pairs for _, attribution in pair.words]
        figures[f"cosine_{name}"] = float(np.mean([pair.cosine for pair in pairs]))
        figures[f"f_clip_score_{name}"] = float(np.mean([f_clip_score(pair) for pair in pairs]))
        figures[f"misaligned_words_{name}"] = float(np.mean(np.asarray(values) < THRESHOLD)) if values else 0.0
    for name, score in (("cosine", lambda pair: pair.cosine), ("f_clip_score", f_clip_score)):
        difference = np.subtract.outer([score(pair) for pair in own], [score(pair) for pair in other])
        figures[f"auroc_{name}"] = float(np.mean((np.sign(difference) + 1) / 2))
    return figures | {"auroc_chance": 0.5}


def exhibit(pair: Words) -> dict[str, Any]:
    """For the report: ``text``, ``score`` and ``tokens``, words with attributions scaled so that the largest is 1."""
    largest = max((abs(attribution) for _, attribution in pair.words), default=0.0) or 1.0
    tokens = [[word, round(attribution / largest, 3)] for word, attribution in pair.words]
    return {"text": pair.text, "score": round(pair.cosine, 4), "tokens": tokens}
