"""What all models of a comparison share: foundation, data, mesh, and the float model that they are held against."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from research.compare.material import Material, load_material
from research.comparison import NO_FOLD, Comparison
from research.config import FoldConfig
from research.foundation import Foundation, load_foundation
from research.mesh import describe, make_mesh
from research.model.layers import tree_of
from research.model.placement import place_float
from research.quant.policy import coverage
from research.report import say
from research.setup import Setup, make_setup, require_batch_fits, setup_of, unreached_grids, whole_rows
from research.train.fold import rotate_foundation, smooth_foundation, spread
from research.train.open_run import open_checkpoint


@dataclass(frozen=True)
class Bench:
    """What all arms share. `float_weights` lie on the mesh and are read only."""

    comparison: Comparison
    foundation: Foundation
    material: Material
    mesh: Mesh
    float_setup: Setup
    float_weights: Any
    start: Callable[[FoldConfig], Foundation]
    """What is rounded or trained: the foundation after a fold, which is calibrated when it is asked for first."""
    console: Console


def make_bench(comparison: Comparison, console: Console) -> Bench:
    """Open foundation and data and put the float model on the mesh, saying what is found."""
    report = partial(say, console, "Data")
    mesh = make_mesh(comparison.mesh)
    say(console, "Mesh", describe(mesh))
    lengths = comparison.task.lengths if comparison.data == "task" else (comparison.corpus.window,)
    require_batch_fits(comparison.train, lengths, mesh)
    foundation = load_foundation(comparison.foundation, report=report, open_checkpoint=open_checkpoint)
    say(console, "Foundation", f"{foundation.name}: {foundation.source}")
    rotated = _rotations(comparison, foundation, console)
    for scheme in comparison.schemes:  # before anything is trained: a rule that can't be is an error now
        experiment = comparison.experiment(scheme.quantization, scheme.fold, distill=False)
        setup_of(experiment, rotated[scheme.fold].architecture, mesh)
        for line in unreached_grids(scheme.quantization, comparison.train.steps):
            say(console, "Warning", f"{scheme.name}: {line}")
    material = load_material(comparison, foundation.tokenizer, console)
    setup = make_setup(foundation.architecture, (), comparison.train, mesh)
    weights = place_float(foundation.read, setup.table, mesh)

    @cache
    def start(fold: FoldConfig) -> Foundation:
        numbers = spread(len(material.train), fold.calibration_examples)
        batches = material.train.batches(numbers, whole_rows(comparison.score_batch, mesh))
        report = partial(say, console, "Fold")
        return smooth_foundation(rotated[fold], fold, comparison.train, batches, mesh, report)

    return Bench(comparison, foundation, material, mesh, setup, weights, start, console)


def _rotations(comparison: Comparison, foundation: Foundation, console: Console) -> dict[FoldConfig, Foundation]:
    """Return the foundation as each fold of the schemes rotates it, and as it is."""
    folds = dict.fromkeys([NO_FOLD, *(scheme.fold for scheme in comparison.schemes)])
    return {fold: rotate_foundation(foundation, fold, partial(say, console, "Fold")) for fold in folds}


def bytes_by_path(setup: Setup) -> dict[str, int]:
    """Return the bytes of each parameter without padding, as the policy stores it."""
    logical = {path: jax.ShapeDtypeStruct(p.padding.logical, jnp.float32) for path, p in setup.table.items()}
    return {row.path: row.bytes for row in coverage(setup.policy, tree_of(logical))}
