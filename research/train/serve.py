"""A model ready to be called, from whatever holds it: a trained run, an export, or an untouched foundation."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from research.config import Experiment
from research.config_file import apply_overrides
from research.errors import UserError
from research.foundation import load_foundation
from research.mesh import describe, make_mesh
from research.model.placement import place_float
from research.report import say
from research.setup import Setup, make_setup, not_on_grids_yet, setup_of
from research.tokenizer import Tokenizer
from research.train.open_run import Opened, open_checkpoint
from research.train.state import serving_weights


@dataclass(frozen=True)
class Served:
    """A model on a mesh: `setup.graph` merged with `weights` can be called."""

    name: str
    setup: Setup
    weights: Any
    tokenizer: Tokenizer


@contextmanager
def serving(source: Opened | str, experiment: Experiment, console: Console) -> Iterator[Served]:
    """Put a trained model, or the foundation of that name, on the mesh of `experiment`, and say what and where.

    Within the block the mesh is in context.
    """
    mesh = make_mesh(experiment.mesh)
    say(console, "Mesh", describe(mesh))
    with jax.set_mesh(mesh):
        if isinstance(source, Opened):
            served = serve_trained(source, experiment, mesh)
        else:
            served = serve_foundation(source, experiment, mesh, lambda line: say(console, "Data", line))
        say(console, "Model", served.name)
        if isinstance(source, Opened):
            for line in not_on_grids_yet(experiment.quantization, source.updates):
                say(console, "Schedule", line)
        yield served


def serve_trained(opened: Opened, experiment: Experiment, mesh: Mesh) -> Served:
    """Return a trained model on a mesh, from codes and scales; `experiment` may differ from its own in the mesh."""
    setup = setup_of(experiment, opened.architecture, mesh)
    return Served(str(opened.path), setup, serving_weights(opened.weights(setup)), opened.tokenizer)


def serve_foundation(name: str, experiment: Experiment, mesh: Mesh, report: Callable[[str], None]) -> Served:
    """Return an untouched foundation on a mesh, float32 weights; only its cache is what the experiment says."""
    foundation = load_foundation(name, report=report, open_checkpoint=open_checkpoint)
    setup = make_setup(foundation.architecture, (), experiment.train, mesh, kv_cache=experiment.kv_cache)
    weights = place_float(foundation.read, setup.table, mesh)
    return Served(f"{foundation.name} ({foundation.source})", setup, weights, foundation.tokenizer)


# What may be changed of an experiment where a model is only used; other fields would change the model, or nothing.
TO_EXPORT = ("mesh",)
TO_GENERATE = (*TO_EXPORT, "train.unroll")
TO_SCORE_TEXT = (*TO_GENERATE, "train.loss_chunk")
TO_EVALUATE = (*TO_SCORE_TEXT, "evaluation", "task.test_examples")
OF_FOUNDATION = ("train.compute_dtype", "kv_cache")


def with_overrides(experiment: Experiment, overrides: dict[str, str], may_change: Sequence[str]) -> Experiment:
    """Return `experiment` with fields replaced; `UserError` for one that is not among, or below, `may_change`."""
    for name in overrides:
        if not f"{name}.".startswith(tuple(f"{allowed}." for allowed in may_change)):
            allowed = ", ".join(f"--config.{field}" for field in may_change)
            raise UserError(
                f"--config.{name} can't be changed here, where the model stays as it is; what can: {allowed}"
            )
    return apply_overrides(experiment, overrides)
