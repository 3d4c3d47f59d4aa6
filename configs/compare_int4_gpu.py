"""The comparison of compare_int4.py with the budget of a GPU: 300 steps of 32 rows of at most 512 tokens.

Command:  python scripts/compare.py --config configs/compare_int4_gpu.py
Hardware: one GPU
Result:   not measured; no GPU was at hand
"""

from research.comparison import Comparison, CorpusConfig, Scheme
from research.config import OptimizerConfig, Rule, TrainConfig


def get_config() -> Comparison:
    """Return the comparison: what differs from the defaults."""
    matrices = "layers/(attention|mlp)/.*"
    return Comparison(
        schemes=(
            Scheme(name="q4_0 g32", quantization=(Rule(match=matrices, weight="q4_0", granularity="group:32"),)),
            Scheme(name="int4 channel", quantization=(Rule(match=matrices, weight="int4", granularity="channel"),)),
        ),
        corpus=CorpusConfig(window=512, validation_documents=32, test_documents=64),
        optimizer=OptimizerConfig(learning_rate=5e-5, warmup_steps=15, weight_decay=0.0),
        train=TrainConfig(
            steps=300, batch_size=32, accumulate=1, compute_dtype="bfloat16", loss_chunk=1024, distill=1.0
        ),
        score_batch=16,
    )
