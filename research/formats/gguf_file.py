"""The container of a GGUF file: its metadata and where each tensor lies, with every bound checked.

Why not the reader of the `gguf` package: it takes seconds for a vocabulary of 49,152 tokens, and a file that was cut
short makes it read zeros or loop. Values of blocks are decoded by that package (`gguf.quants`), as llama.cpp's authors
keep it in step with the format. Layout: magic "GGUF", u32 version, u64 tensors, u64 keys; the keys; the tensors' names,
sizes (innermost first), types and offsets; then, aligned, their data. Little-endian.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from research.errors import UserError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FLOATS = ("F32", "F16", "BF16")
READABLE = (*_FLOATS, "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies; `shape` in numpy's order, outermost axis first."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int  # bytes from the beginning of the file
    size: int  # bytes


@dataclass(frozen=True)
class GgufFile:
    """An opened GGUF file: metadata and the table of tensors are in memory, the data stays on disk."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]

    def read(self, name: str) -> np.ndarray:
        """Return a tensor as float32, blocks decoded, in the file's own shape.

        Raises:
            UserError: it is missing, of a type that isn't in `READABLE`, or the file has become shorter.
        """
        entry = self.tensors.get(name)
        if entry is None:
            raise UserError(f"{self.path}: tensor {name} is missing")
        if entry.type.name not in READABLE:
            raise UserError(f"{self.path}: tensor {name} is {entry.type.name}; readable are {', '.join(READABLE)}")
        with self.path.open("rb") as file:
            file.seek(entry.start)
            raw = np.fromfile(file, np.uint8, entry.size)
        if raw.size != entry.size:
            raise UserError(f"{self.path}: ends inside tensor {name}; fetch or write the file again")
        dtype = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}.get(entry.type.name, np.dtype(np.uint8))
        stored = raw.view(dtype).reshape(*entry.shape[:-1], -1)
        values = quants.dequantize(stored, entry.type).astype(np.float32, copy=False).reshape(entry.shape)
        if entry.type.name not in _FLOATS:
            values += np.float32(0.0)  # code 0 times a negative scale is -0.0 there; a decoded weight never is
        return values


def open_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file.

    Raises:
        UserError: the file is missing, no GGUF, of an unknown version, cut short, or contradicts itself.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _parse(path, _Cursor(file.read, size))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a GGUF file that can be read") from error
    except (ValueError, RecursionError, struct.error) as error:
        raise UserError(f"{path} is not a whole GGUF file ({error}); fetch or write it again") from error


class _Cursor:
    """Reads a file front to back and never past its end, so that a broken length can't ask for all memory."""

    def __init__(self, read: Callable[[int], bytes], size: int):
        self._read, self.size, self.position = read, size, 0

    def bytes(self, count: int) -> bytes:
        if count > self.size - self.position:
            raise ValueError(f"it ends after {self.size} bytes, where {count} more are due at {self.position}")
        self.position += count
        return self._read(count)

    def scalar(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.bytes(struct.calcsize(f"<{form}")))[0]

    def string(self) -> str:
        return self.bytes(self.scalar("Q")).decode("utf8", errors="strict")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.scalar("I"), self.scalar("Q")
            if inner not in _SCALARS:
                # Each element takes 8 bytes at least, so this bounds the loop.
                if count * 8 > self.size - self.position:
                    raise ValueError(f"an array of {count} strings at byte {self.position} can't fit")
                return [self.value(inner) for _ in range(count)]
            width = struct.calcsize(f"<{_SCALARS[inner]}")
            return list(struct.unpack(f"<{count}{_SCALARS[inner]}", self.bytes(count * width)))
        if kind not in _SCALARS:
            raise ValueError(f"unknown type {kind} of a value before byte {self.position}")
        return self.scalar(_SCALARS[kind])


def _parse(path: Path, cursor: _Cursor) -> GgufFile:
    if cursor.bytes(4) != _MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = cursor.scalar("I")
    if version not in _VERSIONS:
        raise ValueError(f"version {version}; known are {_VERSIONS}, little-endian")
    count, keys = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"key {key} occurs twice")
        metadata[key] = cursor.value(cursor.scalar("I"))
    listed = [_entry(cursor) for _ in range(count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in listed:
        block, bytes_per_block = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ValueError(f"rows of {name} hold {shape[-1]} values, blocks of {kind.name} {block}")
        size = prod(shape) // block * bytes_per_block
        if start + offset + size > cursor.size:
            raise ValueError(f"it ends after {cursor.size} bytes, tensor {name} at {start + offset + size}")
        tensors[name] = TensorEntry(name, shape, kind, start + offset, size)
    if len(tensors) != len(listed):
        raise ValueError("a tensor's name occurs twice")
    return GgufFile(path, metadata, tensors)


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    name = cursor.string()
    axes = cursor.scalar("I")
    if not 1 <= axes <= 4:
        raise ValueError(f"tensor {name} has {axes} axes")
    shape = tuple(cursor.scalar("Q") for _ in range(axes))[::-1]
    return name, shape, GGMLQuantizationType(cursor.scalar("I")), cursor.scalar("Q")
