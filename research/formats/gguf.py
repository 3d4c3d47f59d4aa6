"""GGUF files of the architecture `llama` (llama.cpp, Ollama, LM Studio): read into our leaves, and written from them.

One table of names serves both directions. GGUF stores a matrix as rows [out, in], a layer at a time, so a leaf here is
a stack of transposed tensors. The rows of q and k stand in another order: llama.cpp rotates neighbours (2i, 2i+1) where
we rotate halves (i, i + h/2), so the rows of each head are interleaved. A reader that forgets this computes plausible
text from wrong weights. It is a permutation of rows, so it applies to codes and scales of a quantized matrix, too.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import gguf
import numpy as np

from research.architecture import Architecture
from research.errors import UserError, nearest
from research.formats.gguf_file import GgufFile, open_gguf
from research.formats.gguf_metadata import ROPE_FACTORS, architecture_metadata, read_architecture, rope_factors
from research.formats.gguf_tokenizer import read_tokenizer, tokenizer_metadata
from research.formats.model_source import ModelSource, ReadLeaf, check_shape, leaf_shapes
from research.tokenizer import Tokenizer

TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
}


@dataclass(frozen=True)
class Leaf:
    """How one leaf is stored: the tensor's name ("{}" stands for the layer), and how its axes become rows."""

    path: str
    name: str
    inputs: int = 1
    """Leading axes of the leaf (after `l`) that a product sums over; they become the columns. 0: stored as it is."""
    rotary: bool = False
    """Whether its rows are interleaved for llama.cpp's rotation."""


LEAVES = (
    Leaf("embed/table_vd", "token_embd.weight", inputs=0),
    Leaf("layers/attention_norm/scale_d", "blk.{}.attn_norm.weight", inputs=0),
    Leaf("layers/attention/q_dnh", "blk.{}.attn_q.weight", rotary=True),
    Leaf("layers/attention/k_dkh", "blk.{}.attn_k.weight", rotary=True),
    Leaf("layers/attention/v_dkh", "blk.{}.attn_v.weight"),
    Leaf("layers/attention/o_nhd", "blk.{}.attn_output.weight", inputs=2),
    Leaf("layers/mlp_norm/scale_d", "blk.{}.ffn_norm.weight", inputs=0),
    Leaf("layers/mlp/gate_df", "blk.{}.ffn_gate.weight"),
    Leaf("layers/mlp/up_df", "blk.{}.ffn_up.weight"),
    Leaf("layers/mlp/down_fd", "blk.{}.ffn_down.weight"),
    Leaf("norm/scale_d", "output_norm.weight", inputs=0),
    Leaf("head/table_vd", "output.weight", inputs=0),
)
_BY_PATH = {leaf.path: leaf for leaf in LEAVES}


def to_rows(leaf: Leaf, x: np.ndarray) -> np.ndarray:
    """Return one layer's leaf [in..., out...] as the rows [out, in] that GGUF stores; any dtype."""
    if not leaf.inputs:
        return x
    x_io = x.reshape(prod(x.shape[: leaf.inputs]), -1)
    if leaf.rotary:
        width, heads, head = x.shape
        x_io = x_io.reshape(width, heads, 2, head // 2).swapaxes(2, 3).reshape(width, heads * head)
    return np.ascontiguousarray(x_io.T)


def from_rows(leaf: Leaf, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the rows [out, in] that GGUF stores as one layer's leaf of the logical `shape`; any dtype."""
    if not leaf.inputs:
        return rows.reshape(shape)
    x_io = rows.T
    if leaf.rotary:
        width, heads, head = shape
        x_io = x_io.reshape(width, heads, head // 2, 2).swapaxes(2, 3).reshape(width, heads * head)
    return x_io.reshape(shape)


def row_shape(leaf: Leaf, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in which GGUF stores one layer's leaf of the logical `shape`."""
    return (prod(shape[leaf.inputs :]), prod(shape[: leaf.inputs])) if leaf.inputs else shape


def open_model(path: Path) -> ModelSource:
    """Open a GGUF file of the architecture `llama`; its blocks are decoded to float32 when a leaf is read.

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
        read=lambda leaf: _read_leaf(file, shapes, leaf),
        description=f"GGUF file {path} ({', '.join(types)})",
    )


def write(
    path: Path,
    architecture: Architecture,
    tokenizer: Tokenizer,
    read: ReadLeaf,
    paths: Sequence[str],
    type: str = "F32",
    name: str = "",
) -> None:
    """Write a GGUF file that llama.cpp loads and chats with; one leaf at a time is in memory, the file appears whole.

    Args:
        path: file to write; an existing one is replaced.
        architecture: shape of the decoder.
        tokenizer: goes into the file with its chat template.
        read: path of a leaf → float array of the logical, stacked shape.
        paths: leaves to write: all that the architecture has.
        type: F32, F16 or BF16 for matrices and tables; norms are F32, as llama.cpp wants them.
        name: what the file calls the model; empty: the file's own name.

    Raises:
        UserError: an unknown type, a leaf that is missing or has no place, values beyond the range of F16, or a
            tokenizer that GGUF has no keys for.
    """
    if type not in TYPES:
        raise UserError(f"GGUF type {type!r} can't be written{nearest(type, TYPES)}")
    shapes = leaf_shapes(architecture)
    if set(paths) != set(shapes):
        raise UserError(f"GGUF export: leaves {sorted(set(paths) ^ set(shapes))} are missing or have no place")
    path = Path(path)
    metadata = {
        "general.name": name or path.stem,
        "general.file_type": int(TYPES[type]),
        **architecture_metadata(architecture),
        **tokenizer_metadata(tokenizer, architecture.vocabulary),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
            partial = Path(folder) / "partial.gguf"
            _write_file(partial, metadata, architecture, read, type)
            os.replace(partial, path)
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror or error}; name another place for the file") from error


def _check_tensors(file: GgufFile, shapes: dict[str, tuple[int, ...]], architecture: Architecture) -> None:
    """Check that the file holds the decoder's tensors in their shapes, and none that we would have to ignore."""
    expected = {}
    for path, shape in shapes.items():
        leaf, inner = _BY_PATH[path], shape[1:] if path.startswith("layers/") else shape
        expected |= {name: row_shape(leaf, inner) for name in _tensor_names(leaf, architecture)}
    for name, shape in expected.items():
        if name not in file.tensors:
            raise UserError(f"{file.path}: tensor {name} is missing")
        check_shape(str(file.path), name, file.tensors[name].shape, shape)
    extra = sorted(set(file.tensors) - set(expected) - {ROPE_FACTORS})
    if extra:
        raise UserError(f"{file.path}: tensor {extra[0]} ({len(extra)} such) has no place in a plain llama decoder")


def _tensor_names(leaf: Leaf, architecture: Architecture) -> list[str]:
    """Return the names of a leaf's tensors, one a layer."""
    return [leaf.name.format(i) for i in range(architecture.layers)] if "{}" in leaf.name else [leaf.name]


def _read_leaf(file: GgufFile, shapes: dict[str, tuple[int, ...]], path: str) -> np.ndarray:
    """Return a leaf, float32, in its logical and stacked shape."""
    if path not in shapes:
        raise UserError(f"{file.path} has no leaf {path!r}{nearest(path, shapes)}")
    leaf, shape = _BY_PATH[path], shapes[path]
    if "{}" not in leaf.name:
        return from_rows(leaf, file.read(leaf.name), shape)
    stacked = np.empty(shape, np.float32)
    for i in range(shape[0]):
        stacked[i] = from_rows(leaf, file.read(leaf.name.format(i)), shape[1:])
    return stacked


def _write_file(path: Path, metadata: dict, architecture: Architecture, read: ReadLeaf, type: str) -> None:
    """Write metadata, then the table of tensors, then leaf by leaf the tensors in the table's order."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        _add(writer, key, value)
    shapes = leaf_shapes(architecture)
    for leaf_path, shape in shapes.items():
        leaf, inner = _BY_PATH[leaf_path], shape[1:] if leaf_path.startswith("layers/") else shape
        stored, rows = _stored_type(type, inner), row_shape(leaf, inner)
        block, size = gguf.GGML_QUANT_SIZES[stored]
        for name in _tensor_names(leaf, architecture):
            writer.add_tensor_info(name, rows, np.dtype(np.float32), prod(rows) // block * size, raw_dtype=stored)
    factors = rope_factors(architecture)
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for leaf_path, shape in shapes.items():
            for rows in _rows_of(leaf_path, shape, read):
                writer.write_tensor_data(_encode(leaf_path, rows, _stored_type(type, rows.shape)))
        if factors is not None:
            writer.write_tensor_data(factors)
    finally:
        writer.close()


def _rows_of(path: str, shape: tuple[int, ...], read: ReadLeaf):
    """Yield the stored form of a leaf, a layer at a time."""
    leaf, x = _BY_PATH[path], np.asarray(read(path))
    check_shape("GGUF export", path, x.shape, shape)
    for layer in x if "{}" in leaf.name else [x]:
        yield to_rows(leaf, layer)


def _stored_type(type: str, shape: tuple[int, ...]) -> gguf.GGMLQuantizationType:
    """Norms stay F32, whatever the file's type."""
    return gguf.GGMLQuantizationType[type if len(shape) > 1 else "F32"]


def _encode(path: str, rows: np.ndarray, type: gguf.GGMLQuantizationType) -> np.ndarray:
    rows = np.ascontiguousarray(rows, np.float32)
    with np.errstate(over="ignore"):
        encoded = gguf.quants.quantize(rows, type)
    if type == gguf.GGMLQuantizationType.F16 and not np.isfinite(encoded).all():
        raise UserError(f"GGUF export: {path} holds values that F16 can't (largest {np.abs(rows).max():g}); take BF16")
    return encoded


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
