"""From the parameters of one model to those of another configuration: what is copied, resampled, or made new.

A model with one vector an image (CLIP, SigLIP) becomes a Llip that scores every pair as the model did. Its K mixture
tokens are copies of the class token, which together count as one in the tower's attention
(``model.vision.token_weight`` = 1/K), so that each of them comes out as the class token would. Value and output
projection are the old projection and the identity: whatever the mixing weights, the mixture is the old embedding. The
copies differ in a random key bias, so that texts choose among them from the first step on, give them different
gradients, and they part. (A learned average begins with random weights instead, which differ from head to head.)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jaxtyping import Array, Float

from llip_jax.config import Config, ConfigError
from llip_jax.config_files import merged
from llip_jax.models.dual_encoder import DualEncoder, abstract_model

COPIES = 16
"""Mixture tokens made of a class token where nothing says how many. (The paper's 64 double a B/32 tower's tokens.)"""

LONG_CLIP_KEPT = 20
"""Text positions that stretching leaves as they are: most captions end before (arXiv 2403.15378, section 3.1)."""

_ONE_VECTOR = "class_token"
"""The pooler that all others may start from."""


@dataclass(frozen=True)
class Adapted:
    """Parameters for another configuration, and for each path how they came about."""

    params: dict[str, Any]
    origin: dict[str, str]
    dropped: tuple[str, ...]

    def summary(self) -> str:
        """How many parameters came about how, in words."""
        changed = [f"{path} {how}" for path, how in self.origin.items() if how != "copied"]
        copied = f"{len(self.origin) - len(changed)} of {len(self.origin)} parameters copied"
        return "; ".join([copied, *changed, *(f"{path} dropped" for path in self.dropped)])


def adapted_config(raw: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """A raw configuration whose gaps are filled from a source of weights (Weights.config).

    Where a class token becomes several tokens by copying, what makes the first scores equal to the source's is filled
    in too: ``model.vision.token_weight`` and ``model.mixer_key_bias``.

    Raises:
        ConfigError: mixture tokens for a model that has none.
    """
    whole = merged(source, raw)
    model, own = whole["model"], raw.get("model", {})
    several = model.get("pooler", "mixer") != _ONE_VECTOR
    if not several and own.get("mixture_tokens", 1) != 1:
        raise ConfigError(
            f"model.mixture_tokens={own['mixture_tokens']} has no effect with model.pooler={model['pooler']!r}, the "
            "source's; expected model.pooler='mixer' beside it"
        )
    copies = raw.get("init", {}).get("tokens", "copies") == "copies"
    if several and copies and source["model"].get("pooler") == _ONE_VECTOR:
        # What the source says of these is of its one token.
        own_vision = own.get("vision", {})
        if "mixture_tokens" not in own:
            model["mixture_tokens"] = COPIES
        if "mixer_key_bias" not in own:
            model["mixer_key_bias"] = model["pooler"] == "mixer"
        tokens = model["mixture_tokens"]
        if "token_weight" not in own_vision and isinstance(tokens, int) and tokens > 0:
            in_sequence = model["vision"].get("pooling", "tokens") == "tokens"
            model["vision"]["token_weight"] = 1 / tokens if in_sequence else 1.0
    return whole


def adapt(params: Mapping[str, Any], source: Config, target: Config) -> Adapted:
    """Parameters of the model ``target`` from those of the model ``source``.

    Copied where path and shape agree; positions are resampled (:func:`resample_grid`, :func:`stretch`); tokens and
    pooler by ``target.init``. New parameters are drawn as in training from random ones, by ``target.seed``.

    Raises:
        ConfigError: parameters that fit neither way; all are listed.
    """
    check_fit(params, source, target)
    old, wanted = traverse_util.flatten_dict(params, sep="/"), _shapes(target)
    new_pooler = source.model.pooler != target.model.pooler
    made: dict[str, np.ndarray] = {}
    origin: dict[str, str] = {}
    for path, shape in wanted.items():
        found = old.get(path)
        if new_pooler and path == "vision/tokens":
            continue  # made below: noise and fresh tokens are random
        if found is not None and found.shape == shape:
            made[path], origin[path] = found, "copied"
        elif found is not None:
            made[path], origin[path] = _RESAMPLED[path](found, shape[0])
        elif path in ("pooler/value", "pooler/output"):
            made[path], origin[path] = _projection(path, old.get("pooler/image"), shape)
    dropped = old.keys() - wanted.keys() - ({"pooler/image"} if "pooler/value" in made else set())
    fresh = _fresh(target, wanted.keys() - made.keys())
    if "vision/tokens" in fresh:
        fresh["vision/tokens"], origin["vision/tokens"] = _tokens(old["vision/tokens"], fresh["vision/tokens"], target)
    if "pooler/logits" in fresh:  # whose initial zeros would give equal tokens equal gradients
        shape = fresh["pooler/logits"].shape
        fresh["pooler/logits"] = np.random.default_rng(target.seed).normal(size=shape).astype(np.float32)
    for path in fresh:
        origin.setdefault(path, "new")
    return Adapted(
        traverse_util.unflatten_dict(made | fresh, sep="/"),
        {path: origin[path] for path in wanted},
        tuple(sorted(dropped)),
    )


def check_fit(params: Mapping[str, Any], source: Config, target: Config) -> None:
    """Whether :func:`adapt` can do its work; makes nothing.

    Raises:
        ConfigError: parameters that fit neither way; all are listed.
    """
    old, wanted = traverse_util.flatten_dict(params, sep="/"), _shapes(target)
    pooler = target.model.pooler
    new_pooler = source.model.pooler != pooler
    if new_pooler and source.model.pooler != _ONE_VECTOR:
        raise ConfigError(
            f"model.pooler: weights with pooler {source.model.pooler!r} cannot become {pooler!r}; expected the same, "
            f"or weights with pooler {_ONE_VECTOR!r}"
        )
    if new_pooler and pooler == "registers" and target.init.tokens == "copies":
        raise ConfigError("init.tokens: 'copies' is not valid for registers, which would stay equal; expected 'fresh'")
    problems = []
    for path, shape in wanted.items():
        may_change = path in _RESAMPLED or (new_pooler and path == "vision/tokens")
        may_be_new = path in _MAY_COME_OR_GO or (new_pooler and path.startswith("pooler/"))
        if path in old and old[path].shape != shape and not may_change:
            problems.append(f"  {path}: {list(old[path].shape)} in the weights, {list(shape)} in the configuration")
        elif path not in old and not may_be_new:
            problems.append(f"  {path} {list(shape)}: only in the configuration")
    left = old.keys() - wanted.keys() - {*_MAY_COME_OR_GO} - ({"pooler/image"} if new_pooler else set())
    problems += [f"  {path} {list(old[path].shape)}: only in the weights" for path in sorted(left)]
    if problems:
        raise ConfigError("the weights do not fit the configuration:\n" + "\n".join(problems))


def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    params = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(abstract_model(config), nnx.Param)), sep="/")
    return {path: x.shape for path, x in params.items()}


def _tokens(class_token: np.ndarray, fresh: np.ndarray, target: Config) -> tuple[np.ndarray, str]:
    count = len(fresh)
    if target.init.tokens == "fresh":
        return np.concatenate([class_token, fresh[1:]]), f"class token and {count - 1} new"
    tokens = np.repeat(class_token, count, axis=0)
    if not target.init.token_noise:
        return tokens, f"{count} copies of the class token"
    noise = np.random.default_rng(target.seed).normal(size=tokens.shape) * target.init.token_noise * class_token.std()
    return (tokens + noise).astype(np.float32), f"{count} copies of the class token, with noise"


def _projection(path: str, image: np.ndarray | None, shape: tuple[int, ...]) -> tuple[np.ndarray, str]:
    if path == "pooler/output":
        return np.eye(shape[0], dtype=np.float32), "identity"
    if image is None:  # SigLIP: the tower's width is the joint one
        return np.eye(shape[0], dtype=np.float32).reshape(shape), "identity"
    return image.reshape(shape), "the image projection"


def _fresh(config: Config, paths: set[str]) -> dict[str, np.ndarray]:
    """Initial values of some parameters; the compiler drops the others."""

    def draw() -> dict[str, Array]:
        params = nnx.to_pure_dict(nnx.state(DualEncoder(config, rngs=nnx.Rngs(config.seed)), nnx.Param))
        return {path: x for path, x in traverse_util.flatten_dict(params, sep="/").items() if path in paths}

    if not paths:
        return {}
    # Runs once: see llip_jax.training.state.init_state.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return {path: np.asarray(x) for path, x in jax.jit(draw, compiler_options=options)().items()}


def resample_grid(positions: Float[np.ndarray, "P D"], patches: int) -> Float[np.ndarray, "patches D"]:
    """Position embeddings of a square grid, for another one: antialiased bicubic, as OpenCLIP does.

    Raises:
        ConfigError: one of the grids is not square.
    """
    old, new = (round(count**0.5) for count in (len(positions), patches))
    if old**2 != len(positions) or new**2 != patches:
        raise ConfigError(f"model.image_size: cannot resample {len(positions)} positions to {patches}: not both square")
    grid = positions.reshape(old, old, -1)
    resized = jax.image.resize(jnp.asarray(grid), (new, new, grid.shape[-1]), "cubic", antialias=True)
    return np.asarray(resized).reshape(patches, -1)


def stretch(positions: Float[np.ndarray, "L D"], length: int) -> Float[np.ndarray, "length D"]:
    """Text positions for another length: cut, or stretched by Long-CLIP's rule (arXiv 2403.15378, section 3.1).

    The first ``LONG_CLIP_KEPT`` stay as they are; the others are interpolated linearly, the last ones go on in line.
    """
    old = len(positions)
    if length <= old:
        return positions[:length]
    kept = min(LONG_CLIP_KEPT, old - 2)
    # In float64 and rounded once: where a new position falls on an old one it is that one, bit by bit.
    at = kept + np.arange(length - kept) * (old - kept) / (length - kept)
    below = np.minimum(at.astype(int), old - 2)
    share = (at - below)[:, None]
    wide = positions.astype(np.float64)
    return np.concatenate([positions[:kept], (wide[below] * (1 - share) + wide[below + 1] * share)]).astype(np.float32)


def _resampled_grid(positions: np.ndarray, count: int) -> tuple[np.ndarray, str]:
    old, new = (round(n**0.5) for n in (len(positions), count))
    return resample_grid(positions, count), f"resampled from {old} x {old} to {new} x {new}"


def _stretched(positions: np.ndarray, count: int) -> tuple[np.ndarray, str]:
    how = "cut" if count < len(positions) else "stretched"
    return stretch(positions, count), f"{how} from {len(positions)} to {count}"


_RESAMPLED: dict[str, Callable[[np.ndarray, int], tuple[np.ndarray, str]]] = {
    "vision/positions": _resampled_grid,
    "text/positions": _stretched,
}
_MAY_COME_OR_GO = ("bias",)
"""The logit bias."""
