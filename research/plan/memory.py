"""Bytes of a training step on one device: an estimate from shapes alone, and the same parts from compiled programs.

What stays on the device between programs (the state, the sums of gradients) is exact: shapes, dtypes and shardings are
known. What a step takes besides is estimated (`working.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from research.model.parameters import parameter_table
from research.plan.compiler import CPU, Compiler
from research.plan.program import AbstractStep, Compiled, Job, abstract_step, local_bytes
from research.plan.working import forward_and_backward_bytes, update_bytes
from research.quant.state import find
from research.setup import axis_rules_of


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. All but the last two stay there from step to step.

    `activations`: what the step takes besides at its fullest moment, in the forward and backward pass
    (`busiest == "add"`) or while it updates.
    """

    parameters: int
    latents: int
    codes_and_scales: int
    moments: int
    gradients: int
    other: int
    """Counters, the batch, counts of oscillation, a teacher."""
    activations: int
    busiest: str

    @property
    def resident(self) -> int:
        """Bytes that stay from program to program."""
        return self.peak - self.activations

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment."""
        parts = self.parameters, self.latents, self.codes_and_scales, self.moments, self.gradients
        return sum(parts) + self.other + self.activations


def abstract_mesh(sizes: Mapping[str, int]) -> Any:
    """Return a mesh of no devices, its axes Explicit."""
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Explicit,) * len(sizes))


def estimate(job: Job, sizes: Mapping[str, int]) -> Memory:
    """Return the bytes of a job on a mesh of `sizes`, compiled for nothing; raises `UserError` as `make_setup` does."""
    return estimate_step(job, shapes_on(job, sizes))


def shapes_on(job: Job, sizes: Mapping[str, int]) -> AbstractStep:
    """Return the step of a job on a mesh of `sizes` and of no devices.

    Raises `UserError` as `make_setup` does.
    """
    mesh = abstract_mesh(sizes)
    with jax.sharding.use_abstract_mesh(mesh):
        return abstract_step(job, mesh)


def estimate_step(job: Job, step: AbstractStep, compiler: Compiler = CPU) -> Memory:
    """Return the bytes of a step that `shapes_on` made, as `compiler` would arrange it."""
    with jax.sharding.use_abstract_mesh(step.mesh):
        forward = forward_and_backward_bytes(job, step, compiler)
    update = update_bytes(job, step, compiler)
    return replace(resident(step), activations=max(forward, update), busiest="add" if forward >= update else "update")


def from_compiler(step: AbstractStep, compiled: Compiled) -> Memory:
    """Return the bytes of a compiled step: what stays, by part, and what the programs take besides."""
    held = resident(step)
    # A micro-batch that adds to nothing gives new sums, which are counted already.
    new = 0 if step.given else _bytes_of(step.sums)
    extra = {"add": compiled.add.extra_bytes - new, "update": compiled.update.extra_bytes}
    # A TPU pads arrays to its tiles; arguments of the update are all that stays, but for the batch and the teacher.
    padding = max(0, compiled.update.argument_bytes - _bytes_of((step.state, step.sums)))
    busiest = max(extra, key=lambda name: extra[name])
    return replace(held, other=held.other + padding, activations=extra[busiest], busiest=busiest)


def resident(step: AbstractStep) -> Memory:
    """Return what stays on a device, exactly; `activations` is 0."""
    quantized = find(step.state.optimizer)
    parts = {
        "parameters": _bytes_of(step.state.params),
        "latents": _bytes_of(quantized.latent),
        "codes_and_scales": _bytes_of(quantized.encoded),
        "moments": _bytes_of(quantized.inner_state),
        "gradients": _bytes_of(step.sums),
    }
    everything = _bytes_of((step.state, step.sums, step.batch, step.teacher and step.teacher.weights))
    return Memory(**parts, other=everything - sum(parts.values()), activations=0, busiest="")


def sums_bytes(job: Job, sizes: Mapping[str, int]) -> int:
    """Return the bytes of the sums of gradients alone, in no time: less than this no device can have."""
    table = parameter_table(job.architecture, axis_rules_of(job.experiment.train), sizes)
    return 4 * sum(prod(parameter.shape) // prod(parameter.latent_shards) for parameter in table.values())


def _bytes_of(tree: Any) -> int:
    return sum(map(local_bytes, jax.tree.leaves(tree)))
