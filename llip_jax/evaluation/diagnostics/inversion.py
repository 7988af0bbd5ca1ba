"""How much is lost where images are compared with images: retrieval by pseudo-words against retrieval by embeddings.

"Cross the Gap" (Mistretta et al., ICLR 2025, arXiv 2502.04263): CLIP's loss compares images with texts only, so its
image embeddings compare badly with each other. Optimisation-based textual inversion (OTI) gives every image a text:
pseudo-words behind "a photo of", found by gradient descent on the cosine of their text embedding with the image's. As
queries, these texts take the comparison back between the modalities. Settings are those of the authors' released code
(github.com/miccunifi/Cross-the-Gap, src/oti.py): AdamW, 150 steps, learning rate 0.02, weight decay 0.01, a start
drawn from N(0, 0.02^2). Our reading: all images start from one draw, so that no result depends on the other images.

A Llip has no image embedding of its own to invert: the declared one that no text has conditioned stands in
(DualEncoder.unconditioned_embedding), on which its pairs are not scored.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from llip_jax.config import ConfigError
from llip_jax.data.tokenizers import Tokenizer
from llip_jax.evaluation.classification import mean_average_precision_outcomes
from llip_jax.evaluation.diagnostics.pairs import normalized
from llip_jax.evaluation.reading import spread
from llip_jax.evaluation.scoring import Progress
from llip_jax.ops.pair_scores import normalize
from llip_jax.parallel.sharding import whole

PROMPT = "a photo of"
STEPS = 150
IMAGES = 256
"""Queries of :func:`inversion_figures`, at most."""

_BLOCK_PAIRS = 2**20
"""Pairs ranked together: bounds the temporaries to some ten MiB."""


class Prompt(NamedTuple):
    """A tokenized prompt with places for pseudo-words before its end."""

    tokens: Int[np.ndarray, "1 L"]
    mask: Int[np.ndarray, "1 L"]
    places: Int[np.ndarray, "P"]


class Inverted(NamedTuple):
    """Of each image: the embedding of its pseudo-text, L2-normalised, and the cosine reached."""

    embedding: Float[Array, "n d"]
    cosines: Float[Array, "n"]


def prompt_with_places(tokenizer: Tokenizer, length: int, words: int = 1, prompt: str = PROMPT) -> Prompt:
    """The prompt, cut where it does not fit, then ``words`` places.

    Raises:
        ValueError: ``length`` has no room for start, end and ``words``.
    """
    if words < 1 or length - words < 2:
        raise ValueError(f"expected 1 to {length - 2} pseudo-words in texts of {length} tokens, got {words}")
    tokens, mask = tokenizer.encode([prompt], length - words)
    places = int(mask.sum()) - 1 + np.arange(words)
    # What is put there for the time being is never read.
    tokens, mask = (np.insert(x, [places[0]] * words, 1, axis=1) for x in (tokens, mask))
    return Prompt(tokens, mask, places)


@functools.partial(jax.jit, static_argnames="graph")
def invert(
    graph: nnx.GraphDef[Any], params: Any, targets: Float[Array, "n d"], prompt: Prompt, *, steps: int = STEPS
) -> Inverted:
    """Pseudo-words for n image embeddings, all at once; memory grows with n, not with ``steps``.

    Args:
        graph: of a DualEncoder.
        params: its parameters.
        targets: image embeddings, of any length.
        prompt: where the pseudo-words go.
        steps: of the optimiser.
    """
    model = nnx.merge(graph, params)
    targets = normalize(targets)
    base = model.text.embed(jnp.asarray(prompt.tokens))
    mask = jnp.broadcast_to(jnp.asarray(prompt.mask), (len(targets), prompt.mask.shape[1]))

    def embeddings(words: Float[Array, "n P Dt"]) -> Float[Array, "n d"]:
        rows = jnp.broadcast_to(base, (len(words), *base.shape[1:]))
        embedded = rows.at[:, prompt.places].set(words.astype(base.dtype))
        read = model.text.read(model.text.transformer(model.text.placed(embedded)), mask)
        return normalize(model.pooler.texts(read).embedding)

    def loss(words: Float[Array, "n P Dt"]) -> Float[Array, ""]:
        # A sum: an image's gradient, and with it its result, does not depend on how many others there are.
        return jnp.sum(1 - jnp.sum(embeddings(words) * targets, axis=1))

    optimizer = optax.adamw(2e-2, weight_decay=0.01)

    def step(_: Array, state: tuple[Array, Any]) -> tuple[Array, Any]:
        words, moments = state
        updates, moments = optimizer.update(jax.grad(loss)(words), moments, words)
        return words + updates, moments

    start = 0.02 * jax.random.normal(jax.random.key(0), (len(prompt.places), base.shape[-1]), jnp.float32)
    words = jnp.broadcast_to(start, (len(targets), *start.shape))
    words, _ = jax.lax.fori_loop(0, steps, step, (words, optimizer.init(words)))
    found = embeddings(words)
    return whole(Inverted(found, jnp.sum(found * targets, axis=1)))


def average_precision(
    queries: Float[np.ndarray, "Q d"],
    rows: Int[np.ndarray, "Q"],
    gallery: Float[np.ndarray, "N d"],
    labels: Int[np.ndarray, "N"],
) -> tuple[float, float]:
    """Mean average precision of the queries, ties counted fairly, and that of random scores.

    Args:
        queries: embeddings.
        rows: of the gallery that the queries were made from, which are left out; each shares its label with another.
        gallery: embeddings; scores are dot products.
        labels: an answer is right if it has the label of the query's row.
    """
    values, chances = [], []
    block = max(1, _BLOCK_PAIRS // len(gallery))
    for start in range(0, len(queries), block):
        own = rows[start : start + block]
        others = np.arange(len(gallery)) != own[:, None]
        scores = (queries[start : start + block] @ gallery.T)[others].reshape(len(own), -1)
        right = (labels == labels[own][:, None])[others].reshape(len(own), -1)
        outcome = mean_average_precision_outcomes(scores.T, right.T)["mean_average_precision"]
        assert outcome.chance is not None
        # Queries weigh alike, whatever the number of their right answers.
        values.append(np.sum(outcome.weight * outcome.values))
        chances.append(np.sum(outcome.weight * outcome.chance))
    return float(np.sum(values) / len(queries)), float(np.sum(chances) / len(queries))


def inversion_figures(
    graph: nnx.GraphDef[Any],
    params: Any,
    embeddings: Float[np.ndarray, "N d"],
    labels: Int[np.ndarray, "N"],
    tokenizer: Tokenizer,
    length: int,
    *,
    words: int = 1,
    images: int = IMAGES,
    batch_size: int = 64,
    steps: int = STEPS,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Retrieval of images of the same label, by image embeddings and by pseudo-texts, from all the other images.

    Queries are at most ``images`` of those whose label another image has too, evenly spaced over the set.

    Args:
        graph: of a DualEncoder.
        params: its parameters.
        embeddings: unconditioned ones of all images.
        labels: class numbers.
        tokenizer: of the model.
        length: tokens of its texts.
        words: pseudo-words of a text.
        images: see above.
        batch_size: images inverted at a time; bounds the device's memory.
        steps: of the optimiser.
        progress: called after each batch with the images in it.

    Returns:
        ``images``, ``gallery``, ``steps``, ``pseudo_words``, mean average precision ``intra_modal_map`` and
        ``inter_modal_map`` with the ``map_chance`` of a random order, and the mean ``cosine`` of pseudo-texts with
        their images.

    Raises:
        ConfigError: no image shares its label with another.
    """
    _, label, counts = np.unique(labels, return_inverse=True, return_counts=True)
    shared = np.flatnonzero(counts[label] > 1)
    if not len(shared):
        raise ConfigError(f"inversion: expected images that share a label, got {len(labels)} of different ones")
    rows = spread(shared, images)
    gallery = normalized(embeddings).astype(np.float32)
    prompt = prompt_with_places(tokenizer, length, words)
    size = min(batch_size, len(rows))
    found, cosines = np.empty((len(rows), gallery.shape[1]), np.float32), np.empty(len(rows), np.float32)
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        # Filled up, so that one shape is compiled.
        inverted = invert(graph, params, gallery[np.resize(some, size)], prompt, steps=steps)
        found[start : start + size] = inverted.embedding[: len(some)]
        cosines[start : start + size] = inverted.cosines[: len(some)]
        progress(len(some))
    intra, chance = average_precision(gallery[rows], rows, gallery, label)
    inter, _ = average_precision(found, rows, gallery, label)
    return {
        "images": len(rows),
        "gallery": len(gallery) - 1,
        "steps": steps,
        "pseudo_words": words,
        "intra_modal_map": intra,
        "inter_modal_map": inter,
        "map_chance": chance,
        "cosine": float(cosines.mean()),
    }
