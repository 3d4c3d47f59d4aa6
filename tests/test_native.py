"""Our export: bit for bit there and back, about a quarter of float32, and no damaged byte goes unnoticed."""

import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file, save_file

from research.architecture import Architecture, RopeScaling
from research.errors import UserError
from research.formats import native
from research.formats.model_source import leaf_shapes
from research.formats.native import StoredLeaf, decode
from research.tokenizer import Tokenizer

pytestmark = pytest.mark.optimized

TOKENIZER = Tokenizer.load(Path(__file__).parent / "fixtures" / "mha")
ARCHITECTURE = Architecture(
    vocabulary=112,
    width=32,
    layers=2,
    query_heads=6,
    kv_heads=2,
    head_width=10,
    feed_forward=24,
    context=64,
    rope_scaling=RopeScaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_context=32),
    tied_head=False,
)
METADATA = {"run": "x", "step": 7, "policy": [{"match": ".*", "weight": "int8"}], "by_step": {10: 0.5, 9: 1e-300}}
# Axis sizes of the scale of each leaf: per channel, per tensor (in each layer), per group of 8 inputs.
SCALES = {"embed/table_vd": (112, 1), "layers/attention/q_dnh": (2, 1, 1, 1), "layers/mlp/gate_df": (2, 4, 24)}


def make_leaves(architecture: Architecture, seed: int = 0) -> dict[str, native.Leaf]:
    """Random leaves of every kind: int8 in three granularities, both casts, and floats."""
    rng = np.random.default_rng(seed)
    leaves: dict[str, native.Leaf] = {}
    for path, shape in leaf_shapes(architecture).items():
        values = rng.normal(size=shape).astype(np.float32)
        if "norm" in path:
            leaves[path] = values.astype(ml_dtypes.bfloat16 if path == "norm/scale_d" else np.float32)
        elif path == "layers/mlp/up_df":
            leaves[path] = StoredLeaf(values.astype(np.float16), None, "fp16")
        elif path == "layers/mlp/down_fd":
            leaves[path] = StoredLeaf(values.astype(ml_dtypes.bfloat16), None, "bf16")
        else:
            codes = rng.integers(-127, 128, shape).astype(np.int8)
            scale_shape = SCALES.get(path, (*shape[:1], *[1] * (len(shape) - 2), shape[-1]))
            scale = rng.uniform(1e-4, 1e-2, scale_shape).astype(np.float16)
            leaves[path] = StoredLeaf(codes, scale, f"int8/{scale_shape}")
    return leaves


LEAVES = make_leaves(ARCHITECTURE)


def same(left: np.ndarray | None, right: np.ndarray | None) -> bool:
    """Whether dtype, shape and every bit are equal."""
    if left is None or right is None:
        return left is right
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


def same_leaf(left: native.Leaf, right: native.Leaf) -> bool:
    if isinstance(left, np.ndarray) or isinstance(right, np.ndarray):
        return isinstance(left, np.ndarray) and isinstance(right, np.ndarray) and same(left, right)
    names = ("codes", "scale", "offset", "input_scale")
    return all(same(getattr(left, n), getattr(right, n)) for n in names) and left.format == right.format


@pytest.fixture
def export(tmp_path):
    """A fresh export of `LEAVES`."""
    native.write(tmp_path / "export", LEAVES, ARCHITECTURE, TOKENIZER, METADATA)
    return tmp_path / "export"


def test_everything_comes_back_bit_for_bit(export):
    found = native.read(export)
    assert found.architecture == ARCHITECTURE and found.tokenizer == TOKENIZER
    assert found.metadata == json.loads(json.dumps(METADATA))
    assert list(found.leaves) == list(leaf_shapes(ARCHITECTURE)) and len(found.leaves) == len(LEAVES)
    for path, leaf in LEAVES.items():
        assert same_leaf(found.leaves[path], leaf), path


def test_names_and_dtypes_in_the_file(export):
    tensors = load_file(export / "model.safetensors")
    assert tensors["embed/table_vd.codes"].dtype == np.int8 and tensors["embed/table_vd.scale"].dtype == np.float16
    assert tensors["layers/mlp/up_df.codes"].dtype == np.float16 and "layers/mlp/up_df.scale" not in tensors
    assert tensors["layers/mlp_norm/scale_d"].dtype == np.float32
    assert sorted(file.name for file in export.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def any_finite(data: st.DataObject, dtype: type | np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """An array of any bits that are a finite number: negative zeros and subnormals, too."""
    width = np.dtype(dtype).itemsize
    bits = data.draw(hnp.arrays({1: np.uint8, 2: np.uint16, 4: np.uint32}[width], shape))
    values = bits.view(dtype)
    return np.where(np.isfinite(values), values, np.zeros_like(values))


FOUR_BITS = [("int4/channel", -7, 7), ("q4_0/group:2", -8, 7), ("q4_1/group:2", 0, 15), ("ternary/tensor", -1, 1)]


@pytest.mark.parametrize("form, smallest, largest", FOUR_BITS)
def test_codes_of_four_bits_take_half_a_byte(tmp_path, form, smallest, largest):
    """In the file; there may be an odd number of them."""
    odd = Architecture(
        vocabulary=3, width=5, layers=1, query_heads=1, kv_heads=1, head_width=2, feed_forward=3, context=8
    )
    leaves: dict[str, native.Leaf] = {name: np.zeros(shape, np.float32) for name, shape in leaf_shapes(odd).items()}
    path = "embed/table_vd"
    codes = np.random.default_rng(0).integers(smallest, largest + 1, (3, 5), np.int8)
    codes[0, :2] = smallest, largest
    offset = np.full((3, 1), -0.25, np.float16) if form.startswith("q4_1") else None
    leaves[path] = StoredLeaf(codes, np.ones((3, 1), np.float16), form, offset)
    native.write(tmp_path / "export", leaves, odd, TOKENIZER, {})
    assert same_leaf(native.read(tmp_path / "export").leaves[path], leaves[path])
    nibbles = load_file(tmp_path / "export" / "model.safetensors")[f"{path}.nibbles"]
    assert nibbles.dtype == np.uint8 and nibbles.shape == (8,)
    assert nibbles[0] == (smallest & 15) | (int(codes[0, 1]) & 15) << 4
    decoded = native.open_model(tmp_path / "export").read(path)
    assert np.array_equal(decoded, codes.astype(np.float32) - (0 if offset is None else np.float32(0.25)))
    leaves[path] = StoredLeaf(codes + np.int8(9), np.ones((3, 1), np.float16), form, offset)
    with pytest.raises(ValueError, match="don't fit in four bits"):
        native.write(tmp_path / "other", leaves, odd, TOKENIZER, {})


def test_exports_of_version_1_are_read(export):
    """They had a byte for each code."""
    config = json.loads((export / "config.json").read_text())
    config["tensors"][Q]["format"] = "int4/channel"
    sign(export, config | {"version": 1})
    assert same_leaf(native.read(export).leaves[Q], StoredLeaf(LEAVES[Q].codes, LEAVES[Q].scale, "int4/channel"))


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(data=st.data())
def test_any_bits_survive(tmp_path_factory, data):
    small = Architecture(
        vocabulary=4, width=2, layers=2, query_heads=1, kv_heads=1, head_width=2, feed_forward=3, context=8
    )
    shapes = leaf_shapes(small)
    leaves: dict[str, native.Leaf] = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
    path = data.draw(st.sampled_from(sorted(shapes)))
    shape = shapes[path]
    kind = data.draw(st.sampled_from(["int8", "fp16", "bf16", "float32"]))
    if kind == "int8":
        scale_shape = tuple(data.draw(st.sampled_from([m for m in range(1, n + 1) if n % m == 0])) for n in shape)
        leaves[path] = StoredLeaf(any_finite(data, np.int8, shape), any_finite(data, np.float16, scale_shape), kind)
    elif kind == "float32":
        leaves[path] = any_finite(data, np.float32, shape)
    else:
        dtype = np.float16 if kind == "fp16" else ml_dtypes.bfloat16
        leaves[path] = StoredLeaf(any_finite(data, dtype, shape), None, kind)
    directory = tmp_path_factory.mktemp("any") / "export"
    native.write(directory, leaves, small, TOKENIZER, {})
    assert all(same_leaf(native.read(directory).leaves[path], leaf) for path, leaf in leaves.items())


def test_decode_multiplies_each_code_by_its_scale():
    for path, leaf in LEAVES.items():
        values = decode(leaf)
        assert values.dtype == np.float32
        if isinstance(leaf, np.ndarray):
            assert np.array_equal(values, leaf.astype(np.float32))
            continue
        rng = np.random.default_rng(1)
        for index in (tuple(rng.integers(n) for n in leaf.codes.shape) for _ in range(50)):
            expected = np.float32(leaf.codes[index])
            if leaf.scale is not None:
                blocks = [n // m for n, m in zip(leaf.codes.shape, leaf.scale.shape, strict=True)]
                expected *= np.float32(leaf.scale[tuple(i // block for i, block in zip(index, blocks, strict=True))])
            assert values[index] == expected, (path, index)


def test_decode_gives_no_negative_zero_and_leaves_its_input_alone():
    scale = np.array([[-0.5], [0.5]], np.float16)
    leaf = StoredLeaf(np.array([[0, 3], [0, -3]], np.int8), scale, "int8/channel")
    assert same(decode(leaf), np.array([[0.0, -1.5], [0.0, -1.5]], np.float32))
    halves = np.array([-0.0, 1.0], np.float16)
    assert same(decode(StoredLeaf(halves, None, "fp16")), np.array([0.0, 1.0], np.float32))
    assert np.signbit(halves[0])


def test_open_model_decodes_to_float32(export):
    source = native.open_model(export)
    assert source.architecture == ARCHITECTURE and source.tokenizer == TOKENIZER
    assert source.paths == tuple(leaf_shapes(ARCHITECTURE))
    assert str(export) in source.description and "bf16" in source.description
    for path, shape in leaf_shapes(ARCHITECTURE).items():
        assert source.read(path).shape == shape and same(source.read(path), decode(LEAVES[path]))


def test_the_weight_file_is_about_a_quarter_of_float32(tmp_path):
    architecture = Architecture(
        vocabulary=640, width=128, layers=2, query_heads=4, kv_heads=2, head_width=32, feed_forward=256, context=64
    )
    leaves: dict[str, native.Leaf] = {}
    for path, shape in leaf_shapes(architecture).items():
        scale = np.ones((shape[0], *[1] * (len(shape) - 2), shape[-1]) if path != "embed/table_vd" else (640, 1))
        codes = StoredLeaf(np.zeros(shape, np.int8), scale.astype(np.float16), "int8/channel")
        leaves[path] = np.ones(shape, np.float32) if "norm" in path else codes
    native.write(tmp_path / "export", leaves, architecture, TOKENIZER, {})
    float_bytes = 4 * sum(np.prod(shape) for shape in leaf_shapes(architecture).values())
    ratio = (tmp_path / "export" / "model.safetensors").stat().st_size / float_bytes
    # 1/4 for the codes, 1/2 per 128 weights for the scales, and the header.
    assert 0.25 < ratio < 0.27


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_flipped_bit_a_cut_and_a_loss_are_named(export, name):
    file = export / name
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    for place in (0, len(whole) - 2, *rng.integers(0, len(whole), 60)):
        if name == "config.json" and whole[place] in b" \n":
            continue  # indentation says nothing; a space that became another character is no JSON or no change
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.integers(0, 7)
        file.write_bytes(flipped)
        with pytest.raises(UserError, match=name):
            native.read(export)
    for damaged in (whole[:-3], whole[: len(whole) // 2], b""):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=name):
            native.open_model(export)
    file.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        native.read(export)
    file.write_bytes(whole)
    native.read(export)


def test_other_versions_and_formats_are_named(export):
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(config | {"version": native.VERSION + 1}))
    with pytest.raises(UserError, match=f"this program reads versions up to {native.VERSION}, update it"):
        native.read(export)
    (export / "config.json").write_text(json.dumps(config | {"format": "other"}))
    with pytest.raises(UserError, match="format='other' is not 'research-quantized'"):
        native.read(export)


def sign(directory: Path, config: dict) -> None:
    """Write a config.json whose digests are right, as a newer program would."""
    config["sha256"] = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in directory.iterdir()
        if file.name != "config.json"
    }
    config["sha256"]["config.json"] = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    (directory / "config.json").write_text(json.dumps(config))


def test_what_a_newer_program_wrote_is_not_ignored(export):
    config = json.loads((export / "config.json").read_text())
    sign(export, config)
    assert native.read(export).architecture == ARCHITECTURE
    config["architecture"]["window"] = 128
    sign(export, config)
    with pytest.raises(UserError, match="architecture has 'window', unknown to this program"):
        native.read(export)


@pytest.mark.parametrize("damage", ["a tensor less in the file", "a leaf less in both"])
def test_tensors_that_config_does_not_list_are_named(export, damage):
    config = json.loads((export / "config.json").read_text())
    tensors = load_file(export / "model.safetensors")
    del tensors["layers/mlp/up_df.codes"]
    if damage == "a leaf less in both":
        del config["tensors"]["layers/mlp/up_df"]
    save_file(tensors, export / "model.safetensors")
    sign(export, config)
    with pytest.raises(UserError, match="model.safetensors does not hold the tensors of .*config.json"):
        native.read(export)


def test_reformatting_config_changes_nothing(export):
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(config, indent=8, sort_keys=True))
    assert native.read(export).metadata == json.loads(json.dumps(METADATA))


def test_is_native(export, tmp_path):
    assert native.is_native(export)
    (export / "config.json").write_text((export / "config.json").read_text()[:-9])
    assert native.is_native(export), "a broken export must be named as one, not taken for another format"
    assert not native.is_native(tmp_path) and not native.is_native(tmp_path / "absent")
    assert not native.is_native(Path(__file__).parent / "fixtures" / "mha")


def test_nothing_is_overwritten_and_nothing_left_half_done(export):
    before = {file.name: file.read_bytes() for file in export.iterdir()}
    with pytest.raises(UserError, match="export exists already and is not overwritten"):
        native.write(export, make_leaves(ARCHITECTURE, seed=1), ARCHITECTURE, TOKENIZER, {})
    assert {file.name: file.read_bytes() for file in export.iterdir()} == before
    assert [folder.name for folder in export.parent.iterdir()] == ["export"]


Q = "layers/attention/q_dnh"
CODES, SCALE = np.zeros((2, 32, 6, 10), np.int8), np.ones((2, 1, 6, 10), np.float16)


@pytest.mark.parametrize(
    ("leaf", "words"),
    [
        (StoredLeaf(CODES[:, :, :5], SCALE, "int8"), r"q_dnh has shape \(2, 32, 5, 10\), .* drop the padding"),
        (StoredLeaf(CODES, SCALE.astype(np.float32), "int8"), "int8 codes, but no float16 scale"),
        (StoredLeaf(CODES, None, "int8"), "int8 codes, but no float16 scale"),
        (StoredLeaf(CODES, SCALE[:, :, :4], "int8"), "does not divide codes"),
        (StoredLeaf(CODES, SCALE[0], "int8"), "does not divide codes"),
        (StoredLeaf(CODES.astype(np.float16), SCALE, "fp16"), "float16 codes; they have 8 bits, or are float16 or"),
        (StoredLeaf(CODES.astype(np.float32), None, "fp32"), "float32 codes"),
        (CODES, "is int8; a leaf without codes is float32"),
        (CODES.astype(np.float64), "is float64"),
        (None, "'layers/attention/q_dnh'"),
    ],
)
def test_leaves_that_do_not_fit_are_errors(tmp_path, leaf, words):
    leaves = {path: value for path, value in (LEAVES | {Q: leaf}).items() if value is not None}
    with pytest.raises(ValueError, match=words):
        native.write(tmp_path / "export", leaves, ARCHITECTURE, TOKENIZER, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, value):
    scale = SCALE.copy()
    scale[1, 0, 3, 4] = value
    with pytest.raises(UserError, match="q_dnh.scale holds values that are not finite"):
        native.write(tmp_path / "export", LEAVES | {Q: StoredLeaf(CODES, scale, "int8")}, ARCHITECTURE, TOKENIZER, {})
