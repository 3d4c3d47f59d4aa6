"""Opening what a run left, a run folder, one checkpoint or an export, for evaluation, generation and export."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
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
from research.processes import from_first, raise_together
from research.quant.nodes import Encoded, is_encoded
from research.quant.policy import path_of
from research.run_folder import CHECKPOINTS
from research.setup import Setup, setup_of
from research.stores import local_path
from research.tokenizer import Tokenizer
from research.train.checkpoint import newest_whole, read_metadata, verify
from research.train.export import place_export
from research.train.manifest import MANIFEST
from research.train.state import OPTIMIZER, WEIGHTS, architecture_of, restore_weights, tokenizer_of, updates_of


@dataclass(frozen=True)
class Opened:
    """A trained model on disk, verified; `weights(setup)` puts its parameters, `Encoded` or float, on a mesh."""

    path: Path
    metadata: Mapping[str, Any]
    """What it was saved with, see `research.train.state.checkpoint_metadata`."""
    architecture: Architecture
    tokenizer: Tokenizer
    weights: Callable[[Setup], Any]

    @property
    def experiment(self) -> Experiment:
        """The experiment that made it."""
        return from_json(self.metadata["experiment"], f"metadata of {self.path}")

    @property
    def updates(self) -> int:
        """Steps that its weights have taken, of `step`."""
        return updates_of(self.metadata)

    @property
    def step(self) -> int:
        """Optimizer steps that it was trained."""
        return self.metadata["step"]


def open_trained(place: Path | str, report: Callable[[str], None] = print) -> Opened:
    """Open a run folder (its newest whole checkpoint), a checkpoint or an export; of a URL a copy in the cache.

    Raises `UserError` if it is none of these, or damaged.
    """
    path = local_path(str(place), report=report, leave_out=(OPTIMIZER,))
    if not path.exists():
        raise UserError(f"checkpoint {path}: no such directory; give a run (runs/NAME), a checkpoint or an export")
    if native.is_native(path):
        return _open_export(path)
    if _is_step(path):
        verify(path, items=(WEIGHTS,))
        return _open_step(path)
    checkpoints = path if path.name == CHECKPOINTS else path / CHECKPOINTS
    newest, skipped = newest_whole(checkpoints, items=(WEIGHTS,))
    for line in skipped:
        report(line)
    if newest is None:
        why = (
            f"no whole checkpoint in {checkpoints}" if checkpoints.is_dir() else "no run, checkpoint or export is there"
        )
        raise UserError(f"checkpoint {path}: {why}; a run saves one when it ends or is stopped")
    return _open_step(newest)


def _is_step(path: Path) -> bool:
    """Whether `path` is one checkpoint, whole or not; a run, too, may have a number for a name."""
    return (path / MANIFEST).is_file() or (path.name.isdigit() and path.parent.name == CHECKPOINTS)


def _open_export(path: Path) -> Opened:
    export = native.read(path)
    weights = partial(place_export, export)
    return Opened(path, export.metadata, export.architecture, export.tokenizer, weights)


def _open_step(path: Path) -> Opened:
    metadata = read_metadata(path)

    def weights(setup: Setup) -> Any:
        _require_one_step(path, metadata["step"])
        return restore_weights(path, setup, metadata, verified=True)

    return Opened(path, metadata, architecture_of(metadata), tokenizer_of(metadata), weights)


def _require_one_step(path: Path, step: int) -> None:
    """Raise `UserError` if the first process has opened the checkpoint of another step: the run is still saving."""
    first = from_first(step)
    differs = UserError(
        f"{path} is newer or older than step {first}, which the first process has opened; name one step"
    )
    raise_together(differs if step != first else None)


def open_checkpoint(path: Path) -> ModelSource | None:
    """Open a run or a checkpoint as a foundation, decoded to float32; None if `path` is neither."""
    if not (_is_step(path) or (path / CHECKPOINTS).is_dir()):
        return None
    opened = open_trained(path)
    mesh = make_mesh(MeshConfig(), devices=jax.local_devices()[:1])
    setup = setup_of(opened.experiment, opened.architecture, mesh)
    with jax.set_mesh(mesh):  # whatever mesh the run to come has set
        weights = opened.weights(setup)
    leaves = {path_of(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(weights, is_leaf=is_encoded)}

    def read(name: str) -> np.ndarray:
        leaf = leaves[name]
        with jax.set_mesh(mesh):
            values = leaf.decode() if isinstance(leaf, Encoded) else leaf
        return unplace(name, values, setup.table).astype(np.float32)

    return ModelSource(
        architecture=opened.architecture,
        tokenizer=opened.tokenizer,
        paths=tuple(leaves),
        read=read,
        description=f"step {opened.step} of {opened.path}, itself from {opened.metadata['foundation']}",
    )
