"""Scoring all pairs through the device block by block: against the dense form, float64, and what it may take."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest
from jaxtyping import Array, Float
from oracles import relative_error
from run_helpers import call_on_devices

from llip_jax.config import MeshConfig
from llip_jax.evaluation import scoring
from llip_jax.evaluation.scoring import score, score_blocks
from llip_jax.ops import pair_scores
from llip_jax.ops.pair_scores import FixedSide, ImageSide, MixtureSide, TextSide
from llip_jax.parallel.mesh import make_mesh

TOLERANCE = 1e-5
"""As a fraction of the largest cosine; the largest seen was 4e-7."""
TEMPERATURE = 2.5


def mixture(seed: int, n: int, j: int, k: int = 7, m: int = 2, dh: int = 4) -> tuple[MixtureSide, TextSide]:
    """NumPy sides with mixing weights far from uniform."""
    rng = np.random.default_rng(seed)
    shapes = [(n, k, m, dh), (n, k, m, dh), (m * dh, m * dh), (j, m * dh), (j, m, dh)]
    keys, values, output, embedding, queries = (1.5 * rng.normal(size=s).astype(np.float32) for s in shapes)
    return MixtureSide(keys, values, output, TEMPERATURE), TextSide(embedding, queries)


def fixed(seed: int, n: int, j: int, d: int = 8) -> tuple[FixedSide, TextSide]:
    rng = np.random.default_rng(seed)
    images, texts = (rng.normal(size=(rows, d)).astype(np.float32) for rows in (n, j))
    return FixedSide(images), TextSide(texts)


def exact(images: ImageSide, texts: TextSide) -> Float[np.ndarray, "N J"]:
    """In float64."""
    if isinstance(images, FixedSide):
        unit = [np.asarray(x, np.float64) / np.linalg.norm(x, axis=1, keepdims=True) for x in (images[0], texts[0])]
        return unit[0] @ unit[1].T
    sides = (texts.queries, images.keys, images.values, images.output, texts.embedding)
    return reference.contextual_cosines(*(np.asarray(x, np.float64) for x in sides), images.temperature)


def on_device(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


SIDES = {
    "mixture, norm by metric": mixture(1, 23, 17),
    "mixture, norm by Gram matrix": mixture(2, 23, 100, k=2, m=2, dh=16),
    "fixed": fixed(3, 23, 17),
}


@pytest.mark.parametrize("name", SIDES)
@pytest.mark.parametrize("pieces", ["whole", "small"])
def test_equals_the_dense_form_and_float64(name: str, pieces: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """23 images and 17 or 100 texts fit neither the blocks nor, when small, the pieces of a block."""
    if pieces == "small":
        monkeypatch.setattr(scoring, "BLOCK_TEXTS", 4)
        monkeypatch.setattr(scoring, "block_bytes", lambda: 2**11)
        by_pieces = scoring._by_pieces
        monkeypatch.setattr(scoring, "cosines", jax.jit(lambda *sides: by_pieces(*sides)))  # traced anew
    images, texts = SIDES[name]
    scores = score(images, texts, image_block=5)
    assert scores.dtype == np.float32
    assert relative_error(scores, exact(images, texts)) < TOLERANCE
    assert relative_error(scores, pair_scores.cosines(images, texts)) < TOLERANCE
    np.testing.assert_array_equal(score(on_device(images), on_device(texts), image_block=5), scores)


def test_sides_are_scored_as_they_come() -> None:
    """Of any length; no side is asked for before the one before the last has been given back."""
    images, texts = mixture(4, 12, 5)
    lengths, asked = [0, 4, 3, 1, 4], []

    def sides() -> Any:
        start = 0
        for length in lengths:
            asked.append(length)
            yield scoring.by_image(lambda x, s=slice(start, start + length): x[s], images)
            start += length

    blocks = []
    for block in score_blocks(sides(), texts):
        blocks.append(block)
        assert len(asked) == min(len(blocks) + 1, len(lengths))
    assert [len(block) for block in blocks] == lengths
    assert relative_error(np.concatenate(blocks), exact(images, texts)) < TOLERANCE


def test_a_ragged_end_compiles_nothing(caplog: pytest.LogCaptureFixture) -> None:
    images, texts = mixture(5, 21, 9, k=3)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        score(images, texts, image_block=8)
        score(*mixture(6, 13, 9, k=3), image_block=8)
    compiled = [record.getMessage() for record in caplog.records]
    assert sum(message.startswith("Finished XLA compilation of jit(cosines)") for message in compiled) == 1


@pytest.mark.parametrize("images", [1, 8, 20])
def test_progress_is_told_of_every_image(images: int) -> None:
    seen: list[int] = []
    score(*mixture(7, images, 3), image_block=8, progress=seen.append)
    assert sum(seen) == images
    assert len(seen) == -(-images // 8)


def test_no_images_give_no_rows() -> None:
    assert score(*mixture(8, 0, 3)).shape == (0, 3)


def temporaries(j: int, n: int = 32) -> tuple[int, int]:
    """Bytes of the temporaries and of the output of one compiled block."""
    images, texts = mixture(9, n, j, k=16, m=4, dh=16)
    analysis = scoring.cosines.lower(images, texts).compile().memory_analysis()
    return analysis.temp_size_in_bytes, analysis.output_size_in_bytes


def test_memory_is_bounded() -> None:
    """A block's shape, hence its memory, is the same for any number of images; texts cost what they are."""
    few, many = 512, 4096
    d, pairs = 64, 32 * (many - few)
    (small, small_output), (large, large_output) = temporaries(few), temporaries(many)
    assert large_output - small_output == 4 * pairs
    # The output while it is made, and four vectors of each text: normalised, folded, and copies of text and query.
    assert large - small <= 4 * pairs + 4 * 4 * d * (many - few)
    dense = jax.jit(pair_scores.cosines).lower(*mixture(9, 32, many, k=16, m=4, dh=16)).compile().memory_analysis()
    assert 4 * large < dense.temp_size_in_bytes


def largest_errors() -> list[float]:
    """On 8 devices: 23 images in blocks of 20, which is no multiple of 8, and with the tensor axis in use."""
    errors = []
    for mesh in (MeshConfig(), MeshConfig(fsdp=2, tensor=2)):
        with jax.set_mesh(make_mesh(mesh)):
            for images, texts in SIDES.values():
                expected = exact(images, texts)
                errors.append(relative_error(score(images, texts, image_block=20), expected))
                errors.append(relative_error(score(on_device(images), on_device(texts), image_block=20), expected))
                whole: Array = scoring.cosines(scoring.by_image(lambda x: x[:16], images), texts)
                assert whole.sharding.is_fully_replicated
    return errors


def test_devices_do_not_show() -> None:
    errors = call_on_devices(largest_errors, devices=8)
    assert len(errors) == 12
    assert max(errors) < TOLERANCE


def test_cosines_that_are_not_finite_are_named() -> None:
    images, texts = mixture(10, 12, 5)
    for row in (6, 9):
        images.values[row, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"^10 of 30 cosines are not finite, those of 2 images: rows 6, 9$"):
        score(images, texts, image_block=6)
    images.values[:] = np.inf
    with pytest.raises(ValueError, match=r"60 of 60 cosines .* 12 images: rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\.$"):
        score(images, texts)


def test_bad_arguments_are_refused() -> None:
    images, texts = mixture(11, 4, 5)
    with pytest.raises(ValueError, match="queries"):
        score(images, texts._replace(queries=None))
    with pytest.raises(ValueError, match=r"text embedding: expected \(5, 8\) for 2 heads of 4, got \(5, 7\)"):
        score(images, texts._replace(embedding=texts.embedding[:, :7]))
    with pytest.raises(ValueError, match=r"image embedding: expected \[N, 8\], got \(4, 7\)"):
        list(score_blocks([FixedSide(np.ones((4, 7)))], texts))
    with pytest.raises(ValueError, match="image_block of at least 1, got -2"):
        score(images, texts, image_block=-2)
    with pytest.raises(ValueError, match="expected at least one text, got none"):
        score(images, TextSide(texts.embedding[:0], texts.queries[:0]))
