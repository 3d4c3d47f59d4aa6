"""vLLM on a CPU reads our codes and scales and computes with them; see requirements-vllm.txt."""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_models as tiny
from checkpoints import bits
from test_gguf_blocks import SMALL
from test_interop_compressed_tensors import (
    EXPERTS,
    MATRICES,
    METADATA,
    MIXTRAL,
    QWEN3_MOE,
    RULES,
    an_ulp_off,
    compare,
    folded,
    ours_of,
    passage,
    quantized,
)
from tiny_tokenizers import byte_level

from research.config import Rule
from research.formats import native
from research.formats.compressed_tensors import pack
from research.formats.huggingface import NAMES
from research.foundation import load_foundation
from research.model.folding import FloatModel
from research.quant.activations import quantize_tokens
from research.tokenizer import Tokenizer
from research.train.interchange import write_compressed_tensors

pytestmark = pytest.mark.vllm
ENGINE = Path(__file__).parent / "vllm_engine.py"
TINY = replace(SMALL, head_width=32)  # the smallest that vLLM's attention has on CPUs
STATIC = (replace(MATRICES[0], activation="int8:static:ema"), MATRICES[1])
WIDE = 1.0  # a static scale with which nothing saturates: what does has the code -128 there, and -127 here
MIXTURES = {
    "Mixtral": (MIXTRAL, "block_sparse_moe.experts.routed_experts"),
    "Qwen3-MoE": (QWEN3_MOE, "mlp.experts.routed_experts"),
}
FUSED = {"self_attn.qkv_proj": ("attention/q_dnh", "attention/k_dkh", "attention/v_dkh"),
         "self_attn.o_proj": ("attention/o_nhd",),
         "mlp.gate_up_proj": ("mlp/gate_df", "mlp/up_df"),
         "mlp.down_proj": ("mlp/down_fd",)}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model, its leaves, tokens [b, t], and what vLLM found: `logp_btv` and the matrices of layer 1."""

    model: tiny.Tiny
    leaves: Mapping[str, native.Leaf]
    tokens_bt: np.ndarray
    found: Mapping[str, np.ndarray]

    def ours(self, weights: Any = None) -> np.ndarray:
        """Our log-probabilities where vLLM has some: behind every token but the last."""
        return ours_of(self.model, self.tokens_bt, weights)[:, :-1]


def write(folder: Path, source: Any, rules: tuple[Rule, ...], tokenizer: Tokenizer, type: str, tokens_bt: np.ndarray):
    """Write a model for vLLM into a new folder; return it and its leaves."""
    folder.mkdir()
    model, leaves = quantized(source, rules, WIDE)
    architecture = tiny.float_model(source).architecture
    write_compressed_tensors(folder / "export", leaves, architecture, tokenizer, type, METADATA)
    np.save(folder / "tokens.npy", tokens_bt)
    return model, leaves


def ask(folders: list[Path], *options: str) -> dict[str, dict[str, np.ndarray]]:
    """What vLLM finds of each folder, by its name."""
    subprocess.run([os.environ["PYTHON_WITH_VLLM"], ENGINE, *options, *folders], check=True)
    return {folder.name: dict(np.load(folder / "found.npz")) for folder in folders}


def inputs() -> dict[str, np.ndarray]:
    """Activations with outliers and a matrix of codes."""
    random = np.random.default_rng(0)
    x_td = random.normal(size=(512, 576)) * np.exp(random.normal(size=(512, 1))) * np.exp(random.normal(size=(1, 576)))
    codes_nd = random.integers(-127, 128, (192, 576), np.int8)
    scale_n = random.uniform(1e-3, 2e-3, 192).astype(np.float16).astype(np.float32)
    return {"x_td": x_td.astype(np.float32), "codes_nd": codes_nd, "scale_n": scale_n}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All that vLLM is asked, in one process of its interpreter: a `Case` by name, and its product."""
    work = tmp_path_factory.mktemp("vllm")
    foundation = load_foundation("smollm2-135m-instruct")
    passage_bt, smollm2 = passage(foundation), FloatModel(foundation.architecture, foundation.read)
    tokens_bt = np.random.default_rng(0).integers(3, TINY.vocabulary, (8, 60))
    asked = {name: (TINY, byte_level(), tokens_bt, *of) for name, of in {
        "tiny w8a8": (RULES["w8a8"], "w8a8"),
        "tiny static": (STATIC, "w8a8"),
        "tiny w4a16": (RULES["w4a16"], "w4a16"),
    }.items()} | {name: (source, foundation.tokenizer, passage_bt, RULES[type], type) for name, source, type in (
        ("SmolLM2 w8a8", smollm2, "w8a8"),
        ("SmolLM2 folded w8a8", folded(smollm2, passage_bt), "w8a8"),
        ("SmolLM2 w4a16", smollm2, "w4a16"),
    )}  # fmt: skip
    written = {
        name: (*write(work / name, source, rules, tokenizer, type, tokens_bt), tokens_bt)
        for name, (source, tokenizer, tokens_bt, rules, type) in asked.items()
    }
    (work / "product").mkdir()
    np.savez(work / "product" / "inputs.npz", **inputs())  # pyright: ignore[reportArgumentType]
    answers = ask([work / name for name in (*written, "product")])
    return {name: Case(*case, answers[name]) for name, case in written.items()} | {"product": answers["product"]}


@pytest.mark.parametrize("name", ("tiny w8a8", "tiny static", "tiny w4a16", "SmolLM2 w8a8", "SmolLM2 w4a16"))
def test_vllm_reads_codes_and_scales(found: dict[str, Any], name: str) -> None:
    """Bit for bit, as it fuses them and before it packs them anew for its product."""
    case = found[name]
    for module, paths in FUSED.items():
        leaves = {f"layers/{path}": case.leaves[f"layers/{path}"] for path in paths}
        codes_oi = np.concatenate([NAMES[path].from_ours(leaf.codes[1]) for path, leaf in leaves.items()])
        scale_oi = np.concatenate(
            [NAMES[path].from_ours(native.spread(leaf.scale[1], leaf.codes.shape[1:])) for path, leaf in leaves.items()]
        )
        of_module = {part.removeprefix(f"model.layers.1.{module}."): array for part, array in case.found.items()}
        group = codes_oi.shape[1] // of_module["weight_scale"].shape[1]
        np.testing.assert_array_equal(of_module["weight_scale"].astype(np.float32), scale_oi[:, ::group])
        if "weight_packed" in of_module:
            assert group == 32
            assert bits(of_module["weight_packed"]) == bits(pack(codes_oi, 4))
        else:
            assert bits(of_module["weight"]) == bits(np.ascontiguousarray(codes_oi))
        if "static" in name:
            assert of_module["input_scale"].tolist() == [np.float32(WIDE)]


def test_vllms_product_is_ours(found: dict[str, Any]) -> None:
    """The scale of a token is absmax / 127 there and absmax · (1 / 127) here: equal to an ulp.

    Codes are x · (1 / scale) there and x · (127 / absmax) here, two roundings more, which moves one code in about 1e5
    by one step. The sums of int32 are exact; they are multiplied by two scales, three roundings at most.
    """
    given, theirs = inputs(), found["product"]
    codes_td, scale_t = (np.asarray(part) for part in quantize_tokens(jax.numpy.asarray(given["x_td"]), (1,)))
    np.testing.assert_allclose(theirs["scale_t"], scale_t[:, 0], rtol=2**-23)
    differ = theirs["codes_td"] != codes_td
    print("product: codes that differ", differ.sum(), "of", differ.size)
    assert abs(theirs["codes_td"].astype(int) - codes_td).max() <= 1 and differ.mean() <= 1e-4
    sums_tn = theirs["codes_td"].astype(np.int64) @ given["codes_nd"].T.astype(np.int64)
    wanted_tn = sums_tn * theirs["scale_t"].astype(np.float64)[:, None] * given["scale_n"]
    np.testing.assert_allclose(theirs["found_tn"], wanted_tn, rtol=3 * 2**-24)


@pytest.mark.parametrize("name", ("tiny w8a8", "tiny static", "tiny w4a16"))
def test_vllm_computes_what_we_train(found: dict[str, Any], name: str) -> None:
    """Its arithmetic is ours but for the order of float sums and, in w4a16, for float16."""
    case = found[name]
    agreement, divergence = compare(name, case.ours(), case.found["logp_btv"])
    assert agreement >= 0.99 and divergence <= 1e-3


def test_the_foundation_in_w4a16(found: dict[str, Any]) -> None:
    """SmolLM2; packed codes have no float32 product there, and float16 moves its log-probabilities by 6e-3 (rms).

    So it may turn around tokens that we find as likely as that: two of 192 positions, with 5e-4 and 7e-3 nats between
    them. All others agree.
    """
    case = found["SmolLM2 w4a16"]
    ours, theirs = case.ours(), case.found["logp_btv"]
    _, divergence = compare("SmolLM2 w4a16", ours, theirs)
    assert divergence <= 1e-3
    behind_bt = ours.max(-1) - np.take_along_axis(ours, theirs.argmax(-1)[..., None], -1)[..., 0]
    print("SmolLM2 w4a16: top-1 differs where we have between the two", behind_bt[behind_bt > 0])
    assert (behind_bt <= 0.02).mean() >= 0.99 and (behind_bt <= 0.05).all()


@pytest.mark.parametrize(("name", "ceiling"), (("SmolLM2 w8a8", 0.1), ("SmolLM2 folded w8a8", 0.02)))
def test_the_foundation_in_w8a8(found: dict[str, Any], name: str, ceiling: float) -> None:
    """SmolLM2 without training, of which the interop test of the same name tells, and its bounds."""
    case = found[name]
    ours = case.ours()
    _, ulp = compare(f"{name}, our own an ulp off", ours, case.ours(an_ulp_off(case.model.served)))
    _, divergence = compare(name, ours, case.found["logp_btv"])
    assert divergence <= min(3 * ulp, ceiling)


# --- mixtures of experts


@pytest.mark.parametrize("name", MIXTURES)
def test_vllm_reads_experts_and_computes_with_them(tmp_path: Path, name: str) -> None:
    """Codes and scales bit for bit, as it stacks and fuses them; its product of experts has bfloat16 only.

    That moves our own forward as far: measured KL 3.3e-2 and 9.1e-3, ours in bfloat16 3.0e-2 and 8.6e-3. Asked for is
    twice as much: whose sums are in which order is another matter.
    """
    flags = Path("/proc/cpuinfo").read_text()
    assert "amx_tile" in flags, "on CPUs vLLM multiplies experts with AMX; take one of these"
    architecture, prefix = MIXTURES[name]
    tokens_bt = np.random.default_rng(0).integers(3, architecture.vocabulary, (8, 60))
    written = write(tmp_path / "x", architecture, MATRICES, byte_level(), "w8a8", tokens_bt)
    case = Case(*written, tokens_bt, ask([tmp_path / "x"], "--amx")["x"])
    gate, up, down = (case.leaves[f"layers/mlp/{leaf}"] for leaf in EXPERTS)
    for part, held in (("codes", "weight"), ("scale", "weight_scale")):
        wanted_efd = np.concatenate([getattr(gate, part)[1], getattr(up, part)[1]], -1).swapaxes(1, 2)
        wanted_edf = getattr(down, part)[1].swapaxes(1, 2)
        np.testing.assert_array_equal(case.found[f"model.layers.1.{prefix}.w13_{held}"], wanted_efd)
        np.testing.assert_array_equal(case.found[f"model.layers.1.{prefix}.w2_{held}"], wanted_edf)
    ours, bfloat16 = case.ours(), tiny.make(architecture, MATRICES, compute_dtype="bfloat16")
    _, bound = compare(f"{name}, our own in bfloat16", ours, replace(case, model=bfloat16).ours())
    _, divergence = compare(f"{name}", ours, case.found["logp_btv"])
    assert divergence <= 2 * bound
