"""Our int8 export: codes and scales out of the optimizer's state into a file and back, never quantized again."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from research.architecture import Architecture
from research.errors import UserError
from research.formats import native
from research.model.layers import tree_of
from research.model.placement import place, unplace
from research.processes import first_fetching
from research.quant.nodes import Encoded, is_encoded
from research.quant.policy import Format, leaves_by_path
from research.quant.stages import stage_of
from research.setup import Setup
from research.tokenizer import Tokenizer
from research.train.state import updates_of

_METADATA = ("experiment", "foundation", "task", "step", "updates")
_Written = TypeVar("_Written")


@dataclass(frozen=True, eq=False)
class _Leaves(Mapping[str, native.Leaf]):
    """Leaves by path; each access fetches that leaf, and keeps nothing."""

    paths: tuple[str, ...]
    fetch: Callable[[str], native.Leaf]

    def __getitem__(self, path: str) -> native.Leaf:
        return self.fetch(path)

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)


def stored_leaves(encoded: Any, setup: Setup, updates: int) -> Mapping[str, native.Leaf]:
    """Return stored parameters (`Encoded` or float leaves on a mesh) by path, as host arrays without padding.

    `updates`: how many they have seen, which says of what grid codes are. Each access fetches that leaf, in which all
    processes have to take part, and keeps nothing.
    """
    leaves = leaves_by_path(encoded, is_encoded)
    return _Leaves(tuple(leaves), partial(_fetch, leaves, setup, updates))


def write_stored(
    encoded: Any, setup: Setup, updates: int, write: Callable[[Mapping[str, native.Leaf]], _Written]
) -> _Written | None:
    """Let the first process write stored parameters, and return what `write` does, on all others None.

    `write` is given what `stored_leaves` returns. No process ever holds more than one leaf on the host.
    """
    leaves = stored_leaves(encoded, setup, updates)
    paths = tuple(leaves)
    return first_fetching(paths, leaves.__getitem__, lambda fetch: write(_Leaves(paths, fetch)))


def _fetch(leaves: Mapping[str, Any], setup: Setup, updates: int, path: str) -> native.Leaf:
    """Return a stored parameter as host arrays of its logical shape."""
    leaf, table = leaves[path], setup.table
    if not isinstance(leaf, Encoded):
        return unplace(path, leaf, table)

    def part(name: str, array: Any) -> Any:
        return None if array is None else unplace(f"{path}/{name}", array, table)

    return native.StoredLeaf(
        codes=unplace(f"{path}/codes", leaf.codes, table),
        scale=part("scale", leaf.scale),
        format=_name(setup.formats[path], updates),
        offset=part("offset", leaf.offset),
        input_scale=part("input_scale", leaf.input_scale),
    )


def _name(form: Format, updates: int) -> str:
    """Return the format after so many updates as the export's table spells it: "int8/channel", "fp16"."""
    form = stage_of(form, updates)
    return f"{form.grid.name}/{form.granularity}" if form.grid.is_scaled else form.grid.name


def write_export(
    directory: Path,
    encoded: Any,
    setup: Setup,
    architecture: Architecture,
    tokenizer: Tokenizer,
    metadata: Mapping[str, Any],
) -> None:
    """Let the first process write stored parameters (`Encoded` or float leaves).

    `metadata`: a checkpoint's; what doesn't depend on the mesh and the machine goes into the export.
    """
    kept = {key: metadata[key] for key in _METADATA if key in metadata}

    def write(leaves: Mapping[str, native.Leaf]) -> None:
        native.write(directory, leaves, architecture, tokenizer, kept)

    write_stored(encoded, setup, updates_of(metadata), write)


def place_export(export: native.Export, setup: Setup) -> Any:
    """Return an export's parameters on the mesh of `setup`: the tree that `write_export` was given, bit for bit."""
    updates = updates_of(export.metadata)
    return tree_of({path: _place(path, export.leaves[path], setup, updates) for path in setup.table})


def _place(path: str, leaf: native.Leaf, setup: Setup, updates: int) -> Any:
    form = setup.formats.get(path)
    found = None if isinstance(leaf, np.ndarray) else leaf.format
    expected = None if form is None else _name(form, updates)
    if found != expected:
        raise UserError(f"{path} is {found or 'float'} in the export, and its config says {expected or 'float'}")
    if isinstance(leaf, np.ndarray):
        return place(path, leaf, setup.table, setup.mesh)
    assert form is not None
    if (leaf.input_scale is None) != (form.input_scale_shape is None):
        found = "no" if leaf.input_scale is None else "a"
        raise UserError(f"{path} has {found} static scale in the export, its config: {form.rule.activation!r}")

    def part(name: str, array: Any) -> Any:
        return None if array is None else place(f"{path}/{name}", array, setup.table, setup.mesh)

    return Encoded(
        codes=part("codes", leaf.codes),
        scale=part("scale", leaf.scale),
        grid=form.grid,
        dtype=setup.train.param_dtype,
        held_dtype=form.held_dtype,
        offset=part("offset", leaf.offset),
        input_scale=part("input_scale", leaf.input_scale),
    )
