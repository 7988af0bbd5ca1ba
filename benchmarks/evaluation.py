"""Retrieval over many images and captions: time and memory of exact scores, and what two stages keep of them.

    python benchmarks/evaluation.py [--images 5000] [--texts 25000] [--shape K,M,D] [--shortlist 10 50 100]

Random embeddings of Llip B/16's shapes (64 mixture tokens, 8 heads, width 512): no towers, only what is done with their
outputs. A caption's embedding is its image's unconditioned one, with noise added, so that there is something to find.
Image sides are made block by block, as a pass over a set makes them: the mixture tokens of all images never exist at
once. Prints JSON lines: exact scores and figures, then each shortlist, rescored pair by pair.
"""

import argparse
import datetime
import json
import platform
import resource
import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import numpy as np

from llip_jax.evaluation.retrieval import positives_from_owners, recall_at_k
from llip_jax.evaluation.scoring import score_blocks
from llip_jax.evaluation.two_stage import rescore, shortlist
from llip_jax.ops.pair_scores import MixtureSide, TextSide
from llip_jax.training.metrics import progress_of

BLOCK = 256
NOISE = 8.0
"""Length of the noise on a caption's embedding, the image's own having length 1."""


class Sides:
    """Images block by block, each a function of its number."""

    def __init__(self, images: int, k: int, m: int, d: int):
        self.images, self.k, self.m, self.d = images, k, m, d
        self.output = np.random.default_rng(1).standard_normal((d, d), np.float32) / d**0.5

    def block(self, start: int) -> MixtureSide:
        shape = (min(BLOCK, self.images - start), self.k, self.m, self.d // self.m)
        rng = np.random.default_rng([2, start])
        # What an image's tokens have in common is what its unconditioned embedding keeps.
        common = rng.standard_normal((shape[0], 1, *shape[2:]), np.float32)
        values = 0.5 * common + rng.standard_normal(shape, np.float32)
        return MixtureSide(rng.standard_normal(shape, np.float32), values, self.output, 5.0)

    def __iter__(self) -> Iterator[MixtureSide]:
        return (self.block(start) for start in range(0, self.images, BLOCK))

    def unconditioned(self) -> np.ndarray:
        means = [np.asarray(side.values).mean(axis=1).reshape(-1, self.d) for side in self]
        vectors = np.concatenate(means) @ self.output
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def rounded(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) for name, value in figures.items() if "chance" not in name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--texts", type=int, default=25_000)
    parser.add_argument("--shape", default="64,8,512", help="mixture tokens, heads, width")
    parser.add_argument("--shortlist", type=int, nargs="*", default=[10, 50, 100])
    args = parser.parse_args()
    k, m, d = map(int, args.shape.split(","))
    sides, rng = Sides(args.images, k, m, d), np.random.default_rng(0)
    owners = np.arange(args.texts) % args.images
    unconditioned = sides.unconditioned()
    noise = rng.standard_normal((args.texts, d), np.float32) / d**0.5
    queries = rng.standard_normal((args.texts, m, d // m), np.float32)
    texts = TextSide(unconditioned[owners] + NOISE * noise, queries)
    positives = positives_from_owners(owners, args.images)
    common = {
        "images": args.images, "texts": args.texts, "k": k, "m": m, "d": d, "device": "cpu", "jax": version("jax"),
        "python": platform.python_version(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    inputs = peak_mib()

    started, blocks = time.perf_counter(), []
    with progress_of(args.images, "image", "scoring") as progress:
        for block in score_blocks(iter(sides), texts):
            blocks.append(block)
            progress(len(block))
    scores = np.concatenate(blocks)
    del blocks
    scored = time.perf_counter()
    exact = recall_at_k(scores, positives)
    print(
        json.dumps(
            {
                "benchmark": "exact", "seconds_to_score": round(scored - started, 1),
                "seconds_of_figures": round(time.perf_counter() - scored, 1), "mib_before": inputs,
                "mib_at_most": peak_mib(), "of_that_the_scores_mib": scores.nbytes // 2**20, **rounded(exact), **common,
            }
        ), flush=True,
    )  # fmt: skip
    for length in args.shortlist:
        started = time.perf_counter()
        listed = shortlist(unconditioned, texts.embedding, length)
        first = time.perf_counter()
        pairs = listed.pairs()
        second = rescore(iter(sides), texts, pairs)
        seconds = time.perf_counter() - first
        agrees = np.abs(second - scores)[pairs].max()
        own, best = listed.of_images(), scores == scores.max(axis=1, keepdims=True)
        print(
            json.dumps(
                {
                    "benchmark": "two stages", "shortlist": length, "rescored_share": round(float(pairs.mean()), 5),
                    "seconds_of_shortlist": round(first - started, 1), "seconds_of_rescoring": round(seconds, 1),
                    "largest_difference_from_exact": float(f"{agrees:.1e}"),
                    "image_to_text_best_in_shortlist": round(float((best & own).any(axis=1).mean()), 4),
                    **rounded(recall_at_k(second, positives)), **common,
                }
            ), flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
