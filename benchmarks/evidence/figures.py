"""From what a model makes of the test set to the figures of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int, UInt8

from llip_jax.data.records import Source
from llip_jax.data.tokenizers import Tokenizer
from llip_jax.evaluation.diagnostics.spectra import spectrum
from llip_jax.evaluation.reading import Reading
from llip_jax.evaluation.retrieval import recall_at_k, retrieve
from llip_jax.ops.pair_scores import cosines

GALLERY = 32
"""Images among which a caption looks for one that it is true of. Among all, nearly every caption finds one."""

Figures = dict[str, float]


def shelf_figures(
    scores: Float[np.ndarray, "N J"], positives: Bool[np.ndarray, "N J"], texts: Sequence[str]
) -> tuple[Figures, Figures]:
    """Zero-shot accuracy (mean over topics) and recall at 1, both directions; and their chance levels.

    Args:
        scores: of every image with every caption.
        positives: which captions are true of which images.
        texts: "a red circle": the last word is the topic.
    """
    topics = np.asarray([text.split()[-1] for text in texts])
    right, chance = [], []
    for topic in np.unique(topics):
        columns = np.flatnonzero(topics == topic)
        best = columns[scores[:, columns].argmax(axis=1)]
        right.append(positives[np.arange(len(scores)), best].mean())
        chance.append(1 / len(columns))
    galleries = [slice(start, start + GALLERY) for start in range(0, len(scores) - GALLERY + 1, GALLERY)]
    asked = [positives[rows].any(axis=0) for rows in galleries]
    found = np.concatenate(
        [
            positives[rows][scores[rows].argmax(axis=0), np.arange(len(texts))][texts_asked]
            for rows, texts_asked in zip(galleries, asked, strict=True)
        ]
    )
    by_chance = np.concatenate(
        [positives[rows].mean(axis=0)[texts_asked] for rows, texts_asked in zip(galleries, asked, strict=True)]
    )
    retrieval = recall_at_k(scores, positives, (1,))
    return (
        {
            "zero_shot": float(np.mean(right)),
            "image_to_text_r1": retrieval["image_to_text_recall_at_1"],
            "text_to_image_r1": float(found.mean()),
        },
        {
            "zero_shot": float(np.mean(chance)),
            "image_to_text_r1": retrieval["image_to_text_recall_at_1_chance"],
            "text_to_image_r1": float(by_chance.mean()),
        },
    )


def recalls(prefix: str, reading: Reading, group_field: str = "") -> tuple[Figures, Figures]:
    """Recall at 1 and 5 of a set, both directions, with chance; images to texts also by the values of a field."""
    result = retrieve(reading.caption_scores, reading.positives, (1, 5))
    groups = np.asarray(reading.groups(group_field)) if group_field else np.asarray([])
    figures: Figures = {}
    chance: Figures = {}
    for k in (1, 5):
        for direction in ("image_to_text", "text_to_image"):
            outcome = result.outcomes[f"{direction}_recall_at_{k}"]
            name = f"{prefix}{direction}_r{k}"
            figures[name] = result.figures[f"{direction}_recall_at_{k}"]
            chance[name] = result.figures[f"{direction}_recall_at_{k}_chance"]
            for value in sorted(set(groups)) if direction == "image_to_text" else ():
                some = groups[outcome.unit] == value
                figures[f"{value}_{name}"] = float(outcome.values[some].mean())
                chance[f"{value}_{name}"] = float(outcome.chance[some].mean())
    return figures, chance


def spectra(reading: Reading) -> dict[str, dict[str, Any]]:
    """Singular values and effective rank of the image embeddings.

    ``scored``: what pairs are scored with; of a Llip every image mixed by each of its captions. ``unconditioned`` and
    ``tower``: one vector an image, see Reading.embeddings.
    """
    own = reading.captions
    scored = reading.embeddings["unconditioned"]
    if own is not None and own.weights is not None and own.mixed is not None:
        scored = own.mixed[own.mask]
    named = {"scored": scored, **{name: reading.embeddings[name] for name in ("unconditioned", "tower")}}
    return {name: spectrum(rows) for name, rows in named.items()}


def controls(
    graph: nnx.GraphDef[Any],
    params: Any,
    source: Source,
    tokenizer: Tokenizer,
    length: int,
    reading: Reading,
    seed: int,
) -> Figures:
    """Figures of a Llip that is used wrongly.

    ``wrong_caption``: images are mixed by another caption than the one they are scored with; ``wrong_object`` and
    ``wrong_colour``: by one that differs in this only. ``shuffled_tokens``: every mixture token is of a random image.
    """
    images = np.stack([source[row].image for row in reading.rows])
    tokens, mask = tokenizer.encode(reading.texts, length)
    order = np.random.default_rng(seed).permutation(len(reading.texts))
    wrong_caption = np.empty(len(order), int)
    wrong_caption[order] = np.roll(order, 1)
    mixed_by = {
        "wrong_caption": wrong_caption,
        "wrong_object": _neighbours(reading.texts, same=1, other=2),
        "wrong_colour": _neighbours(reading.texts, same=2, other=1),
    }

    @jax.jit
    def scores_of(
        params: Any, images: UInt8[np.ndarray, "N H W 3"], donors: Int[np.ndarray, "N K"]
    ) -> Mapping[str, Any]:
        model = nnx.merge(graph, params)
        output, texts = model.encode_images(images), model.text_side(tokens, mask)
        side = model.image_side(output)
        shuffled = output._replace(mixture=output.mixture[donors, jnp.arange(donors.shape[1])])
        wrong = {name: cosines(side, texts._replace(queries=texts.queries[other])) for name, other in mixed_by.items()}
        return {**wrong, "shuffled_tokens": cosines(model.image_side(shuffled), texts)}

    tokens_of_image = jax.eval_shape(lambda p, x: nnx.merge(graph, p).encode_images(x), params, images).mixture.shape[1]
    rng = np.random.default_rng(seed)
    donors = np.stack([rng.permutation(len(images)) for _ in range(tokens_of_image)], axis=1)
    figures: Figures = {}
    for name, scores in jax.device_get(scores_of(params, images, donors)).items():
        values, _ = shelf_figures(np.asarray(scores), reading.positives, reading.texts)
        figures |= {f"{name}_{figure}": value for figure, value in values.items()}
    return figures


def _neighbours(texts: Sequence[str], same: int, other: int) -> Int[np.ndarray, "J"]:
    """For each "a COLOUR OBJECT" another one: word ``same`` is equal, word ``other`` the next in the alphabet."""
    words = [text.split() for text in texts]
    number = {(own[same], own[other]): j for j, own in enumerate(words)}
    values = sorted({own[other] for own in words})
    following = dict(zip(values, [*values[1:], values[0]], strict=True))
    return np.asarray([number[own[same], following[own[other]]] for own in words])
