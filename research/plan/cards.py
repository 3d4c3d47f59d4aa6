"""GPUs as XLA's compiler wants them described: it asks a card where there is one, and is told here where there is none.

The figures are those that cards report, as XLA's repository has them for uses like this one:
https://github.com/openxla/xla, xla/backends/gpu/target_config/specs, h100_sxm.txtpb, h200.txtpb and a100_sxm_80.txtpb.
Its xla/stream_executor/device_description.proto has the fields; NVIDIA's CUDA C++ Programming Guide has the limits of
each compute capability.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """What differs from card to card. `core`: a streaming multiprocessor."""

    name: str
    """As JAX calls the device."""
    memory_bytes: int
    """All of it; less than the data sheet's, as error correction and the driver keep some."""
    memory_bandwidth: int
    """Bytes a second."""
    cores: int
    clock_ghz: float
    fpus_per_core: int
    l2_bytes: int
    shared_bytes_per_core: int
    shared_bytes_per_block: int
    """At most, where a kernel asks for more than the 48 KiB that it gets unasked."""
    capability: int
    """Major part of the compute capability; the minor is 0 for all of these."""
    features: str
    """ACCELERATED_FEATURES: instructions that no later card has, sm_90a."""


def _hopper(name: str, memory_bytes: int, memory_bandwidth: int) -> Card:
    return Card(
        name,
        memory_bytes,
        memory_bandwidth,
        cores=132,
        clock_ghz=1.98,
        fpus_per_core=128,
        l2_bytes=50 * 2**20,
        shared_bytes_per_core=228 * 2**10,
        shared_bytes_per_block=227 * 2**10,
        capability=9,
        features="ACCELERATED_FEATURES",
    )


CARDS = {
    "a100": Card(
        "NVIDIA A100-SXM4-80GB",
        85_100_068_864,
        2_039_040_000_000,
        cores=108,
        clock_ghz=1.41,
        fpus_per_core=64,
        l2_bytes=40 * 2**20,
        shared_bytes_per_core=164 * 2**10,
        shared_bytes_per_block=163 * 2**10,
        capability=8,
        features="NONE",
    ),
    "h100": _hopper("NVIDIA H100 80GB HBM3", 84_942_979_072, 3_352_320_000_000),
    "h200": _hopper("NVIDIA H200 141GB HBM3e", 151_397_597_184, 4_800_000_000_000),
}


def target_config(card: Card) -> str:
    """Return a card as a text of XLA's message GpuTargetConfigProto. What is a number here is the same on all of them.

    The version is that of cuDNN, which decides what the compiler may leave to it.
    """
    return f"""
gpu_device_info {{
  core_count: {card.cores}
  clock_rate_ghz: {card.clock_ghz}
  fpus_per_core: {card.fpus_per_core}
  cuda_compute_capability {{ major: {card.capability} minor: 0 feature_extension: {card.features} }}
  device_memory_size: {card.memory_bytes}
  memory_bandwidth: {card.memory_bandwidth}
  l2_cache_size: {card.l2_bytes}
  shared_memory_per_core: {card.shared_bytes_per_core}
  shared_memory_per_block_optin: {card.shared_bytes_per_block}
  shared_memory_per_block: 49152
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{card.name}"
"""
