"""Llama-3-70B in int8, weights and activations, on 4 × 8 H100: compiled, never run, no weights behind it.

Command:  python scripts/plan.py --config configs/llama3_70b_int8_h100x32.py --topology h100:4x8
Hardware: none: the GPUs are compiled for, with JAX's CUDA plugin (requirements-gpu-topology.txt)
Result:   45.6 GiB on each GPU (44.8 from shapes alone) of the 59.3 that JAX takes of it; 2.0 s a step and 32,987
          tokens/s predicted, a third of it traffic over hosts; compiled in 9 s on two shared cores, then from the cache
"""

from research.config import Experiment, MeshConfig, Rule, TaskConfig, TrainConfig


def get_config() -> Experiment:
    """Return the experiment: what differs from the defaults."""
    return Experiment(
        foundation="architecture:llama-3-70b",
        task=TaskConfig(lengths=(2048,)),
        mesh=MeshConfig(fsdp=32),
        quantization=(
            Rule(match="layers/(attention|mlp)/.*", weight="int8", activation="int8"),
            Rule(match="(embed|head)/table_vd", weight="int8", activation="int8"),
        ),
        train=TrainConfig(
            batch_size=32, accumulate=1, compute_dtype="bfloat16", param_dtype="bfloat16", rematerialize="full"
        ),
    )
