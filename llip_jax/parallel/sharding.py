"""Logical-axis rules: which mesh axis divides which array dimension.

Parameters name their dimensions (``axes`` of a Param, e.g. ("embed", "mlp")). Two tables say where a dimension lives:
one for parameters at rest (divided over ``fsdp`` and ``tensor``, with the optimizer state beside them) and one for
parameters in use (gathered over ``fsdp``). The gather before use is written in :func:`in_use`, not left to the
compiler, which otherwise may move whole activations instead.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

Tree = TypeVar("Tree")
Axes = Sequence[str | None]
Rules = Mapping[str, str | tuple[str, ...]]

AT_REST: Rules = {"embed": "fsdp", "mlp": "tensor", "heads": "tensor", "vocab": "tensor"}
IN_USE: Rules = {"mlp": "tensor", "heads": "tensor"}
ACTIVATIONS: Rules = {"batch": ("data", "fsdp"), "mlp": "tensor", "heads": "tensor"}


def partition_spec(shape: Sequence[int], axes: Axes, rules: Rules, mesh_shape: Mapping[str, int]) -> PartitionSpec:
    """Where an array with named dimensions lives on the mesh.

    A dimension that its mesh axis does not divide stays whole. Leading dimensions without a name (the stack of
    layers) stay whole too.
    """
    axes = (None,) * (len(shape) - len(axes)) + tuple(axes)
    spec = []
    for size, name in zip(shape, axes, strict=True):
        target = rules.get(name) if name is not None else None
        names = (target,) if isinstance(target, str) else target or ()
        divides = names and size % math.prod(mesh_shape[n] for n in names) == 0
        spec.append(target if divides else None)
    return PartitionSpec(*spec)


def constrain(x: Array, *axes: str | None) -> Array:
    """Pins an activation to the mesh in use; without a mesh (plain function calls) it changes nothing."""
    return _pin(x, axes, ACTIVATIONS)


def whole(tree: Tree) -> Tree:
    """Pins every array of a tree to be whole on each device of the mesh in use, and so in each process."""
    return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), tree)


def row_axes(mesh_shape: Mapping[str, int], *counts: int) -> tuple[str, ...]:
    """The mesh axes over which computation on rows may be divided where nothing else uses ``tensor``.

    The batch axes, and ``tensor`` too where together they divide all of the row counts; none where they do not.
    """
    batch = ACTIVATIONS["batch"]
    assert isinstance(batch, tuple)
    for axes in ((*batch, "tensor"), batch):
        if mesh_shape and all(count % math.prod(mesh_shape[axis] for axis in axes) == 0 for count in counts):
            return axes
    return ()


def by_rows(function: Callable[[Array, Array], Array], rows: Array, shared: Array) -> Array:
    """``function(rows, shared)`` on each device's own rows, where it treats every row alike and loops over them."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = row_axes(mesh.shape, len(rows))
    if not axes or mesh.manual_axes:  # no mesh, or on one device's rows already
        return function(rows, shared)
    divided, whole = PartitionSpec(axes), PartitionSpec()
    return jax.shard_map(function, in_specs=(divided, whole), out_specs=divided, check_vma=False)(rows, shared)


def in_use(parameter: nnx.Param, dtype: Any) -> Array:
    """A parameter as computation needs it: cast to the compute type, then gathered over ``fsdp``.

    Its gradient goes the other way: summed over devices and divided among them at once (a reduce-scatter), then cast to
    the parameter's type. This is ZeRO-3 (arXiv 1910.02054) where the mesh has an axis ``fsdp``.
    """
    return _gathered(parameter[...], tuple(parameter.get_metadata()["axes"]), dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(x: Array, axes: Axes, dtype: Any) -> Array:
    return _pin(x.astype(dtype), axes, IN_USE)


def _scattered(axes: Axes, dtype: Any, like: Array, gradient: Array) -> tuple[Array]:
    # Left to itself, the gradient of a pin is pinned alike: summed whole on every device, and only then divided.
    if "vocab" in axes:  # as that of a table must be: to add rows up in pieces, whole activations would be exchanged
        gradient = _pin(gradient, axes, IN_USE)
    return (_pin(gradient, axes, AT_REST).astype(like.dtype),)


_gathered.defvjp(lambda x, axes, dtype: (_gathered(x, axes, dtype), jnp.empty(0, x.dtype)), _scattered)


def _pin(x: Array, axes: Axes, rules: Rules) -> Array:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(x.shape, axes, rules, mesh.shape))


def parameter_specs(params: nnx.State, mesh: Mesh) -> dict[str, Any]:
    """PartitionSpec of every parameter at rest, as a nested dict like ``nnx.to_pure_dict(params)``."""

    def spec(_: Any, variable: nnx.Variable) -> PartitionSpec:
        axes = variable.get_metadata().get("axes", ())
        return partition_spec(variable.shape, axes, AT_REST, mesh.shape)

    return nnx.to_pure_dict(nnx.map_state(spec, params))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of host batches: rows over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
