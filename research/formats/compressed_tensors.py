"""Hugging Face directories whose matrices are codes and scales in the layout of the `compressed-tensors` library.

transformers and vLLM load them. A matrix is `weight` (int8 [out, in]) in the format int-quantized, or `weight_packed`
(int32, 32 / bits codes a word, the first in its lowest bits, each plus half the range) in the format pack-quantized;
its `weight_scale` is [out, in / group], [out, 1] per channel. Where what it multiplies has a static scale, that is
`input_scale`, [1]. Layouts: compressed-tensors 0.20, compressors/.

Nothing is quantized here, and everything is exact: scales are float32 copies of our float16 ones, and what has no
integer codes is float32, and so are the tables (docs/decisions/0008-compressed-tensors.md says why).
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from math import gcd, prod
from pathlib import Path
from typing import Any

import numpy as np

from research.architecture import Architecture
from research.errors import UserError
from research.formats import native
from research.formats.huggingface import WEIGHTS, Name, cast, names_of
from research.formats.huggingface_config import write_config
from research.formats.model_source import leaf_shapes
from research.formats.new_directory import new_directory
from research.formats.safetensors_file import TensorSpec, by_alignment, write_tensors
from research.tokenizer import Tokenizer

_FLOAT = np.dtype(np.float32)


@dataclass(frozen=True)
class Scheme:
    """What engines do with a matrix of codes."""

    bits: int
    """Of a code: -2^(bits - 1) … 2^(bits - 1) - 1."""
    rounds_activations: bool
    """Whether what it multiplies is rounded to int8, a scale per token or a static one; such an engine wants one scale
    a channel."""

    def fits(self, codes: np.ndarray) -> bool:
        """Whether all codes (int8) are among those of the scheme."""
        half = 1 << (self.bits - 1)
        return bool(codes.min() >= -half and codes.max() < half)


TYPES = {"w8a8": Scheme(8, True), "w8a16": Scheme(8, False), "w4a16": Scheme(4, False)}


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file: some part of one layer of a leaf, or of one expert of a layer."""

    path: str
    name: Name
    index: tuple[int, ...]
    """Of the layer, or of layer and expert; () of what is not stacked."""
    part: str
    spec: TensorSpec

    @property
    def needs_weight(self) -> bool:
        """Whether it is made of the leaf's codes or floats, and not of scales and shapes alone."""
        return self.part in ("weight", "weight_packed")

    @property
    def holds_floats(self) -> bool:
        """Whether it is a weight without codes."""
        return self.part == "weight" and self.spec.dtype == "F32"


def write(
    directory: Path,
    architecture: Architecture,
    tokenizer: Tokenizer,
    leaves: Mapping[str, native.Leaf],
    type: str,
    metadata: Mapping[str, str],
) -> frozenset[str]:
    """Write a directory that `AutoModelForCausalLM.from_pretrained` loads where compressed-tensors is installed.

    Args:
        directory: must not exist, or be empty.
        leaves: all that `architecture` has, of the logical, stacked shapes; asked for one at a time, twice.
        type: one of `TYPES`.
        metadata: goes into the header of model.safetensors, text → text.

    Returns:
        The paths of the leaves that the file holds as codes and scales; the others are float32.

    Raises:
        UserError: `directory` holds something, no matrix has integer codes, codes or scales don't fit `type` (the line
            names the type that holds them), only some activations have static scales, or a value is not finite.
    """
    scheme, shapes, names = TYPES[type], leaf_shapes(architecture), names_of(architecture)
    groups: dict[str, int] = {}
    has_static: dict[str, bool] = {}
    scales: dict[str, native.StoredLeaf] = {}
    for path in shapes:
        leaf, name = leaves[path], names[path]
        if name.inputs and isinstance(leaf, native.StoredLeaf) and leaf.codes.dtype == np.int8:
            _check_fit(path, name, leaf, type)
            groups[path] = _inputs_per_scale(name, leaf)
            has_static[path] = scheme.rounds_activations and leaf.input_scale is not None
            scales[path] = _without_codes(leaf)
        del leaf  # or it would stay in memory while the next one is read
    if not groups:
        raise UserError(f"no matrix of this model has integer codes for {type}; --format huggingface holds its floats")
    _check_experts(names, groups)
    static = _one_kind(has_static)
    per_channel = all(group == _matrix(names[path], shapes[path])[1] for path, group in groups.items())
    group = None if per_channel else gcd(*groups.values())
    tensors = _plan(names, shapes, groups, scheme, group, static)
    specs = {name: tensor.spec for name, tensor in tensors.items()}
    floats = [names[path] for path in sorted(shapes.keys() - groups.keys())]
    quantization = _quantization(scheme, group, static, floats)
    with new_directory(directory) as partial:
        write_config(partial, architecture, tokenizer, "float32", quantization)
        tokenizer.save(partial)
        arrays = _arrays(tensors.values(), leaves, scales, scheme, group)
        write_tensors(partial / WEIGHTS, specs, arrays, {**metadata, "format": "pt"})
    return frozenset(groups)


def _without_codes(leaf: native.StoredLeaf) -> native.StoredLeaf:
    """The scales of a leaf, beside codes of its shape that take no memory."""
    return replace(leaf, codes=np.broadcast_to(np.int8(0), leaf.codes.shape))


def _check_fit(path: str, name: Name, leaf: native.StoredLeaf, type: str) -> None:
    assert leaf.scale is not None
    if leaf.offset is not None:
        raise UserError(f"{path} is {leaf.format}, whose offsets {type} has no place for; GGUF's type Q4_1 holds them")
    if not np.isfinite(leaf.scale).all():
        raise UserError(f"{path} has scales that are not finite; export a step from before the run diverged")
    scheme, holder = TYPES[type], "w4a16" if TYPES["w4a16"].fits(leaf.codes) else "w8a16"
    if not scheme.fits(leaf.codes):
        found = f"{leaf.codes.min()} … {leaf.codes.max()}"
        raise UserError(f"{path} is {leaf.format} with codes {found}, and {type} has -8 … 7; type {holder} holds it")
    if scheme.rounds_activations and prod(leaf.scale.shape[name.stacked :][: name.inputs]) > 1:
        raise UserError(f"{path} is {leaf.format}, and {type} has one scale a channel; type {holder} holds it")


def _check_experts(names: Mapping[str, Name], groups: Collection[str]) -> None:
    """Raise `UserError` if some matrices of experts have codes and some none: engines hold them in one scheme."""
    experts = [path for path, name in names.items() if name.stacked == 2]
    without = [path for path in experts if path not in groups]
    if without and len(without) < len(experts):
        some = next(path for path in experts if path in groups)
        raise UserError(
            f"{without[0]} has no integer codes, and {some} has some; engines hold experts in one scheme, so give all"
            " their matrices the same rule, or take --format huggingface"
        )


def _one_kind(has_static: Mapping[str, bool]) -> bool:
    """Whether the activations have static scales; `UserError` if only some have."""
    kinds = {static: path for path, static in has_static.items()}
    if len(kinds) > 1:
        raise UserError(
            f"{kinds[True]} has a static scale of its activation, {kinds[False]} has none, and w8a8 holds one"
            " kind; train all matrices with the same rule, or take type w8a16"
        )
    return True in kinds


def _inputs_per_scale(name: Name, leaf: native.StoredLeaf) -> int:
    """How many neighbours of a row share a scale, for sure."""
    assert leaf.scale is not None
    group, inputs = 1, slice(name.stacked, name.stacked + name.inputs)
    axes = zip(leaf.codes.shape[inputs], leaf.scale.shape[inputs], strict=True)
    for size, scales in reversed(list(axes)):  # the innermost axis first
        group *= size // scales
        if scales > 1:
            break
    return group


def _matrix(name: Name, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one tensor of a leaf of that stacked shape, [out, in] for a matrix."""
    return name.shape(shape[name.stacked :])


def _plan(
    names: Mapping[str, Name],
    shapes: Mapping[str, tuple[int, ...]],
    groups: Collection[str],
    scheme: Scheme,
    group: int | None,
    static: bool,
) -> dict[str, _Tensor]:
    """The tensors of the file by name, in its order."""
    tensors: dict[str, _Tensor] = {}
    for path, shape in shapes.items():
        name, stored = names[path], _matrix(names[path], shape)
        parts = _parts(stored, scheme, group, static) if path in groups else {"weight": TensorSpec("F32", stored)}
        for index, tensor in zip(np.ndindex(shape[: name.stacked]), name.tensors(shape), strict=True):
            module = tensor.removesuffix("weight")
            tensors |= {module + part: _Tensor(path, name, index, part, spec) for part, spec in parts.items()}
    return {name: tensors[name] for name in by_alignment({name: tensor.spec for name, tensor in tensors.items()})}


def _parts(matrix: tuple[int, ...], scheme: Scheme, group: int | None, static: bool) -> dict[str, TensorSpec]:
    """The tensors of a matrix [out, in] that is held as codes."""
    rows, inputs = matrix
    scale = {"weight_scale": TensorSpec("F32", (rows, inputs // (group or inputs)))}
    if static:
        scale["input_scale"] = TensorSpec("F32", (1,))
    if scheme.rounds_activations:
        return {"weight": TensorSpec("I8", matrix), **scale}
    words = -(-inputs * scheme.bits // 32)
    return {"weight_packed": TensorSpec("I32", (rows, words)), "weight_shape": TensorSpec("I64", (2,)), **scale}


def _arrays(
    tensors: Iterable[_Tensor],
    leaves: Mapping[str, native.Leaf],
    scales: Mapping[str, native.StoredLeaf],
    scheme: Scheme,
    group: int | None,
) -> Iterator[np.ndarray]:
    """The values of the tensors; the codes of one leaf in memory at a time."""
    for path, of_leaf in groupby(tensors, key=lambda tensor: tensor.path):
        weight: native.Leaf | None = None
        for tensor in of_leaf:
            if tensor.needs_weight:
                leaf = weight = leaves[path] if weight is None else weight
            else:
                leaf = scales[path]
            yield _array(tensor, _at(leaf, tensor.index), scheme, group)


def _array(tensor: _Tensor, matrix: native.Leaf, scheme: Scheme, group: int | None) -> np.ndarray:
    name = tensor.name
    if tensor.holds_floats:
        return cast(tensor.path, name.from_ours(native.decode(matrix)), _FLOAT)
    assert isinstance(matrix, native.StoredLeaf) and matrix.scale is not None
    codes_oi = name.from_ours(matrix.codes)
    if tensor.part == "weight":
        return codes_oi
    if tensor.part == "weight_packed":
        return pack(codes_oi, scheme.bits)
    if tensor.part == "weight_shape":
        return np.array(codes_oi.shape, np.int64)
    if tensor.part == "input_scale":
        assert matrix.input_scale is not None
        return matrix.input_scale.reshape(1)
    scale_oi = name.from_ours(native.spread(matrix.scale, matrix.codes.shape))
    return scale_oi[:, :: group or codes_oi.shape[1]].astype(np.float32)


def _at(leaf: native.Leaf, index: tuple[int, ...]) -> native.Leaf:
    """The layer, or the expert of a layer, at that index of what stacks them."""
    if isinstance(leaf, np.ndarray):
        return leaf[index]

    def part(scales: np.ndarray | None) -> np.ndarray | None:  # may have one for several layers or experts
        if scales is None:
            return None
        return scales[tuple(i * m // n for i, m, n in zip(index, scales.shape, leaf.codes.shape, strict=False))]

    return native.StoredLeaf(leaf.codes[index], part(leaf.scale), leaf.format, input_scale=part(leaf.input_scale))


def pack(codes_oi: np.ndarray, bits: int) -> np.ndarray:
    """Return codes (int8 [out, in], of 4 or 8 bits) as int32 [out, ⌈in · bits / 32⌉]; rows end in zero bits."""
    per_word, half = 32 // bits, 1 << (bits - 1)
    unsigned = (codes_oi.astype(np.int32) + half).astype(np.uint32)
    padded = np.pad(unsigned, ((0, 0), (0, -codes_oi.shape[1] % per_word)))
    words = padded.reshape(len(padded), -1, per_word) << (bits * np.arange(per_word, dtype=np.uint32))
    return np.bitwise_or.reduce(words, axis=-1).view(np.int32)


def _quantization(scheme: Scheme, group: int | None, static: bool, floats: Iterable[Name]) -> dict[str, Any]:
    """The object `quantization_config` of config.json; transformers 4 and 5 and vLLM read the same."""
    common = {"type": "int", "symmetric": True}
    weights = {"num_bits": scheme.bits, **common, "dynamic": False, "strategy": "group" if group else "channel"}
    activations = {"num_bits": 8, **common, "dynamic": not static, "strategy": "tensor" if static else "token"}
    modules = [name.pattern.removesuffix(".weight").rsplit("{}.", 1)[1] for name in floats if name.inputs]
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if scheme.rounds_activations else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**weights, "group_size": group},
                "input_activations": activations if scheme.rounds_activations else None,
                "output_activations": None,
            }
        },
        "ignore": ["lm_head", *(f"re:.*{re.escape(module)}$" for module in modules)],
        "kv_cache_scheme": None,
    }
