"""What all models of a comparison share: foundation, corpus, mesh, and the float model that they are held against."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from research.comparison import Comparison
from research.foundation import Foundation, load_foundation
from research.mesh import describe, make_mesh
from research.model.layers import tree_of
from research.model.placement import place_float
from research.quant.policy import coverage
from research.report import say
from research.setup import Setup, make_setup, require_batch_fits
from research.tasks.corpus import Corpus, load_corpus
from research.train.open_run import open_checkpoint


@dataclass(frozen=True)
class Bench:
    """What all arms share. `float_weights` lie on the mesh and are read only."""

    comparison: Comparison
    foundation: Foundation
    corpus: Corpus
    mesh: Mesh
    float_setup: Setup
    float_weights: Any
    console: Console


def make_bench(comparison: Comparison, console: Console) -> Bench:
    """Open foundation and corpus and put the float model on the mesh, saying what is found."""

    def report(line: str) -> None:
        say(console, "Data", line)

    mesh = make_mesh(comparison.mesh)
    say(console, "Mesh", describe(mesh))
    require_batch_fits(comparison.train, (comparison.corpus.window,), mesh)
    foundation = load_foundation(comparison.foundation, report=report, open_checkpoint=open_checkpoint)
    say(console, "Foundation", f"{foundation.name}: {foundation.source}")
    for scheme in comparison.schemes:  # before anything is trained: a rule that can't be is an error now
        make_setup(foundation.architecture, scheme.quantization, comparison.train, mesh)
    corpus = load_corpus(comparison.corpus, foundation.tokenizer, report=report)
    setup = make_setup(foundation.architecture, (), comparison.train, mesh)
    return Bench(comparison, foundation, corpus, mesh, setup, place_float(foundation.read, setup.table, mesh), console)


def bytes_by_path(setup: Setup) -> dict[str, int]:
    """Return the bytes of each parameter without padding, as the policy stores it."""
    logical = {path: jax.ShapeDtypeStruct(p.padding.logical, jnp.float32) for path, p in setup.table.items()}
    return {row.path: row.bytes for row in coverage(setup.policy, tree_of(logical))}
