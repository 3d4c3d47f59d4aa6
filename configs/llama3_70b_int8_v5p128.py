"""Llama-3-70B in int8, weights and activations, on 128 TPU v5p: compiled, never run, no weights behind it.

Command:  python scripts/plan.py --config configs/llama3_70b_int8_v5p128.py --topology v5p:4x4x8
Hardware: none: the slice is compiled for, with libtpu (requirements-tpu.txt)
Result:   13.4 of 95.7 GiB on each chip (13.3 from shapes alone); 2.4 s a step and 55,027 tokens/s predicted,
          bound by matrix products; compiled in 29 s on two shared cores, then from the cache
"""

from research.config import Experiment, MeshConfig, Rule, TaskConfig, TrainConfig


def get_config() -> Experiment:
    """Return the experiment: what differs from the defaults."""
    return Experiment(
        foundation="architecture:llama-3-70b",
        task=TaskConfig(lengths=(2048,)),
        mesh=MeshConfig(fsdp=16, tensor=8),
        quantization=(
            Rule(match="layers/(attention|mlp)/.*", weight="int8", activation="int8"),
            Rule(match="(embed|head)/table_vd", weight="int8", activation="int8"),
        ),
        train=TrainConfig(
            batch_size=64, accumulate=1, compute_dtype="bfloat16", param_dtype="bfloat16", rematerialize="full"
        ),
    )
