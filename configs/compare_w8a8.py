"""Eight-bit SmolLM2-135M-Instruct, weights and activations: what folding, training and distillation bring back.

All products of the model in w8a8, activations per token, as in int8_tp4.py: of the foundation as it is, and after a
rotation and SmoothQuant.

    Command:  python scripts/compare.py --config configs/compare_w8a8.py
    Hardware: one CPU device, two cores
    Result:   not measured
"""

from research.comparison import Comparison, Scheme
from research.config import FoldConfig, OptimizerConfig, Rule, TrainConfig


def get_config() -> Comparison:
    """Return the comparison: what differs from the defaults."""
    w8a8 = (
        Rule(match="layers/(attention|mlp)/.*", weight="int8", activation="int8"),
        Rule(match="(embed|head)/table_vd", weight="int8", activation="int8"),
    )
    return Comparison(
        schemes=(
            Scheme(name="w8a8", quantization=w8a8),
            Scheme(name="w8a8 folded", quantization=w8a8, fold=FoldConfig(rotate=True, smooth=0.5)),
        ),
        control=False,
        optimizer=OptimizerConfig(learning_rate=2e-6, warmup_steps=6, weight_decay=0.0),
        train=TrainConfig(steps=30, batch_size=1, accumulate=1, distill=1.0),
    )
