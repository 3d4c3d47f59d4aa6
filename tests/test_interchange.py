"""A trained run as a GGUF file and as a Hugging Face directory: its own codes and scales, or its decoded weights."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf as package
import jax
import ml_dtypes
import numpy as np
import pytest
import tiny_training as tiny
from checkpoints import bits, one_line
from commands import Call, calls_in, check_mistake
from llama_cpp import LlamaCpp
from test_huggingface import reference_logits
from tiny_runs import save
from tiny_tokenizers import byte_level

from research.config import Rule
from research.formats import gguf, huggingface, native
from research.formats.gguf_file import open_gguf
from research.formats.model_source import leaf_shapes
from research.formats.safetensors_file import read_tensor
from research.train.export import stored_leaves
from research.train.interchange import write_compressed_tensors, write_gguf, write_huggingface
from research.train.state import encoded_weights

Leaves = Mapping[str, native.Leaf]
METADATA = {"foundation": {"name": "tiny"}, "task": "fruit", "step": 2}
RULES = (  # one scale a tensor, one a channel, groups of one block and of two
    Rule(match="layers/attention/.*", weight="int8", granularity="group:32"),
    Rule(match="layers/mlp/up_df", weight="int8", granularity="group:64"),
    Rule(match="layers/mlp/gate_df", weight="int8", granularity="tensor"),
    Rule(match=".*", weight="int8"),
)
MODEL = (tiny.OF_BLOCKS, byte_level())


@pytest.fixture(scope="module")
def run() -> tiny.Run:
    """A run of two steps on a mesh that pads heads (9/3 become 12/4) and words (398 become 400)."""
    run = tiny.start(RULES, architecture=tiny.OF_BLOCKS, tensor=4)
    run.advance(2)
    assert run.state.params["layers"]["attention"]["q_dnh"].shape == (2, 64, 12, 32)
    return run


@pytest.fixture(scope="module")
def leaves(run: tiny.Run) -> Leaves:
    return stored_leaves(encoded_weights(run.state), run.setup, 0)


@pytest.fixture(scope="module")
def project(run: tiny.Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of the run."""
    folder = tmp_path_factory.mktemp("project")
    save(folder / "runs" / "blocks" / "checkpoints", run.state, {"tensor": 4}, RULES, tiny.OF_BLOCKS)
    return folder


@pytest.fixture
def call(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Call]:
    yield from calls_in(project, monkeypatch, capsys)


def of_tensor(name: str, leaf: Any) -> np.ndarray:
    """The rows [out, in] that stand for a layer's tensor, from a leaf of q_dnh's kind; written out, not by the map."""
    layer = leaf[int(name.split(".")[1])]
    if name.endswith(("attn_q.weight", "attn_k.weight")):
        # llama.cpp turns rows 2i and 2i + 1 of a head, we turn i and i + 16.
        order = [half * 16 + i for i in range(16) for half in (0, 1)]
        layer = layer[:, :, order]
    if name.endswith("attn_output.weight"):
        return layer.reshape(-1, layer.shape[-1]).T
    return layer.reshape(layer.shape[0], -1).T


TENSORS = {
    "blk.1.attn_q.weight": "layers/attention/q_dnh",
    "blk.0.attn_k.weight": "layers/attention/k_dkh",
    "blk.1.attn_v.weight": "layers/attention/v_dkh",
    "blk.0.attn_output.weight": "layers/attention/o_nhd",
    "blk.1.ffn_gate.weight": "layers/mlp/gate_df",
    "blk.0.ffn_up.weight": "layers/mlp/up_df",
    "blk.1.ffn_down.weight": "layers/mlp/down_fd",
}


def test_blocks_hold_the_codes_and_scales_of_the_run(call: Call, project: Path, leaves: Leaves) -> None:
    """Through the command, from a checkpoint, read with the package of llama.cpp's authors: bit for bit."""
    arguments = ("--checkpoint", "runs/blocks", "--format", "gguf", "--type", "Q8_0", "--output", "model.gguf")
    done = call("export.py", *arguments)
    assert done.code == 0, done.err
    assert "Q8_0: 8 leaves" in done.out and "lossless" in done.out and "model.gguf: step 2" in done.out
    reader = package.GGUFReader(project / "model.gguf")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    assert reader.fields["general.file_type"].contents() == 7
    assert reader.fields["general.quantization_version"].contents() == 2
    for name, path in TENSORS.items():
        leaf = leaves[path]
        assert isinstance(leaf, native.StoredLeaf) and leaf.scale is not None
        assert stored[name].tensor_type.name == "Q8_0"
        rows = of_tensor(name, leaf.codes).shape[0]
        blocks = np.asarray(stored[name].data).reshape(rows, -1, 34)
        codes = blocks[..., 2:].view(np.int8).reshape(rows, -1)
        np.testing.assert_array_equal(codes, of_tensor(name, leaf.codes))
        repeats = [n // m for n, m in zip(leaf.codes.shape, leaf.scale.shape, strict=True)]
        scale = leaf.scale
        for axis, count in enumerate(repeats):
            scale = scale.repeat(count, axis)
        found = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].repeat(32, 1)
        assert bits(found) == bits(np.ascontiguousarray(of_tensor(name, scale)))
    table = leaves["embed/table_vd"]
    blocks = np.asarray(stored["token_embd.weight"].data).reshape(398, 2, 34)
    np.testing.assert_array_equal(blocks[..., 2:].view(np.int8).reshape(398, 64), table.codes)
    check_mistake(call("export.py", *arguments), "model.gguf exists already")


def test_matrices_of_codes_through_the_command(call: Call, project: Path, leaves: Leaves) -> None:
    """Groups of 32 and 64 and whole rows of 64, 96 and 128 are groups of 32; packed by hand: the code plus 128."""
    arguments = ("--checkpoint", "runs/blocks", "--format", "compressed-tensors", "--type")
    done = call("export.py", *arguments, "w8a16")
    assert done.code == 0, done.err
    assert "codes and scales of the run, bit for bit: 7 leaves" in done.out and "float32, exactly decoded" in done.out
    file = project / "runs" / "blocks" / "export-step-2-compressed-tensors-w8a16" / "model.safetensors"
    leaf = leaves["layers/mlp/down_fd"]
    assert isinstance(leaf, native.StoredLeaf) and leaf.scale is not None
    packed = read_tensor(file, "model.layers.1.mlp.down_proj.weight_packed").view(np.uint8)
    np.testing.assert_array_equal(packed.astype(np.int32) - 128, leaf.codes[1].T)
    scale = read_tensor(file, "model.layers.1.mlp.down_proj.weight_scale")
    np.testing.assert_array_equal(scale, leaf.scale[1].T.repeat(4, 1).astype(np.float32))
    mistake = "layers/attention/q_dnh is int8/group:32, and w8a8 has one scale a channel; type w8a16 holds it"
    check_mistake(call("export.py", *arguments, "w8a8"), mistake)
    check_mistake(call("export.py", *arguments, "w4a4"), "--format compressed-tensors has w8a8, w8a16, w4a16")


@pytest.mark.parametrize("type", ("Q8_0", "F32"))
def test_the_file_opened_as_a_foundation_is_the_run(tmp_path: Path, leaves: Leaves, type: str) -> None:
    path = tmp_path / "x.gguf"
    *_, line = write_gguf(path, leaves, *MODEL, type)
    assert line.startswith("lossless")
    found = gguf.open_model(path)
    assert found.architecture == tiny.OF_BLOCKS
    for name in leaves:
        assert bits(found.read(name)) == bits(native.decode(leaves[name])), name
    chat = [{"role": "user", "content": "Is it spam?"}]
    assert found.tokenizer.apply_chat_template(chat) == byte_level().apply_chat_template(chat)


@pytest.mark.parametrize(("type", "dtype"), (("F16", np.float16), ("BF16", ml_dtypes.bfloat16)))
def test_halves_are_rounded_and_it_is_said(tmp_path: Path, leaves: Leaves, type: str, dtype: Any) -> None:
    types, line = write_gguf(tmp_path / "x.gguf", leaves, *MODEL, type)
    assert f"{type}: 8 leaves" in types and line == f"rounded to {type}: 8 leaves, of 11 leaves; F32 holds them exactly"
    found, path = gguf.open_model(tmp_path / "x.gguf"), "layers/mlp/down_fd"
    np.testing.assert_array_equal(found.read(path), native.decode(leaves[path]).astype(dtype).astype(np.float32))


def test_a_hugging_face_directory_holds_the_decoded_weights(tmp_path: Path, leaves: Leaves) -> None:
    exact = write_huggingface(tmp_path / "f32", leaves, *MODEL, "float32", METADATA)
    rounded = write_huggingface(tmp_path / "bf16", leaves, *MODEL, "bfloat16", METADATA)
    assert exact == ("lossless: every weight is the run's, bit for bit",)
    assert rounded[0].startswith("rounded to bfloat16: 11 leaves, of 11")
    full, half = huggingface.open_model(tmp_path / "f32"), huggingface.open_model(tmp_path / "bf16")
    for path in leaves:
        values = native.decode(leaves[path])
        assert bits(full.read(path)) == bits(values)
        assert bits(half.read(path)) == bits(values.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("dtype", (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2))
def test_eight_bit_floats_are_decoded(tmp_path: Path, leaves: Leaves, dtype: Any) -> None:
    """Bit for bit in float32; in 16 bits where they hold them; and no block takes their codes."""
    path = "layers/mlp/up_df"
    codes = np.random.default_rng(0).normal(size=leaf_shapes(tiny.OF_BLOCKS)[path]).astype(dtype)
    leaf = native.StoredLeaf(codes, np.full((2, 1, 128), 2.0**-3, np.float16), f"{np.dtype(dtype)}/channel")
    values = codes.astype(np.float32) / 8 + 0.0
    changed = {**leaves, path: leaf}
    for type in ("F32", "BF16", "F16"):
        write_gguf(tmp_path / f"{type}.gguf", changed, *MODEL, type)
        assert bits(gguf.open_model(tmp_path / f"{type}.gguf").read(path)) == bits(values), type
    for type in ("float32", "bfloat16"):
        write_huggingface(tmp_path / type, changed, *MODEL, type, METADATA)
        assert bits(huggingface.open_model(tmp_path / type).read(path)) == bits(values), type
    line = one_line(lambda: write_gguf(tmp_path / "x.gguf", changed, *MODEL, "Q8_0"))
    assert f"{path} is {leaf.format}, so that Q8_0 would quantize it anew; type F32 holds it exactly" in line


def in_blocks(x: np.ndarray) -> np.ndarray:
    """Activations as llama.cpp rounds them before they meet a block of weights: int8, a scale for 32 of them."""
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, 32)
    step = abs(blocks).max(-1, keepdims=True) / np.float32(127)
    return (np.round(blocks / step) * step.astype(np.float16).astype(np.float32)).reshape(x.shape)


# Bounds of the perplexity, relative; measured 1e-7 to 5e-7, and 3e-3. Float32 sums differ in their order; with blocks
# such a difference now and then makes an activation's code the next one. Without rounded activations it is 4e-2.
@pytest.mark.parametrize(("type", "activation", "bound"), (("F32", lambda x: x, 5e-6), ("Q8_0", in_blocks, 1e-2)))
def test_llama_cpp_predicts_as_the_run_does(
    tmp_path: Path, leaves: Leaves, type: str, activation: Callable[[np.ndarray], np.ndarray], bound: float
) -> None:
    """The perplexity of a text, where each token follows all before it, against formulas in float64."""
    weights = {path: native.decode(leaves[path]) for path in leaves}
    ids = byte_level().encode("Is this message spam or ham? Answer with one word, it's 2026.")
    logits_tv = reference_logits(tiny.OF_BLOCKS, weights, np.array([ids]), activation)[0]
    logits_tv -= logits_tv.max(1, keepdims=True)
    logp_tv = logits_tv - np.log(np.exp(logits_tv).sum(1, keepdims=True))
    write_gguf(tmp_path / "x.gguf", leaves, *MODEL, type)
    judge = LlamaCpp(tmp_path / "x.gguf")
    found_tv = np.array([judge.log_probabilities(ids[:end], 398) for end in range(1, len(ids))])
    assert np.isfinite(found_tv).all()
    rows = np.arange(len(ids) - 1)
    ratio = np.exp(-np.mean(found_tv[rows, ids[1:]] - logp_tv[rows, ids[1:]]))
    assert abs(ratio - 1) < bound, ratio


def test_what_blocks_cannot_hold_is_named_with_what_can(tmp_path: Path, leaves: Leaves) -> None:
    def mistake(type: str, **changed: Any) -> str:
        path = tmp_path / "x.gguf"
        line = one_line(lambda: write_gguf(path, {**leaves, **{k: v for k, v in changed.items()}}, *MODEL, type))
        assert not path.exists()
        return line

    up = leaves["layers/mlp/up_df"]
    assert isinstance(up, native.StoredLeaf)
    assert "which Q4_0 doesn't hold; type Q8_0 does, exactly" in mistake("Q4_0")
    name = "layers/mlp/up_df"
    assert f"{name} is float, so that Q8_0" in mistake("Q8_0", **{name: native.decode(up)})
    half = native.StoredLeaf(native.decode(up).astype(ml_dtypes.bfloat16), None, "bf16")
    assert f"{name} is bf16, so that Q8_0 would quantize it anew; type BF16" in mistake("Q8_0", **{name: half})
    fine = native.StoredLeaf(up.codes, np.ones((2, 4, 128), np.float16), "int8/group:16")
    fine.scale[1, 3, 5] = 2
    assert f"{name} has more than one scale in a block" in mistake("Q8_0", **{name: fine})
    broken = native.StoredLeaf(up.codes, np.full((2, 1, 128), np.nan, np.float16), "int8/channel")
    assert f"{name} has scales that are not finite" in mistake("Q8_0", **{name: broken})
    assert f"{name} holds values that are not finite" in mistake("F32", **{name: broken})
    assert "ends in .gguf" in one_line(lambda: write_gguf(tmp_path / "x", leaves, *MODEL, "F32"))


def test_what_is_held_does_not_depend_on_the_mesh(run: tiny.Run, leaves: Leaves) -> None:
    """No padding is left."""
    shapes = {path: native.decode(leaves[path]).shape for path in leaves}
    assert shapes == gguf.leaf_shapes(tiny.OF_BLOCKS)
    assert jax.tree.leaves(run.state.params)[0].shape == (400, 64)


def test_an_exported_file_is_of_the_type_that_it_says(tmp_path: Path, leaves: Leaves) -> None:
    for type, number in {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7}.items():
        write_gguf(tmp_path / f"{type}.gguf", leaves, *MODEL, type)
        assert open_gguf(tmp_path / f"{type}.gguf").metadata["general.file_type"] == number


class Counted(dict[str, native.Leaf]):
    """Leaves that count how often they are asked for: between processes each time is a transfer."""

    def __init__(self, leaves: Leaves):
        super().__init__(leaves)
        self.asked: list[str] = []

    def __getitem__(self, path: str) -> native.Leaf:
        self.asked.append(path)
        return super().__getitem__(path)


def test_leaves_are_asked_for_as_rarely_as_can_be(tmp_path: Path, leaves: Leaves) -> None:
    """Once where what is written doesn't depend on them all; twice where their kind decides how a file is laid out."""
    most: dict[str, int] = {}
    for name, write in {
        "gguf": lambda leaves: write_gguf(tmp_path / "x.gguf", leaves, *MODEL, "Q8_0"),
        "huggingface": lambda leaves: write_huggingface(tmp_path / "hf", leaves, *MODEL, "float32", METADATA),
        "w8a16": lambda leaves: write_compressed_tensors(tmp_path / "ct", leaves, *MODEL, "w8a16", METADATA),
    }.items():
        counted = Counted(leaves)
        write(counted)
        most[name] = max(counted.asked.count(path) for path in leaves)
    assert most == {"gguf": 2, "huggingface": 1, "w8a16": 2}
