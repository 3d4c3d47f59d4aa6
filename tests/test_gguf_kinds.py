"""Mixtral and Qwen3 as GGUF files: codes of each expert are where llama.cpp looks for them, and it answers as we do."""

from dataclasses import replace
from pathlib import Path

import gguf as package
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from llama_cpp import LlamaCpp
from test_gguf_blocks import SMALL
from test_huggingface import reference_logits
from test_interchange import in_blocks
from tiny_tokenizers import byte_level

from research.architecture import Architecture, ExpertSizes
from research.formats import gguf, native
from research.formats.model_source import leaf_shapes
from research.model.folding import FloatModel
from research.model.generate import generate
from research.model.parameters import ROUTER
from research.model.transformer import causal

MIXTRAL = replace(SMALL, experts=ExpertSizes(experts=4, chosen=2), tied_head=False)
QWEN3 = replace(SMALL, head_norms=True)
QWEN3_MOE = replace(MIXTRAL, head_norms=True, head_width=32)
TOKENS = 12


def int8_leaves(architecture: Architecture) -> dict[str, native.Leaf]:
    """Int8 matrices with a scale a channel, an expert's its own; float norms and routers."""
    leaves: dict[str, native.Leaf] = {}
    read = tiny.random_weights(architecture)
    for path, shape in leaf_shapes(architecture).items():
        random = np.random.default_rng(list(path.encode()))
        axes = path.rpartition("_")[2]
        if "norm" in path or path == ROUTER:
            leaves[path] = read(path)
            continue
        summed = {"nhd": "nh", "fd": "f", "efd": "f"}.get(axes, "d")
        letters = ("l" if path.startswith("layers/") else "") + axes
        sizes = [1 if letter in summed else size for letter, size in zip(letters, shape, strict=True)]
        scale = random.uniform(0.002, 0.004, sizes).astype(np.float16)
        leaves[path] = native.StoredLeaf(random.integers(-127, 128, shape, np.int8), scale, "int8/channel")
    return leaves


def write(path: Path, architecture: Architecture, leaves: dict[str, native.Leaf], type: str) -> Path:
    gguf.write(path, architecture, byte_level(), leaves.__getitem__, tuple(leaves), type)
    return path


@pytest.mark.parametrize("architecture", [MIXTRAL, QWEN3_MOE], ids=["mixtral", "qwen3_moe"])
def test_experts_are_held_as_their_own_codes(tmp_path: Path, architecture: Architecture) -> None:
    """Read with the package of llama.cpp's authors: blocks of 34 bytes along what an expert sums over."""
    leaves = int8_leaves(architecture)
    path = write(tmp_path / "x.gguf", architecture, leaves, "Q8_0")
    stored = {tensor.name: tensor for tensor in package.GGUFReader(path).tensors}
    for name, leaf_path in {"ffn_gate": "gate_edf", "ffn_up": "up_edf", "ffn_down": "down_efd"}.items():
        leaf, tensor = leaves[f"layers/mlp/{leaf_path}"], stored[f"blk.1.{name}_exps.weight"]
        assert isinstance(leaf, native.StoredLeaf) and leaf.scale is not None
        experts, inputs, outputs = leaf.codes[1].shape
        assert tensor.shape.tolist() == [inputs, outputs, experts] and tensor.tensor_type.name == "Q8_0"
        blocks = np.asarray(tensor.data).reshape(experts, outputs, inputs // 32, 34)
        codes = blocks[..., 2:].view(np.int8).reshape(experts, outputs, inputs)
        np.testing.assert_array_equal(codes, leaf.codes[1].swapaxes(1, 2))
        scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
        np.testing.assert_array_equal(scales, np.broadcast_to(leaf.scale[1].swapaxes(1, 2), scales.shape))
    assert stored["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"
    found = gguf.open_model(path)
    assert found.architecture == architecture
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(found.read(name), native.decode(leaf), err_msg=name)


@pytest.mark.parametrize("architecture", [MIXTRAL, QWEN3, QWEN3_MOE], ids=["mixtral", "qwen3", "qwen3_moe"])
def test_llama_cpp_computes_with_the_blocks(tmp_path: Path, architecture: Architecture) -> None:
    """As formulas in float64 that round activations in its blocks, but for a router's.

    Log-probabilities differ by 1e-6 to 2e-6, float32 sums; such a difference may give an activation the next code, so
    that more is allowed. Without rounding the formulas are off by 0.13 to 0.19.
    """
    leaves = int8_leaves(architecture)
    judge = LlamaCpp(write(tmp_path / "x.gguf", architecture, leaves, "Q8_0"))
    ids = byte_level().encode("Is this message spam or ham?")
    weights = {path: native.decode(leaf) for path, leaf in leaves.items()}
    logits_v = reference_logits(architecture, weights, np.array([ids]), in_blocks)[0, -1]
    wanted_v = logits_v - logits_v.max()
    wanted_v -= np.log(np.exp(wanted_v).sum())
    off = abs(judge.log_probabilities(ids, SMALL.vocabulary) - wanted_v).max()
    print(f"off by {off:.1e}")
    assert off < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [MIXTRAL, QWEN3, QWEN3_MOE], ids=["mixtral", "qwen3", "qwen3_moe"])
def test_greedy_text_is_that_of_llama_cpp(tmp_path: Path, architecture: Architecture) -> None:
    """In float32, behind a text; our two likeliest tokens are further apart than the engines, 1e-4 at most."""
    leaves: dict[str, native.Leaf] = {path: native.decode(leaf) for path, leaf in int8_leaves(architecture).items()}
    judge = LlamaCpp(write(tmp_path / "x.gguf", architecture, leaves, "F32"))
    model = tiny.make(FloatModel(architecture, lambda path: native.decode(leaves[path])))
    ids = byte_level().encode("Is this message spam or ham?")
    answer = list(generate(model.graph, model.served, ids, max_tokens=TOKENS))
    assert len(answer) == TOKENS and not set(answer) & set(byte_level().end_ids)
    logits_tv = np.asarray(causal(model.model(model.served), jnp.asarray([ids + answer[:-1]])))[0, len(ids) - 1 :]
    best_t, second_t = np.sort(logits_tv)[:, [-1, -2]].T
    assert (best_t - second_t).min() > 1e-2
    assert judge.greedy(ids, TOKENS) == answer
