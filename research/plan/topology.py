"""Devices that aren't there: the slice of TPUs or the GPUs that a program is compiled for.

Nothing runs on them. `libtpu` (requirements-tpu.txt) holds the whole TPU compiler and needs no TPU; JAX's CUDA plugin
(requirements-gpu-topology.txt) holds that for GPUs and needs neither a GPU nor NVIDIA's libraries.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
from jax.experimental import mesh_utils, topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh

from research.errors import UserError
from research.plan.cards import CARDS, target_config
from research.plan.hardware import HARDWARE, Hardware, hardware

LOW_EFFORT = {"exec_time_optimization_effort": -1.0}
"""Compiler options for the question whether a program fits; a sixth of the time, and nearly the same memory."""
_EXAMPLES = "v5e:4x4, v5p:4x4x4, v6e:16x16, h100:8 (one host, of up to 8), h100:4x8 (four hosts)"
_LOG_LEVEL, _JAX_LOGS = "TF_CPP_MIN_LOG_LEVEL", "1"  # XLA's variable, and what JAX sets where a user didn't


@dataclass(frozen=True, eq=False)
class Topology:
    """A slice by name, the devices in it, and what each can do."""

    name: str
    hardware: Hardware
    devices: Sequence[Any]
    platform: str
    """As JAX lowers for it."""
    options: Mapping[str, Any] | None = None
    """The compiler's."""


def chips(name: str) -> int:
    """Return the number of devices of a topology such as "v5e:4x4"; `UserError` for a name that isn't one."""
    return prod(_parse(name)[1])


def leave_accelerators() -> None:
    """Have JAX run on the CPU alone, before it starts: plugins complain where their device is missing.

    Of a program that doesn't fit XLA logs that its own calculation is wrong; left out, unless a user set a level.
    """
    jax.config.update("jax_platforms", "cpu")
    if os.environ.get(_LOG_LEVEL) == _JAX_LOGS:
        os.environ[_LOG_LEVEL] = "3"


def open_topology(name: str) -> Topology:
    """Return the devices of a topology; `UserError` where its compiler is missing or doesn't know it."""
    kind, shape = _parse(name)
    # JAX's own cache keeps programs for devices that aren't there, but can't read them back; ours keeps what they take.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # or what it decided at the first compilation stays
    return _open_gpus(name, kind, shape) if kind in CARDS else _open_tpus(name, kind)


def _open_tpus(name: str, kind: str) -> Topology:
    # Compilers may run side by side; the lock that would keep them apart guards a TPU, which isn't used here.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        found = topologies.get_topology_desc(name, "tpu")
    except (RuntimeError, jax.errors.JaxRuntimeError) as error:
        reason = " ".join(str(error).split())
        if "not installed" in reason:
            raise UserError(f"--topology {name} needs libtpu: pip install -r requirements-tpu.txt") from None
        raise UserError(f"--topology {name}: {reason[:200]}; examples: {_EXAMPLES}") from None
    return Topology(name, hardware(kind), found.devices, "tpu", LOW_EFFORT)


def _open_gpus(name: str, kind: str, shape: tuple[int, ...]) -> Topology:
    """Return GPUs of one host or of several: what NVLink joins, to JAX, is a partition of one host."""
    *hosts, devices = shape
    device, partitions = replace(hardware(kind), host_devices=devices), f"{prod(hosts)}x1x{devices}"
    try:
        found = topologies.get_topology_desc(
            partitions, "cuda", topology=partitions, target_config=target_config(CARDS[kind])
        )
    except NotImplementedError:
        needed = "JAX's CUDA plugin: pip install -r requirements-gpu-topology.txt"
        raise UserError(f"--topology {name} needs {needed}") from None
    return Topology(name, device, found.devices, "cuda")


def _parse(name: str) -> tuple[str, tuple[int, ...]]:
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if match and match[1] in HARDWARE:
        shape = tuple(int(size) for size in match[2].split("x"))
        if 0 not in shape and (match[1] not in CARDS or _are_hosts(shape, HARDWARE[match[1]])):
            return match[1], shape
    raise UserError(f"--topology {name!r}: give a kind of {', '.join(sorted(HARDWARE))} and a shape: {_EXAMPLES}")


def _are_hosts(shape: tuple[int, ...], device: Hardware) -> bool:
    *hosts, devices = shape
    return len(hosts) <= 1 and devices <= device.host_devices


def mesh_on(topology: Topology, sizes: Mapping[str, int]) -> Mesh:
    """Return a mesh of `sizes` over all devices of a topology, neighbours near each other where they can be."""
    devices = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices=list(topology.devices), allow_split_physical_axes=True
    )
    return Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def memory_message(error: Exception) -> str | None:
    """Return what a compiler says of memory that isn't there, None if it failed for another reason."""
    text = " ".join(str(error).split())
    if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
        return None
    numbers = re.search(r"\(([\d.]+[KMGT])\) exceeds available \w+ \(([\d.]+[KMGT])\)", text)
    used = numbers or re.search(r"Used ([\d.]+[KMGT]) of ([\d.]+[KMGT])", text)
    if used is None:
        return text[:200]
    lost = re.search(r"([\d.]+%) fragmentation \(([\d.]+[KMGT])\)", text)
    gaps = f", {lost[2]}iB of it gaps between arrays ({lost[1]} of the temporary memory)" if lost else ""
    return f"needs {used[1]}iB of the {used[2]}iB that the compiler has for a program{gaps}"
