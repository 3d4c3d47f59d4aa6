"""Checkpoints of the tiny training runs, as the real command writes them, without the command."""

from pathlib import Path
from typing import Any

import tiny_training as tiny
from checkpoints import quiet
from tiny_tokenizers import byte_level

from research.architecture import Architecture
from research.config import Experiment, MeshConfig, Rule, TaskConfig
from research.foundation import Foundation
from research.mesh import make_mesh
from research.tasks.task import Example, Task
from research.train.checkpoint import Checkpointer
from research.train.state import checkpoint_items, checkpoint_metadata
from research.train.step import TrainState

TASK = Task(
    name="fruit",
    labels=("yes", "no"),
    train=(Example("apple", "yes"),),
    validation=(Example("pear", "yes"),),
    test=(Example("stone", "no"),),
    prompt="Fruit? {text}",
    source="made up",
    duplicates_removed=0,
    contradictions_removed=0,
)


def foundation(architecture: Architecture = tiny.ARCHITECTURE) -> Foundation:
    """Return the foundation that the runs began with."""
    weights = tiny.foundation(architecture=architecture)
    return Foundation("tiny", "random numbers", architecture, byte_level(), tuple(weights), weights.__getitem__)


def metadata_on(
    sizes: dict[str, int], rules: tuple[Rule, ...] = tiny.W8A8, architecture: Architecture = tiny.ARCHITECTURE
) -> dict[str, Any]:
    """Return what a checkpoint of a run on such a mesh tells, less its step."""
    mesh = MeshConfig(**sizes)
    experiment = Experiment(
        mesh=mesh, quantization=rules, train=tiny.TRAIN, optimizer=tiny.OPTIMIZER, task=TaskConfig(lengths=(64, 128))
    )
    return checkpoint_metadata(experiment, foundation(architecture), TASK, make_mesh(mesh))


def save(
    directory: Path,
    state: TrainState,
    sizes: dict[str, int],
    rules: tuple[Rule, ...] = tiny.W8A8,
    architecture: Architecture = tiny.ARCHITECTURE,
) -> Path:
    """Save a state that lies on a mesh and return the path of the checkpoint."""
    step = int(state.step)
    metadata = metadata_on(sizes, rules, architecture) | {"step": step}
    with Checkpointer(directory, 9, quiet) as checkpointer:
        checkpointer.save(step, checkpoint_items(state), metadata)
    return directory / f"{step:08d}"
