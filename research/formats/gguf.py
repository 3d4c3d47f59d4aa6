"""GGUF files of Llama, Mixtral and Qwen3 (llama.cpp, Ollama, LM Studio): read into our leaves, written from them.

One table of names serves both directions. GGUF stores a matrix as rows [out, in], a layer at a time, so a leaf here is
a stack of transposed tensors; those of a layer's experts are one tensor. In the architecture `llama` the rows of q and
k stand in another order: llama.cpp rotates neighbours (2i, 2i+1) there where we rotate halves (i, i + h/2), so the rows
of each head are interleaved; in Qwen3's it rotates halves. A reader that forgets this computes plausible text from
wrong weights. It is a permutation of rows, so it applies to codes and scales of a quantized matrix, too, and a matrix
that is held as codes and scales becomes blocks (`gguf_blocks`) without being quantized again.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np

from research.architecture import Architecture
from research.errors import UserError, nearest
from research.formats import gguf_blocks, native
from research.formats.gguf_file import GgufFile, open_gguf
from research.formats.gguf_metadata import (
    ROPE_FACTORS,
    architecture_metadata,
    kind_of,
    read_architecture,
    rope_factors,
)
from research.formats.gguf_tokenizer import read_tokenizer, tokenizer_metadata
from research.formats.model_source import ModelSource, check_shape, leaf_shapes
from research.tokenizer import Tokenizer

TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
}
_EXACT = {np.dtype(np.float16): "F16", np.dtype(ml_dtypes.bfloat16): "BF16"}
_TABLES = ("embed/table_vd", "head/table_vd")
_ROUTER = "layers/mlp/router_de"  # never quantized, and float32 in every file, as llama.cpp has it


@dataclass(frozen=True)
class Leaf:
    """How one leaf is stored: the tensor's name ("{}" stands for the layer), and how its axes become rows."""

    path: str
    name: str
    inputs: int = 1
    """Axes of the leaf (after `l` and `e`) that a product sums over; they become the columns. 0: stored as it is."""
    rotary: bool = False
    """Whether its rows are interleaved for llama.cpp's rotation, where it rotates neighbours."""
    stacked: int = 0
    """1: its first axis (after `l`) is experts, a matrix each."""


LEAVES = (
    Leaf("embed/table_vd", "token_embd.weight", inputs=0),
    Leaf("layers/attention_norm/scale_d", "blk.{}.attn_norm.weight", inputs=0),
    Leaf("layers/attention/q_dnh", "blk.{}.attn_q.weight", rotary=True),
    Leaf("layers/attention/k_dkh", "blk.{}.attn_k.weight", rotary=True),
    Leaf("layers/attention/v_dkh", "blk.{}.attn_v.weight"),
    Leaf("layers/attention/o_nhd", "blk.{}.attn_output.weight", inputs=2),
    Leaf("layers/attention/q_norm/scale_h", "blk.{}.attn_q_norm.weight", inputs=0),
    Leaf("layers/attention/k_norm/scale_h", "blk.{}.attn_k_norm.weight", inputs=0),
    Leaf("layers/mlp_norm/scale_d", "blk.{}.ffn_norm.weight", inputs=0),
    Leaf("layers/mlp/gate_df", "blk.{}.ffn_gate.weight"),
    Leaf("layers/mlp/up_df", "blk.{}.ffn_up.weight"),
    Leaf("layers/mlp/down_fd", "blk.{}.ffn_down.weight"),
    Leaf(_ROUTER, "blk.{}.ffn_gate_inp.weight"),
    Leaf("layers/mlp/gate_edf", "blk.{}.ffn_gate_exps.weight", stacked=1),
    Leaf("layers/mlp/up_edf", "blk.{}.ffn_up_exps.weight", stacked=1),
    Leaf("layers/mlp/down_efd", "blk.{}.ffn_down_exps.weight", stacked=1),
    Leaf("norm/scale_d", "output_norm.weight", inputs=0),
    Leaf("head/table_vd", "output.weight", inputs=0),
)


def leaves_of(architecture: Architecture) -> dict[str, Leaf]:
    """Return how llama.cpp stores the leaves of a decoder, by path; `UserError` for one that it has no place for."""
    neighbours = kind_of(architecture) == "llama"
    found = {leaf.path: replace(leaf, rotary=leaf.rotary and neighbours) for leaf in LEAVES}
    return {path: found[path] for path in leaf_shapes(architecture)}


def to_rows(leaf: Leaf, x: np.ndarray) -> np.ndarray:
    """Return one layer's leaf [(e,) in..., out...] as the rows [(e,) out, in] that GGUF stores; any dtype."""
    if not leaf.inputs:
        return x
    outer, inner = x.shape[: leaf.stacked], x.shape[leaf.stacked :]
    x_io = x.reshape(*outer, prod(inner[: leaf.inputs]), -1)
    if leaf.rotary:
        width, heads, head = x.shape
        x_io = x_io.reshape(width, heads, 2, head // 2).swapaxes(2, 3).reshape(width, heads * head)
    return np.ascontiguousarray(x_io.swapaxes(-2, -1))


def from_rows(leaf: Leaf, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the rows [(e,) out, in] that GGUF stores as one layer's leaf of the logical `shape`; any dtype."""
    if not leaf.inputs:
        return rows.reshape(shape)
    x_io = rows.swapaxes(-2, -1)
    if leaf.rotary:
        width, heads, head = shape
        x_io = x_io.reshape(width, heads, head // 2, 2).swapaxes(2, 3).reshape(width, heads * head)
    return x_io.reshape(shape)


def row_shape(leaf: Leaf, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in which GGUF stores one layer's leaf of the logical `shape`."""
    if not leaf.inputs:
        return shape
    outer, inner = shape[: leaf.stacked], shape[leaf.stacked :]
    return *outer, prod(inner[leaf.inputs :]), prod(inner[: leaf.inputs])


@dataclass(frozen=True)
class Written:
    """How one leaf went into a file."""

    type: str
    """F32, Q8_0, …"""
    is_exact: bool
    """Whether the file gives back every value as it was; False where a cast rounded some."""


def open_model(path: Path) -> ModelSource:
    """Open a GGUF file of a decoder that ours computes; its blocks are decoded to float32 when a leaf is read.

    Raises:
        UserError: no whole GGUF file, another architecture, or something that our decoder would compute differently.
    """
    path = Path(path)
    file = open_gguf(path)
    architecture = read_architecture(file)
    shapes = leaf_shapes(architecture)
    _check_tensors(file, shapes, architecture)
    tokenizer = read_tokenizer(str(path), file.metadata)
    if tokenizer.vocabulary > architecture.vocabulary:
        raise UserError(
            f"{path}: {tokenizer.vocabulary} tokens, but an embedding table of {architecture.vocabulary} rows"
        )
    types = sorted({entry.type.name for entry in file.tensors.values()})
    return ModelSource(
        architecture=architecture,
        tokenizer=tokenizer,
        paths=tuple(shapes),
        read=lambda leaf: _read_leaf(file, leaves_of(architecture), shapes, leaf),
        description=f"GGUF file {path} ({', '.join(types)})",
    )


def write(
    path: Path,
    architecture: Architecture,
    tokenizer: Tokenizer,
    read: native.ReadStored,
    paths: Sequence[str],
    type: str = "F32",
    name: str = "",
) -> dict[str, Written]:
    """Write a GGUF file that llama.cpp loads and chats with; one leaf at a time is in memory, the file appears whole.

    Args:
        path: file to write; an existing one is replaced.
        architecture: shape of the decoder.
        tokenizer: goes into the file with its chat template.
        read: path of a leaf → float array, or codes and scales, of the logical, stacked shape; asked more than once.
        paths: leaves to write: all that the architecture has.
        type: F32, F16 or BF16 for matrices and tables, whose codes are decoded; Q8_0 or Q4_0: the codes themselves. A
            table of int8 codes is Q8_0 in a file of type Q4_0. Norms and routers are F32, as llama.cpp wants them.
        name: what the file calls the model; empty: the file's own name.

    Returns:
        How each leaf was written, by path.

    Raises:
        UserError: an unknown type, an architecture that llama.cpp doesn't have, a leaf that is missing or has no place,
            values beyond the range of F16, codes or scales that don't fit the blocks, values that are not finite, or a
            tokenizer that GGUF has no keys for.
    """
    if type not in TYPES:
        raise UserError(f"GGUF type {type!r} can't be written{nearest(type, TYPES)}")
    shapes, leaves = leaf_shapes(architecture), leaves_of(architecture)
    if set(paths) != set(shapes):
        raise UserError(f"GGUF export: leaves {sorted(set(paths) ^ set(shapes))} are missing or have no place")
    path = Path(path)
    types = {leaf: _stored_type(leaves[leaf], shape, read, type) for leaf, shape in shapes.items()}
    metadata = {
        "general.name": name or path.stem,
        "general.file_type": int(TYPES[type]),
        **({"general.quantization_version": gguf.GGML_QUANT_VERSION} if type in gguf_blocks.TYPES else {}),
        **architecture_metadata(architecture),
        **tokenizer_metadata(tokenizer, architecture.vocabulary),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
            partial = Path(folder) / "partial.gguf"
            written = _write_file(partial, metadata, architecture, read, types)
            os.replace(partial, path)
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror or error}; name another place for the file") from error
    return written


def _check_tensors(file: GgufFile, shapes: dict[str, tuple[int, ...]], architecture: Architecture) -> None:
    """Check that the file holds the decoder's tensors in their shapes, and none that we would have to ignore."""
    expected, leaves = {}, leaves_of(architecture)
    for path, shape in shapes.items():
        rows = row_shape(leaves[path], _inner(path, shape))
        expected |= dict.fromkeys(_tensor_names(leaves[path], architecture), rows)
    for name, shape in expected.items():
        if name not in file.tensors:
            raise UserError(f"{file.path}: tensor {name} is missing")
        check_shape(str(file.path), name, file.tensors[name].shape, shape)
    extra = sorted(set(file.tensors) - set(expected) - {ROPE_FACTORS})
    if extra:
        raise UserError(f"{file.path}: tensor {extra[0]} ({len(extra)} such) has no place in such a decoder")


def _inner(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a leaf without its axis of layers."""
    return shape[1:] if path.startswith("layers/") else shape


def _tensor_names(leaf: Leaf, architecture: Architecture) -> list[str]:
    """Return the names of a leaf's tensors, one a layer."""
    return [leaf.name.format(i) for i in range(architecture.layers)] if "{}" in leaf.name else [leaf.name]


def _read_leaf(file: GgufFile, leaves: dict[str, Leaf], shapes: dict[str, tuple[int, ...]], path: str) -> np.ndarray:
    """Return a leaf, float32, in its logical and stacked shape."""
    if path not in shapes:
        raise UserError(f"{file.path} has no leaf {path!r}{nearest(path, shapes)}")
    leaf, shape = leaves[path], shapes[path]
    if "{}" not in leaf.name:
        return from_rows(leaf, file.read(leaf.name), shape)
    stacked = np.empty(shape, np.float32)
    for i in range(shape[0]):
        stacked[i] = from_rows(leaf, file.read(leaf.name.format(i)), shape[1:])
    return stacked


def _write_file(
    path: Path,
    metadata: dict,
    architecture: Architecture,
    read: native.ReadStored,
    types: dict[str, str],
) -> dict[str, Written]:
    """Write metadata, then the table of tensors, then leaf by leaf the tensors in the table's order."""
    writer = gguf.GGUFWriter(path, kind_of(architecture))
    for key, value in metadata.items():
        _add(writer, key, value)
    shapes, leaves = leaf_shapes(architecture), leaves_of(architecture)
    for leaf_path, shape in shapes.items():
        leaf, inner = leaves[leaf_path], _inner(leaf_path, shape)
        stored, rows = gguf.GGMLQuantizationType[types[leaf_path]], row_shape(leaf, inner)
        block, size = gguf.GGML_QUANT_SIZES[stored]
        for name in _tensor_names(leaf, architecture):
            writer.add_tensor_info(name, rows, np.dtype(np.float32), prod(rows) // block * size, raw_dtype=stored)
    factors = rope_factors(architecture)
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    written = {}
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for leaf_path, shape in shapes.items():
            is_exact = True
            for data, same in _tensors(leaves[leaf_path], shape, read, types[leaf_path]):
                writer.write_tensor_data(data)
                is_exact &= same
                del data
            written[leaf_path] = Written(types[leaf_path], is_exact)
        if factors is not None:
            writer.write_tensor_data(factors)
    finally:
        writer.close()
    return written


def _tensors(
    leaf: Leaf, shape: tuple[int, ...], read: native.ReadStored, type: str
) -> Iterator[tuple[np.ndarray, bool]]:
    """Yield the data of a leaf's tensors, a layer at a time, and whether it holds each value exactly."""
    path = leaf.path
    stored = read(path)
    if type in gguf_blocks.TYPES:
        assert not isinstance(stored, np.ndarray)
        for blocks in _blocks_of(leaf, shape, stored):
            yield blocks.pack(type), True
    else:
        x = native.decode(stored)
        check_shape("GGUF export", path, x.shape, shape)
        for layer in _layers(path, x):
            yield _encode(path, to_rows(leaf, layer), gguf.GGMLQuantizationType[type])


def _blocks_of(leaf: Leaf, shape: tuple[int, ...], stored: native.StoredLeaf) -> Iterator[gguf_blocks.Blocks]:
    """Yield the blocks of a leaf that has int8 codes, a layer at a time, the rows of all experts below each other."""
    assert stored.scale is not None
    path = leaf.path
    check_shape("GGUF export", path, stored.codes.shape, shape)
    codes = _layers(path, stored.codes)
    parts = [_layers(path, part) for part in (stored.scale, stored.offset) if part is not None]
    for i, layer in enumerate(codes):
        spread = (native.spread(part[i * len(part) // len(codes)], layer.shape) for part in parts)
        rows = (to_rows(leaf, x) for x in (layer, *spread))
        yield gguf_blocks.make_blocks(path, *(x_oi.reshape(-1, x_oi.shape[-1]) for x_oi in rows))


def _layers(path: str, x: np.ndarray) -> np.ndarray:
    """Return a leaf, or its scale, with a leading axis of layers, of size 1 where it isn't stacked."""
    return x if path.startswith("layers/") else x[None]


def _stored_type(leaf: Leaf, shape: tuple[int, ...], read: native.ReadStored, type: str) -> str:
    """Return the type of a leaf's tensors in a file of some type; `UserError` where that would quantize it anew."""
    path = leaf.path
    if len(_inner(path, shape)) == 1 or path == _ROUTER:
        return "F32"
    if type not in gguf_blocks.TYPES:
        return type
    stored = read(path)
    if isinstance(stored, np.ndarray):
        raise UserError(f"{path} is float, so that {type} would quantize it anew; type F32 holds it exactly")
    if stored.codes.dtype != np.int8:
        exact = _EXACT.get(stored.codes.dtype, "F32")
        raise UserError(
            f"{path} is {stored.format}, so that {type} would quantize it anew; type {exact} holds it exactly"
        )
    for _ in _blocks_of(leaf, shape, stored):
        pass  # raises where they don't fit
    has_offset = stored.offset is not None
    if gguf_blocks.fits(stored.codes, has_offset, type):
        return type
    holder = gguf_blocks.holder(stored.codes, has_offset)
    if path in _TABLES and type in gguf_blocks.FOUR_BITS:
        return holder
    found = f"codes {stored.codes.min()} … {stored.codes.max()} and {'' if has_offset else 'no '}offsets"
    raise UserError(f"{path} is {stored.format} with {found}, which {type} doesn't hold; type {holder} does, exactly")


def _encode(path: str, rows: np.ndarray, type: gguf.GGMLQuantizationType) -> tuple[np.ndarray, bool]:
    """Return the data of a float tensor, and whether it holds each value exactly."""
    rows = np.ascontiguousarray(rows, np.float32)
    if not np.isfinite(rows).all():
        raise UserError(f"{path} holds values that are not finite; export a step from before the run diverged")
    with np.errstate(over="ignore"):
        encoded = gguf.quants.quantize(rows, type)
    if type == gguf.GGMLQuantizationType.F16 and not np.isfinite(encoded).all():
        raise UserError(f"GGUF export: {path} holds values that F16 can't (largest {np.abs(rows).max():g}); take BF16")
    is_exact = type == gguf.GGMLQuantizationType.F32 or np.array_equal(gguf.quants.dequantize(encoded, type), rows)
    return encoded, is_exact


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    """Add a metadata value with the type that llama.cpp expects of its Python type: counts are u32, reals f32."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        raise TypeError(f"{key}: no GGUF type for {value!r}")
