"""Opening what a run left, a run folder, one checkpoint or an export, for evaluation, generation and export."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research.architecture import Architecture
from research.config import Experiment, MeshConfig
from research.config_file import from_json
from research.errors import UserError
from research.formats import native
from research.formats.model_source import ModelSource
from research.mesh import make_mesh
from research.model.placement import unplace
from research.quant.nodes import Encoded, is_encoded
from research.quant.policy import path_of
from research.run_folder import CHECKPOINTS
from research.setup import Setup, make_setup
from research.tokenizer import Tokenizer
from research.train.checkpoint import newest_whole, read_metadata, verify
from research.train.export import place_export
from research.train.state import WEIGHTS, architecture_of, experiment_of, restore_weights, tokenizer_of


@dataclass(frozen=True)
class Opened:
    """A trained model on disk, verified; `weights(setup)` puts its parameters, `Encoded` or float, on a mesh."""

    path: Path
    experiment: Experiment
    architecture: Architecture
    tokenizer: Tokenizer
    step: int
    foundation: str
    weights: Callable[[Setup], Any]


def open_trained(path: Path, report: Callable[[str], None] = print) -> Opened:
    """Open a run folder (its newest whole checkpoint), a checkpoint or an export.

    Raises `UserError` if it is none of these, or damaged.
    """
    if not path.exists():
        raise UserError(f"--checkpoint {path}: no such directory; give a run (runs/NAME), a checkpoint or an export")
    if native.is_native(path):
        return _open_export(path)
    if path.name.isdigit():
        verify(path, items=(WEIGHTS,))
        return _open_step(path)
    checkpoints = path if path.name == CHECKPOINTS else path / CHECKPOINTS
    newest, skipped = newest_whole(checkpoints, items=(WEIGHTS,))
    for line in skipped:
        report(line)
    if newest is None:
        why = f"no whole checkpoint in {checkpoints}" if checkpoints.is_dir() else "no run, checkpoint or export is there"
        raise UserError(f"--checkpoint {path}: {why}; a run saves one when it ends or is stopped")
    return _open_step(newest)


def _open_export(path: Path) -> Opened:
    export = native.read(path)
    metadata = export.metadata
    return Opened(
        path,
        from_json(metadata["experiment"], str(path)),
        export.architecture,
        export.tokenizer,
        metadata["step"],
        metadata["foundation"],
        lambda setup: place_export(export, setup),
    )


def _open_step(path: Path) -> Opened:
    metadata = read_metadata(path)
    return Opened(
        path,
        experiment_of(metadata),
        architecture_of(metadata),
        tokenizer_of(metadata),
        metadata["step"],
        metadata["foundation"],
        lambda setup: restore_weights(path, setup, metadata, verified=True),
    )


def open_checkpoint(path: Path) -> ModelSource | None:
    """Open a run or a checkpoint as a foundation, decoded to float32; None if `path` is neither."""
    if not (path.name.isdigit() or (path / CHECKPOINTS).is_dir()):
        return None
    opened = open_trained(path)
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    setup = make_setup(opened.architecture, opened.experiment.quantization, opened.experiment.train, mesh)
    weights = opened.weights(setup)
    leaves = {path_of(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(weights, is_leaf=is_encoded)}

    def read(name: str) -> np.ndarray:
        leaf = leaves[name]
        values = leaf.decode() if isinstance(leaf, Encoded) else leaf
        return unplace(name, values, setup.table).astype(np.float32)

    return ModelSource(
        architecture=opened.architecture,
        tokenizer=opened.tokenizer,
        paths=tuple(leaves),
        read=read,
        description=f"step {opened.step} of {opened.path}, itself from {opened.foundation}",
    )
