"""The training state as a checkpoint holds it, and back: on another mesh, or as weights alone for evaluation."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from research.architecture import Architecture, architecture_from
from research.axes import AxisRules
from research.config import Experiment
from research.config_file import to_json
from research.environment import versions
from research.errors import UserError
from research.foundation import Foundation
from research.model.layers import tree_of
from research.model.parameters import Parameter, parameter_table
from research.model.placement import Table, abstract, abstract_weights, layout
from research.padding import Padding
from research.quant.nodes import Encoded, is_encoded, stored
from research.quant.optimizer import project
from research.quant.policy import leaves_by_path, path_of
from research.quant.state import export, find, replace_state
from research.setup import Setup
from research.tasks.task import Task
from research.tokenizer import Tokenizer
from research.train.checkpoint import load_repadded, read_manifest
from research.train.step import TrainState, start_state

WEIGHTS, OPTIMIZER = "weights", "optimizer"


def encoded_weights(state: TrainState) -> Any:
    """Return the parameters as they are stored: `Encoded` where they are quantized, float arrays elsewhere."""
    return jax.tree.map(
        lambda node, p: node if is_encoded(node) else p,
        export(state.optimizer),
        state.params,
        is_leaf=lambda node: isinstance(node, Encoded | optax.MaskedNode),
    )


def serving_weights(encoded: Any) -> Any:
    """Return stored parameters as the model is called with them: codes and scales, no float copy."""
    return jax.tree.map(lambda node: stored(node) if is_encoded(node) else node, encoded, is_leaf=is_encoded)


def checkpoint_items(state: TrainState) -> dict[str, Any]:
    """Return what is saved: the weights, which evaluation needs, and all the rest.

    Weights that are annealed lie between latent and code, and computed anew they may be an ulp off: they are saved, so
    that a resumed run is the same run.
    """
    rest = replace_state(state.optimizer, lambda quantized: replace(quantized, encoded=None))
    params = leaves_by_path(state.params)
    annealed = tree_of({path: params[path] for path, form in find(state.optimizer).formats if form.rule.end_step})
    others = {"step": state.step, "nonfinite_in_a_row": state.nonfinite_in_a_row}
    return {WEIGHTS: encoded_weights(state), OPTIMIZER: {**others, "state": rest, "annealed": annealed}}


def checkpoint_metadata(experiment: Experiment, foundation: Foundation, task: Task, mesh: Mesh) -> dict[str, Any]:
    """Return what a checkpoint tells of itself, so that nothing else is needed to load it."""
    return {
        "experiment": to_json(experiment),
        "architecture": asdict(foundation.architecture),
        "tokenizer": asdict(foundation.tokenizer),
        "mesh": dict(mesh.shape),
        "foundation": foundation.source,
        "task": question(task) | {"fingerprint": task.fingerprint},
        "versions": versions(),
    }


def progress_of(state: TrainState) -> dict[str, int]:
    """Return how far a state is, for the metadata of what is saved of it.

    `step` counts steps that were left out, too, because a gradient wasn't finite; `updates`, which number formats go
    by, doesn't.
    """
    return {"step": int(state.step), "updates": int(find(state.optimizer).count)}


def updates_of(metadata: Mapping[str, Any]) -> int:
    """Return the updates that saved weights have seen; before they were saved, all steps were counted as taken."""
    return metadata.get("updates", metadata["step"])


def question(task: Task) -> dict[str, Any]:
    """Return what a task asks and what can be answered: enough to ask the model without the task's data."""
    return {"name": task.name, "prompt": task.prompt, "labels": list(task.labels)}


def require_same_run(metadata: Mapping[str, Any], foundation: Foundation, task: Task) -> None:
    """Raise `UserError` if a run would go on with a model of another shape or other data than it began with.

    The config can't tell: it names them, and what is behind the name may have changed.
    """
    if (architecture_of(metadata), tokenizer_of(metadata)) != (foundation.architecture, foundation.tokenizer):
        raise UserError(f"--resume: foundation {foundation.name} is not the model any more that the run began with")
    if metadata["task"]["fingerprint"] != task.fingerprint:
        raise UserError(
            f"--resume: the data of task {task.name} has changed since the run began; restore it, or start another run"
            " with --config.run=NAME"
        )


def describe_change(metadata: Mapping[str, Any], foundation: Foundation) -> str:
    """Return what has become of the foundation since a run began, nothing where it is from where it was.

    The run has its own weights; the teacher and what results are compared with are read anew.
    """
    if metadata["foundation"] == foundation.source:
        return ""
    return f"the foundation was {metadata['foundation']} when the run began, and is {foundation.source} now"


def architecture_of(metadata: Mapping[str, Any]) -> Architecture:
    """Return the shape of the model in a checkpoint."""
    return architecture_from(metadata["architecture"])


def tokenizer_of(metadata: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer in a checkpoint."""
    fields = dict(metadata["tokenizer"])
    return Tokenizer(**{**fields, "end_ids": tuple(fields["end_ids"])})


def restore_weights(path: Path, setup: Setup, metadata: Mapping[str, Any], *, verified: bool = False) -> Any:
    """Return a checkpoint's weights, `Encoded` or float leaves, on the mesh of `setup`; reads no optimizer state."""
    target = abstract_weights(setup.table, setup.formats, setup.train.param_dtype, setup.mesh)
    return _load(path, WEIGHTS, target, setup.table, metadata, verified)


def restore_state(
    path: Path,
    setup: Setup,
    tx: optax.GradientTransformationExtraArgs,
    metadata: Mapping[str, Any],
    *,
    verified: bool = False,
) -> TrainState:
    """Return the training state of a checkpoint on the mesh of `setup`, bit for bit as it was saved."""
    float_params = tree_of(
        {path: jax.ShapeDtypeStruct(parameter.shape, jnp.float32) for path, parameter in setup.table.items()}
    )
    shapes = jax.eval_shape(lambda params: start_state(tx, params), float_params)
    targets = checkpoint_items(abstract(shapes, setup.table, setup.mesh))
    loaded = {item: _load(path, item, target, setup.table, metadata, verified) for item, target in targets.items()}
    return _rebuild(loaded[WEIGHTS], loaded[OPTIMIZER], find(shapes.optimizer).encoded)


def _rebuild(weights: Any, rest: Any, encoded_shapes: Any) -> TrainState:
    """Return the state whose items were saved by `checkpoint_items`."""
    encoded = jax.tree.map(
        lambda node, leaf: leaf if is_encoded(node) else node,
        encoded_shapes,
        weights,
        is_leaf=lambda node: isinstance(node, Encoded | optax.MaskedNode),
    )
    optimizer = replace_state(rest["state"], lambda quantized: replace(quantized, encoded=encoded))
    floats = jax.tree.map(lambda node: None if is_encoded(node) else node, weights, is_leaf=is_encoded)
    params = jax.jit(project)(optimizer, floats)
    saved = leaves_by_path(rest["annealed"])
    params = jax.tree_util.tree_map_with_path(lambda path, p: saved.get(path_of(path), p), params)
    return TrainState(rest["step"], params, optimizer, rest["nonfinite_in_a_row"])


def _load(path: Path, item: str, target: Any, table: Table, metadata: Mapping[str, Any], verified: bool) -> Any:
    saved_table = parameter_table(architecture_of(metadata), AxisRules(), metadata["mesh"])
    shapes = {key: leaf.shape for key, leaf in read_manifest(path).items[item].items()}
    target_shapes = {
        jax.tree_util.keystr(key, simple=True, separator="/"): leaf.shape
        for key, leaf in jax.tree_util.tree_leaves_with_path(target)
    }
    return load_repadded(
        path, item, target, _lookup(saved_table, shapes), _lookup(table, target_shapes), verified=verified
    )


def _lookup(table: Mapping[str, Parameter], shapes: Mapping[str, tuple[int, ...]]) -> Callable[[str], Padding | None]:
    def padding(key: str) -> Padding | None:
        return layout(key, shapes[key], table).padding if key in shapes else None

    return padding
