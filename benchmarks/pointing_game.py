"""Do maps point at what a caption names? ToyWorld scenes with several groups of objects, of which it names one.

    python benchmarks/pointing_game.py RUN [RUN ...] >> benchmarks/results/pointing_game.jsonl

RUN: trained on ToyWorld with ``data.toyworld.groups=2`` or more. Each group of an evaluation scene is named by its
colour and shape, which no other group of the scene has ("a red circle"). Accuracy: how often the map's highest patch
shows a pixel of the named group; patches that tie share the hit. All methods see the same images and captions:

- ``caption``: evaluation.maps.caption_maps, what is shipped;
- ``uncaptioned``: evaluation.maps.uncaptioned_maps, one map for all captions of an image;
- ``alike``: caption_maps with the mixture tokens weighted alike: the caption's direction without its mixture;
- ``rollout``: the mixing weights on the tokens' attention rolled out (arXiv 2005.00928): its mixture alone;
- ``occlusion``: what the score loses when a patch is painted over: what the score itself knows of places.

``chance``: the share of patches that show the named group. ``erased``: how often the score loses more when the named
group is painted over than when any other is. One JSON line a run.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from llip_jax import Model, Texts, load
from llip_jax.config import Config, ConfigError
from llip_jax.data.toyworld import ToyWorld
from llip_jax.data.toyworld_captions import describe
from llip_jax.data.toyworld_render import COLOURS
from llip_jax.evaluation.figures import Outcome, figures_of, intervals, paired_difference
from llip_jax.models.dual_encoder import abstract_model
from llip_jax.ops.pair_scores import TextSide, mixing_weights
from llip_jax.training.run_directory import read_config


class Query(NamedTuple):
    """A scene and, for each of its G groups of objects, a caption that names it.

    groups: number of the group of every pixel, -1 for the background.
    shows: whether a patch has a pixel of the group.
    """

    image: UInt8[np.ndarray, "H W 3"]
    background: tuple[int, int, int]
    captions: list[str]
    groups: Int[np.ndarray, "H W"]
    shows: Bool[np.ndarray, "G height width"]


def queries(config: Config, patch: int, images: int) -> list[Query]:
    """From the run's evaluation scenes; the captions' words are drawn anew."""
    world = ToyWorld(config.data.toyworld, "eval", config.model.image_size)
    return [query(world, index, patch) for index in range(min(images, len(world)))]


def query(world: ToyWorld, index: int, patch: int) -> Query:
    scene, rng = world.scene(index), Random(f"pointing game/{index}")
    alone = [
        replace(scene, groups=(group,), corners=(corners,))
        for group, corners in zip(scene.groups, scene.corners, strict=True)
    ]
    captions = [describe(one, {"colour", "shape"}, rng) for one in alone]
    group_of = np.repeat(np.arange(len(alone)), [group.count for group in scene.groups])
    groups = np.where(scene.masks >= 0, group_of[scene.masks], -1)
    side = len(groups) // patch
    by_patch = groups.reshape(side, patch, side, patch)
    shows = np.stack([(by_patch == number).any(axis=(1, 3)) for number in range(len(alone))])
    return Query(np.asarray(world[index].image), COLOURS[scene.background], captions, groups, shows)


def hits(
    maps: Float[np.ndarray, "G height width"], shows: Bool[np.ndarray, "G height width"]
) -> Float[np.ndarray, "G"]:
    """Chance that a patch drawn from the highest ones of each map shows the group."""
    highest = maps == maps.max(axis=(1, 2), keepdims=True)
    return (highest & shows).sum(axis=(1, 2)) / highest.sum(axis=(1, 2))


def alike(model: Model, query: Query) -> Float[np.ndarray, "G height width"]:
    texts = model.encode_text(query.captions)
    if texts.queries is None:
        raise ConfigError(f"expected a run whose model mixes tokens, got the pooler {model.config.model.pooler!r}")
    return model.maps(query.image, Texts(texts.embedding, np.zeros_like(texts.queries)))[0]


def rollout(function: Callable[..., Array], model: Model, query: Query) -> Float[np.ndarray, "G height width"]:
    texts = model.encode_text(query.captions)
    return np.asarray(function(model.params, query.image[None], TextSide(texts.embedding, texts.queries)))  # type: ignore[arg-type]


def rollout_of(config: Config) -> Callable[[Any, UInt8[Array, "1 H W 3"], TextSide], Float[Array, "G height width"]]:
    graph: Any = nnx.split(abstract_model(config), nnx.Param)[0]

    @jax.jit
    def function(params: Any, image: UInt8[Array, "1 H W 3"], texts: TextSide) -> Float[Array, "G height width"]:
        model = nnx.merge(graph, params)
        output, attention = model.vision.observed(image, model.vision.no_offsets(1))
        weights = mixing_weights(model.image_side(output), texts.queries)[0].mean(axis=1)
        tokens, rolled = weights.shape[-1], jnp.eye(attention.layers.shape[-1])
        for layer in attention.layers[:, 0].mean(axis=1):
            rolled = (layer + jnp.eye(len(layer))) / 2 @ rolled
        side = model.vision.image_size // model.vision.patch
        return (weights @ rolled[:tokens, tokens:]).reshape(-1, side, side)

    return function


def occlusion(patch: int, model: Model, query: Query) -> Float[np.ndarray, "G height width"]:
    side = len(query.image) // patch
    painted = np.broadcast_to(query.image, (side * side, *query.image.shape)).copy()
    for number in range(side * side):
        top, left = number // side * patch, number % side * patch
        painted[number, top : top + patch, left : left + patch] = query.background
    return -model.score(painted, query.captions).T.reshape(-1, side, side)  # less than the picture's own, a constant


def erased(model: Model, query: Query) -> Float[np.ndarray, "G"]:
    count = len(query.captions)
    painted = [np.where((query.groups == g)[..., None], query.background, query.image) for g in range(count)]
    left = model.score([image.astype(np.uint8) for image in painted], query.captions)  # [erased, caption]
    others = np.where(np.eye(count, dtype=bool), np.inf, left).min(axis=0)
    return (left.diagonal() < others).astype(float)


def play(run: Path, images: int, controls: bool = True) -> dict[str, Any]:
    """Figures of one run; without ``controls`` only those of what is shipped."""
    model, config = load(run), read_config(run)
    if config.data.source != "toyworld" or config.data.toyworld.groups < 2:
        raise ConfigError(f"{run}: expected a run on ToyWorld with data.toyworld.groups of 2 or 3")
    side = model.maps(np.zeros((config.model.image_size,) * 2 + (3,), np.uint8)).shape[-1]
    patch = config.model.image_size // side
    some = queries(config, patch, images)
    unit = np.repeat(np.arange(len(some)), [len(query.captions) for query in some])
    chance = np.concatenate([query.shows.mean(axis=(1, 2)) for query in some])

    def outcome(method: Callable[[Model, Query], Float[np.ndarray, "G height width"]]) -> Outcome:
        values = np.concatenate([hits(method(model, query), query.shows) for query in some])
        return Outcome(values, unit, np.ones(len(unit)), None)

    outcomes = {
        "caption": outcome(lambda model, query: model.maps(query.image, query.captions)[0]),
        "uncaptioned": outcome(lambda model, query: model.maps(query.image)[0].repeat(len(query.captions), axis=0)),
    }
    differences = {"caption_less_uncaptioned": paired_difference(outcomes["caption"], outcomes["uncaptioned"])}
    if controls:
        outcomes |= {
            "alike": outcome(alike),
            "rollout": outcome(partial(rollout, rollout_of(model.computing))),
            "occlusion": outcome(partial(occlusion, patch)),
            "erased": Outcome(np.concatenate([erased(model, query) for query in some]), unit, np.ones(len(unit)), None),
        }
        differences["caption_less_alike"] = paired_difference(outcomes["caption"], outcomes["alike"])
    return {
        "run": run.name,
        "seed": config.seed,
        "steps": config.train.steps,
        "images": len(some),
        "queries": len(unit),
        "chance": float(chance.mean()),
        **figures_of(outcomes),
        "intervals": intervals(outcomes),
        **differences,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--images", type=int, default=300)
    args = parser.parse_args()
    about = {"llip_jax": version("llip_jax"), "jax": jax.__version__, "device": jax.devices()[0].device_kind}
    for run in args.runs:
        line = {**play(run, args.images), **about, "date": datetime.now(UTC).isoformat(timespec="seconds")}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
