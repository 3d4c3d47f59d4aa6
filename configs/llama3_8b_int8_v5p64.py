"""Llama-3-8B in int8, weights and activations, on sixty-four TPU v5p: compiled, never run, no weights behind it.

Command:  python scripts/plan.py --config configs/llama3_8b_int8_v5p64.py --topology v5p:4x4x4
Hardware: none: the slice is compiled for, with libtpu (requirements-tpu.txt)
Result:   3.85 of 95.7 GiB on each chip (3.80 from shapes alone); 0.44 s a step and 295,404 tokens/s predicted,
          bound by matrix products; compiled in 22 s on two shared cores, then from the cache
"""

from research.config import Experiment, MeshConfig, Rule, TaskConfig, TrainConfig


def get_config() -> Experiment:
    """Return the experiment: what differs from the defaults."""
    return Experiment(
        foundation="architecture:llama-3-8b",
        task=TaskConfig(lengths=(2048,)),
        mesh=MeshConfig(fsdp=16, tensor=4),
        quantization=(
            Rule(match="layers/(attention|mlp)/.*", weight="int8", activation="int8"),
            Rule(match="(embed|head)/table_vd", weight="int8", activation="int8"),
        ),
        train=TrainConfig(
            batch_size=64, accumulate=1, compute_dtype="bfloat16", param_dtype="bfloat16", rematerialize="full"
        ),
    )
