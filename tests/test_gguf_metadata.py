"""The shape of a decoder in GGUF keys, there and back, and the settings that our decoder would get wrong."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from research.architecture import Architecture, ExpertSizes, RopeScaling
from research.errors import UserError
from research.formats.gguf_file import GgufFile, TensorEntry
from research.formats.gguf_metadata import (
    ROPE_FACTORS,
    architecture_metadata,
    kind_of,
    read_architecture,
    rope_factors,
)

LLAMA3 = RopeScaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_context=8192)
PLAIN = Architecture(
    vocabulary=100,
    width=24,
    layers=2,
    query_heads=3,
    kv_heads=1,
    head_width=8,
    feed_forward=40,
    context=128,
    norm_epsilon=1e-5,
    rope_theta=500_000.0,
)
EXPERTS = ExpertSizes(experts=4, chosen=2)
OTHER = replace(PLAIN, rope_scaling=replace(LLAMA3, factor=2.5, original_context=64, high_frequency_factor=3.0))


def opened(architecture: Architecture, folder: Path, **changes: object) -> GgufFile:
    """The header of a file of that shape; `changes` are metadata (with "__" for "."), None takes a key away."""
    metadata = {"general.architecture": kind_of(architecture), **architecture_metadata(architecture)}
    # What a file holds is float32, so 1e-5 comes back as 9.999999747378752e-06.
    metadata = {key: float(np.float32(v)) if isinstance(v, float) else v for key, v in metadata.items()}
    metadata |= {key.replace("__", "."): value for key, value in changes.items()}
    tensors = {"token_embd.weight": TensorEntry("token_embd.weight", (architecture.vocabulary, 24), Type.F32, 0, 0)}
    if not architecture.tied_head:
        tensors["output.weight"] = TensorEntry("output.weight", (architecture.vocabulary, 24), Type.F32, 0, 0)
    factors, path = rope_factors(architecture), folder / "x.gguf"
    if factors is not None:
        path.write_bytes(factors.tobytes())
        tensors[ROPE_FACTORS] = TensorEntry(ROPE_FACTORS, factors.shape, Type.F32, 0, factors.nbytes)
    return GgufFile(path, {key: value for key, value in metadata.items() if value is not None}, tensors)


@pytest.mark.parametrize(
    "architecture",
    [
        PLAIN,
        replace(PLAIN, tied_head=False, kv_heads=3),
        replace(PLAIN, rope_scaling=LLAMA3),
        OTHER,
        replace(PLAIN, experts=EXPERTS),
        replace(PLAIN, head_norms=True),
        replace(PLAIN, head_norms=True, experts=EXPERTS),
    ],
    ids=["plain", "untied", "llama3", "other_scaling", "mixtral", "qwen3", "qwen3moe"],
)
def test_shape_comes_back(architecture, tmp_path):
    assert read_architecture(opened(architecture, tmp_path)) == architecture


def test_an_expert_of_qwen3_has_a_size_of_its_own(tmp_path):
    qwen3 = replace(PLAIN, head_norms=True, experts=EXPERTS)
    assert read_architecture(opened(qwen3, tmp_path, qwen3moe__feed_forward_length=99)) == qwen3
    with pytest.raises(UserError, match="qwen3moe.expert_count is missing"):
        read_architecture(opened(qwen3, tmp_path, qwen3moe__expert_count=None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": replace(EXPERTS, normalized=False)}, "no mixture whose shares don't sum to 1"),
        ({"head_norms": True, "rope_scaling": LLAMA3}, "doesn't scale the rotary frequencies of a Qwen3"),
    ],
)
def test_what_llama_cpp_lacks_is_not_written(changes, message):
    with pytest.raises(UserError, match=message):
        architecture_metadata(replace(PLAIN, **changes))


def test_scaling_of_llama3_is_found_in_a_file_that_does_not_state_it(tmp_path):
    file = opened(replace(PLAIN, rope_scaling=LLAMA3), tmp_path)
    file = replace(file, metadata={key: v for key, v in file.metadata.items() if not key.startswith("research.")})
    assert read_architecture(file).rope_scaling == LLAMA3


def test_factors_of_llama3():
    """Short wavelengths are kept, long ones stretched by 8, one between is blended as Llama's authors do."""
    architecture = replace(PLAIN, rope_scaling=LLAMA3)
    factors = rope_factors(architecture)
    wavelengths = 2 * np.pi * architecture.rope_theta ** (np.arange(0, 8, 2) / 8)
    assert wavelengths[1] < 8192 / 4 < wavelengths[2] and wavelengths[3] > 8192
    kept = (8192 / wavelengths[2] - 1) / (4 - 1)
    blended = 1 / ((1 - kept) / 8 + kept) if kept > 0 else 8
    np.testing.assert_allclose(factors, [1, 1, blended, 8], rtol=1e-6)
    assert rope_factors(PLAIN) is None


def test_factors_of_one_are_no_scaling(tmp_path):
    file = opened(replace(PLAIN, rope_scaling=LLAMA3), tmp_path)
    file.path.write_bytes(np.ones(4, np.float32).tobytes())
    assert read_architecture(file).rope_scaling is None


def test_other_factors_are_refused(tmp_path):
    file = opened(OTHER, tmp_path)
    file.path.write_bytes(np.float32([1, 2, 3, 4]).tobytes())
    with pytest.raises(UserError, match=r"x\.gguf: rope_freqs\.weight is not Llama-3's scaling"):
        read_architecture(file)


def test_keys_that_may_be_missing(tmp_path):
    missing = dict.fromkeys(
        ("llama__rope__dimension_count", "llama__attention__key_length", "llama__attention__value_length")
    )
    architecture = read_architecture(opened(PLAIN, tmp_path, llama__rope__freq_base=None, **missing))
    assert (architecture.head_width, architecture.rope_theta) == (8, 10_000.0)
    assert read_architecture(opened(PLAIN, tmp_path, llama__attention__head_count_kv=None)).kv_heads == 3


def test_counts_given_for_each_layer(tmp_path):
    assert read_architecture(opened(PLAIN, tmp_path, llama__feed_forward_length=[40, 40])).feed_forward == 40
    with pytest.raises(UserError, match=r"feed_forward_length=\[40, 48\]; one positive number"):
        read_architecture(opened(PLAIN, tmp_path, llama__feed_forward_length=[40, 48]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general__architecture": "qwen2"}, "architecture 'qwen2' is not supported"),
        ({"general__architecture": None}, "architecture None is not supported"),
        ({"split__count": 3}, "one part of 3; .* llama-gguf-split --merge"),
        ({"llama__expert_count": 8}, "llama.expert_used_count is missing"),
        ({"llama__expert_count": 4, "llama__expert_used_count": 5}, "5 experts a token of 4"),
        ({"llama__expert_gating_func": 2}, "llama.expert_gating_func=2 is not supported"),
        ({"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type='yarn' is not supported"),
        ({"llama__rope__scaling__factor": 4.0}, "llama.rope.scaling.factor=4.0 is not supported"),
        ({"llama__block_count": None}, "llama.block_count is missing"),
        ({"llama__block_count": 0}, "llama.block_count=0; one positive number"),
        ({"llama__attention__layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
        ({"llama__rope__dimension_count": 4}, "rope.dimension_count=4 differs from the head width 8"),
        ({"llama__attention__value_length": 16}, "attention.value_length=16 differs from the head width 8"),
    ],
)
def test_what_our_decoder_lacks_is_refused(changes, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        read_architecture(opened(PLAIN, tmp_path, **changes))
    assert "x.gguf" in str(caught.value)


def test_file_without_a_table_is_refused(tmp_path):
    file = replace(opened(PLAIN, tmp_path), tensors={})
    with pytest.raises(UserError, match="tensor token_embd.weight is missing"):
        read_architecture(file)
