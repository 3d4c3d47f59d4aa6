"""Architectures by name, for planning a model whose weights aren't at hand; sizes as in its publisher's config.json.

Sources: the Llama 3 herd of models (2024), table 3, and the config.json of meta-llama/Meta-Llama-3-8B, -70B,
meta-llama/Llama-3.1-8B and meta-llama/Llama-3.2-1B; the config.json of HuggingFaceTB/SmolLM2-135M,
mistralai/Mixtral-8x7B-v0.1, Qwen/Qwen3-8B and Qwen/Qwen3-30B-A3B.
"""

from collections.abc import Mapping
from dataclasses import replace

from research.architecture import Architecture, ExpertSizes, RopeScaling

_LLAMA_3_8B = Architecture(
    vocabulary=128_256,
    width=4096,
    layers=32,
    query_heads=32,
    kv_heads=8,
    head_width=128,
    feed_forward=14_336,
    context=8192,
    rope_theta=500_000.0,
    tied_head=False,
)
_QWEN3_8B = replace(
    _LLAMA_3_8B,
    vocabulary=151_936,
    layers=36,
    feed_forward=12_288,
    context=40_960,
    norm_epsilon=1e-6,
    rope_theta=1e6,
    head_norms=True,
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama-3-8b": _LLAMA_3_8B,
    "llama-3.1-8b": replace(
        _LLAMA_3_8B,
        context=131_072,
        rope_scaling=RopeScaling(
            factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_context=8192
        ),
    ),
    "llama-3-70b": replace(_LLAMA_3_8B, width=8192, layers=80, query_heads=64, feed_forward=28_672),
    "llama-3.2-1b": replace(
        _LLAMA_3_8B,
        width=2048,
        layers=16,
        head_width=64,
        feed_forward=8192,
        context=131_072,
        rope_scaling=RopeScaling(
            factor=32.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_context=8192
        ),
        tied_head=True,
    ),
    "mixtral-8x7b": replace(
        _LLAMA_3_8B, vocabulary=32_000, context=32_768, rope_theta=1e6, experts=ExpertSizes(experts=8, chosen=2)
    ),
    "qwen3-8b": _QWEN3_8B,
    "qwen3-30b-a3b": replace(
        _QWEN3_8B,
        width=2048,
        layers=48,
        kv_heads=4,
        feed_forward=768,
        experts=ExpertSizes(experts=128, chosen=8),
    ),
    "smollm2-135m": Architecture(
        vocabulary=49_152,
        width=576,
        layers=30,
        query_heads=9,
        kv_heads=3,
        head_width=64,
        feed_forward=1536,
        context=8192,
        rope_theta=100_000.0,
    ),
}
