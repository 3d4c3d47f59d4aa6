"""What a run will look like before it runs: layout, padding, number formats, memory."""

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from research.config import Experiment
from research.model.generate import cache_bytes_per_token
from research.model.layers import tree_of
from research.model.placement import abstract
from research.quant.policy import coverage
from research.quant.state import find
from research.report import coverage_rows, describe_cache, describe_padding, render_coverage, render_memory, say
from research.setup import Setup, describe_attention, unreached_grids
from research.train.step import make_optimizer, start_state


def describe_setup(setup: Setup, console: Console, *, table: bool) -> None:
    """Say how the model is padded, and, if asked, show which parameter gets which format and why.

    The cache of keys and values is told of if it is quantized, or if asked; how tokens attend, if the platform has a
    kernel for it, or if asked.
    """
    for line in unreached_grids(setup.policy.rules, setup.train.steps):
        say(console, "Warning", line)
    say(console, "Padding", describe_padding(setup.table))
    if table or setup.settings.attention_kernel is not None:
        say(console, "Attention", describe_attention(setup))
    if table or setup.settings.kv_grid is not None:
        say_cache(setup, console)
    if table:
        logical = {path: jax.ShapeDtypeStruct(p.padding.logical, jnp.float32) for path, p in setup.table.items()}
        console.print(render_coverage(coverage_rows(coverage(setup.policy, tree_of(logical)), setup.table)))


def say_cache(setup: Setup, console: Console) -> None:
    """Say how keys and values are kept, and how many bytes a token takes."""
    settings = setup.settings
    size = cache_bytes_per_token(settings)
    say(console, "KV cache", describe_cache(settings.kv_grid, settings.compute_dtype, size))


def memory_per_device(experiment: Experiment, setup: Setup, mesh: Mesh) -> dict[str, int]:
    """Return the bytes of the training state on one device by what they are for; activations are not counted."""
    tx = make_optimizer(experiment.optimizer, experiment.train, setup.policy, setup.table)
    floats = tree_of({path: jax.ShapeDtypeStruct(p.shape, jnp.float32) for path, p in setup.table.items()})
    state = abstract(jax.eval_shape(lambda params: start_state(tx, params), floats), setup.table, mesh)
    quantized = find(state.optimizer)
    parts = {
        "parameters": state.params,
        "latents": quantized.latent,
        "codes and scales": quantized.encoded,
        "moments": quantized.inner_state,
        "oscillation": quantized.counted,
        "gradients": abstract({"gradients": floats}, setup.table, mesh),
    }
    if experiment.train.distill:
        parts["teacher"] = abstract(floats, setup.table, mesh)
    return {name: sum(map(_shard_bytes, jax.tree.leaves(tree))) for name, tree in parts.items()}


def _shard_bytes(leaf: Any) -> int:
    return prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def show_dry_run(experiment: Experiment, setup: Setup, mesh: Mesh, console: Console) -> None:
    """Print the coverage table, the padding and the memory of a run that doesn't run."""
    describe_setup(setup, console, table=True)
    console.print(render_memory(memory_per_device(experiment, setup, mesh), mesh.size))
