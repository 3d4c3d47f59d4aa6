"""The optimizer of an experiment, its state, and one training step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.config import OptimizerConfig, TrainConfig
from research.model.parameters import ROUTER
from research.model.placement import Table, shardings
from research.model.sharding import split
from research.quant.moments import moment_blocks, scale_by_adam_8bit
from research.quant.nodes import Encoded
from research.quant.optimizer import apply_updates, project, quantize, view
from research.quant.policy import Policy, path_of
from research.quant.state import find, oscillation
from research.tasks.batches import Batch, most_texts
from research.train.metrics import LossSums, distillation_sums, loss_sums

TPU_LANES = 128


class TrainState(NamedTuple):
    """What one step hands to the next.

    Attributes:
      step: optimizer steps done, int32 scalar.
      params: nested dict; quantized leaves on their grid in `param_dtype`, the others float32.
      optimizer: state of the optax chain, with latents, scales and codes in it.
      nonfinite_in_a_row: steps left out since the last one that was taken, int32 scalar.
    """

    step: jax.Array
    params: Any
    optimizer: Any
    nonfinite_in_a_row: jax.Array


class StepMetrics(NamedTuple):
    """What a step reports, float32 scalars but for the counts."""

    loss: jax.Array  # nats per answer token, of the task alone
    divergence: jax.Array  # KL(teacher ‖ model), nats per answer token; 0 without a teacher
    tokens: jax.Array  # answer tokens that the loss is over
    grad_norm: jax.Array  # before clipping
    learning_rate: jax.Array
    nonfinite_in_a_row: jax.Array  # int32; 0 if this step was taken
    oscillating: dict[str, jax.Array]  # share of the weights that oscillate, by path; where a rule counts it
    router: dict[str, jax.Array]  # of a mixture of experts: balance (1 = even) and z loss, share of choices dropped


def router_means(losses: LossSums) -> dict[str, jax.Array]:
    """Return what is reported of the routers, by name."""
    return {f"router_{name}": getattr(losses, name) / losses.tokens for name in ("balance", "z", "dropped")}


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the learning rate by step: linear warm-up, then cosine down to a fraction of the peak."""
    warmup = _warm_up(config, steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (warmup + 1),
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=steps,
        end_value=config.learning_rate * config.final_fraction,
    )


def describe_warm_up(config: OptimizerConfig, steps: int) -> str:
    """Return what a run of so many steps makes of a longer warm-up, nothing where it isn't longer."""
    if (warmup := _warm_up(config, steps)) == config.warmup_steps:
        return ""
    asked = f"optimizer.warmup_steps={config.warmup_steps} are more"
    return f"{warmup} of {steps} steps, the last at the full rate: {asked}"


def _warm_up(config: OptimizerConfig, steps: int) -> int:
    return min(config.warmup_steps, steps - 1)


def make_optimizer(
    config: OptimizerConfig, train: TrainConfig, policy: Policy, table: Table
) -> optax.GradientTransformationExtraArgs:
    """Return AdamW on the latents, landing on the policy's grids; `make_step` clips what it is given."""

    def decayed(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: bool(table[path_of(path)].contract), params)

    adamw = optax.chain(
        adam_of(config, table),
        optax.add_decayed_weights(config.weight_decay, decayed),
        optax.scale_by_learning_rate(make_schedule(config, train.steps)),
    )
    scales = optax.adam(config.scale_learning_rate, b1=config.b1, b2=config.b2)
    return quantize(adamw, policy, dtype=train.param_dtype, scales=scales, settle=partial(_settle, table))


def _settle(table: Table, path: str, encoded: Encoded) -> Encoded:
    """Return new codes and scales where the model uses them; they, not floats, leave the place of their latents."""
    parameter = table[path]
    if parameter.latent_spec == parameter.spec:
        return encoded
    return split(split(encoded, parameter.latent_spec), parameter.spec)


def adam_of(config: OptimizerConfig, table: Table) -> optax.GradientTransformation:
    """Return Adam with its moments stored as the config says; `UserError` where the mesh would split their blocks."""
    if config.moments != "int8":
        return optax.scale_by_adam(config.b1, config.b2, config.epsilon, mu_dtype=config.moments)
    blocks = moment_blocks({path: parameter.leaf for path, parameter in table.items()})
    return scale_by_adam_8bit(config.b1, config.b2, config.epsilon, blocks=blocks)


def start_state(tx: optax.GradientTransformationExtraArgs, float_params: Any) -> TrainState:
    """Return the state before the first step: latents copy the float weights, params are their projection."""
    optimizer = tx.init(float_params)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, project(optimizer, float_params), optimizer, zero)


def make_state(tx: optax.GradientTransformationExtraArgs, float_params: Any, table: Table, mesh: Mesh) -> TrainState:
    """Return `start_state`, every leaf placed on the mesh; `float_params`, float32, are donated."""

    start = partial(start_state, tx)
    layout = shardings(jax.eval_shape(start, float_params), table, mesh)
    return jax.jit(start, out_shardings=layout, donate_argnums=0)(float_params)


class GradientSums(NamedTuple):
    """What micro-batches add up to.

    Attributes:
      losses: sums over answer tokens, and their number.
      gradients: of the loss that is minimised, with respect to the on-grid params, float32, tree like params.
    """

    losses: LossSums
    gradients: Any


@dataclass(frozen=True, eq=False)
class Teacher:
    """A model whose predictions are learned, too; it stays as it is.

    `share`: what the divergence from its predictions counts in the loss, 0 to 1; the task has the rest.
    """

    graph: nnx.GraphDef
    weights: Any
    share: float


@dataclass(frozen=True)
class Step:
    """One optimizer step as compiled programs: one that adds a micro-batch's gradient, one that updates.

    Micro-batches may differ in length: each length compiles the gradient once, the update is compiled once in all.
    """

    zeros: Callable[[], GradientSums]
    add: Callable[..., GradientSums]
    update: Callable[[TrainState, GradientSums], tuple[TrainState, StepMetrics]]
    teacher_weights: Any = None

    def __call__(self, state: TrainState, micro_batches: Sequence[Batch]) -> tuple[TrainState, StepMetrics]:
        """Return the next state, for which `state` is donated, and the metrics of the step."""
        # Where there is one there is nothing to add to: no second tree of gradients.
        sums: Any = self.zeros() if len(micro_batches) > 1 else None
        for batch in micro_batches:
            sums = self.add(state, batch, sums, self.teacher_weights)
        return self.update(state, sums)


def make_loss(graph: nnx.GraphDef, train: TrainConfig, teacher: Teacher | None = None) -> Callable[..., Any]:
    """Return `loss(params, state, batch, teacher_weights, done)`: what is minimised, and its sums; see `make_step`.

    A batch is one of `training_batches`, or rows of one text each. `done`: answer tokens of the step's micro-batches
    before this one.
    """
    texts = most_texts(train)

    def loss(
        params: Any, state: TrainState, batch: Batch, teacher_weights: Any, done: jax.Array | int = 0
    ) -> tuple[jax.Array, LossSums]:
        weights = view(params, state.optimizer, jnp.asarray(done).astype(jnp.uint32))
        if teacher is None:
            answers, sums = loss_sums(graph, weights, batch, train.loss_chunk, texts)
        else:
            learned = teacher.graph, teacher_weights, teacher.share
            answers, sums = distillation_sums(graph, weights, *learned, batch, train.loss_chunk, texts)
        return answers + train.router_balance * sums.balance + train.router_z * sums.z, sums

    return loss


def make_step(
    graph: nnx.GraphDef,
    tx: optax.GradientTransformationExtraArgs,
    optimizer: OptimizerConfig,
    train: TrainConfig,
    table: Table,
    mesh: Mesh,
    state: TrainState,
    teacher: Teacher | None = None,
) -> Step:
    """Return the jitted step; `state`, arrays or shapes, gives the shardings that every step keeps.

    With a teacher the loss is (1 - share) · task loss + share · KL(teacher ‖ model), the forward KL on all logits.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    state_layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    scalars: Any = LossSums(*[whole] * len(LossSums._fields))  # pyright: ignore
    sums_layout = GradientSums(scalars, shardings({"gradients": state.params}, table, mesh)["gradients"])
    schedule = make_schedule(optimizer, train.steps)
    loss = make_loss(graph, train, teacher)

    def zeros() -> GradientSums:
        gradients = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state_shapes)
        return GradientSums(LossSums(*jnp.zeros(len(LossSums._fields))), gradients)

    def add(state: TrainState, batch: Batch, sums: GradientSums | None, teacher_weights: Any = None) -> GradientSums:
        done = 0 if sums is None else sums.losses.tokens
        gradients, losses = jax.grad(loss, has_aux=True)(state.params, state, batch, teacher_weights, done)
        found = GradientSums(losses, jax.tree.map(lambda g: g.astype(jnp.float32), gradients))
        return found if sums is None else jax.tree.map(jnp.add, sums, found)

    def update(state: TrainState, sums: GradientSums) -> tuple[TrainState, StepMetrics]:
        tokens = sums.losses.tokens
        grad_norm = optax.tree.norm(sums.gradients) / tokens
        is_finite = jnp.isfinite(grad_norm)
        # The mean and clipping by the global norm as one factor, which is part of whatever reads a gradient.
        factor = jnp.minimum(1.0, optimizer.clip_norm / grad_norm) / tokens

        def move(weights: tuple[Any, Any]) -> tuple[Any, Any]:
            params, optimizer_state = weights
            gradients = jax.tree.map(lambda g: g * factor, sums.gradients)
            with jax.numpy_dtype_promotion("standard"):  # optax relies on it (schedules, Adam's bias correction)
                updated: Any = tx.update(gradients, optimizer_state, params)
            return apply_updates(params, *updated), updated[1]

        weights, places = (state.params, state.optimizer), (state_layout.params, state_layout.optimizer)
        params, optimizer_state = _once_if(is_finite, move, weights, places)
        with jax.numpy_dtype_promotion("standard"):
            learning_rate = jnp.asarray(schedule(find(state.optimizer).count), jnp.float32)
        nonfinite_in_a_row = jnp.where(is_finite, 0, state.nonfinite_in_a_row + 1)
        metrics = StepMetrics(
            loss=sums.losses.nll / tokens,
            divergence=sums.losses.divergence / tokens,
            tokens=tokens,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            nonfinite_in_a_row=nonfinite_in_a_row,
            oscillating=oscillation(optimizer_state),
            router=router_means(sums.losses) if ROUTER in table else {},
        )
        return TrainState(state.step + 1, params, optimizer_state, nonfinite_in_a_row), metrics

    # keep_unused: nothing reads the old values of quantized leaves, but the new ones take their place.
    state_shapes = jax.eval_shape(lambda: state.params)
    return Step(
        jax.jit(zeros, out_shardings=sums_layout),
        jax.jit(add, donate_argnums=2, out_shardings=sums_layout),
        jax.jit(update, donate_argnums=0, keep_unused=True, out_shardings=(state_layout, whole)),
        teacher and teacher.weights,
    )


def _once_if(condition: jax.Array, function: Callable[[Any], Any], carried: Any, layout: Any) -> Any:
    """Return function(carried) if the condition holds, else `carried`, in its place in memory either way.

    A loop of at most one turn, not `lax.cond`, whose outcome lies beside what it was given
    (docs/decisions/0004-non-finite-steps.md). `layout`: the sharding of each array.
    """

    def turn(loop: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        return jnp.zeros((), bool), _in_usual_order(function(loop[1]), layout)

    return jax.lax.while_loop(lambda loop: loop[0], turn, (condition, carried))[1]


def _in_usual_order(tree: Any, layout: Any) -> Any:
    """Return `tree`, whose arrays have their axes in memory in the order that arguments of programs have.

    Else compilers for accelerators have the loop carry transposed weights, whose maxima they find faster, and transpose
    whole stacks before the loop and behind it. That order is row-major, but on a TPU only if the last axis fills the
    lanes. On each device by itself: what keeps an order doesn't know of shards.
    """

    def row_major(tree: Any, narrowest: int) -> Any:
        def one(x: jax.Array) -> jax.Array:
            usual = x.ndim > 1 and x.shape[-1] >= narrowest
            return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim)))) if usual else x

        return jax.tree.map(one, tree)

    shardings, specs = jax.tree.leaves(layout), jax.tree.map(lambda leaf: leaf.spec, layout)

    def keep(narrowest: int) -> Any:
        local = partial(row_major, narrowest=narrowest)
        return jax.shard_map(local, mesh=shardings[0].mesh, in_specs=(specs,), out_specs=specs)

    return jax.lax.platform_dependent(tree, cuda=keep(1), tpu=keep(TPU_LANES), default=lambda tree: tree)
