"""A model ready to be called, from whatever holds it: a trained run, an export, or an untouched foundation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from research.config import Experiment
from research.config_file import apply_overrides
from research.errors import UserError
from research.foundation import load_foundation
from research.model.placement import place_float
from research.setup import Setup, make_setup
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


def serve_trained(opened: Opened, experiment: Experiment, mesh: Mesh) -> Served:
    """Return a trained model on a mesh, from codes and scales; `experiment` may differ from its own in the mesh."""
    setup = make_setup(opened.architecture, experiment.quantization, experiment.train, mesh)
    return Served(str(opened.path), setup, serving_weights(opened.weights(setup)), opened.tokenizer)


def serve_foundation(name: str, experiment: Experiment, mesh: Mesh, report: Callable[[str], None]) -> Served:
    """Return an untouched foundation on a mesh, float32 weights."""
    foundation = load_foundation(name, report=report, open_checkpoint=open_checkpoint)
    setup = make_setup(foundation.architecture, (), experiment.train, mesh)
    weights = place_float(foundation.read, setup.table, mesh)
    return Served(f"{foundation.name} ({foundation.source})", setup, weights, foundation.tokenizer)


EVALUATION_MAY_CHANGE = ("mesh", "evaluation", "task.test_examples", "task.validation_examples", "train.unroll")


def with_overrides(experiment: Experiment, overrides: dict[str, str]) -> Experiment:
    """Return a trained model's experiment with the fields changed that don't change the model.

    Raises `UserError` for others: they would evaluate something else than what was trained.
    """
    for name in overrides:
        if not f"{name}.".startswith(tuple(f"{allowed}." for allowed in EVALUATION_MAY_CHANGE)):
            raise UserError(
                f"--config.{name}: a trained model keeps its own value; what may change: "
                + ", ".join(f"--config.{allowed}" for allowed in EVALUATION_MAY_CHANGE)
            )
    return apply_overrides(experiment, overrides)
