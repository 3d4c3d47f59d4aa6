"""Llama-3-8B in int8, weights and activations, on eight H100: compiled, never run, no weights behind it.

Command:  python scripts/plan.py --config configs/llama3_8b_int8_h100x8.py --topology h100:8
Hardware: none: the GPUs are compiled for, with JAX's CUDA plugin (requirements-gpu-topology.txt)
Result:   20.8 GiB on each GPU (20.6 from shapes alone) of the 59.3 that JAX takes of it; 0.34 s a step and 96,758
          tokens/s predicted, bound by matrix products; compiled in 16 s on two shared cores, then from the cache
"""

from research.config import Experiment, MeshConfig, Rule, TaskConfig, TrainConfig


def get_config() -> Experiment:
    """Return the experiment: what differs from the defaults."""
    return Experiment(
        foundation="architecture:llama-3-8b",
        task=TaskConfig(lengths=(2048,)),
        mesh=MeshConfig(fsdp=8),
        quantization=(
            Rule(match="layers/(attention|mlp)/.*", weight="int8", activation="int8"),
            Rule(match="(embed|head)/table_vd", weight="int8", activation="int8"),
        ),
        train=TrainConfig(
            batch_size=16, accumulate=1, compute_dtype="bfloat16", param_dtype="bfloat16", rematerialize="full"
        ),
    )
