"""Llama-3-8B in int8 on rows of 131,072 tokens, on sixty-four TPU v5p: keys and values travel around rings of 16 chips.

Command:  python scripts/plan.py --config configs/llama3_8b_int8_128k_v5p64.py --topology v5p:4x4x4
Hardware: none: the slice is compiled for, with libtpu (requirements-tpu.txt)
Result:   42.7 of 95.7 GiB on each chip (43.7 from shapes alone); 8.7 s a step and 60,358 tokens/s predicted, bound
          by matrix products; compiled in 22 s on two shared cores, then from the cache
"""

from research.config import Experiment, MeshConfig, Rule, TaskConfig, TrainConfig


def get_config() -> Experiment:
    """Return the experiment: what differs from the defaults."""
    return Experiment(
        foundation="architecture:llama-3.1-8b",
        task=TaskConfig(lengths=(131_072,)),
        mesh=MeshConfig(fsdp=4, context=16),
        quantization=(
            Rule(match="layers/(attention|mlp)/.*", weight="int8", activation="int8"),
            Rule(match="(embed|head)/table_vd", weight="int8", activation="int8"),
        ),
        train=TrainConfig(
            batch_size=4, accumulate=1, compute_dtype="bfloat16", param_dtype="bfloat16", rematerialize="full"
        ),
    )
