"""The architectures that are known by name have as many parameters as their publishers say."""

from math import prod

from research.architectures import ARCHITECTURES
from research.formats.model_source import leaf_shapes


def test_parameters_are_those_that_are_published() -> None:
    """Llama 3: 8.03 and 70.55 billion, 8.03 for 3.1-8B, 1.24 for 3.2-1B; SmolLM2: 134.5 million.

    Mixtral 46.7, Qwen3 8.19 and 30.5 billion.
    """
    counts = {name: sum(map(prod, leaf_shapes(shape).values())) for name, shape in ARCHITECTURES.items()}
    rounded = {name: round(count / 1e6) for name, count in counts.items()}
    llama_3 = {"llama-3-8b": 8030, "llama-3.1-8b": 8030, "llama-3-70b": 70554, "llama-3.2-1b": 1236}
    others = {"mixtral-8x7b": 46_703, "qwen3-8b": 8191, "qwen3-30b-a3b": 30_532, "smollm2-135m": 135}
    assert rounded == {**llama_3, **others}
