"""Where an array lies while a program computes: told to the compiler, or moved there where sharding is a type."""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec


def explicit(spec: PartitionSpec) -> PartitionSpec | None:
    """Return `spec` where the axes of the mesh in context are Explicit, None where the compiler chooses."""
    return free(spec) if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types else None


def free(spec: PartitionSpec) -> PartitionSpec:
    """Return `spec` without the mesh axes over which the program is already written per device (`per_device`)."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if not manual:
        return spec

    def left(entry: Any) -> Any:
        if isinstance(entry, tuple):
            return tuple(axis for axis in entry if axis not in manual) or None
        return None if entry in manual else entry

    return PartitionSpec(*map(left, spec))


def constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Return `x` with sharding `spec` on the mesh in context; unchanged if there is none (one device, no mesh).

    On Explicit mesh axes nothing moves: an `x` of another sharding raises.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, free(spec))


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the axes of the mesh in context that split what a spec's entry says: those of more than one device."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return tuple(axis for axis in ((entry,) if isinstance(entry, str) else entry or ()) if sizes.get(axis, 1) > 1)


def ways_of(entry: str | tuple[str, ...] | None) -> int:
    """Return into how many pieces the mesh in context splits what a spec's entry says; 1 if there is none."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return prod(sizes[axis] for axis in axes_of(entry))


def moves(lies: PartitionSpec, used: PartitionSpec) -> bool:
    """Whether what lies as one spec says must be moved, or on Explicit mesh axes be retyped, to lie as the other."""
    if explicit(lies) is not None:
        return lies != used
    return any(axes_of(a) != axes_of(b) for a, b in zip(lies, used, strict=True))


def whole(x: jax.Array, *entries: tuple[str, ...]) -> jax.Array:
    """Return `x`, part of a parameter, ready for elementwise use with an activation.

    A parameter's `d` may be split over the mesh axis that splits an activation's `b`. On Explicit mesh axes that is a
    type error, so `x` is made whole on every device, but for its first axes where they have `entries`; elsewhere the
    compiler chooses.
    """
    spec = explicit(PartitionSpec(*entries))
    return x if spec is None else jax.sharding.reshard(x, spec)


def place(array: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Return `array` split as `spec` says, moved there on Explicit mesh axes, too."""
    told = explicit(spec)
    if told is None:
        return constrain(array, spec)
    return array if jax.typeof(array).sharding.spec == told else jax.sharding.reshard(array, told)


def reshape(array: jax.Array, shape: tuple[int, ...], spec: PartitionSpec) -> jax.Array:
    """Return `array` in another shape; `spec` is its sharding, which only Explicit mesh axes need."""
    return jax.lax.reshape(array, shape, out_sharding=explicit(spec))


def split(parts: Any, spec: PartitionSpec) -> Any:
    """Return arrays of one shape, codes and scales, split as `spec` says; where a scale is shared nothing is split."""

    def move(array: jax.Array) -> jax.Array:
        entries = zip(array.shape, spec, strict=True)
        return place(array, PartitionSpec(*(None if size == 1 else entry for size, entry in entries)))

    return jax.tree.map(move, parts)


def whole_layers(weights: Any) -> Any:
    """Return stacked weights as a scan over their leading axis takes them: whole in it, where sharding is a type."""

    def whole(x: jax.Array) -> jax.Array:
        return jax.sharding.reshard(x, PartitionSpec(None, *jax.typeof(x).sharding.spec[1:]))

    return weights if explicit(PartitionSpec()) is None else jax.tree.map(whole, weights)


def per_device(
    function: Callable[..., Any], inputs: Sequence[Any], outputs: Any, axes: Sequence[str] | None = None
) -> Callable[..., Any]:
    """Return `function` as each device of the mesh in context calls it, with what it holds; itself if there is none.

    `inputs`, `outputs`: shardings of the arguments, and of what is returned; of an argument that is a tree a sharding
    for all its leaves. `axes`: mesh axes that it is about, all if None; over the others arrays stay whole and the
    compiler splits them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function
    names = set(mesh.axis_names if axes is None else axes) - set(mesh.manual_axes)
    inputs, outputs = jax.tree.map(free, (tuple(inputs), outputs))
    mapped = jax.shard_map(function, in_specs=inputs, out_specs=outputs, axis_names=names, check_vma=False)

    def call(*arguments: Any) -> Any:
        return mapped(*jax.tree.map(lambda spec, x: jax.tree.map(partial(place, spec=spec), x), inputs, arguments))

    return call if axes is None else mapped
