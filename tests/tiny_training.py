"""A tiny decoder with 9/3 heads and everything that a training step needs, on any mesh."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from checkpoints import quiet
from jax.sharding import Mesh

from research.architecture import Architecture
from research.axes import AxisRules
from research.config import MeshConfig, OptimizerConfig, Rule, TrainConfig
from research.mesh import make_mesh
from research.model.parameters import parameter_table
from research.model.placement import place_float
from research.setup import Setup, make_setup, put_batch
from research.tasks.batches import Batch
from research.train.calibrate import calibrate_inputs
from research.train.step import Step, StepMetrics, TrainState, make_optimizer, make_state, make_step

# 9 query and 3 kv heads, 50 hidden units and 67 words divide by none of the meshes' sizes but 1.
ARCHITECTURE = Architecture(
    vocabulary=67, width=24, layers=2, query_heads=9, kv_heads=3, head_width=4, feed_forward=50, context=64
)
# The same, with rows that are whole blocks of 32 weights, and room for a tokenizer's words.
OF_BLOCKS = replace(ARCHITECTURE, vocabulary=398, width=64, head_width=32, feed_forward=128)
ROWS, LENGTH, SLOTS = 8, 12, 3

FLOAT: tuple[Rule, ...] = ()
WEIGHT_ONLY = (Rule(match=".*", weight="int8"),)
W8A8 = (Rule(match=".*", weight="int8", activation="int8"),)
STATIC = (  # both statistics, and beside integers a cast grid, whose products are of floats
    Rule(match="layers/(mlp/.*|attention/q.*)", weight="int8", activation="int8:static:97"),
    Rule(match="layers/attention/v.*", weight="fp16", activation="int8:static:ema"),
    Rule(match=".*", weight="int8", activation="int8:static:ema"),
)


def foundation(seed: int = 0, architecture: Architecture = ARCHITECTURE) -> dict[str, np.ndarray]:
    """Return random float32 weights, by path, of the logical shapes."""
    rng = np.random.default_rng(seed)
    table = parameter_table(architecture, AxisRules(), {"data": 1, "fsdp": 1, "tensor": 1})
    weights = {}
    for path, parameter in table.items():
        noise = rng.normal(size=parameter.padding.logical)
        weights[path] = (0.3 * noise if parameter.contract else 1 + 0.1 * noise).astype(np.float32)
    return weights


def batch(seed: int = 0) -> Batch:
    """Return rows of random text, the last three tokens of each to be predicted."""
    rng = np.random.default_rng(seed)
    tokens_bt = rng.integers(0, ARCHITECTURE.vocabulary, (ROWS, LENGTH)).astype(np.int32)
    position_bt = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    source_ba = np.tile(np.arange(LENGTH - SLOTS - 1, LENGTH - 1, dtype=np.int32), (ROWS, 1))
    ones_ba = np.ones((ROWS, SLOTS), np.int32)
    return Batch(
        tokens_bt, position_bt, position_bt, np.zeros_like(tokens_bt), source_ba, tokens_bt[:, -SLOTS:], ones_ba
    )


@dataclass
class Run:
    """A training run in memory."""

    mesh: Mesh
    setup: Setup
    tx: Any
    step: Step
    state: TrainState

    def split(self, rows: Batch) -> list[Batch]:
        """Return the micro-batches of a batch."""
        parts = self.setup.train.accumulate
        return [Batch(*(np.split(array, parts)[index] for array in rows)) for index in range(parts)]

    def advance(self, steps: int, data: Batch | None = None) -> list[float]:
        """Take some steps, on the batch of each step's number or on `data`, and return the losses."""
        return [metrics.loss for metrics in self.advance_metrics(steps, data)]

    def advance_metrics(self, steps: int, data: Batch | None = None) -> list[StepMetrics]:
        """Like `advance`, all metrics of each step."""
        found = []
        with jax.set_mesh(self.mesh):
            for number in range(int(self.state.step), int(self.state.step) + steps):
                rows = batch(number) if data is None else data
                self.state, metrics = self.step(self.state, [put_batch(part, self.mesh) for part in self.split(rows)])
                found.append(jax.tree.map(float, metrics))
        return found

    def leave_a_step_out(self) -> StepMetrics:
        """Take a step whose gradient is not a number, and return its metrics."""
        norm = self.state.params["norm"]["scale_d"]
        kept = np.asarray(norm)
        self.state.params["norm"]["scale_d"] = jnp.full_like(norm, jnp.nan)
        (metrics,) = self.advance_metrics(1)
        self.state.params["norm"]["scale_d"] = jax.device_put(kept, norm.sharding)
        return metrics


# Adam divides by the root of the second moment: where a gradient is nothing but rounding noise, the default epsilon
# turns noise into a whole step of the learning rate. A larger one keeps comparisons of weights well-conditioned.
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, warmup_steps=2, epsilon=1e-4)


TRAIN = TrainConfig(steps=40, batch_size=ROWS, accumulate=1)


@cache
def _program(
    architecture: Architecture,
    rules: tuple[Rule, ...],
    train: TrainConfig,
    mesh_config: MeshConfig,
    tensor: int,
) -> Run:
    """Return a run that is copied by `start`, so that each program is compiled once a session."""
    mesh = make_mesh(mesh_config)
    with jax.set_mesh(mesh):
        setup = make_setup(architecture, rules, train, mesh, padded_for={"tensor": tensor})
        tx = make_optimizer(OPTIMIZER, train, setup.policy, setup.table)
        state = _state(setup, tx, foundation(architecture=architecture), mesh)
        step = make_step(setup.graph, tx, OPTIMIZER, train, setup.table, mesh, state)
    return Run(mesh, setup, tx, step, state)


def _state(setup: Setup, tx: Any, weights: dict[str, np.ndarray], mesh: Mesh) -> TrainState:
    state = make_state(tx, place_float(weights.__getitem__, setup.table, mesh), setup.table, mesh)
    return calibrate_inputs(state, setup, [batch(100), batch(101)], quiet)


def w8a8_bounds(steps: int, architecture: Architecture = ARCHITECTURE) -> np.ndarray:
    """Return three times what one ulp in the norms' scales changes in the relative loss on one device, by step.

    An ulp flips the code of an activation now and then, and the runs part: the bound grows with the steps. Where the
    nudge happens to flip nothing, float32 noise is allowed for, 1e-5.
    """
    reference = np.array(start(W8A8, architecture=architecture).advance(steps))
    deviation = np.zeros(steps)
    for direction in (0.0, 2.0):
        nudged = {
            path: np.nextafter(w, np.float32(direction)) if "norm/" in path else w
            for path, w in foundation(architecture=architecture).items()
        }
        losses = np.array(start(W8A8, nudged, architecture=architecture).advance(steps))
        deviation = np.maximum(deviation, np.abs(losses / reference - 1))
    bounds = np.maximum.accumulate(np.maximum(3 * deviation, 1e-5))
    assert bounds[-1] < 2e-2  # the ceiling: beyond it the comparison would say nothing
    return bounds


@jax.jit
def _copy(state: TrainState) -> TrainState:
    return jax.tree.map(jnp.copy, state)


def start(
    rules: tuple[Rule, ...],
    weights: dict[str, np.ndarray] | None = None,
    train: TrainConfig = TRAIN,
    padded_for: int = 0,
    architecture: Architecture = ARCHITECTURE,
    **mesh_sizes: int,
) -> Run:
    """Return a run before its first step; `padded_for`: tensor ways to pad for, by default those of the mesh."""
    tensor = padded_for or mesh_sizes.get("tensor", 1)
    program = _program(architecture, rules, train, MeshConfig(**mesh_sizes), tensor)
    with jax.set_mesh(program.mesh):
        if weights is not None:
            state = _state(program.setup, program.tx, weights, program.mesh)
        else:
            state = _copy(program.state)  # the step donates its argument
    return replace(program, state=state)
