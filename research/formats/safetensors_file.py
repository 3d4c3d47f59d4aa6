"""Safetensors files, one tensor in memory at a time: the official reader, and a writer that streams.

The library's own writer takes all tensors at once; a model that fills half the memory could not be written. The
layout (github.com/huggingface/safetensors, "Format") is 8 bytes little-endian length, a JSON header, the data.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from research.errors import UserError

DTYPES: Mapping[str, np.dtype] = {
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "U8": np.dtype(np.uint8),
}
"""The dtypes that we read and write, by their names in the file."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its values; `dtype` is spelt as in the file: F32, BF16, …"""

    dtype: str
    shape: tuple[int, ...]

    @staticmethod
    def of(array: np.ndarray) -> "TensorSpec":
        """The spec of `array`; `ValueError` for a dtype that we don't write."""
        names = [name for name, dtype in DTYPES.items() if dtype == array.dtype]
        if not names:
            raise ValueError(f"dtype {array.dtype} can't be stored; use one of {', '.join(map(str, DTYPES.values()))}")
        return TensorSpec(names[0], array.shape)

    @property
    def byte_count(self) -> int:
        """Bytes of the values."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


def list_tensors(path: Path) -> dict[str, TensorSpec]:
    """Return name → spec of every tensor; `UserError` if the file is missing, truncated or no safetensors file."""
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            return {name: TensorSpec(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except FileNotFoundError:
        raise UserError(f"{path} is missing; fetch or export the model again") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); fetch or export it again") from None


def read_tensor(path: Path, name: str, rows: slice = slice(None)) -> np.ndarray:
    """Return one tensor, or some of its rows, with the dtype that it has in the file.

    `name` is one of `list_tensors(path)` with a dtype of `DTYPES`; `rows` may not reach beyond the last one.
    """
    with safe_open(path, framework="np") as file:
        part = file.get_slice(name)
        if part.get_dtype().startswith("F8_"):  # the reader looks for these dtypes in numpy, which has none
            return _read_bytes(path, name).view(DTYPES[part.get_dtype()]).reshape(part.get_shape())[rows]
        return part[rows]


def _read_bytes(path: Path, name: str) -> np.ndarray:
    """The values of a tensor as uint8 [bytes]; the file's header is known to be right."""
    with open(path, "rb") as file:
        data = 8 + int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(data - 8))[name]["data_offsets"]
    return np.fromfile(path, np.uint8, count=end - begin, offset=data + begin)


def write_tensors(
    path: Path, specs: Mapping[str, TensorSpec], arrays: Iterable[np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file: `arrays` in the order of `specs`, each dropped before the next is asked for.

    Order wide dtypes before narrow ones, so that every tensor is aligned to its item size.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, spec in specs.items():
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [end, end + spec.byte_count]}
        end += spec.byte_count
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    remaining = iter(arrays)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, spec in specs.items():
            # Not a loop over zip(): that would hold the last array while the next one is made.
            file.write(_bytes(name, spec, next(remaining)))
    if next(remaining, None) is not None:
        raise ValueError(f"{path}: more tensors came than the {len(specs)} announced")


def _bytes(name: str, spec: TensorSpec, array: np.ndarray) -> memoryview:
    if TensorSpec.of(array) != spec:
        raise ValueError(f"tensor {name} is {TensorSpec.of(array)}, announced was {spec}")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def by_alignment(specs: Mapping[str, TensorSpec]) -> list[str]:
    """The names, wide dtypes first, else in the given order."""
    return sorted(specs, key=lambda name: -DTYPES[specs[name].dtype].itemsize)
