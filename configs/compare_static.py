"""SmolLM2-135M-Instruct in w8a8 by rounding: dynamic scales of activations beside static ones, per kind of product.

The input of down_fd has a few values that are far larger than all others: a constant scale either spends its codes on
them or cuts them off. So static scales are tried everywhere, and beside a scale per token there.

    Command:  python scripts/compare.py --config configs/compare_static.py
    Hardware: one CPU device, two cores
    Result:   KL to the float foundation on 16 held-out documents: per token 0.033; static everywhere 0.858 (ema), 0.611
              (99.99th percentile); static but for down_fd 0.164 and 0.109
"""

from research.comparison import Comparison, CorpusConfig, Scheme
from research.config import Rule

DOWN, MATRICES = "layers/mlp/down_fd", "layers/(attention|mlp)/.*"


def get_config() -> Comparison:
    """Return the comparison: what differs from the defaults."""
    return Comparison(
        corpus=CorpusConfig(test_documents=16),
        schemes=(
            Scheme(name="dynamic", quantization=(_int8(MATRICES, "int8"),)),
            Scheme(name="ema", quantization=(_int8(MATRICES, "int8:static:ema"),)),
            Scheme(name="p99.99", quantization=(_int8(MATRICES, "int8:static:99.99"),)),
            Scheme(name="ema + dynamic", quantization=(_int8(DOWN, "int8"), _int8(MATRICES, "int8:static:ema"))),
            Scheme(name="p99.99 + dynamic", quantization=(_int8(DOWN, "int8"), _int8(MATRICES, "int8:static:99.99"))),
        ),
        treatments=("ptq",),
        control=False,
        calibration_rows=32,
    )


def _int8(match: str, activation: str) -> Rule:
    return Rule(match=match, weight="int8", activation=activation)
