"""Hugging Face directories: config.json, tokenizer and safetensors, in one file or in shards.

One name map serves reading and writing (`huggingface_kinds` has the names of experts, which differ). Hugging Face keeps
a layer's projections as [out, in] matrices of its own; ours are [in..., out...] with heads and their width as two axes,
stacked over the layers, and over the experts. Rotary embeddings pair the same dimensions in both (the first half of a
head with its second half), so that no row moves.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from research.architecture import Architecture
from research.errors import UserError, nearest
from research.formats.huggingface_config import read_architecture, read_json, write_config
from research.formats.huggingface_kinds import kind_of
from research.formats.model_source import ModelSource, ReadLeaf, leaf_shapes
from research.formats.new_directory import new_directory
from research.formats.safetensors_file import DTYPES, TensorSpec, list_tensors, read_tensor, write_tensors
from research.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "embed/table_vd", "head/table_vd"
_FLOATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_ROWS_AT_ONCE = 8192
# Buffers that old files hold and that follow from config.json; transformers ignores them as well.
_DERIVED = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class Name:
    """How Hugging Face calls a leaf; {} stands for the number of a layer, and then of an expert: a tensor each."""

    pattern: str
    inputs: int = 0
    """Leading axes of one tensor in our layout that a product sums over; 0: tables and scales, stored as they are."""

    @property
    def stacked(self) -> int:
        """Leading axes of our leaf that stack tensors."""
        return self.pattern.count("{}")

    def tensors(self, shape: tuple[int, ...]) -> list[str]:
        """Names of the tensors of our leaf of the stacked `shape`: one, or one a layer, or one a layer and expert."""
        return [self.pattern.format(*index) for index in np.ndindex(shape[: self.stacked])]

    def parts(self, leaf: np.ndarray) -> np.ndarray:
        """Our leaf with what stacks its tensors as one leading axis, a view."""
        return leaf.reshape(-1, *leaf.shape[self.stacked :])

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored tensor where one of our leaf has shape `ours`."""
        return (prod(ours[self.inputs :]), prod(ours[: self.inputs])) if self.inputs else ours

    def from_ours(self, leaf: np.ndarray) -> np.ndarray:
        """One tensor of our leaf as the stored one."""
        return leaf.reshape(self.shape(leaf.shape)[::-1]).T if self.inputs else leaf

    def to_ours(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The stored tensor as one of our leaf, of shape `shape`."""
        return tensor.T.reshape(shape) if self.inputs else tensor


NAMES: Mapping[str, Name] = {
    EMBEDDING: Name("model.embed_tokens.weight"),
    "layers/attention_norm/scale_d": Name("model.layers.{}.input_layernorm.weight"),
    "layers/attention/q_dnh": Name("model.layers.{}.self_attn.q_proj.weight", inputs=1),
    "layers/attention/k_dkh": Name("model.layers.{}.self_attn.k_proj.weight", inputs=1),
    "layers/attention/v_dkh": Name("model.layers.{}.self_attn.v_proj.weight", inputs=1),
    "layers/attention/o_nhd": Name("model.layers.{}.self_attn.o_proj.weight", inputs=2),
    "layers/mlp_norm/scale_d": Name("model.layers.{}.post_attention_layernorm.weight"),
    "layers/mlp/gate_df": Name("model.layers.{}.mlp.gate_proj.weight", inputs=1),
    "layers/mlp/up_df": Name("model.layers.{}.mlp.up_proj.weight", inputs=1),
    "layers/mlp/down_fd": Name("model.layers.{}.mlp.down_proj.weight", inputs=1),
    "norm/scale_d": Name("model.norm.weight"),
    HEAD: Name("lm_head.weight"),
    "layers/attention/q_norm/scale_h": Name("model.layers.{}.self_attn.q_norm.weight"),
    "layers/attention/k_norm/scale_h": Name("model.layers.{}.self_attn.k_norm.weight"),
}


def names_of(architecture: Architecture) -> Mapping[str, Name]:
    """Return how transformers calls the leaves of a model, by path; `UserError` if none of its classes computes it."""
    experts = kind_of(architecture).experts
    of_experts = {} if experts is None else {path: Name(pattern, inputs=1) for path, pattern in experts.names.items()}
    return {**NAMES, **of_experts}


def open_model(directory: Path) -> ModelSource:
    """Open a Hugging Face directory; weights are read leaf by leaf, later.

    Names, shapes and dtypes of all tensors are checked now.

    Raises:
        UserError: a file is missing or broken, or the model is not one that ours computes exactly (see
            `read_architecture`); the line names the file, the value and the remedy.
    """
    directory = Path(directory)
    architecture = read_architecture(directory / "config.json")
    files = _locate(directory)
    specs = {name: spec for file in set(files.values()) for name, spec in list_tensors(file).items()}
    _check_tensors(directory, architecture, files, specs)
    tokenizer = Tokenizer.load(directory)
    if tokenizer.vocabulary > architecture.vocabulary:
        raise UserError(
            f"{directory}: the tokenizer has {tokenizer.vocabulary} tokens, config.json says "
            f"vocab_size={architecture.vocabulary}; take the tokenizer that belongs to these weights"
        )
    dtypes = sorted({spec.dtype for name, spec in specs.items() if not name.endswith(_DERIVED)})
    return ModelSource(
        architecture=architecture,
        tokenizer=tokenizer,
        paths=tuple(leaf_shapes(architecture)),
        read=partial(_read_leaf, files, leaf_shapes(architecture), names_of(architecture)),
        description=f"{kind_of(architecture).architecture} in {directory} ({', '.join(dtypes)})",
    )


def write(
    directory: Path,
    architecture: Architecture,
    tokenizer: Tokenizer,
    paths: Iterable[str],
    read: ReadLeaf,
    dtype: str = "float32",
    metadata: Mapping[str, str] | None = None,
) -> frozenset[str]:
    """Write a directory that transformers 4 and 5 load with `AutoModelForCausalLM.from_pretrained`.

    Args:
        directory: must not exist, or be empty.
        paths: the leaves that there are; must be those that `architecture` has.
        read: path → float array of the logical, stacked shape; called once a leaf.
        dtype: float32, bfloat16 or float16 (rounded to nearest even).
        metadata: goes into the header of model.safetensors, text → text.

    Returns:
        The paths of the leaves of which `dtype` rounded some value.

    Raises:
        UserError: `directory` holds something, `dtype` is none of these, or a value is too large for it.
        ValueError: leaves or shapes are not those of `architecture`.
    """
    if dtype not in _FLOATS:
        raise UserError(f"dtype={dtype!r} can't be written{nearest(dtype, _FLOATS)}")
    shapes = leaf_shapes(architecture)
    if set(paths) != set(shapes):
        raise ValueError(f"leaves {sorted(set(paths) ^ set(shapes))} are missing or not in the architecture")
    specs = {name: TensorSpec(_FLOATS[dtype], shape) for name, shape in _stored_shapes(architecture).items()}
    names = names_of(architecture)
    rounded: set[str] = set()
    with new_directory(directory) as partial_directory:
        write_config(partial_directory, architecture, tokenizer, dtype)
        tokenizer.save(partial_directory)
        tensors = _convert(names, shapes, read, DTYPES[_FLOATS[dtype]], rounded)
        write_tensors(partial_directory / WEIGHTS, specs, tensors, {**(metadata or {}), "format": "pt"})
    return frozenset(rounded)


def _stored_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor, leaf after leaf and, in a leaf, layer after layer."""
    shapes: dict[str, tuple[int, ...]] = {}
    names = names_of(architecture)
    for path, shape in leaf_shapes(architecture).items():
        name = names[path]
        shapes |= dict.fromkeys(name.tensors(shape), name.shape(shape[name.stacked :]))
    return shapes


def _read_leaf(
    files: Mapping[str, Path], shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, Name], path: str
) -> np.ndarray:
    """One leaf, float32, of its logical, stacked shape."""
    name, leaf = names[path], np.empty(shapes[path], np.float32)
    for part, stored in zip(name.parts(leaf), name.tensors(leaf.shape), strict=True):
        part[...] = name.to_ours(read_tensor(files[stored], stored), part.shape)
    return leaf


def _convert(
    names: Mapping[str, Name],
    shapes: Mapping[str, tuple[int, ...]],
    read: ReadLeaf,
    dtype: np.dtype,
    rounded: set[str],
) -> Iterator[np.ndarray]:
    """The tensors of `_stored_shapes`, in its order; one leaf in memory at a time. `rounded` gets the rounded ones."""
    for path, shape in shapes.items():
        leaf = read(path)
        if leaf.shape != shape:
            raise ValueError(f"{path} has shape {leaf.shape}, the architecture implies {shape}")
        for part in names[path].parts(leaf):
            tensor = cast(path, names[path].from_ours(part), dtype)
            if not np.array_equal(tensor.astype(np.float32), names[path].from_ours(part)):
                rounded.add(path)
            yield tensor
            del part, tensor
        del leaf  # or it would stay in memory while the next one is read


def cast(path: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return float32 values of the leaf `path` as `dtype`; `UserError` where one is not finite, or too large for it."""
    if not np.isfinite(values).all():
        raise UserError(f"{path} holds values that are not finite; export a step from before the run diverged")
    with np.errstate(over="ignore"):
        tensor = values.astype(dtype)
    if not np.isfinite(tensor).all():
        raise UserError(f"{path} has values that {dtype} can't hold (largest {abs(values).max()}); write float32")
    return tensor


def _locate(directory: Path) -> dict[str, Path]:
    """Name of every tensor → the file that holds it."""
    if (directory / WEIGHTS).exists():
        return dict.fromkeys(list_tensors(directory / WEIGHTS), directory / WEIGHTS)
    index = directory / INDEX
    if not index.exists():
        raise UserError(f"{directory} has neither {WEIGHTS} nor {INDEX}; weights are read from safetensors only")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise UserError(f"{index} has no weight_map from tensors to files; fetch it again")
    for shard in set(shards.values()):
        if Path(shard).name != shard:
            raise UserError(f"{index}: shard {shard!r} is not a file name; shards lie beside the index")
    files = {name: directory / shard for name, shard in shards.items()}
    for file in sorted(set(files.values())):
        found, expected = set(list_tensors(file)), {name for name, shard in files.items() if shard == file}
        if found != expected:
            name = min(found ^ expected)
            missing = "is not in that file" if name in expected else "is in that file, but the index doesn't say so"
            raise UserError(f"{file}: tensor {name} {missing}; index and shards are of two models, fetch both again")
    return files


def _check_tensors(
    directory: Path, architecture: Architecture, files: Mapping[str, Path], specs: Mapping[str, TensorSpec]
) -> None:
    """Raise `UserError` unless the tensors are exactly those that the architecture implies."""
    expected = _stored_shapes(architecture)
    found = {name for name in files if not name.endswith(_DERIVED)}
    head, embedding = (NAMES[path].pattern for path in (HEAD, EMBEDDING))
    if missing := [name for name in expected if name not in found]:
        hint = "; does config.json lack tie_word_embeddings=true?" if missing == [head] else "; fetch the model again"
        raise UserError(f"{directory}: tensor {missing[0]} is missing ({len(missing)} in all){hint}")
    for name, shape in expected.items():
        if specs[name].shape != shape:
            raise UserError(f"{files[name]}: {name} has shape {specs[name].shape}, config.json implies {shape}")
        if specs[name].dtype not in _FLOATS.values():
            raise UserError(f"{files[name]}: {name} is {specs[name].dtype}; use a checkpoint in F32, F16 or BF16")
    unexpected = found - set(expected)
    if head in unexpected:  # it is expected where it is not tied
        _check_tied(files, specs, head, embedding)
        unexpected.remove(head)
    if unexpected:
        name = min(unexpected)
        kind = kind_of(architecture).architecture
        raise UserError(f"{files[name]}: tensor {name} is not one of a {kind} (unexpected: {len(unexpected)})")


def _check_tied(files: Mapping[str, Path], specs: Mapping[str, TensorSpec], head: str, embedding: str) -> None:
    """A tied head may be stored a second time, but then it must be the embedding, bit for bit."""
    rows = specs[embedding].shape[0]
    blocks = [slice(start, min(start + _ROWS_AT_ONCE, rows)) for start in range(0, rows, _ROWS_AT_ONCE)]
    same = specs[head] == specs[embedding] and all(
        np.array_equal(read_tensor(files[head], head, block), read_tensor(files[embedding], embedding, block))
        for block in blocks
    )
    if not same:
        raise UserError(
            f"{files[head]}: {head} differs from {embedding}, but config.json ties them; set tie_word_embeddings=false"
        )
