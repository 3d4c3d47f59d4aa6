"""compressed-tensors reads our codes and scales, and transformers computes with them; see requirements-interop.txt."""

from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_models as tiny
from checkpoints import bits
from test_gguf_blocks import SMALL, int4_leaves
from tiny_tokenizers import byte_level

from research.architecture import Architecture, ExpertSizes
from research.config import MeshConfig, Rule, TrainConfig
from research.formats import native
from research.formats.huggingface import NAMES
from research.foundation import Foundation, load_foundation
from research.mesh import make_mesh
from research.model.attention import Segments
from research.model.folding import FloatModel, rotate
from research.model.layers import tree_of
from research.model.smoothing import input_maxima, logical_maxima, smooth
from research.model.transformer import causal, make_settings
from research.quant.nodes import is_encoded
from research.setup import make_setup
from research.tokenizer import Tokenizer
from research.train.export import stored_leaves
from research.train.interchange import write_compressed_tensors

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("default"),  # those of other libraries are theirs
]
METADATA = {"foundation": {"name": "tiny"}, "task": "fruit", "step": 2}
MATRICES = (Rule(match="layers/.*", weight="int8", activation="int8"), Rule(match="embed/.*", weight="int8"))
RULES = {
    "w8a8": MATRICES,
    "w8a16": (Rule(match="layers/.*", weight="int8"), MATRICES[1]),
    "w4a16": (Rule(match="layers/.*", weight="int4", granularity="group:32"), MATRICES[1]),
}
MIXTRAL = replace(SMALL, head_width=32, feed_forward=32, experts=ExpertSizes(experts=4, chosen=2), tied_head=False)
QWEN3_MOE = replace(
    SMALL, head_width=32, feed_forward=32, experts=ExpertSizes(experts=6, chosen=3, normalized=False), head_norms=True
)
EXPERTS = ("gate_edf", "up_edf", "down_efd")
PASSAGE = Path(__file__).parent / "fixtures" / "passage.txt"


def quantized(
    source: Any, rules: tuple[Rule, ...], input_scale: float = tiny.INPUT_SCALE
) -> tuple[tiny.Tiny, dict[str, native.Leaf]]:
    """A model on its grids, with that scale where it is static, and its leaves as an export gets them."""

    def with_scale(w: Any) -> Any:
        has_one = is_encoded(w) and w.input_scale is not None
        return replace(w, input_scale=jax.numpy.full_like(w.input_scale, input_scale)) if has_one else w

    model = tiny.make(source, rules)
    model = replace(model, weights=jax.tree.map(with_scale, model.weights, is_leaf=is_encoded))
    architecture = tiny.float_model(source).architecture
    setup = make_setup(architecture, rules, TrainConfig(), make_mesh(MeshConfig(), devices=jax.devices()[:1]))
    return model, dict(stored_leaves(model.weights, setup, 0))


def load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(found.values()), found  # nothing missing, unexpected or of another shape
    return model.eval()


def log_probabilities(logits_tv: Any) -> np.ndarray:
    logits_tv = np.asarray(logits_tv, np.float64)
    logits_tv = logits_tv - logits_tv.max(-1, keepdims=True)
    return logits_tv - np.log(np.exp(logits_tv).sum(-1, keepdims=True))


def ours_of(model: tiny.Tiny, tokens_bt: np.ndarray, weights: Any = None) -> np.ndarray:
    logits_btv = causal(model.model(weights or model.served), jax.numpy.asarray(tokens_bt.astype(np.int32)))
    return log_probabilities(logits_btv)


def theirs_of(model: Any, tokens_bt: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return log_probabilities(model(torch.tensor(tokens_bt, dtype=torch.long)).logits.numpy())


def compare(what: str, ours: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """The share of positions where both find the same token likeliest, and the mean of KL(ours, found) in nats."""
    agreement = float((ours.argmax(-1) == found.argmax(-1)).mean())
    divergence = float((np.exp(ours) * (ours - found)).sum(-1).mean())
    print(f"{what}: top-1 agreement {agreement:.4f}, KL {divergence:.2e}")
    return agreement, divergence


def our_scale(value: Any, **_: Any) -> tuple[Any, Any]:
    """The library's function for scale and zero of an activation, with our largest code, 127, for its 127.5."""
    import torch

    scale = value.abs().amax(-1, keepdim=True) / 127
    return scale, torch.zeros_like(scale)


def folded(model: FloatModel, tokens_bt: np.ndarray) -> FloatModel:
    """The model rotated, and smoothed by half after these tokens: the same function without outliers in activations."""
    turned = rotate(model, seed=0)
    turned = FloatModel(turned.architecture, cache(turned.read))
    settings = make_settings(turned.architecture)
    weights = tree_of({path: turned.read(path) for path in settings.table})
    position_bt = np.broadcast_to(np.arange(tokens_bt.shape[1], dtype=np.int32), tokens_bt.shape)
    segments = Segments(position_bt, np.zeros_like(position_bt))
    seen = jax.jit(partial(input_maxima, settings))(weights, tokens_bt.astype(np.int32), position_bt, segments)
    smoothed = smooth(turned, logical_maxima(seen, settings.table), 0.5)
    return FloatModel(smoothed.architecture, cache(smoothed.read))


def an_ulp_off(weights: dict[str, Any]) -> dict[str, Any]:
    """Weights whose first norms are an ulp larger or smaller."""
    scale_ld = np.asarray(weights["layers"]["attention_norm"]["scale_d"])
    up = np.random.default_rng(0).random(scale_ld.shape) < 0.5
    moved = np.nextafter(scale_ld, np.where(up, np.inf, -np.inf).astype(np.float32))
    layers = {**weights["layers"], "attention_norm": {"scale_d": jax.numpy.asarray(moved)}}
    return {**weights, "layers": layers}


@pytest.mark.parametrize(("type", "head_norms"), (("w4a16", False), ("w8a16", False), ("w4a16", True)))
def test_the_library_unpacks_the_codes(tmp_path: Path, type: str, head_norms: bool) -> None:
    """And transformers decodes the weights themselves, also where a scale is negative."""
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    architecture = replace(SMALL, head_norms=head_norms)  # a Llama, or a Qwen3
    leaves = int4_leaves(architecture)
    write_compressed_tensors(tmp_path / "x", leaves, architecture, byte_level(), type, METADATA)
    model = load(tmp_path / "x")
    tensors = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    model(torch.zeros((1, 1), dtype=torch.long))  # decodes
    decoded = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    matrices = [path for path in leaves if NAMES[path].inputs]
    for path in matrices:
        leaf, name = leaves[path], NAMES[path]
        assert isinstance(leaf, native.StoredLeaf) and leaf.scale is not None
        for layer in range(SMALL.layers):
            module = name.pattern.format(layer)
            packed, shape = (torch.tensor(tensors[f"{module}_{part}"]) for part in ("packed", "shape"))
            codes = unpack_from_int32(packed, int(type[1]), torch.Size(shape.tolist())).numpy()
            np.testing.assert_array_equal(codes, name.from_ours(leaf.codes[layer]))
            scale_oi = name.from_ours(native.spread(leaf.scale[layer], leaf.codes.shape[1:]))
            found = tensors[f"{module}_scale"].repeat(32, 1)
            np.testing.assert_array_equal(found, scale_oi.astype(np.float32))
            np.testing.assert_array_equal(decoded[module], name.from_ours(native.decode(leaf)[layer]))
    assert len(matrices) == 7 and bits(decoded["lm_head.weight"]) == bits(native.decode(leaves["embed/table_vd"]))


@pytest.mark.parametrize("rules", (MATRICES, tiny.W8A8), ids=("float head", "int8 head"))
def test_transformers_computes_what_w8a8_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rules: tuple[Rule, ...]
) -> None:
    """Codes and scales bit for bit; an activation's scale is absmax / 127.5 there and absmax / 127 here.

    Measured: KL 7.7e-4 and 8.0e-4, top-1 0.956 (random tokens, flat distributions); with our scale in the library
    7.8e-5 and 0.996, and 1.03e-4 and 0.992 where our head is int8, which theirs never is.
    """
    model, leaves = quantized("gqa_9_3", rules)
    tokenizer = Tokenizer.load(tiny.FIXTURES / "gqa_9_3")
    architecture = tiny.float_model("gqa_9_3").architecture
    write_compressed_tensors(tmp_path / "x", leaves, architecture, tokenizer, "w8a8", METADATA)
    theirs = load(tmp_path / "x")
    tensors = theirs.state_dict()
    for path, leaf in leaves.items():
        if NAMES[path].inputs:
            assert isinstance(leaf, native.StoredLeaf) and leaf.scale is not None
            found = tensors[NAMES[path].pattern.format(1)].numpy()
            assert bits(found) == bits(np.ascontiguousarray(NAMES[path].from_ours(leaf.codes[1])))
            scale = tensors[NAMES[path].pattern.format(1) + "_scale"].numpy()
            np.testing.assert_array_equal(scale[:, 0], leaf.scale[1].reshape(-1).astype(np.float32))
    tokens_bt = np.random.default_rng(0).integers(3, architecture.vocabulary, (8, 60))
    ours = ours_of(model, tokens_bt)
    _, divergence = compare("tiny", ours, theirs_of(theirs, tokens_bt))
    assert divergence <= 1e-3
    module = "compressed_tensors.quantization.lifecycle.forward"
    monkeypatch.setattr(f"{module}.compute_dynamic_scales_and_zp", our_scale)
    agreement, divergence = compare("tiny, our activations", ours, theirs_of(theirs, tokens_bt))
    assert agreement >= 0.99 and divergence <= 2e-4


@pytest.mark.parametrize(("input_scale", "bound"), ((0.1, 1e-5), (tiny.INPUT_SCALE, 1e-3)), ids=("wide", "saturated"))
def test_transformers_computes_with_static_scales(tmp_path: Path, input_scale: float, bound: float) -> None:
    """Scales bit for bit; what saturates below has the code -128 there, and -127 here.

    Measured: KL 4.90e-07 and top-1 1.0000 where nothing saturates, 3.46e-04 and 0.9750 where much does.
    """
    rules = (replace(MATRICES[0], activation="int8:static:ema"), MATRICES[1])
    model, leaves = quantized("gqa_9_3", rules, input_scale)
    architecture, tokenizer = tiny.float_model("gqa_9_3").architecture, Tokenizer.load(tiny.FIXTURES / "gqa_9_3")
    write_compressed_tensors(tmp_path / "x", leaves, architecture, tokenizer, "w8a8", METADATA)
    theirs = load(tmp_path / "x")
    found = {name: tensor for name, tensor in theirs.state_dict().items() if name.endswith(".input_scale")}
    assert len(found) == 7 * architecture.layers
    assert {float(scale) for scale in found.values()} == {float(np.float32(input_scale))}
    tokens_bt = np.random.default_rng(0).integers(3, architecture.vocabulary, (8, 60))
    _, divergence = compare(f"tiny, static {input_scale}", ours_of(model, tokens_bt), theirs_of(theirs, tokens_bt))
    assert divergence <= bound


@pytest.fixture(scope="module", name="foundation")
def fixture_foundation() -> Foundation:
    return load_foundation("smollm2-135m-instruct")


def passage(foundation: Foundation) -> np.ndarray:
    """Tokens of the passage, one row."""
    return np.array([foundation.tokenizer.encode_document(PASSAGE.read_text(encoding="utf-8"))])


@pytest.mark.parametrize(("is_folded", "ceiling"), ((False, 0.1), (True, 0.02)), ids=("plain", "folded"))
def test_the_foundation_in_w8a8(tmp_path: Path, foundation: Foundation, is_folded: bool, ceiling: float) -> None:
    """SmolLM2, quantized without training, on a passage of 193 tokens.

    Its activations have outliers, so that a code that flips in one layer flips many in the next: an ulp in the norms
    changes our own forward by KL 2.6e-2 and 10 % of the top tokens. transformers differs by 3.5e-2; asked for is three
    times what the ulp does, as between meshes (docs/decisions/0001-numerics.md), and an order below a broken layer.
    Folded, a step of the codes is smaller, and both are a tenth.
    """
    tokens_bt, model = passage(foundation), FloatModel(foundation.architecture, foundation.read)
    model = folded(model, tokens_bt) if is_folded else model
    int8, leaves = quantized(model, MATRICES)
    write_compressed_tensors(tmp_path / "x", leaves, model.architecture, foundation.tokenizer, "w8a8", METADATA)
    ours, name = ours_of(int8, tokens_bt), "foundation, folded" if is_folded else "foundation"
    _, ulp = compare(f"{name}, an ulp off", ours, ours_of(int8, tokens_bt, an_ulp_off(int8.served)))
    _, divergence = compare(name, ours, theirs_of(load(tmp_path / "x"), tokens_bt))
    assert divergence <= min(3 * ulp, ceiling)


@pytest.mark.parametrize("type", ("w8a16", "w4a16"))
def test_the_foundation_where_activations_are_floats(tmp_path: Path, foundation: Foundation, type: str) -> None:
    """There nothing flips: float sums in another order. Measured: KL 2e-11, every top token the same."""
    tokens_bt, source = passage(foundation), FloatModel(foundation.architecture, foundation.read)
    model, leaves = quantized(source, RULES[type])
    write_compressed_tensors(tmp_path / "x", leaves, source.architecture, foundation.tokenizer, type, METADATA)
    theirs = theirs_of(load(tmp_path / "x"), tokens_bt)
    agreement, divergence = compare(f"foundation, {type}", ours_of(model, tokens_bt), theirs)
    assert agreement >= 0.99 and divergence <= 1e-9


# --- mixtures of experts


@pytest.mark.parametrize("type", ("w4a16", "w8a16"))
@pytest.mark.parametrize("architecture", (MIXTRAL, QWEN3_MOE), ids=("Mixtral", "Qwen3-MoE"))
def test_transformers_decodes_experts(tmp_path: Path, architecture: Architecture, type: str) -> None:
    """Each expert's weights bit for bit, which transformers stacks, and so the logits of our forward.

    Both multiply floats, in another order; measured 2e-6 of the largest logit, asked for 1e-4.
    """
    model, leaves = quantized(architecture, RULES[type])
    write_compressed_tensors(tmp_path / "x", leaves, architecture, byte_level(), type, METADATA)
    theirs = load(tmp_path / "x")
    experts = theirs.model.layers[1].mlp.experts
    gate_edf, up_edf, down_efd = (native.decode(leaves[f"layers/mlp/{name}"])[1] for name in EXPERTS)
    found_efd, found_edf = experts.gate_up_proj.detach().numpy(), experts.down_proj.detach().numpy()
    np.testing.assert_array_equal(found_efd, np.concatenate([gate_edf, up_edf], -1).swapaxes(1, 2))
    np.testing.assert_array_equal(found_edf, down_efd.swapaxes(1, 2))
    tokens_bt = np.random.default_rng(0).integers(3, architecture.vocabulary, (3, 40))
    agreement, divergence = compare(f"{type}", ours_of(model, tokens_bt), theirs_of(theirs, tokens_bt))
    assert agreement >= 0.99 and divergence <= 1e-8
