"""Blocks of 32 weights from codes and scales: bytes as the `gguf` package and llama.cpp read them, nothing rounded."""

from dataclasses import replace
from pathlib import Path

import gguf as package
import numpy as np
import pytest
from checkpoints import bits, one_line
from gguf import GGMLQuantizationType as Type
from llama_cpp import LlamaCpp
from tiny_tokenizers import byte_level

from research.architecture import Architecture
from research.formats import gguf, gguf_blocks, native
from research.formats.gguf_blocks import Blocks, fits, holder, make_blocks
from research.formats.gguf_file import open_gguf
from research.formats.model_source import leaf_shapes

SMALL = Architecture(
    vocabulary=400, width=64, layers=2, query_heads=4, kv_heads=2, head_width=16, feed_forward=96, context=64
)


def int4_leaf(shape: tuple[int, ...], seed: int) -> native.StoredLeaf:
    """Codes -8 … 7 with a scale, some of them negative, for 32 inputs; for o_nhd, of heads below 32, one a column."""
    random = np.random.default_rng(seed)
    groups = (shape[0], shape[1] // 32, *shape[2:]) if shape[1] % 32 == 0 else (shape[0], 1, 1, shape[3])
    scale = random.uniform(0.02, 0.05, groups) * random.choice([-1, 1], groups)
    return native.StoredLeaf(random.integers(-8, 8, shape, np.int8), scale.astype(np.float16), "int4/group:32")


def int4_leaves(architecture: Architecture = SMALL) -> dict[str, native.Leaf]:
    """A model as the usual recipe makes it: int4 matrices, an int8 table, float norms."""
    leaves: dict[str, native.Leaf] = {}
    for seed, (path, shape) in enumerate(leaf_shapes(architecture).items()):
        random = np.random.default_rng(seed)
        if "table" in path:
            codes = random.integers(-127, 128, shape, np.int8)
            scale = random.uniform(0.001, 0.002, (shape[0], 1)).astype(np.float16)
            leaves[path] = native.StoredLeaf(codes, scale, "int8/channel")
        elif "norm" in path:
            leaves[path] = random.uniform(0.9, 1.1, shape).astype(np.float32)
        else:
            leaves[path] = int4_leaf(shape, seed)
    return leaves


def write(path: Path, leaves: dict[str, native.Leaf], type: str) -> dict[str, gguf.Written]:
    return gguf.write(path, SMALL, byte_level(), leaves.__getitem__, tuple(leaves), type)


def test_nibbles_are_where_llama_cpp_looks_for_them() -> None:
    """Written out by hand: the low half of byte j is element j, the high half element j + 16, each plus 8."""
    codes = np.array([[-8, 7, *[0] * 14, 5, -1, *[0] * 14]], np.int8)
    packed = Blocks(codes, np.array([[-0.5]], np.float16)).pack("Q4_0")
    assert packed.dtype == np.uint8 and packed.shape == (1, 18)
    assert packed[0, :4].tolist() == [0x00, 0xB8, 0xD0, 0x7F] and set(packed[0, 4:].tolist()) == {0x88}
    eight = Blocks(codes, np.array([[-0.5]], np.float16)).pack("Q8_0")
    assert eight.shape == (1, 34) and eight[0, 2:].view(np.int8).tolist() == codes[0].tolist()


@pytest.mark.parametrize("type", ("Q8_0", "Q4_0"))
def test_the_package_decodes_what_we_packed(type: str) -> None:
    random = np.random.default_rng(0)
    codes = random.integers(-8, 8, (5, 96), np.int8)
    scale = random.normal(size=(5, 3)).astype(np.float16)
    found = package.quants.dequantize(Blocks(codes, scale).pack(type), Type[type])
    np.testing.assert_array_equal(found, codes.astype(np.float32) * scale.astype(np.float32).repeat(32, 1))


@pytest.mark.parametrize("codes, type", (([-8, 7], "Q4_0"), ([-9, 0], "Q8_0"), ([0, 8], "Q8_0"), ([0, 15], "Q4_1")))
def test_the_type_that_holds_codes(codes: list[int], type: str) -> None:
    held, has_offset = np.array(codes, np.int8), type == "Q4_1"
    assert holder(held, has_offset) == type
    others = {"Q4_0": {"Q4_0", "Q8_0"}}.get(type, {type})
    assert {name for name in gguf_blocks.TYPES if fits(held, has_offset, name)} == others


def affine_leaves() -> dict[str, native.Leaf]:
    """A model whose matrices are affine, in groups of 32 inputs (of heads of 16, in the one column of each)."""
    leaves = int4_leaves()
    for path, leaf in leaves.items():
        if isinstance(leaf, native.StoredLeaf) and leaf.scale is not None and "table" not in path:
            offset = (-8 * leaf.scale).astype(np.float16) + np.float16(0.01)
            leaves[path] = native.StoredLeaf(leaf.codes + np.int8(8), leaf.scale, "q4_1/group:32", offset)
    return leaves


def test_affine_matrices_are_q4_1(tmp_path: Path) -> None:
    """Offsets lie behind scales; the package decodes code · scale + offset, in float32, as we do."""
    leaves = affine_leaves()
    written = write(tmp_path / "x.gguf", leaves, "Q4_1")
    types = {path: entry.type for path, entry in written.items()}
    assert types.pop("embed/table_vd") == "Q8_0" and all(entry.is_exact for entry in written.values())
    assert all(type == ("F32" if "norm" in path else "Q4_1") for path, type in types.items())
    assert open_gguf(tmp_path / "x.gguf").metadata["general.file_type"] == 3
    found = gguf.open_model(tmp_path / "x.gguf")
    for path, leaf in leaves.items():
        assert bits(found.read(path)) == bits(native.decode(leaf)), path
    line = one_line(lambda: write(tmp_path / "y.gguf", leaves, "Q4_0"))
    assert "is q4_1/group:32 with codes 0 … 15 and offsets, which Q4_0 doesn't hold; type Q4_1 does, exactly" in line
    line = one_line(lambda: write(tmp_path / "y.gguf", int4_leaves(), "Q4_1"))
    assert "is int4/group:32 with codes -8 … 7 and no offsets, which Q4_1 doesn't hold; type Q4_0 does" in line


def test_what_makes_no_block_is_named() -> None:
    codes, scale = np.zeros((2, 64), np.int8), np.ones((2, 64), np.float16)
    assert make_blocks("x", codes, scale).scale_ob.shape == (2, 2)
    assert "x sums over 48 inputs" in one_line(lambda: make_blocks("x", codes[:, :48], scale[:, :48]))
    scale[1, 63] = 2
    assert "x has more than one scale in a block of 32" in one_line(lambda: make_blocks("x", codes, scale))
    assert "x has more than one scale" in one_line(lambda: make_blocks("x", codes, np.ones_like(scale), scale))
    scale[1, 63] = np.inf
    assert "x has scales that are not finite" in one_line(lambda: make_blocks("x", codes, scale))


def test_int4_matrices_and_int8_tables_in_one_file(tmp_path: Path) -> None:
    """Bit for bit the decoded weights, without negative zeros, which code 0 times a negative scale would be."""
    leaves = int4_leaves()
    written = write(tmp_path / "x.gguf", leaves, "Q4_0")
    types = {path: entry.type for path, entry in written.items()}
    assert types.pop("embed/table_vd") == "Q8_0" and all(entry.is_exact for entry in written.values())
    assert all(type == ("F32" if "norm" in path else "Q4_0") for path, type in types.items())
    assert open_gguf(tmp_path / "x.gguf").metadata["general.file_type"] == 2
    found = gguf.open_model(tmp_path / "x.gguf")
    for path, leaf in leaves.items():
        assert bits(found.read(path)) == bits(native.decode(leaf)), path
    as_eight = write(tmp_path / "y.gguf", leaves, "Q8_0")
    assert {entry.type for entry in as_eight.values()} == {"Q8_0", "F32"}
    found = gguf.open_model(tmp_path / "y.gguf")
    assert all(bits(found.read(path)) == bits(native.decode(leaf)) for path, leaf in leaves.items())


def test_a_matrix_of_int8_codes_is_no_q4_0(tmp_path: Path) -> None:
    leaves = int4_leaves()
    up = leaves["layers/mlp/up_df"]
    assert isinstance(up, native.StoredLeaf)
    leaves["layers/mlp/up_df"] = replace(up, codes=up.codes * np.int8(2), format="int8/group:32")
    line = one_line(lambda: write(tmp_path / "x.gguf", leaves, "Q4_0"))
    assert line.startswith("layers/mlp/up_df is int8/group:32 with codes -16 … 14 and no offsets, which Q4_0 doesn't")
    assert line.endswith("type Q8_0 does, exactly")
    leaves["embed/table_vd"] = native.decode(leaves["embed/table_vd"])
    assert "embed/table_vd is float, so that Q4_0" in one_line(lambda: write(tmp_path / "x.gguf", leaves, "Q4_0"))


def test_llama_cpp_computes_with_the_blocks(tmp_path: Path) -> None:
    """The files of one model: llama.cpp multiplies the same integers for Q4_0 and Q8_0, and rounds activations.

    Measured: equal; against F32, 0.02 in the mean of the differences, where log-probabilities vary by 0.86.
    """
    leaves, found = int4_leaves(), {}
    ids = byte_level().encode("Is this message spam or ham?")
    for name, model in {"F32": leaves, "Q8_0": leaves, "Q4_0": leaves, "F32 affine": affine_leaves()}.items():
        found[name] = _log_probabilities(tmp_path / f"{name}.gguf", model, name.split()[0], ids)
    found["Q4_1"] = _log_probabilities(tmp_path / "Q4_1.gguf", affine_leaves(), "Q4_1", ids)
    assert np.isfinite(found["F32"]).all()
    np.testing.assert_allclose(found["Q4_0"], found["Q8_0"], rtol=0, atol=1e-4)  # sums of float32 in another order
    assert abs(found["Q8_0"] - found["F32"]).mean() < 0.06
    assert abs(found["Q4_1"] - found["F32 affine"]).mean() < 0.06
    assert abs(found["F32 affine"] - found["F32"]).mean() > 0.06, "the offsets count"


def _log_probabilities(path: Path, leaves: dict[str, native.Leaf], type: str, ids: list[int]) -> np.ndarray:
    write(path, leaves, type)
    return LlamaCpp(path).log_probabilities(ids, SMALL.vocabulary)
