"""Rules that tie another library's arrays to our parameters, both ways.

A :class:`Rule` says how some of their arrays are written from some of ours and how ours are read from theirs. Reading
what was written gives the same numbers. ``{}`` in their names is a layer's, which is the first axis of ours.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx, traverse_util
from jaxtyping import Float

from llip_jax.config import Config, ConfigError
from llip_jax.models.dual_encoder import abstract_model
from llip_jax.models.sizes import model_shape

Array = Float[np.ndarray, "..."]
Shape = tuple[int, ...]

_LAYER = re.compile(r"(\.|block_)\d+")
"""Where names have the number of a layer."""


@dataclass(frozen=True)
class View:
    """One array as they and as we lay it out. ``read`` is told our shape."""

    write: Callable[[Array], Array]
    read: Callable[[Array, Shape], Array]


@dataclass(frozen=True)
class Rule:
    """Their names and our paths; ``write`` and ``read`` have arrays in these orders, one layer at a time if stacked."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    write: Callable[[Sequence[Array]], Sequence[Array]]
    read: Callable[[Sequence[Array], Sequence[Shape]], Sequence[Array]]

    @property
    def stacked(self) -> bool:
        """Whether our arrays have a leading axis of layers."""
        return "{}" in self.theirs[0]


def linear(inputs: int = 1) -> View:
    """A torch.nn.Linear, [out, in]; in ours ``inputs`` axes in front are the input's, the others the output's."""
    return View(
        lambda x: x.reshape(int(np.prod(x.shape[:inputs])), -1).T,
        lambda x, shape: x.T.reshape(shape),
    )


def _read_reshaped(x: Array, shape: Shape) -> Array:
    return x.reshape(shape)


SAME = View(lambda x: x, _read_reshaped)
FLAT = View(lambda x: x.reshape(-1), _read_reshaped)
"""One axis: biases of attention heads, and scalars that they keep as one-element vectors."""
BATCHED = View(lambda x: x[None], _read_reshaped)
"""A leading axis of one."""


def _patch_side(kernel: Array) -> int:
    return round((kernel.shape[0] / 3) ** 0.5)


CONVOLUTION = View(
    lambda x: x.reshape(_patch_side(x), _patch_side(x), 3, -1).transpose(3, 2, 0, 1),
    lambda x, shape: x.transpose(2, 3, 1, 0).reshape(shape),
)
"""The patch embedding as a torch convolution, [out, channel, row, column]; ours is [row * column * channel, out]."""


def tie(theirs: str, ours: str, view: View = SAME) -> Rule:
    """One array of theirs is one of ours."""
    return Rule((theirs,), (ours,), lambda x: [view.write(x[0])], lambda x, shapes: [view.read(x[0], shapes[0])])


def stack(theirs: Sequence[str], ours: str, axis: int, view: View = SAME) -> Rule:
    """One array of ours is several of theirs, stacked along an axis of its own (queries, keys and values)."""

    def write(arrays: Sequence[Array]) -> list[Array]:
        return [view.write(piece) for piece in np.moveaxis(arrays[0], axis, 0)]

    def read(arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        piece = shapes[0][:axis] + shapes[0][axis + 1 :]
        return [np.stack([view.read(x, piece) for x in arrays], axis)]

    return Rule(tuple(theirs), (ours,), write, read)


def concatenate(theirs: str, ours: Sequence[str], view: View) -> Rule:
    """One array of theirs is several of ours, below each other along its first axis."""

    def write(arrays: Sequence[Array]) -> list[Array]:
        return [np.concatenate([view.write(x) for x in arrays])]

    def read(arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        rows = [len(view.write(_placeholder(shape))) for shape in shapes]
        pieces = np.split(arrays[0], np.cumsum(rows)[:-1])
        return [view.read(x, shape) for x, shape in zip(pieces, shapes, strict=True)]

    return Rule((theirs,), tuple(ours), write, read)


def class_token(token: str, positions: str) -> Rule:
    """CLIP's class token [D] and positions [1 + P, D]; ours is the sum of the token and its position (VisionTower)."""

    def write(arrays: Sequence[Array]) -> list[Array]:
        return [arrays[0][0], np.concatenate([np.zeros_like(arrays[0]), arrays[1]])]

    def read(arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        return [(arrays[0] + arrays[1][0])[None], arrays[1][1:]]

    return Rule((token, positions), ("vision/tokens", "vision/positions"), write, read)


def norm(theirs: str, ours: str) -> list[Rule]:
    """A torch.nn.LayerNorm."""
    return [tie(f"{theirs}.weight", f"{ours}/scale"), tie(f"{theirs}.bias", f"{ours}/bias")]


def dense(theirs: str, ours: str, inputs: int = 1) -> list[Rule]:
    """A torch.nn.Linear with its bias; see :func:`linear`."""
    return [tie(f"{theirs}.weight", ours, linear(inputs)), tie(f"{theirs}.bias", f"{ours}_bias", FLAT)]


def parameter_shapes(config: Config) -> dict[str, Shape]:
    """Shapes of all parameters of a model by path; nothing is allocated."""
    shapes = nnx.to_pure_dict(nnx.state(abstract_model(config), nnx.Param))
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items()}


def their_shapes(rules: Sequence[Rule], config: Config) -> dict[str, Shape]:
    """Shapes of all of their arrays by name, for the model that ``config`` describes."""
    shapes = parameter_shapes(config)
    return {name: x.shape for rule in rules for name, x in _write(rule, [_placeholder(shapes[p]) for p in rule.ours])}


def to_ours(
    rules: Sequence[Rule], arrays: Mapping[str, Array], config: Config, *, source: object, ignored: Collection[str] = ()
) -> dict[str, Any]:
    """Their arrays as the parameters of the model that ``config`` describes: nested, float32.

    Args:
        rules: of their names, for this configuration.
        arrays: theirs; none may be missing.
        config: its shapes are expected.
        source: where the arrays are from, for errors.
        ignored: names that may be there and hold nothing of the model.

    Raises:
        ConfigError: a model that is larger than all arrays; else lists those that are missing, left over or of a wrong
            shape.
    """
    _check_size(rules, arrays, config, source)
    shapes, expected = parameter_shapes(config), their_shapes(rules, config)
    unset = shapes.keys() - {path for rule in rules for path in rule.ours}
    found = {name: x for name, x in arrays.items() if name not in ignored}
    _refuse(
        f"{source}: the weights do not fit the model that their configuration describes",
        {
            "missing": {name: _axes(expected[name]) for name in expected.keys() - found.keys()},
            "left over": {name: _axes(found[name].shape) for name in found.keys() - expected.keys()},
            "of another shape": {
                name: f"{_axes(found[name].shape)}, expected {_axes(shape)}"
                for name, shape in expected.items()
                if name in found and found[name].shape != shape
            },
            "not floating-point": {
                name: str(x.dtype) for name, x in found.items() if not np.issubdtype(x.dtype, np.floating)
            },
            "parameters that the weights do not have": {path: _axes(shapes[path]) for path in unset},
        },
    )
    flat: dict[str, Array] = {}
    for rule in rules:
        of_rule = [shapes[path] for path in rule.ours]
        if rule.stacked:
            of_layer = [shape[1:] for shape in of_rule]
            layers = [
                rule.read([found[name.format(layer)] for name in rule.theirs], of_layer)
                for layer in range(of_rule[0][0])
            ]
            values: Sequence[Array] = [np.stack(of_path) for of_path in zip(*layers, strict=True)]
        else:
            values = rule.read([found[name] for name in rule.theirs], of_rule)
        flat |= zip(rule.ours, values, strict=True)
    return traverse_util.unflatten_dict({path: np.asarray(x, np.float32) for path, x in flat.items()}, sep="/")


def to_theirs(rules: Sequence[Rule], params: Mapping[str, Any]) -> dict[str, Array]:
    """Our parameters as their arrays: float32, contiguous.

    Raises:
        ConfigError: lists all parameters that are missing or have no place among theirs.
    """
    flat = {path: np.asarray(x) for path, x in traverse_util.flatten_dict(dict(params), sep="/").items()}
    known = {path for rule in rules for path in rule.ours}
    _refuse(
        "the parameters do not fit the format",
        {
            "missing": dict.fromkeys(known - flat.keys(), ""),
            "without a place": {path: _axes(flat[path].shape) for path in flat.keys() - known},
        },
    )
    return {
        name: np.asarray(x, np.float32, order="C")
        for rule in rules
        for name, x in _write(rule, [flat[path] for path in rule.ours])
    }


def _write(rule: Rule, arrays: Sequence[Array]) -> list[tuple[str, Array]]:
    """Their arrays by name, layer by layer where stacked."""
    if not rule.stacked:
        return list(zip(rule.theirs, rule.write(arrays), strict=True))
    return [
        (name.format(layer), x)
        for layer, of_layer in enumerate(zip(*arrays, strict=True))
        for name, x in zip(rule.theirs, rule.write(of_layer), strict=True)
    ]


def _placeholder(shape: Shape) -> Array:
    """An array of a shape, all of it one byte."""
    return np.broadcast_to(np.zeros((), bool), shape)


def _check_size(rules: Sequence[Rule], arrays: Mapping[str, Array], config: Config, source: object) -> None:
    """Refuses a configuration of more than the arrays hold, before anything of its size is made."""
    model, shape, vocabulary = config.model, model_shape(config.model), config.data.tokenizer.vocabulary_size
    vision, text, held = shape.vision, shape.text, sum(x.size for x in arrays.values())
    least = {  # Numbers that the parameters of a field are at least.
        f"model.text={text}": text.layers * text.width * (text.width + text.mlp),
        f"model.text.length={model.text.length}": model.text.length * text.width,
        f"data.tokenizer.vocabulary_size={vocabulary}": vocabulary * text.width,
        f"model.embed_dim={shape.embed_dim}": shape.embed_dim * text.width,
        f"model.mixture_tokens={model.mixture_tokens}": model.mixture_tokens * vision.width,
    }
    if model.vision.big_vision is None:
        least |= {
            f"model.vision={vision}": vision.layers * vision.width * (vision.width + vision.mlp),
            f"model.vision.patch={shape.patch}": 3 * shape.patch**2 * vision.width,
            f"model.image_size={model.image_size}": (model.image_size // shape.patch) ** 2 * vision.width,
        }
    excess = [field for field, numbers in least.items() if numbers > held]
    if any(rule.stacked for rule in rules):
        layers = {"vision": vision.layers, "text": text.layers}
        excess += [f"model.{tower}.layers={n}" for tower, n in layers.items() if n > len(arrays)]
    if excess:
        raise ConfigError(
            f"{source}: the configuration asks for more than its {len(arrays)} arrays of {held:,} numbers can hold: "
            + "; ".join(excess)
        )


def _axes(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _refuse(subject: str, problems: Mapping[str, Mapping[str, str]]) -> None:
    """Raises ConfigError if there is any problem; layers with the same one share a line."""
    lines = []
    for problem, names in problems.items():
        groups: dict[tuple[str, str], list[str]] = {}
        for name, detail in sorted(names.items()):
            groups.setdefault((_LAYER.sub(r"\1*", name), detail), []).append(name)
        for (pattern, detail), members in groups.items():
            name = members[0] if len(members) == 1 else f"{pattern} ({len(members)} of them)"
            lines.append(f"  {problem}: {name} {detail}".rstrip())
    if lines:
        raise ConfigError("\n".join([f"{subject}:", *lines]))
