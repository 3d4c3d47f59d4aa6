"""Four-bit SmolLM2-135M-Instruct: what rounding costs, and how much of it training and distillation bring back.

The seven matrices of each layer in four bits, on GGUF's Q4_0 grid in groups of 32 and with one scale per output
channel; embedding and head stay float. 60 steps of one row of at most 256 tokens, 13,464 in all (`train_tokens` in
comparison.json), for each arm that is trained.

    Command:  python scripts/compare.py --config configs/compare_int4.py
    Hardware: one CPU device, two cores
    Result:   KL to the float foundation on 32 held-out documents, rounded → 60 steps of QAT with distillation:
              Q4_0 0.308 → 0.172, 44 % recovered [42, 47]; per channel 0.987 → 0.325, 67 % [66, 69];
              23 min 47 s, peak 5.97 GiB, on two Xeon cores (AVX-512 VNNI)

    Command:  python scripts/compare.py --config configs/compare_int4.py --sensitivity --budget 150
    Result:   alone, down_fd costs the most (KL 0.615 per channel, 0.115 on Q4_0), then up_df, v_dkh; layers 11 and 29
              are the worst. Proposed in 150 MiB: int8 but for k_dkh and v_dkh, which stay float, 148 MiB; KL predicted
              0.0037, measured 0.0038 [0.0035, 0.0042] on 8 validation documents; 14 min, other jobs beside it
"""

from research.comparison import Comparison, Scheme
from research.config import OptimizerConfig, Rule, TrainConfig


def get_config() -> Comparison:
    """Return the comparison: what differs from the defaults."""
    matrices = "layers/(attention|mlp)/.*"
    return Comparison(
        schemes=(
            Scheme(name="q4_0 g32", quantization=(Rule(match=matrices, weight="q4_0", granularity="group:32"),)),
            Scheme(name="int4 channel", quantization=(Rule(match=matrices, weight="int4", granularity="channel"),)),
        ),
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=6, weight_decay=0.0),
        train=TrainConfig(steps=60, batch_size=1, accumulate=1, distill=1.0),
    )
