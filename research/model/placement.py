"""Where the arrays of an experiment lie: sharding and padding of parameters, and of all that is shaped like them.

Codes, latents, moments and gradients lie like their parameter, scales like its axes that they keep. So one function,
`layout`, tells by the path of an array how it is padded and split; checkpoints, optimizer states and exports ask it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.model.layers import tree_of
from research.model.parameters import Parameter
from research.padding import AxisPadding, Padding
from research.processes import host_array
from research.quant.grid import bytes_of
from research.quant.nodes import Encoded
from research.quant.policy import Format, path_of

Table = Mapping[str, Parameter]

PARTS = ("codes", "scale", "offset", "input_scale", "frequency", "average", "direction")
"""Names of the arrays that one parameter may have in the place of itself."""


LIKE_PARAMETERS = ("", "params", "encoded", "annealed")
"""Trees whose arrays lie where the model uses them; all others (latents, moments, gradients …) are the optimizer's."""


@dataclass(frozen=True)
class Layout:
    """Padding and sharding of one array."""

    padding: Padding
    spec: PartitionSpec


def layout(key: str, shape: tuple[int, ...], table: Table) -> Layout:
    """Return how the array at `key` of shape `shape` (padded) lies.

    `key` ends in a parameter's path ("…/mu/embed/table_vd", "…/encoded/embed/table_vd/scale"); arrays that belong to no
    parameter (counters) are whole on every device.
    """
    tree, path = _divide(key, table)
    parameter = table.get(path)
    if parameter is None or len(shape) != len(parameter.shape):
        return Layout(Padding.none(shape), PartitionSpec())
    spec = parameter.spec if tree in LIKE_PARAMETERS else parameter.latent_spec
    axes = zip(shape, parameter.padding.axes, parameter.shape, spec, strict=True)
    paddings, entries = zip(*(_axis(size, padding, whole, entry) for size, padding, whole, entry in axes), strict=True)
    return Layout(Padding(paddings), PartitionSpec(*entries))


def owner(key: str, table: Table) -> Parameter | None:
    """Return the parameter that the array at `key` belongs to, None for a counter."""
    return table.get(_divide(key, table)[1])


def _divide(key: str, table: Table) -> tuple[str, str]:
    """Return the tree that an array is in, "mu", "encoded" … or "", and the path of its parameter, "" for a counter."""
    *path, last = key.split("/")
    parts = path if last in PARTS else [*path, last]
    start = next((i for i in range(len(parts)) if "/".join(parts[i:]) in table), len(parts))
    return "/".join(parts[:start]).rpartition("/")[2], "/".join(parts[start:])


def _axis(size: int, padding: AxisPadding, whole: int, entry: Any) -> tuple[AxisPadding, Any]:
    """Return padding and mesh axes of one axis of an array whose parameter has `whole` there."""
    if size == whole:
        return padding, entry
    if size == 1:
        return AxisPadding.none(1), None
    group = whole // size  # blocks of a grouped scale
    *outer, logical = padding.logical
    *outer_padded, padded = padding.padded
    return AxisPadding((*outer, logical // group), (*outer_padded, padded // group)), entry


def shardings(tree: Any, table: Table, mesh: Mesh) -> Any:
    """Return a tree like `tree` (arrays or shapes) of the sharding of each leaf."""
    return _map_with_key(lambda key, leaf: NamedSharding(mesh, layout(key, leaf.shape, table).spec), tree)


def abstract(tree: Any, table: Table, mesh: Mesh) -> Any:
    """Return a tree like `tree` of `jax.ShapeDtypeStruct` with shardings on `mesh`, for a checkpoint to fill."""

    def one(key: str, leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, layout(key, leaf.shape, table).spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return _map_with_key(one, tree)


def paddings(tree: Any, table: Table) -> dict[str, Padding]:
    """Return {key: padding} of every leaf of a tree of padded arrays (or shapes)."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_of(path): layout(path_of(path), leaf.shape, table).padding for path, leaf in leaves}


def _map_with_key(function: Callable[[str, Any], Any], tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(path_of(path), leaf), tree)


def place(key: str, logical: np.ndarray, table: Table, mesh: Mesh) -> jax.Array:
    """Return a host array of the logical shape as a padded one, each device holding its shard only."""
    parameter = owner(key, table)
    assert parameter is not None
    shape = _padded_shape(logical.shape, parameter)
    found = layout(key, shape, table)
    # A scale of a padded channel is 1, as calibration gives it to zeros; everything else is padded with zeros.
    padded = np.asarray(found.padding.pad(logical, fill=1 if key.endswith("/scale") else 0))
    return jax.make_array_from_callback(shape, NamedSharding(mesh, found.spec), lambda index: padded[index])


def _padded_shape(logical: tuple[int, ...], parameter: Parameter) -> tuple[int, ...]:
    sizes = zip(logical, parameter.padding.logical, parameter.shape, strict=True)
    return tuple(1 if size == 1 else padded // (whole // size) for size, whole, padded in sizes)


def unplace(key: str, array: jax.Array, table: Table) -> np.ndarray:
    """Return an array as a host array of its logical shape, on every process. Inverse of `place`."""
    return np.asarray(layout(key, array.shape, table).padding.unpad(host_array(array)))


def place_float(read: Callable[[str], np.ndarray], table: Table, mesh: Mesh) -> dict[str, Any]:
    """Return the float32 parameter tree of a foundation, read leaf by leaf."""
    return tree_of({path: place(path, read(path), table, mesh) for path in table})


def abstract_weights(table: Table, formats: Mapping[str, Format], dtype: str, mesh: Mesh) -> dict[str, Any]:
    """Return the tree that evaluation holds, as shapes: `Encoded` where a format says so, float32 arrays elsewhere."""

    def one(path: str, parameter: Parameter) -> Any:
        form = formats.get(path)
        if form is None:
            return jax.ShapeDtypeStruct(parameter.shape, np.float32)
        numbers = jax.ShapeDtypeStruct(form.scale_shape, np.float16)
        scale, offset = numbers if form.grid.is_scaled else None, numbers if form.grid.is_affine else None
        codes = jax.ShapeDtypeStruct(parameter.shape, jnp.dtype(form.grid.code_dtype))
        inputs = None if form.input_scale_shape is None else jax.ShapeDtypeStruct(form.input_scale_shape, np.float32)
        return Encoded(codes, scale, form.grid, dtype, form.held_dtype, offset, inputs)  # pyright: ignore[reportArgumentType]

    return abstract(tree_of({path: one(path, parameter) for path, parameter in table.items()}), table, mesh)


def bytes_per_device(tree: Any) -> int:
    """Return the bytes that the arrays of `tree` take on the device that holds most of them."""
    held: dict[Any, int] = {}  # by device
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + array_bytes(shard.data)
    return max(held.values(), default=0)


def array_bytes(array: jax.Array) -> int:
    """Return the bytes that an array takes; `nbytes` counts a whole one for each four-bit code."""
    return bytes_of(array.size, array.dtype)
