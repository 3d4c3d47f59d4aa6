"""Eight-bit SmolLM2-135M-Instruct, weights and activations: what folding, training and distillation bring back.

All products of the model in w8a8, activations per token, as in int8_tp4.py: of the foundation as it is, and after a
rotation and SmoothQuant. 30 steps of one row of at most 256 tokens, 7,124 in all, for each arm that is trained.

    Command:  python scripts/compare.py --config configs/compare_w8a8.py
    Hardware: one CPU device, two cores
    Result:   KL to the float foundation on 32 held-out documents: rounded 0.0393, folded and rounded 0.0113, folded and
              distilled 0.0098 [0.0091, 0.0105]; without a fold distillation reaches 0.0369, and the task loss alone
              moves away from the foundation (0.0230 after the fold);
              32 min, peak 6.77 GiB, on two Xeon cores (AVX-512 VNNI) that other jobs shared

The learning rate is the best of three (2e-6, 6e-6, 2e-5) for the last arm on the first 8 of the 32 documents: at 6e-6
nothing was gained over rounding, at 2e-5, in 8 steps, the KL grew to 0.0199.
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
