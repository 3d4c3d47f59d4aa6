"""What a device can do: rates of matrix products, bandwidths, memory. Published figures, each with its source.

Published rates are peaks. `utilisation` is the share of them that a training step of this framework's kind was measured
to reach; it multiplies matrix rates only.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import UserError, nearest
from research.plan.cards import CARDS
from research.plan.compiler import CPU, GPU, TPU, Compiler


@dataclass(frozen=True)
class Hardware:
    """One device. Rates per second; `multiplies`: operations (a multiplication and an addition are two) by dtype."""

    name: str
    multiplies: Mapping[str, float]
    memory_bytes: int
    """What programs may take."""
    memory_bandwidth: float
    """Bytes a second."""
    link_bandwidth: float
    """Bytes a second that one device sends while it receives as many."""
    source: str
    utilisation: float = 0.68
    compiler: Compiler = CPU
    memory_note: str = ""
    """What `memory_bytes` is a part of, in words."""
    host_devices: int = 0
    """Devices whose links end at their host; 0 where links join all devices, as in a slice of TPUs."""
    network_bandwidth: float = 0.0
    """Bytes a second that one device sends out of its host."""

    def seconds_of(self, flops: Mapping[str, float]) -> float:
        """Return the time that matrix products take, operations by dtype."""
        return sum(count / self.multiplies[dtype] for dtype, count in flops.items()) / self.utilisation

    def bandwidth(self, on_a_host: int, hosts: int) -> float:
        """Return the bytes a second that each member of a group sends, of which each of `hosts` has so many.

        Each device has a network adapter of its own, and rings go through all that their members have on a host.
        """
        if hosts == 1:
            return self.link_bandwidth
        return min(self.link_bandwidth, on_a_host * self.network_bandwidth)


_T = 1e12
_AMPERE = {"float32": 156 * _T, "bfloat16": 312 * _T, "int8": 624 * _T}
_HOPPER = {"float32": 494.7 * _T, "bfloat16": 989.4 * _T, "int8": 1978.9 * _T}
_NVIDIA = "NVIDIA data sheets, SXM, dense; float32 as TF32; NVLink {:.0f} GB/s, between hosts {:.0f} GB/s a GPU (DGX)"
_HOST = 8  # GPUs that NVLink joins in NVIDIA's DGX and HGX hosts, and in the clouds' that are made of them
_SHARE = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # today's name, then the old one
_JAX_TAKES = "0.75"  # of a GPU, unless told otherwise; jax 0.10.2 takes no more, later ones may
_GOOGLE = "Google Cloud TPU documentation, system architecture; float32 as six bfloat16 passes"


def _gpu(name: str, multiplies: Mapping[str, float], nvlink_gbps: float, network_gbit: float) -> Hardware:
    """`nvlink_gbps`: both directions together; `network_gbit`: of the adapter that each GPU has (DGX user guides)."""
    card, link, network = CARDS[name], nvlink_gbps / 2 * 1e9, network_gbit / 8 * 1e9
    source = _NVIDIA.format(link / 1e9, network / 1e9)
    return Hardware(
        name,
        multiplies,
        card.memory_bytes,
        card.memory_bandwidth,
        link,
        source,
        compiler=GPU,
        host_devices=_HOST,
        network_bandwidth=network,
    )


def _tpu(name: str, bfloat16: float, int8: float, gib: float, memory_gbps: float, ici_gbit: float) -> Hardware:
    """`gib`: what the compiler lets a program use."""
    rates = {"float32": bfloat16 * _T / 6, "bfloat16": bfloat16 * _T, "int8": int8 * _T}
    # The inter-chip figure counts both directions of all links together.
    links = ici_gbit * 1e9 / 8 / 2
    return Hardware(name, rates, int(gib * 2**30), memory_gbps * 1e9, links, _GOOGLE, compiler=TPU)


HARDWARE = {
    one.name: one
    for one in (
        _gpu("a100", _AMPERE, nvlink_gbps=600, network_gbit=200),
        _gpu("h100", _HOPPER, nvlink_gbps=900, network_gbit=400),
        _gpu("h200", _HOPPER, nvlink_gbps=900, network_gbit=400),
        _tpu("v5e", 197, 393, 15.75, 819, 1600),
        _tpu("v5p", 459, 918, 95.74, 2765, 4800),
        _tpu("v6e", 918, 1836, 31.25, 1640, 3584),
    )
}
"""Of GPUs the memory is all that the card has: `hardware` knows how much of it is for programs."""


def hardware(name: str) -> Hardware:
    """Return a device by name; `UserError` for a name that isn't in the table."""
    if name not in HARDWARE:
        raise UserError(f"hardware {name!r} is not in the table{nearest(name, HARDWARE)}")
    return _with_pool(HARDWARE[name]) if name in CARDS else HARDWARE[name]


def _with_pool(card: Hardware) -> Hardware:
    """Return a GPU with the memory that JAX takes for its programs, which leaves the rest to CUDA and NCCL."""
    given = next((os.environ[name] for name in _SHARE if os.environ.get(name)), _JAX_TAKES)
    try:
        share = float(given)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UserError(f"{_SHARE[0]}={given!r}: give the share of a GPU's memory that JAX takes, like 0.9")
    note = f"{100 * share:.0f} % of the GPU; {_SHARE[0]} sets how much"
    return replace(card, memory_bytes=int(share * card.memory_bytes), memory_note=note)


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
