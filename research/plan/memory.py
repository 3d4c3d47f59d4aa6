"""Bytes of a training step on one device: an estimate from shapes alone, and the same parts from compiled programs.

What stays on the device between programs (the state, the sums of gradients) is exact: shapes, dtypes and shardings are
known. What a forward saves for its backward is nearly so: it is traced, nothing computed, on Explicit mesh axes, where
the type of every array tells how it is split. The rest is what one layer works with at a time, by rules of thumb that
stand below with their reasons (docs/decisions/0015-planner.md has how far off they are).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
from jax.extend.core import Literal
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from research.model.attention import BLOCK
from research.model.parameters import Parameter, head_of, parameter_table
from research.plan.compiler import CPU, Compiler
from research.plan.mixtures import bytes_at_work, mixture
from research.plan.products import STREAM, chunk, in_layers, is_of_experts, layout_of, products, weight_parts
from research.plan.program import AbstractStep, Compiled, Job, abstract_step
from research.quant.grid import bytes_of
from research.quant.state import find
from research.setup import axis_rules_of
from research.train.step import make_loss


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
        forward = _forward_and_backward(job, step, compiler)
    update = _update(job, step, compiler.update_trees)
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


def local_bytes(leaf: Any, mesh: Any = None) -> int:
    """Return the bytes of one device's shard of a shape with a sharding."""
    sharding = leaf.sharding if mesh is None else NamedSharding(mesh, leaf.sharding.spec)
    return bytes_of(prod(sharding.shard_shape(leaf.shape)), leaf.dtype)


def _bytes_of(tree: Any) -> int:
    return sum(map(local_bytes, jax.tree.leaves(tree)))


def _forward_and_backward(job: Job, step: AbstractStep, compiler: Compiler) -> int:
    """Return the bytes that a micro-batch takes besides what stays, at its fullest moment.

    Everything saved is there when the backward pass begins. Then either the head is worked on, or a layer: half of
    what it saved is at work at a time, of what it computes anew what its compiler keeps, and what its products gather;
    its gradient is there whole where it is kept split, and the gradients of the layers gather. The gradient of the
    head, made with the loss, is among what is saved, or has become shards; the look-up's, another table, comes last. A
    stage takes what it saved of a piece out of what it saved of all.
    """
    table, layout = step.setup.table, layout_of(job, step)
    layers = layout.sizes["l"] // layout.mesh["stage"]
    saved, of_layer = saved_bytes(job, step)
    anew = _computed_anew(job, step) - of_layer if job.experiment.train.rematerialize != "none" else 0
    of_layers = [path for path, p in table.items() if "l" in p.axes and not is_of_experts(p)]
    of_head = 0 if compiler.head_fused else _gradient_bytes(step, [head_of(step.setup.table)], whole=True)
    of_piece = of_layer * layers if layout.mesh["stage"] > 1 else 0
    whole = _gradient_bytes(step, of_layers, whole=True) // layers
    mix = mixture(job, step)
    of_experts = bytes_at_work(mix) if mix else 0
    at_work = of_layer // 2 + int(compiler.anew * anew) + whole + of_piece + of_experts + _gathered(job, step)
    return saved + max(_waiting_bytes(step, compiler) + of_head + at_work, _head_bytes(job, step, compiler))


def _waiting_bytes(step: AbstractStep, compiler: Compiler) -> int:
    """Return the bytes of all gradients beside the sums that they are added to.

    Where there is nothing to add to they become the sums, at the end.
    """
    total = 0
    for path, parameter in step.setup.table.items():
        elements, dtype = prod(parameter.shape) // prod(parameter.latent_shards), _gradient_dtype(step, path)
        waits = compiler.sums_wait and dtype != "float32"
        total += bytes_of(elements, dtype) if step.given or waits else 0
        total += 4 * elements if step.given and waits else 0
    return total


def _gathered(job: Job, step: AbstractStep) -> int:
    """Return the bytes of a layer's arrays that exist while it is worked on alone.

    Its weights, gathered in the format that they travel in; the residual stream, whole, as input, as gradient of the
    output and as two gradients of the input, where it lies split by positions; and of a pair of attention's blocks the
    scores, the shares and the gradients of both (a platform's kernel keeps them to itself, and a layer's q, k and v
    scaled and turned: about as much).
    """
    layout, compute = in_layers(layout_of(job, step)), job.experiment.train.compute_dtype
    used = layout.rules.activations
    weights = sum(
        bytes_of(elements, dtype)
        for product in products(job, step)
        for dtype, axes, elements in weight_parts(product)
        if axes and not product.is_head
    )
    is_split = layout.moved(STREAM, layout.rules.residuals, used)
    streams = 4 * bytes_of(layout.elements(STREAM, used), compute) if is_split else 0
    block = min(BLOCK, job.length // layout.ways(layout.split("t", used)))
    return weights + streams + 4 * 4 * layout.elements("bn", used) * block**2


def _computed_anew(job: Job, step: AbstractStep) -> int:
    """Return the bytes that one layer would save if nothing of it were computed anew."""
    train = replace(job.experiment.train, rematerialize="none")
    plain = replace(job, experiment=replace(job.experiment, train=train))
    return saved_bytes(plain, abstract_step(plain, step.mesh))[1]


def saved_bytes(job: Job, step: AbstractStep) -> tuple[int, int]:
    """Return the bytes on one device that the forward pass saves for the backward pass, and those of one layer."""
    loss = make_loss(step.setup.graph, job.experiment.train, step.teacher)
    weights = step.teacher and step.teacher.weights

    def saved(params: Any, state: Any, batch: Any, weights: Any) -> Any:
        return jax.vjp(lambda p: loss(p, state, batch, weights)[0], params)[1]

    traced = jax.make_jaxpr(saved)(step.state.params, step.state, step.batch, weights).jaxpr
    found = {v for v in traced.outvars if not isinstance(v, Literal) and _origin(traced, v) not in traced.invars}
    layout = in_layers(layout_of(job, step))
    loops = (layout.sizes["l"],)
    if (stages := layout.mesh["stage"]) > 1:  # of all stages, for their ticks and for their layers
        loops = (stages * layout.ticks, layout.sizes["l"] // stages)
    stacked = [v for v in found if v.aval.ndim > len(loops) and v.aval.shape[: len(loops)] == loops]

    def total(variables: Iterable[Any]) -> int:
        return sum(local_bytes(v.aval, step.mesh) for v in variables)

    return total(found), total(stacked) // layout.passes


def _origin(traced: Any, variable: Any) -> Any:
    """Return what a variable is, but for its type.

    Where sharding is a type, a stack of layers is given another for its scan, and nothing moves; a pipeline returns the
    weights that its backward pass needs.
    """
    made = {out: (eqn, index) for eqn in traced.eqns for index, out in enumerate(eqn.outvars)}
    while not isinstance(variable, Literal) and variable in made:
        eqn, index = made[variable]
        if eqn.primitive.name == "reshard":
            variable = eqn.invars[0]
        elif eqn.primitive.name == "shard_map":
            inner = eqn.params["jaxpr"]
            origin = _origin(inner, inner.outvars[index])
            if origin not in inner.invars:
                break
            variable = eqn.invars[inner.invars.index(origin)]
        else:
            break
    return variable


def _gradient_bytes(step: AbstractStep, paths: Iterable[str], *, whole: bool = False) -> int:
    """Return the bytes of gradients on one device, in its parameter's dtype each; `whole`: not yet split over `d`."""
    table = step.setup.table
    return sum(bytes_of(_local_size(table[path], whole=whole), _gradient_dtype(step, path)) for path in paths)


def _gradient_dtype(step: AbstractStep, path: str) -> str:
    return step.setup.train.param_dtype if path in step.setup.formats else "float32"


def _local_size(parameter: Parameter, *, whole: bool) -> int:
    sizes = zip(parameter.axes, parameter.shape, parameter.shards, strict=True)
    return prod(size if whole and letter == "d" else size // ways for letter, size, ways in sizes)


def _head_bytes(job: Job, step: AbstractStep, compiler: Compiler) -> int:
    """Return the bytes at work in the loss: logits of a chunk, shifted, exponentiated, and what their gradient needs.

    Where the head is split over `d` it is gathered; its gradient is there whole, twice where chunks add to it and not
    in place.
    """
    head, product = head_of(step.setup.table), next(p for p in products(job, step) if p.is_head)
    positions = chunk(job)
    shape = (job.rows, positions, step.setup.table[head].shape[0])
    logits = 4 * prod(NamedSharding(step.mesh, step.setup.settings.spec("bav", shape[1])).shard_shape(shape))
    gradient = _gradient_bytes(step, [head], whole=True)
    if compiler.head_fused:
        gathered = sum(bytes_of(elements, dtype) for dtype, axes, elements in weight_parts(product) if axes)
        return 3 * logits + gathered + gradient
    gathered = gradient if gradient > _gradient_bytes(step, [head]) else 0
    return 3 * logits + gathered + gradient * (1 if positions == job.answer_tokens else 2)


def _update(job: Job, step: AbstractStep, trees: int) -> int:
    """Return the bytes that the update takes besides: float32 trees of latents, more for moments and scales in codes.

    A gradient and a step of each leaf; of quantized leaves that no axis splits the compiler makes one of both. Latents
    that are split further than their parameter (ZeRO) send codes back, and there is what they decode to.
    """
    more = 3 * (job.experiment.optimizer.moments == "int8") + any(r.learn_scale for r in job.experiment.quantization)
    total = 0
    for path, parameter in step.setup.table.items():
        kept = 4 * prod(parameter.shape) // prod(parameter.latent_shards)
        form, is_whole = step.setup.formats.get(path), prod(parameter.latent_shards) == 1
        total += more * kept
        if form is not None and parameter.latent_spec != parameter.spec:
            held = _local_size(parameter, whole=False)
            total += kept + bytes_of(held, form.grid.code_dtype) + 4 * held
        else:
            total += kept if is_whole and form is not None else trees * kept
    return total
