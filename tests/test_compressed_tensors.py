"""Codes and scales in the layout of compressed-tensors, by hand; what the library makes of it is in test_interop_*."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import bits, one_line
from test_gguf_blocks import SMALL, int4_leaves
from tiny_tokenizers import byte_level

from research.formats import native
from research.formats.compressed_tensors import pack, write
from research.formats.safetensors_file import list_tensors, read_tensor

UP, OUT = "layers/mlp/up_df", "layers/attention/o_nhd"


def written(path: Path, leaves: Mapping[str, native.Leaf], type: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of a new directory, and what its config.json says of them."""
    write(path, SMALL, byte_level(), leaves, type, {})
    file = path / "model.safetensors"
    config = json.loads((path / "config.json").read_text())
    return {name: read_tensor(file, name) for name in list_tensors(file)}, config["quantization_config"]


def whole_rows(leaves: dict[str, native.Leaf]) -> dict[str, native.Leaf]:
    """The leaves with the first scale of each row for all of it."""
    changed = dict(leaves)
    for path, leaf in leaves.items():
        if isinstance(leaf, native.StoredLeaf) and path.startswith("layers/"):
            assert leaf.scale is not None
            changed[path] = replace(leaf, scale=abs(leaf.scale[:, :1]), format="int4/channel")
    return changed


@pytest.mark.parametrize(
    ("bits_of", "codes", "words"),
    [
        (4, [-8, 7, 0, 1, -1, 2, -2, 3, 5], [[0xB6A798F0 - 2**32, 0xD]]),  # the first in the lowest bits, plus 8
        (8, [-128, 127, 0, 1, -127], [[0x8180FF00 - 2**32, 0x01]]),
    ],
)
def test_words_are_filled_from_their_lowest_bits(bits_of: int, codes: list[int], words: list[list[int]]) -> None:
    packed = pack(np.array([codes], np.int8), bits_of)
    assert packed.dtype == np.int32 and packed.tolist() == words


def test_groups_of_four_bits(tmp_path: Path) -> None:
    """One group size for the file: where a matrix has one scale a row, it is repeated."""
    leaves = int4_leaves()
    tensors, config = written(tmp_path / "x", leaves, "w4a16")
    group = config["config_groups"]["group_0"]
    assert (group["weights"]["num_bits"], group["weights"]["group_size"], group["weights"]["strategy"]) == (
        4,
        32,
        "group",
    )
    assert config["format"] == "pack-quantized" and group["input_activations"] is None
    assert config["ignore"] == ["lm_head"]
    up, o = leaves[UP], leaves[OUT]
    assert isinstance(up, native.StoredLeaf) and isinstance(o, native.StoredLeaf)
    assert up.scale is not None and o.scale is not None
    module = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(tensors[f"{module}_packed"], pack(up.codes[1].T, 4))
    np.testing.assert_array_equal(tensors[f"{module}_scale"], up.scale[1].T.astype(np.float32))
    assert tensors[f"{module}_shape"].tolist() == [96, 64] and tensors[f"{module}_shape"].dtype == np.int64
    scale = tensors["model.layers.0.self_attn.o_proj.weight_scale"]
    np.testing.assert_array_equal(scale, o.scale[0].reshape(1, 64).T.repeat(2, 1).astype(np.float32))
    assert bits(tensors["model.embed_tokens.weight"]) == bits(native.decode(leaves["embed/table_vd"]))
    assert "lm_head.weight" not in tensors


def test_groups_within_heads(tmp_path: Path) -> None:
    """Scales of each half of a head, the same for all heads: the file's groups are those halves."""
    leaves = int4_leaves()
    out = leaves[OUT]
    assert isinstance(out, native.StoredLeaf)
    scale = np.random.default_rng(0).uniform(0.02, 0.05, (2, 1, 2, 64)).astype(np.float16)
    leaves[OUT] = native.StoredLeaf(out.codes, scale, "int4/group:8")
    tensors, config = written(tmp_path / "x", leaves, "w4a16")
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == 8
    found = tensors["model.layers.1.self_attn.o_proj.weight_scale"]
    np.testing.assert_array_equal(found, np.tile(scale[1, 0].T, (1, 4)).astype(np.float32))


def test_channels_of_eight_bits(tmp_path: Path) -> None:
    leaves = whole_rows(int4_leaves())
    tensors, config = written(tmp_path / "x", leaves, "w8a8")
    group = config["config_groups"]["group_0"]
    assert (group["weights"]["strategy"], group["weights"]["group_size"]) == ("channel", None)
    assert group["input_activations"]["dynamic"] is True and group["input_activations"]["strategy"] == "token"
    o = leaves[OUT]
    assert isinstance(o, native.StoredLeaf) and o.scale is not None
    module = "model.layers.1.self_attn.o_proj.weight"
    assert bits(tensors[module]) == bits(o.codes[1].reshape(64, 64).T.copy())
    assert bits(tensors[f"{module}_scale"]) == bits(o.scale[1].reshape(64, 1).astype(np.float32))


def test_static_scales_of_activations(tmp_path: Path) -> None:
    inputs = np.random.default_rng(0).uniform(0.01, 0.1, (2, 1, 1)).astype(np.float32)
    leaves = {
        path: replace(leaf, input_scale=inputs.reshape(2, *[1] * (leaf.codes.ndim - 1)))
        if isinstance(leaf, native.StoredLeaf) and path.startswith("layers/")
        else leaf
        for path, leaf in whole_rows(int4_leaves()).items()
    }
    tensors, config = written(tmp_path / "x", leaves, "w8a8")
    activations = config["config_groups"]["group_0"]["input_activations"]
    assert (activations["dynamic"], activations["strategy"]) == (False, "tensor")
    names = [name for name in tensors if name.endswith(".input_scale")]
    assert len(names) == 14
    for name in names:
        assert bits(tensors[name]) == bits(inputs[int(name.split(".")[2])].reshape(1)), name
    weights_only, config = written(tmp_path / "y", leaves, "w8a16")
    assert config["config_groups"]["group_0"]["input_activations"] is None
    assert not any("input_scale" in name for name in weights_only)
    up = leaves[UP]
    assert isinstance(up, native.StoredLeaf)
    assert f"has a static scale of its activation, {UP} has none, and w8a8 holds one kind" in one_line(
        lambda: written(tmp_path / "z", {**leaves, UP: replace(up, input_scale=None)}, "w8a8")
    )


def test_matrices_without_integer_codes_stay_float(tmp_path: Path) -> None:
    """And the engines are told so."""
    leaves = int4_leaves()
    up = leaves[UP]
    assert isinstance(up, native.StoredLeaf)
    for value in (
        native.decode(up),
        native.StoredLeaf(native.decode(up).astype(np.float16), None, "fp16"),
        native.StoredLeaf(np.ones(up.codes.shape, ml_dtypes.float8_e4m3fn), up.scale, "fp8_e4m3/channel"),
    ):
        folder = tmp_path / str(value.__class__) / str(getattr(value, "format", "float")).split("/")[0]
        tensors, config = written(folder, {**leaves, UP: value}, "w4a16")
        assert config["ignore"] == ["lm_head", r"re:.*mlp\.up_proj$"]
        assert bits(tensors["model.layers.1.mlp.up_proj.weight"]) == bits(native.decode(value)[1].T.copy())
    floats = {path: native.decode(leaf) for path, leaf in leaves.items()}
    assert "no matrix of this model has integer codes for w8a8" in one_line(
        lambda: written(tmp_path / "y", floats, "w8a8")
    )


def test_what_does_not_fit_is_named_with_the_type_that_holds_it(tmp_path: Path) -> None:
    def mistake(type: str, **changed: Any) -> str:
        line = one_line(lambda: written(tmp_path / "x", {**whole_rows(int4_leaves()), **changed}, type))
        assert not (tmp_path / "x").exists()
        return line

    grouped = int4_leaves()[UP]
    assert isinstance(grouped, native.StoredLeaf)
    assert f"{UP} is int4/group:32, and w8a8 has one scale a channel; type w4a16 holds it" in mistake(
        "w8a8", **{UP: grouped}
    )
    eight = replace(grouped, codes=grouped.codes * np.int8(2), format="int8/group:32")
    assert f"{UP} is int8/group:32, and w8a8 has one scale a channel; type w8a16" in mistake("w8a8", **{UP: eight})
    assert f"{UP} is int8/group:32 with codes -16 … 14, and w4a16 has -8 … 7; type w8a16 holds it" in mistake(
        "w4a16", **{UP: eight}
    )
    broken = replace(grouped, scale=np.full((2, 1, 96), np.nan, np.float16))
    assert f"{UP} has scales that are not finite" in mistake("w4a16", **{UP: broken})
    norm = np.full((2, 64), np.inf, np.float32)
    assert "mlp_norm/scale_d holds values that are not finite" in mistake("w4a16", **{"layers/mlp_norm/scale_d": norm})
