"""From `MeshConfig` to devices: how many CPU devices to simulate, what -1 stands for, and the mesh itself.

The names and the order of the mesh axes are the fields of `MeshConfig`, nowhere else: an axis more there is an axis
more here. The last axis varies fastest over the devices, so the neighbours in `tensor`, which talk most, are nearest.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import fields
from math import log, prod
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from research.config import MeshConfig
from research.errors import UserError
from research.host_memory import keep_host_memory

AXES = tuple(axis.name for axis in fields(MeshConfig))
"""Names of the mesh axes, slowest first."""

_MOST_SIMULATED = 512  # start-up grows with the square: 0.1 s here, 4.5 s and 1 GB at 8192
_MOST_SHAPES_LISTED = 6
_ALWAYS_SHOWN = ("data", "fsdp", "tensor")


def sizes(mesh: MeshConfig) -> dict[str, int]:
    """Return the size of each mesh axis by name, -1 where it is open."""
    return {axis: getattr(mesh, axis) for axis in AXES}


def least_devices(mesh: MeshConfig) -> int:
    """Return the number of devices that `mesh` needs at least: -1 counts as 1."""
    return prod(max(size, 1) for size in sizes(mesh).values())


def prepare_devices(mesh: MeshConfig, processes: int = 1) -> None:
    """Simulate this process's share of the CPU devices of `mesh`, the least that it needs, before anything runs in JAX.

    Nothing is set where the user's environment already names a number of CPU devices (`XLA_FLAGS` with
    `xla_force_host_platform_device_count`, or `JAX_NUM_CPU_DEVICES`): then `resolve` works with theirs. On a machine
    with accelerators the setting is harmless: it only splits the CPU backend, which JAX then doesn't choose.

    Raises RuntimeError if JAX has already started its backends with another number: the setting would do nothing.
    """
    keep_host_memory()
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    if "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    needed = -(-least_devices(mesh) // processes)
    # A mesh beyond the limit may fit real devices; where it doesn't, `resolve` says so.
    jax.config.update("jax_num_cpu_devices", min(needed, _MOST_SIMULATED))


def resolve(mesh: MeshConfig, device_count: int) -> MeshConfig:
    """Return `mesh` with -1 replaced by what is left of `device_count` devices.

    Raises UserError, listing valid shapes, if the mesh needs more devices or the open size would not be whole. Devices
    more than a mesh without -1 needs are no error: they are left unused, and `describe` tells of them.
    """
    asked = sizes(mesh)
    fixed = prod(size for size in asked.values() if size != -1)
    open_axes = [axis for axis, size in asked.items() if size == -1]
    if fixed > device_count:
        reason = f" needs {fixed} devices, {device_count} found"
    elif open_axes and device_count % fixed:
        reason = f": {device_count} devices can't be split by {fixed}"
    else:
        return MeshConfig(**asked | dict.fromkeys(open_axes, device_count // fixed))
    raise UserError(f"mesh {_show(asked)}{reason}; {_valid_shapes(asked, device_count)}")


def make_mesh(mesh: MeshConfig, devices: Sequence[Any] | None = None, axis_type: AxisType = AxisType.Auto) -> Mesh:
    """Return the JAX mesh over the first of the JAX `devices` (default: all of this run), -1 resolved.

    `axis_type` is Auto for all that trains; tests run the forward with Explicit, where a wrong sharding is a type
    error. It is always passed on, since the defaults of JAX's own two constructors differ.
    """
    devices = jax.devices() if devices is None else list(devices)
    try:
        shape = tuple(sizes(resolve(mesh, len(devices))).values())
    except UserError as error:
        if devices[0].platform == "cpu":
            raise
        raise UserError(f"{error}; JAX_PLATFORMS=cpu simulates as many as are needed") from None
    if jax.process_count() > 1 and prod(shape) < len(devices):
        processes = f"the {jax.process_count()} processes of this run have {len(devices)}"
        raise UserError(
            f"mesh {_show(sizes(mesh))} uses {prod(shape)} devices, {processes}; use all of them, e.g. mesh.data=-1"
        )
    return jax.make_mesh(shape, AXES, axis_types=(axis_type,) * len(AXES), devices=devices[: prod(shape)])


def describe(mesh: Mesh, device_count: int | None = None) -> str:
    """Return one line that names the shape, the devices and how many of `device_count` (default: all) are unused."""
    count = len(jax.devices()) if device_count is None else device_count
    unused = count - mesh.size
    kind = mesh.devices.flat[0].device_kind
    line = f"mesh {_show(dict(mesh.shape))}: {mesh.size} {kind} device{'s' if mesh.size > 1 else ''}"
    return f"{line}; {unused} left unused" if unused else line


def _show(shape: dict[str, int]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in shape.items() if size != 1 or axis in _ALWAYS_SHOWN)


def _valid_shapes(asked: dict[str, int], device_count: int) -> str:
    """List the shapes that use all devices, those nearest to what was asked for first; axes in use vary."""
    asked = {axis: size for axis, size in asked.items() if size != 1 or axis in _ALWAYS_SHOWN}

    def distance(shape: tuple[int, ...]) -> float:
        pairs = zip(shape, asked.values(), strict=True)
        return sum(abs(log(size / wanted)) for size, wanted in pairs if wanted != -1)

    shapes = sorted(_factorisations(device_count, len(asked)), key=lambda shape: (distance(shape), shape))
    listed = ", ".join("×".join(map(str, shape)) for shape in shapes[:_MOST_SHAPES_LISTED])
    more = len(shapes) - _MOST_SHAPES_LISTED
    names = "×".join(asked)
    return f"valid {names}: {listed}" + (f" and {more} more" if more > 0 else "")


def all_shapes(device_count: int) -> Iterator[dict[str, int]]:
    """Yield every mesh of so many devices, as sizes by name."""
    return (dict(zip(AXES, shape, strict=True)) for shape in _factorisations(device_count, len(AXES)))


def _factorisations(number: int, factors: int) -> Iterator[tuple[int, ...]]:
    """Yield every ordered way to write `number` as a product of so many positive factors."""
    if factors == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _factorisations(number // first, factors - 1):
                yield (first, *rest)
