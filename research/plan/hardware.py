"""What a device can do: rates of matrix products, bandwidths, memory. Published figures, each with its source.

Published rates are peaks. `utilisation` is the share of them that a training step of this framework's kind was measured
to reach; it multiplies matrix rates only.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import UserError, nearest


@dataclass(frozen=True)
class Hardware:
    """One device. Rates per second; `multiplies`: operations (a multiplication and an addition are two) by dtype."""

    name: str
    multiplies: Mapping[str, float]
    memory_bytes: int
    memory_bandwidth: float
    """Bytes a second."""
    link_bandwidth: float
    """Bytes a second that one device sends while it receives as many."""
    source: str
    utilisation: float = 0.68
    update_trees: int = 2
    """Float32 trees that a compiled update holds at once beside the state: a TPU's compiler fuses two into one."""

    def seconds_of(self, flops: Mapping[str, float]) -> float:
        """Return the time that matrix products take, operations by dtype."""
        return sum(count / self.multiplies[dtype] for dtype, count in flops.items()) / self.utilisation


_T = 1e12
_HOPPER = {"float32": 494.7 * _T, "bfloat16": 989.4 * _T, "int8": 1978.9 * _T}
_NVIDIA = "NVIDIA data sheet, SXM, dense; float32 as TF32; NVLink 900 GB/s both ways together"
_GOOGLE = "Google Cloud TPU documentation, system architecture; float32 as six bfloat16 passes"


def _tpu(name: str, bfloat16: float, int8: float, gib: float, memory_gbps: float, ici_gbit: float) -> Hardware:
    """`gib`: what the compiler lets a program use."""
    rates = {"float32": bfloat16 * _T / 6, "bfloat16": bfloat16 * _T, "int8": int8 * _T}
    # The inter-chip figure counts both directions of all links together.
    links = ici_gbit * 1e9 / 8 / 2
    return Hardware(name, rates, int(gib * 2**30), memory_gbps * 1e9, links, _GOOGLE, update_trees=1)


HARDWARE = {
    one.name: one
    for one in (
        Hardware("h100", _HOPPER, 80 * 10**9, 3.35e12, 450e9, _NVIDIA),
        Hardware("h200", _HOPPER, 141 * 10**9, 4.8e12, 450e9, _NVIDIA),
        _tpu("v5e", 197, 393, 15.75, 819, 1600),
        _tpu("v5p", 459, 918, 95.74, 2765, 4800),
        _tpu("v6e", 918, 1836, 31.25, 1640, 3584),
    )
}


def hardware(name: str) -> Hardware:
    """Return a row of the table; `UserError` for a name that isn't there."""
    if name not in HARDWARE:
        raise UserError(f"hardware {name!r} is not in the table{nearest(name, HARDWARE)}")
    return HARDWARE[name]


def measure_cpu(devices: int) -> Hardware:
    """Measure this machine as `devices` simulated ones that share it: products of 1024³, copies of 64 MiB."""
    copied = jnp.ones((2**24,), jnp.float32)
    rates = {dtype: product_rate(dtype, 1024) / devices for dtype in ("float32", "bfloat16", "int8")}
    bandwidth = 2 * copied.nbytes / _seconds(jax.jit(lambda x: x + 1), copied) / devices
    return Hardware(
        "cpu", rates, _memory_bytes() // devices, bandwidth, bandwidth / 2, "measured on the spot", utilisation=1.0
    )


def product_rate(dtype: str, side: int) -> float:
    """Measure the operations a second of one device in products of `side`³; integers are summed in int32."""
    ones = jnp.ones((side, side), dtype)
    wide = jnp.int32 if dtype == "int8" else dtype
    return 2 * side**3 / _seconds(jax.jit(lambda x: jax.lax.dot(x, x, preferred_element_type=wide)), ones)


def _seconds(function: Callable[[Any], Any], x: Any) -> float:
    """Return the median time of a call, once it is compiled."""
    times = []
    for _ in range(6):
        started = time.perf_counter()
        jax.block_until_ready(function(x))
        times.append(time.perf_counter() - started)
    return float(np.median(times[1:]))


def _memory_bytes() -> int:
    """Return the memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
