"""Weight-only int8 on one device: what quantization-aware training costs over training in float.

Command:  python scripts/benchmark.py --config benchmarks/int8_weights.py --compare float,base --steps 15
Hardware: one device, whatever jax finds
"""

from research.config import Experiment, Rule, TaskConfig, TrainConfig


def get_config() -> Experiment:
    """Return the experiment: what differs from the defaults."""
    return Experiment(
        task=TaskConfig(lengths=(128,)),
        quantization=(Rule(match="layers/(attention|mlp)/.*|(embed|head)/table_vd", weight="int8"),),
        train=TrainConfig(batch_size=8, accumulate=1),
    )
