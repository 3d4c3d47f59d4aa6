"""Jobs to plan: a decoder of eight layers, small enough to compile, with the proportions of a large one."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import tiny_training as tiny

from research.architecture import Architecture, ExpertSizes
from research.config import Experiment, MeshConfig, Rule, TaskConfig, TrainConfig
from research.mesh import make_mesh, sizes
from research.plan.hardware import Hardware
from research.plan.plan import Plan, compile_plan, estimate_plan
from research.plan.program import Job, abstract_step

EIGHT_LAYERS = Architecture(
    vocabulary=2048, width=256, layers=8, query_heads=8, kv_heads=8, head_width=32, feed_forward=1024, context=512
)
TWO_LAYERS = replace(tiny.ARCHITECTURE, width=32, head_width=8)
MIXTURE = replace(TWO_LAYERS, experts=ExpertSizes(experts=8, chosen=2))

ONE = sizes(MeshConfig())
"""A mesh of one device."""

# Round figures of no real device: what follows from them can be worked out by hand.
DEVICE = Hardware(
    "toy",
    {"float32": 1e12, "bfloat16": 2e12, "int8": 4e12},
    memory_bytes=2**30,
    memory_bandwidth=1e11,
    link_bandwidth=1e10,
    source="made up",
    utilisation=0.5,
)


def job(
    architecture: Architecture, rules: tuple[Rule, ...], *, length: int = 64, answer_tokens: int = 8, **train: Any
) -> Job:
    """Return a job of 16 rows a step, by default in one micro-batch."""
    options = TrainConfig(**{"batch_size": 16, "accumulate": 1} | train)
    task = TaskConfig(lengths=(length,))
    return Job(Experiment(quantization=rules, task=task, train=options), architecture, answer_tokens)


@cache
def compiled(planned: Job, **mesh_sizes: int) -> Plan:
    """Return the plan of a job on a mesh of simulated devices, compiled."""
    config = MeshConfig(**mesh_sizes)
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        return compile_plan(planned, estimate_plan(planned, sizes(config), DEVICE), mesh)


def lowered_flops(planned: Job) -> float:
    """Return the operations that the compiler counts in a micro-batch on one device."""
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        step = abstract_step(planned, mesh)
        add: Any = step.step.add
        weights = step.teacher and step.teacher.weights
        return add.lower(step.state, step.batch, step.sums, weights).cost_analysis()["flops"]
