"""Planted misaligned words: does the attribution of a caption's words find the one that was made wrong?

    python benchmarks/token_attribution.py runs/a runs/b > attribution.jsonl

For every image of a ToyWorld run's evaluation split: one of its captions with a colour, and the same caption with
that colour word replaced by the word for a colour that is nowhere in the picture. One JSON line for each run, for
colours of objects and of backgrounds, and for gradients through the mixing queries too and through the target alone:

- ``found``: how often the word has the lowest attribution of its caption once it is wrong; ``found_true``: how often
  while it is still true; ``chance``: one over the number of words.
- ``auroc``: how well the word's attribution tells the wrong captions from the true ones; ``auroc_cosine``: how well
  the score of the whole pair does. Chance is 0.5.

Colours of backgrounds are found less often than the cosine would let one hope: an attribution is a slope at the caption
as it stands, not what the score loses by the word, and in these models "background" beside the colour often has the
lowest one.
"""

import argparse
import json
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

import llip_jax
from llip_jax.data.toyworld import ToyWorld
from llip_jax.data.toyworld_captions import COLOUR_WORDS
from llip_jax.evaluation.diagnostics.attribution import Words, attribute_words, f_clip_score
from llip_jax.models.dual_encoder import abstract_model

_COLOURS = {word for words in COLOUR_WORDS.values() for word in words}


class Planted(NamedTuple):
    """A caption and the same with its word ``at`` replaced."""

    image: int
    true: str
    wrong: str
    at: int
    kind: str


def planted_words(world: ToyWorld, seed: int = 0) -> list[Planted]:
    """At most one an image."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(len(world)):
        record = world[index]
        present = {record.fields["background"], *(group["colour"] for group in record.fields["groups"])}
        absent = sorted(COLOUR_WORDS.keys() - present)
        for caption in record.captions:
            words = caption.split()
            # No new colour follows "an".
            places = [k for k, word in enumerate(words) if word.rstrip(",") in _COLOURS and words[k - 1] != "an"]
            if places and len(words) > 3:
                at = int(rng.choice(places))
                comma = "," * words[at].endswith(",")
                wrong = [*words[:at], COLOUR_WORDS[rng.choice(absent)][0] + comma, *words[at + 1 :]]
                kind = (
                    "background" if words[at + 1 :][:1] in (["background"], ["background,"], ["backdrop"]) else "object"
                )
                found.append(Planted(index, caption, " ".join(wrong), at, kind))
                break
    return found


def measure(run: str, through_queries: bool) -> list[dict[str, Any]]:
    """Lines of one run."""
    model = llip_jax.load(run)
    config = model.config
    world = ToyWorld(config.data.toyworld, "eval", config.model.image_size)
    planted = planted_words(world)
    images = np.stack([world[each.image].image for each in planted])
    graph = nnx.split(abstract_model(model.computing), nnx.Param)[0]

    def attributed(texts: list[str]) -> list[Words]:
        return attribute_words(
            graph,
            model.params,
            images,
            texts,
            model.tokenizer,
            config.model.text.length,
            through_queries=through_queries,
            batch_size=128,
        )

    true, wrong = attributed([each.true for each in planted]), attributed([each.wrong for each in planted])
    lines = []
    for kind in ("object", "background"):
        # Where a caption was cut off before the word, or words were joined, there is nothing to be found.
        rows = [
            row
            for row, each in enumerate(planted)
            if each.kind == kind and len(true[row].words) == len(wrong[row].words) == len(each.true.split())
        ]
        of_true, of_wrong = (
            np.array([pairs[row].words[planted[row].at][1] for row in rows]) for pairs in (true, wrong)
        )
        lines.append(
            {
                "run": run,
                "colour_of": kind,
                "through_queries": through_queries,
                "captions": len(rows),
                "found": float(np.mean([_lowest(wrong[row]) == planted[row].at for row in rows])),
                "found_true": float(np.mean([_lowest(true[row]) == planted[row].at for row in rows])),
                "chance": float(np.mean([1 / len(true[row].words) for row in rows])),
                "auroc": auroc(of_true, of_wrong),
                "auroc_cosine": auroc(*(np.array([p[row].cosine for row in rows]) for p in (true, wrong))),
                "auroc_f_clip_score": auroc(*(np.array([f_clip_score(p[row]) for row in rows]) for p in (true, wrong))),
            }
        )
    return lines


def auroc(above: np.ndarray, below: np.ndarray) -> float:
    """How often one of ``above`` is larger than one of ``below``, ties half."""
    return float(np.mean((np.sign(np.subtract.outer(above, below)) + 1) / 2))


def _lowest(pair: Words) -> int:
    return int(np.argmin([attribution for _, attribution in pair.words]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run directories of ToyWorld models")
    about = {
        "llip_jax": version("llip_jax"),
        "jax": version("jax"),
        "device": jax.default_backend(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    for run in parser.parse_args().runs:
        for through_queries in (True, False):
            for line in measure(run, through_queries):
                print(json.dumps(line | about))
                sys.stdout.flush()


if __name__ == "__main__":
    main()
