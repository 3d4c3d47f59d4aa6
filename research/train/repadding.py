"""A checkpoint's arrays from one mesh's padding to another's: unpadded and padded anew, not a bit of them changed."""

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from research.errors import UserError
from research.padding import Padding
from research.train.manifest import Leaf

Paddings = Mapping[str, Padding] | Callable[[str], Padding | None]
Changes = Mapping[str, tuple[Padding, Padding]]  # leaf path → saved padding, target padding


def padding_changes(
    path: Path, saved: Mapping[str, Leaf], target: Mapping[str, Any], old_paddings: Paddings, new_paddings: Paddings
) -> Changes:
    """Return the leaves whose padding differs; `UserError` where padding and shape don't agree."""
    old_of, new_of = _lookup(old_paddings), _lookup(new_paddings)
    changes = {}
    for name in sorted(target.keys() & saved.keys()):
        shapes = saved[name].shape, tuple(target[name].shape)
        old, new = (_known(padding, shape) for padding, shape in zip((old_of(name), new_of(name)), shapes, strict=True))
        if (old.padded, new.padded) != shapes or old.logical != new.logical:
            raise UserError(
                f"checkpoint {path}: {name} is saved as {_shape_text(shapes[0], old)} and expected as "
                f"{_shape_text(shapes[1], new)}; load it with the model and the policy it was saved with"
            )
        if old != new and not (old.is_none and new.is_none):
            changes[name] = old, new
    return changes


def sharding_of_shape(sharding: Sharding, shape: tuple[int, ...]) -> Sharding:
    """Return `sharding`, Auto, less the mesh axes that don't divide `shape`: a place on the way to another shape."""
    sharding = automatic(sharding)
    if not isinstance(sharding, NamedSharding):
        return sharding

    def divides(size: int, names: Any) -> bool:
        names = (names,) if isinstance(names, str) else names or ()
        return size % prod(sharding.mesh.shape[name] for name in names) == 0

    spec = [names if divides(size, names) else None for size, names in zip(shape, sharding.spec, strict=False)]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def repad(arrays: Mapping[str, jax.Array], changes: Changes, shardings: Mapping[str, Sharding]) -> dict[str, jax.Array]:
    """Return the arrays at their new padding (zero there), placed by `shardings`, in one compiled program."""

    def change(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: _change(x, *changes[name]) for name, x in arrays.items()}

    places = {name: automatic(sharding) for name, sharding in shardings.items()}
    changed = jax.jit(change, out_shardings=places)(dict(arrays))
    return {name: jax.device_put(x, shardings[name]) for name, x in changed.items()}  # moves nothing


def automatic(sharding: Sharding) -> Sharding:
    """Return `sharding` with every mesh axis of type Auto: reshapes of explicitly split axes are not supported."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    names = sharding.mesh.axis_names
    mesh = Mesh(np.asarray(sharding.mesh.devices), names, axis_types=(AxisType.Auto,) * len(names))
    return NamedSharding(mesh, sharding.spec)


def _change(x: jax.Array, old: Padding, new: Padding) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.asarray(new.pad(old.unpad(x)))
    # As integers: a backend is free to move shards by a sum with zeros, which would turn -0.0 into 0.0.
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return jax.lax.bitcast_convert_type(new.pad(old.unpad(bits)), x.dtype)


def _lookup(paddings: Paddings) -> Callable[[str], Padding | None]:
    return paddings.get if isinstance(paddings, Mapping) else paddings


def _known(padding: Padding | None, shape: tuple[int, ...]) -> Padding:
    return Padding.none(shape) if padding is None else padding


def _shape_text(shape: tuple[int, ...], padding: Padding) -> str:
    return (
        f"{list(shape)}"
        if padding.is_none
        else f"{list(shape)} ({list(padding.logical)} padded to {list(padding.padded)})"
    )
