"""Weight-only int8 on one device: what quantization-aware training costs over training in float.

    Command:  python scripts/benchmark.py --config benchmarks/int8_weights.py --compare base,float --tokens 128 --steps 15
    Hardware: one device, CPU or GPU
"""

from research.config import Experiment, Rule, TrainConfig


def get_config() -> Experiment:
    """Return the experiment: what differs from the defaults."""
    return Experiment(
        quantization=(Rule(match="layers/(attention|mlp)/.*|(embed|head)/table_vd", weight="int8"),),
        train=TrainConfig(batch_size=8, accumulate=1),
    )
