"""The real model predicts a fixed text as llama.cpp does with the same weights; run with -s to see the figures."""

import math
from pathlib import Path

import jax
import numpy as np
import pytest
from llama_cpp import LlamaCpp

from research.config import MeshConfig, TrainConfig
from research.evaluate import make_score, score_text
from research.formats import gguf
from research.foundation import REGISTRY, Foundation, load_foundation
from research.mesh import make_mesh
from research.model.placement import place_float
from research.packages import fetch_package
from research.setup import make_setup

NAME = "smollm2-135m-instruct"
PASSAGE = Path(__file__).parent / "fixtures" / "passage.txt"
TOKENS = 64  # of the passage: llama.cpp tells one distribution of 49,152 tokens at a time, a second each


def _our_loss(foundation: Foundation, ids: list[int]) -> float:
    """Nats per predicted token, float32, one device, one window."""
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        setup = make_setup(foundation.architecture, (), TrainConfig(), mesh)
        weights = place_float(foundation.read, setup.table, mesh)
        return score_text(make_score(setup), setup, weights, ids, window=len(ids)).loss


def _llama_cpp_loss(path: Path, ids: list[int], vocabulary: int) -> float:
    """The same from llama.cpp, which tells the distribution behind one prefix at a time."""
    judge = LlamaCpp(path, context=2 * len(ids))
    nll = [-judge.log_probabilities(ids[:end], vocabulary)[ids[end]] for end in range(1, len(ids))]
    return float(np.mean(nll))


@pytest.mark.foundation
def test_perplexity_is_that_of_llama_cpp(tmp_path: Path) -> None:
    foundation = load_foundation(NAME)
    ids = foundation.tokenizer.encode_document(PASSAGE.read_text(encoding="utf-8"))[:TOKENS]
    ours = _our_loss(foundation, ids)
    same_weights = tmp_path / "f32.gguf"
    gguf.write(
        same_weights, foundation.architecture, foundation.tokenizer, foundation.read, foundation.paths, type="F32"
    )
    theirs = _llama_cpp_loss(same_weights, ids, foundation.architecture.vocabulary)
    package = REGISTRY[NAME].package
    original = _llama_cpp_loss(fetch_package(package) / package.members[0][0], ids, foundation.architecture.vocabulary)
    print(
        f"\nperplexity of {len(ids) - 1} tokens: ours {math.exp(ours):.4f}"
        f" · llama.cpp, same weights in F32 {math.exp(theirs):.4f} ({math.exp(ours - theirs) - 1:+.4%})"
        f" · llama.cpp, original Q4_1 {math.exp(original):.4f} ({math.exp(original - theirs) - 1:+.4%})"
    )
    # The project's promise. Both sum in float32, in another order; Q4_1 also rounds activations to blocks of int8.
    assert abs(math.exp(ours - theirs) - 1) < 1e-3
    assert abs(math.exp(original - theirs) - 1) < 2e-2
