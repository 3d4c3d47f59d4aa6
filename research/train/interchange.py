"""Exports for other engines, GGUF files and Hugging Face directories, and the lines that say what they hold exactly.

Codes go into GGUF's blocks and compressed-tensors' matrices as the optimizer held them. Where a format holds floats,
they are the decoded weights, float32(code) · float32(scale): 8 + 11 bits, which float32 holds exactly and 16-bit floats
round.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from research.architecture import Architecture
from research.errors import UserError
from research.formats import compressed_tensors, gguf, huggingface, native
from research.tokenizer import Tokenizer

GGUF_TYPES = ("Q8_0", "Q4_0", "Q4_1", "F16", "BF16", "F32")
HUGGINGFACE_TYPES = ("float32", "bfloat16")
COMPRESSED_TYPES = tuple(compressed_tensors.TYPES)


@dataclass(frozen=True, eq=False)
class _Watched(Mapping[str, native.Leaf]):
    """Stored leaves, and which of those that were asked for multiply an activation with a static scale."""

    leaves: Mapping[str, native.Leaf]
    static: set[str] = field(default_factory=set)

    def __getitem__(self, path: str) -> native.Leaf:
        leaf = self.leaves[path]
        if isinstance(leaf, native.StoredLeaf) and leaf.input_scale is not None:
            self.static.add(path)
        return leaf

    def __iter__(self) -> Iterator[str]:
        return iter(self.leaves)

    def __len__(self) -> int:
        return len(self.leaves)


def write_gguf(
    path: Path, leaves: Mapping[str, native.Leaf], architecture: Architecture, tokenizer: Tokenizer, type: str
) -> tuple[str, ...]:
    """Write stored leaves (see `stored_leaves`) as a new GGUF file; return lines that say which types it holds.

    Raises `UserError` if the file exists or isn't called *.gguf, or a leaf does not fit `type` (see `gguf.write`).
    """
    if path.suffix != ".gguf":
        raise UserError(f"{path}: a GGUF file's name ends in .gguf; write --output {path.name}.gguf")
    if path.exists():
        raise UserError(f"{path} exists already and is not overwritten; give another name or move it away")
    leaves = _Watched(leaves)
    written = gguf.write(path, architecture, tokenizer, leaves.__getitem__, tuple(leaves), type)
    held: dict[str, list[str]] = {}
    for leaf, entry in written.items():
        held.setdefault(entry.type, []).append(leaf)
    types = " · ".join(f"{name}: {_list(paths)}" for name, paths in held.items())
    rounded = [leaf for leaf, entry in written.items() if not entry.is_exact]
    return types, describe_rounding(type, rounded, leaves, remedy="F32"), *_left_out(leaves.static)


def write_huggingface(
    directory: Path,
    leaves: Mapping[str, native.Leaf],
    architecture: Architecture,
    tokenizer: Tokenizer,
    type: str,
    metadata: Mapping[str, Any],
) -> tuple[str, ...]:
    """Write the decoded leaves as a new Hugging Face directory; return a line that says whether they are exact.

    `metadata`: a checkpoint's; foundation, task and step go into the file's header. Raises `UserError` as
    `huggingface.write` does.
    """
    leaves = _Watched(leaves)
    rounded = huggingface.write(
        directory, architecture, tokenizer, leaves, lambda path: native.decode(leaves[path]), type, _header(metadata)
    )
    return (describe_rounding(type, rounded, leaves, remedy="float32"), *_left_out(leaves.static))


def write_compressed_tensors(
    directory: Path,
    leaves: Mapping[str, native.Leaf],
    architecture: Architecture,
    tokenizer: Tokenizer,
    type: str,
    metadata: Mapping[str, Any],
) -> tuple[str, ...]:
    """Write stored leaves as a new directory of the library compressed-tensors; return lines that say what is in it.

    `metadata`: as for `write_huggingface`. Raises `UserError` as `compressed_tensors.write` does.
    """
    leaves, header = _Watched(leaves), _header(metadata)
    held = sorted(compressed_tensors.write(directory, architecture, tokenizer, leaves, type, header))
    floats = [path for path in leaves if path not in held]
    rounds = compressed_tensors.TYPES[type].rounds_activations
    static = leaves.static.intersection(held) if rounds else set()
    per = "the static scales of the run" if static else "a scale per token"
    inputs = f"engines round what they multiply to int8, {per}" if rounds else "engines decode them"
    of_experts = rounds and architecture.experts is not None
    return (
        f"codes and scales of the run, bit for bit: {_list(held)}; {inputs}",
        f"float32, exactly decoded: {_list(floats)}; engines round nothing that they multiply",
        *(("vLLM reads experts in w8a8, transformers doesn't; it reads w8a16 and w4a16",) if of_experts else ()),
        *_left_out(leaves.static - static),
    )


def _left_out(static: Iterable[str]) -> tuple[str, ...]:
    """Return a line about leaves with static scales of activations that a file has no place for, if there are such."""
    paths = sorted(static)
    return (f"not in it: static scales of activations, of {_list(paths)}",) if paths else ()


def _header(metadata: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(metadata[key]) for key in ("foundation", "task", "step")}


def describe_rounding(type: str, rounded: Iterable[str], leaves: Mapping[str, native.Leaf], remedy: str) -> str:
    """Return a line that says whether the file holds every weight of the run bit for bit, and if not, which ones."""
    paths = sorted(rounded)
    if not paths:
        return "lossless: every weight is the run's, bit for bit"
    return f"rounded to {type}: {_list(paths)}, of {len(leaves)} leaves; {remedy} holds them exactly"


def _list(paths: list[str]) -> str:
    """Return a few paths by name, many as their number."""
    return ", ".join(paths) if len(paths) <= 3 else f"{len(paths)} leaves"
