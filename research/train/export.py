"""Our int8 export: codes and scales out of the optimizer's state into a file and back, never quantized again."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research.architecture import Architecture
from research.errors import UserError
from research.formats import native
from research.model.layers import tree_of
from research.model.placement import place, unplace
from research.processes import first_alone
from research.quant.nodes import Encoded, is_encoded
from research.quant.policy import Format, leaves_by_path
from research.quant.stages import stage_of
from research.setup import Setup
from research.tokenizer import Tokenizer

_METADATA = ("experiment", "foundation", "task", "step")


@dataclass(frozen=True, eq=False)
class _Leaves(Mapping[str, native.Leaf]):
    """Stored parameters as host arrays of their logical shapes, one at a time."""

    encoded: Mapping[str, Any]
    setup: Setup
    step: int

    def __getitem__(self, path: str) -> native.Leaf:
        leaf, table = self.encoded[path], self.setup.table
        if not isinstance(leaf, Encoded):
            return unplace(path, leaf, table)

        def part(name: str, array: Any) -> Any:
            return None if array is None else unplace(f"{path}/{name}", array, table)

        return native.StoredLeaf(
            codes=unplace(f"{path}/codes", leaf.codes, table),
            scale=part("scale", leaf.scale),
            format=_name(self.setup.formats[path], self.step),
            offset=part("offset", leaf.offset),
            input_scale=part("input_scale", leaf.input_scale),
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.encoded)

    def __len__(self) -> int:
        return len(self.encoded)


def stored_leaves(encoded: Any, setup: Setup, step: int) -> Mapping[str, native.Leaf]:
    """Return stored parameters (`Encoded` or float leaves on a mesh) by path, as host arrays without padding.

    `step`: updates that they have seen, which says of what grid codes are. Each access fetches that leaf, and keeps
    nothing.
    """
    return _Leaves(leaves_by_path(encoded, is_encoded), setup, step)


def _name(form: Format, step: int) -> str:
    """Return the format at a step as the export's table spells it: "int8/channel", "fp16"."""
    form = stage_of(form, step)
    return f"{form.grid.name}/{form.granularity}" if form.grid.is_scaled else form.grid.name


def write_export(
    directory: Path,
    encoded: Any,
    setup: Setup,
    architecture: Architecture,
    tokenizer: Tokenizer,
    metadata: Mapping[str, Any],
) -> int:
    """Write stored parameters (`Encoded` or float leaves) and return the size of the weight file in bytes.

    `metadata`: a checkpoint's; what doesn't depend on the mesh and the machine goes into the export.
    """
    leaves = stored_leaves(encoded, setup, metadata["step"])
    if jax.process_count() > 1:
        leaves = dict(leaves)  # all processes take part in fetching a leaf, and the first one alone writes
    kept = {key: metadata[key] for key in _METADATA}
    first_alone(lambda: native.write(directory, leaves, architecture, tokenizer, kept))
    return (directory / native.WEIGHTS).stat().st_size


def place_export(export: native.Export, setup: Setup) -> Any:
    """Return an export's parameters on the mesh of `setup`: the tree that `write_export` was given, bit for bit."""
    step = export.metadata["step"]
    return tree_of({path: _place(path, export.leaves[path], setup, step) for path in setup.table})


def _place(path: str, leaf: native.Leaf, setup: Setup, step: int) -> Any:
    form = setup.formats.get(path)
    found = None if isinstance(leaf, np.ndarray) else leaf.format
    expected = None if form is None else _name(form, step)
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
