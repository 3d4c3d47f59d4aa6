"""Our own export: quantized leaves as their codes and scales, everything else as it is, in one safetensors file.

Nothing is computed anew on the way to the file or back: the codes and scales that the optimizer held come back bit for
bit. A leaf `path` is stored as `path.codes` (int8 or an 8-bit float, or the 16-bit float of a grid that is a cast) and
`path.scale` (fp16), with `path.offset` (fp16) of an affine grid, or as `path` where it has no codes; `path.input_scale`
(fp32) is beside them where what the leaf multiplies has a static scale. Codes of a grid of four bits are `path.nibbles`
instead: uint8 with one axis, code 2i in the low four bits of byte i, code 2i + 1 in the high ones, in C order; -8 … 7
in two's complement, 0 … 15 where there is an offset.

config.json beside it says how to read them and carries a SHA-256 of every file, itself included; opening an export
verifies all of them, because a flipped byte in a weight is silent otherwise.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from research.architecture import Architecture, RopeScaling
from research.errors import UserError
from research.formats.huggingface_config import read_json
from research.formats.model_source import ModelSource, leaf_shapes
from research.formats.new_directory import new_directory
from research.formats.safetensors_file import TensorSpec, by_alignment, list_tensors, read_tensor, write_tensors
from research.quant.grid import GRIDS
from research.tokenizer import Tokenizer

FORMAT = "research-quantized"
VERSION = 3
"""1 had no nibbles, 2 no offsets and no static scales of activations."""
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
_CAST_DTYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
_SCALED_DTYPES = tuple(map(np.dtype, (np.int8, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)))


@dataclass(frozen=True, eq=False)
class StoredLeaf:
    """A quantized leaf on its way to or from a file, as numpy arrays.

    `codes` is int8 or an 8-bit float, or float16 / bfloat16 where the grid is a cast. `scale` is float16, of the same
    rank as `codes`; each of its axes has a size that divides that of the codes, and element j of an axis of n codes and
    m scales uses scale j // (n // m). It is None for a cast. `format` names grid and granularity, e.g. "int8/channel"
    or "fp16". `offset`: like `scale`, what code 0 of an affine grid stands for; None for other grids. `input_scale`,
    float32, is the static scale of the activation that the leaf multiplies, one for each stacked tensor, in the rank of
    `codes`; None without.
    """

    codes: np.ndarray
    scale: np.ndarray | None
    format: str
    offset: np.ndarray | None = None
    input_scale: np.ndarray | None = None


Leaf = np.ndarray | StoredLeaf
ReadStored = Callable[[str], Leaf]


@dataclass(frozen=True, eq=False)
class StoredLeaves(Mapping[str, Leaf]):
    """The leaves of an export, path → leaf; each access reads that leaf from the file, and keeps nothing."""

    file: Path
    formats: Mapping[str, str | None] = field(repr=False)
    """Path → format of a quantized leaf, None for one without codes."""
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    names: frozenset[str] = field(repr=False)
    """Tensors in the file."""

    def __getitem__(self, path: str) -> Leaf:
        form = self.formats[path]
        if form is None:
            return read_tensor(self.file, path)
        scale, offset, input_scale = (
            read_tensor(self.file, f"{path}.{part}") if f"{path}.{part}" in self.names else None
            for part in ("scale", "offset", "input_scale")
        )
        if f"{path}.nibbles" in self.names:
            codes = _unpack(read_tensor(self.file, f"{path}.nibbles"), self.shapes[path], is_signed=offset is None)
        else:
            codes = read_tensor(self.file, f"{path}.codes")
        return StoredLeaf(codes, scale, form, offset, input_scale)

    def __iter__(self) -> Iterator[str]:
        return iter(self.formats)

    def __len__(self) -> int:
        return len(self.formats)


@dataclass(frozen=True)
class Export:
    """A verified export."""

    leaves: StoredLeaves
    architecture: Architecture
    tokenizer: Tokenizer
    metadata: dict[str, Any]
    """What the writer passed: run, step, policy, …"""


def decode(leaf: Leaf) -> np.ndarray:
    """Return the values of a leaf, float32(code) · float32(scale) [+ float32(offset)]; no zero is a negative one."""
    if isinstance(leaf, np.ndarray):
        return leaf.astype(np.float32)
    values = leaf.codes.astype(np.float32, order="C")  # so that the views below are of it
    if leaf.scale is not None:
        blocks, scale = _in_blocks(values, leaf.scale)
        blocks *= scale
    if leaf.offset is not None:
        blocks, offset = _in_blocks(values, leaf.offset)
        blocks += offset
    values += np.float32(0.0)  # -0.0 + 0.0 is 0.0; all other values stay
    return values


def _in_blocks(values: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a view of `values` with each axis of n split as [m, n/m], m its scales, and the scale, float32, for it.

    So that the scale is broadcast, not repeated in memory.
    """
    split = [size for n, m in zip(values.shape, scale.shape, strict=True) for size in (m, n // m)]
    return values.reshape(split), scale.astype(np.float32).reshape([size for m in scale.shape for size in (m, 1)])


def spread(scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the scale of every element of codes of `shape`, in the scale's dtype."""
    for axis, (n, m) in enumerate(zip(shape, scale.shape, strict=True)):
        scale = np.repeat(scale, n // m, axis=axis)
    return scale


def write(
    directory: Path,
    leaves: Mapping[str, Leaf],
    architecture: Architecture,
    tokenizer: Tokenizer,
    metadata: Mapping[str, Any],
) -> None:
    """Write an export; it appears whole or not at all.

    Args:
        directory: must not exist, or be empty.
        leaves: every leaf of `architecture`, of its logical, stacked shape: a float32, float16 or bfloat16 numpy
            array, or a `StoredLeaf`. Asked for one at a time, and more than once.
        metadata: JSON values, given back by `read` (tuples as lists).

    Raises:
        UserError: `directory` holds something, the disk is full, or a leaf holds a value that is not finite.
        ValueError: leaves, shapes or dtypes are not as said here.
    """
    shapes = leaf_shapes(architecture)
    if set(leaves) != set(shapes):
        raise ValueError(f"leaves {sorted(set(leaves) ^ set(shapes))} are missing or not in the architecture")
    table: dict[str, dict[str, Any]] = {}
    specs: dict[str, TensorSpec] = {}
    path_of: dict[str, str] = {}
    for path, shape in shapes.items():
        leaf = leaves[path]
        _check_leaf(path, shape, leaf)
        tensors = _tensors(path, leaf)
        table[path] = {"format": None if isinstance(leaf, np.ndarray) else leaf.format, "tensors": sorted(tensors)}
        specs |= {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
        path_of |= dict.fromkeys(tensors, path)
    config = {"format": FORMAT, "version": VERSION, "architecture": asdict(architecture), "tensors": table}
    config["metadata"] = dict(metadata)
    config = json.loads(json.dumps(config, allow_nan=False))  # what a reader will find, so that its digest is the same
    order = by_alignment(specs)
    with new_directory(directory) as partial:
        tokenizer.save(partial)
        arrays = (_tensors(path_of[name], leaves[path_of[name]])[name] for name in order)
        write_tensors(partial / WEIGHTS, {name: specs[name] for name in order}, arrays, {"format": FORMAT})
        config["sha256"] = {file.name: _sha256(file) for file in sorted(partial.iterdir())}
        config["sha256"][CONFIG] = _sha256_of(config)
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def is_native(directory: Path) -> bool:
    """Whether a directory is one of our exports, whole or not (a broken one is named when it is opened)."""
    config = Path(directory) / CONFIG
    return config.is_file() and f'"{FORMAT}"'.encode() in config.read_bytes()


def read(directory: Path) -> Export:
    """Verify and open an export; its leaves are read when asked for, bit-equal to what was written.

    Raises:
        UserError: a file is missing, truncated or changed since it was written, or of a version that is newer than this
            program; the line names the file.
    """
    directory = Path(directory)
    config = _verified_config(directory)
    architecture = _architecture(directory / CONFIG, config["architecture"])
    formats = {path: entry["format"] for path, entry in config["tensors"].items()}
    named = {name for entry in config["tensors"].values() for name in entry["tensors"]}
    shapes = leaf_shapes(architecture)
    if set(formats) != set(shapes) or named != set(list_tensors(directory / WEIGHTS)):
        raise UserError(f"{directory / WEIGHTS} does not hold the tensors of {directory / CONFIG}; export again")
    return Export(
        leaves=StoredLeaves(directory / WEIGHTS, formats, shapes, frozenset(named)),
        architecture=architecture,
        tokenizer=Tokenizer.load(directory),
        metadata=config["metadata"],
    )


def open_model(directory: Path) -> ModelSource:
    """Open an export as a float model: `read(path)` decodes a leaf to float32. Errors as in `read`."""
    export = read(directory)
    formats = sorted({form or "float" for form in export.leaves.formats.values()})
    return ModelSource(
        architecture=export.architecture,
        tokenizer=export.tokenizer,
        paths=tuple(export.leaves),
        read=lambda path: decode(export.leaves[path]),
        description=f"export {directory} ({', '.join(formats)})",
    )


def _tensors(path: str, leaf: Leaf) -> dict[str, np.ndarray]:
    """Name in the file → array, for one leaf."""
    if isinstance(leaf, np.ndarray):
        return {path: leaf}
    codes, grid = np.asarray(leaf.codes), GRIDS.get(leaf.format.split("/")[0])
    packed = grid is not None and grid.held_dtype in ("int4", "uint4")
    tensors = {f"{path}.nibbles": _pack(codes, leaf.offset is None)} if packed else {f"{path}.codes": codes}
    parts = {f"{path}.scale": leaf.scale, f"{path}.offset": leaf.offset, f"{path}.input_scale": leaf.input_scale}
    return tensors | {name: np.asarray(part) for name, part in parts.items() if part is not None}


def _pack(codes: np.ndarray, is_signed: bool) -> np.ndarray:
    """Return codes from -8 to 7, or from 0 to 15, two to a byte, uint8 [⌈n / 2⌉]."""
    smallest, largest = (-8, 7) if is_signed else (0, 15)
    if codes.min(initial=0) < smallest or codes.max(initial=0) > largest:
        raise ValueError(f"codes {codes.min()} … {codes.max()} don't fit in four bits")
    flat = codes.reshape(-1).view(np.uint8) & 15
    low, high = flat[::2], flat[1::2]
    return low | (np.pad(high, (0, len(low) - len(high))) << 4)


def _unpack(nibbles: np.ndarray, shape: tuple[int, ...], is_signed: bool) -> np.ndarray:
    """Return the codes of `shape` that `_pack` made bytes of, int8."""
    flat = np.stack([nibbles & 15, nibbles >> 4], axis=-1).reshape(-1)[: prod(shape)]
    codes = (flat ^ 8).view(np.int8) - np.int8(8) if is_signed else flat.view(np.int8)
    return codes.reshape(shape)


def _check_leaf(path: str, shape: tuple[int, ...], leaf: Leaf) -> None:
    values = leaf if isinstance(leaf, np.ndarray) else np.asarray(leaf.codes)
    if values.shape != shape:
        raise ValueError(f"{path} has shape {values.shape}, the architecture implies {shape}; drop the padding")
    if isinstance(leaf, np.ndarray):
        if values.dtype not in (np.float32, *_CAST_DTYPES):
            raise ValueError(f"{path} is {values.dtype}; a leaf without codes is float32, float16 or bfloat16")
        tensors = {path: values}
    else:
        _check_codes(path, values, leaf)
        scales = {f"{path}.scale": leaf.scale, f"{path}.offset": leaf.offset, f"{path}.input_scale": leaf.input_scale}
        tensors = {f"{path}.codes": values, **scales}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != np.int8 and not np.isfinite(tensor).all():
            raise UserError(f"{name} holds values that are not finite; export a step from before the run diverged")


def _check_codes(path: str, codes: np.ndarray, leaf: StoredLeaf) -> None:
    if codes.dtype not in _SCALED_DTYPES and (codes.dtype not in _CAST_DTYPES or leaf.scale is not None):
        raise ValueError(f"{path} has {codes.dtype} codes; they have 8 bits, or are float16 or bfloat16 with no scale")
    if codes.dtype in _SCALED_DTYPES and (leaf.scale is None or leaf.scale.dtype != np.float16):
        raise ValueError(f"{path} has {codes.dtype} codes, but no float16 scale")
    if leaf.scale is not None and (
        leaf.scale.ndim != codes.ndim or any(n % m for n, m in zip(codes.shape, leaf.scale.shape, strict=True))
    ):
        raise ValueError(f"{path}: scale of shape {leaf.scale.shape} does not divide codes of shape {codes.shape}")
    if leaf.offset is not None and (leaf.scale is None or TensorSpec.of(leaf.offset) != TensorSpec.of(leaf.scale)):
        raise ValueError(f"{path}: offset of shape {leaf.offset.shape}, {leaf.offset.dtype} is none like its scale")
    inputs = leaf.input_scale
    if inputs is not None and (inputs.dtype != np.float32 or inputs.ndim != codes.ndim):
        raise ValueError(
            f"{path} has a {inputs.dtype} static scale of shape {inputs.shape}; it is float32, one a layer"
        )


def _verified_config(directory: Path) -> dict[str, Any]:
    """config.json, after it and every file that it lists were compared with their digests."""
    file = directory / CONFIG
    config = read_json(file)
    if config.get("format") != FORMAT:
        raise UserError(f"{file}: format={config.get('format')!r} is not {FORMAT!r}; give a directory that we exported")
    if config.get("version") not in range(1, VERSION + 1):
        known = f"versions up to {VERSION}"
        raise UserError(f"{file}: version={config.get('version')!r}; this program reads {known}, update it")
    digests = config.get("sha256")
    if not isinstance(digests, dict) or digests.pop(CONFIG, None) != _sha256_of(config):
        raise UserError(f"{file} was changed after it was written (SHA-256 differs); export again")
    for name, digest in digests.items():
        if not (directory / name).is_file():
            raise UserError(f"{directory / name} is missing; export again")
        if _sha256(directory / name) != digest:
            raise UserError(f"{directory / name} is damaged (SHA-256 differs from that in {CONFIG}); export again")
    return config


def _architecture(file: Path, stored: dict[str, Any]) -> Architecture:
    unknown = set(stored) - {entry.name for entry in fields(Architecture)}
    if unknown:
        raise UserError(f"{file}: architecture has {min(unknown)!r}, unknown to this program; update it")
    scaling = stored.get("rope_scaling")
    return Architecture(**{**stored, "rope_scaling": RopeScaling(**scaling) if scaling else None})


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sha256_of(config: Mapping[str, Any]) -> str:
    """Digest of config.json without its own digest; whitespace and the order of keys don't count."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
