"""Llama-3-8B in int8, weights and activations, on sixteen TPU v5e: compiled, never run, no weights behind it.

Command:  python scripts/plan.py --config configs/llama3_8b_int8_v5e16.py --topology v5e:4x4
Hardware: none: the slice is compiled for, with libtpu (requirements-tpu.txt)
Result:   11.3 of 15.8 GiB on each chip (11.2 from shapes alone); 1.1 s a step and 30,229 tokens/s predicted,
          bound by matrix products; compiled in 19 s on two shared cores, then from the cache
"""

from research.config import Experiment, MeshConfig, Rule, TaskConfig, TrainConfig


def get_config() -> Experiment:
    """Return the experiment: what differs from the defaults."""
    return Experiment(
        foundation="architecture:llama-3-8b",
        task=TaskConfig(lengths=(2048,)),
        mesh=MeshConfig(fsdp=4, tensor=4),
        quantization=(
            Rule(match="layers/(attention|mlp)/.*", weight="int8", activation="int8"),
            Rule(match="(embed|head)/table_vd", weight="int8", activation="int8"),
        ),
        train=TrainConfig(
            batch_size=16, accumulate=1, compute_dtype="bfloat16", param_dtype="bfloat16", rematerialize="full"
        ),
    )
