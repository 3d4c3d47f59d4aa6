"""What a step works with at its fullest moment, told from shapes: the parts of the estimate that aren't exact.

What a forward saves for its backward is traced, nothing computed, on Explicit mesh axes, where the type of every array
tells how it is split. The rest is what one layer, or the head, works with at a time, by rules of thumb that stand below
with their reasons (docs/decisions/0015-planner.md has how far off they are).
"""

from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

import jax
from jax.extend.core import Literal
from jax.sharding import NamedSharding

from research.model.attention import BLOCK
from research.model.parameters import Parameter, head_of
from research.plan.compiler import Compiler
from research.plan.mixtures import bytes_at_work, mixture
from research.plan.products import STREAM, chunk, chunks, in_layers, is_of_experts, layout_of, products, weight_parts
from research.plan.program import AbstractStep, Job, abstract_step, local_bytes, models
from research.quant.grid import bytes_of
from research.train.step import make_loss


def forward_and_backward_bytes(job: Job, step: AbstractStep, compiler: Compiler) -> int:
    """Return the bytes that a micro-batch takes besides what stays, at its fullest moment.

    Everything saved is there when the backward pass begins. Then either the head is worked on, or a layer. Where
    nothing is fused the gradient of the head, made with the loss, is no longer among what is saved by then: it is where
    its sum will be. And what the gradients of the layers are stacked in is there before the loss.
    """
    saved, of_layer = saved_bytes(job, step)
    waiting = _waiting_bytes(step, compiler)
    layer, head = _layer_bytes(job, step, compiler, of_layer), _head_bytes(job, step, compiler)
    if compiler.fuses:
        return saved + max(waiting + layer, head)
    return saved - _gradient_bytes(step, [head_of(step.setup.table)]) + waiting + max(layer, head)


def _layer_bytes(job: Job, step: AbstractStep, compiler: Compiler, of_layer: int) -> int:
    """Return the bytes at work in the backward pass of a layer, of which `of_layer` are saved.

    Half of what it saved is at work at a time; its gradient is there whole where it is kept split. A stage takes what
    it saved of a piece out of what it saved of all, and stacks the gradients of the piece: of one layer alone it adds
    each gradient at once.
    """
    layout, table = layout_of(job, step), step.setup.table
    of_layers = [path for path, one in table.items() if "l" in one.axes and not is_of_experts(one)]
    stages, mix = layout.mesh["stage"], mixture(job, step)
    layers = layout.sizes["l"] // stages
    found = of_layer // 2 + (bytes_at_work(mix) if mix else 0)
    if stages == 1 or layers > 1:
        found += _gradient_bytes(step, of_layers, whole=True) // layers
    if stages > 1 and layers > 1:
        found += of_layer * layers + _gradient_bytes(step, of_layers)
    anew = _computed_anew(job, step) - of_layer if job.experiment.train.rematerialize != "none" else 0
    if compiler.fuses:
        return found + _gathered_weights(job, step) + anew // 2 + _streams(job, step) + _scores(job, step)
    return found + _plainly(job, step, anew)


def _plainly(job: Job, step: AbstractStep, anew: int) -> int:
    """Return the bytes that exist in a layer besides, where what is elementwise stands by itself.

    All that is computed anew (where products are saved, 0.7 of the rest) when its backward pass begins, or, when that
    has come to attention, half of it (where products are saved, twelve arrays like the queries). Of the residual stream
    gathered by positions floats are among what is saved. Weights are gathered one by one: half of them, and all stacks
    that they come from, laid out anew. Where keys travel around a ring, there are four more each of keys, of values and
    of arrays like the queries.
    """
    layout, train = layout_of(job, step), job.experiment.train
    inner, saves_products = in_layers(layout), train.rematerialize == "dots"
    queries, keys = (4 * inner.elements(letters, inner.rules.activations) for letters in ("btnh", "btkh"))
    rounded = any(one.activation != "none" for one in products(job, step) if one.x == STREAM)
    streams = _streams(job, step) // (1 if rounded else 2)
    at_begin = int((0.7 if saves_products else 1.0) * anew) + streams
    in_attention = (12 * queries + streams if saves_products else anew // 2) + _scores(job, step)
    ring = 4 * queries + 8 * keys if layout.mesh["context"] > 1 else 0
    return _gathered_weights(job, step) // 2 + _copied_weights(job, step) + ring + max(at_begin, in_attention)


def _copied_weights(job: Job, step: AbstractStep) -> int:
    """Return the bytes of the stacks whose layers are gathered, of the teacher, too; stages have copies anyway."""
    layout = layout_of(job, step)
    if layout.mesh["stage"] > 1:
        return 0
    parts = (part for model in models(job, step) for part in _gathered_parts(*model))
    return sum(bytes_of(elements, dtype) * layout.sizes["l"] // layout.ways(axes) for dtype, axes, elements in parts)


def _waiting_bytes(step: AbstractStep, compiler: Compiler) -> int:
    """Return the bytes of all gradients beside the sums that they are added to.

    Where there is nothing to add to they become the sums, at the end. Where nothing is fused, that of the head is none
    of them.
    """
    total, head = 0, head_of(step.setup.table)
    for path, parameter in step.setup.table.items():
        if path == head and not compiler.fuses:
            continue
        elements, dtype = prod(parameter.shape) // prod(parameter.latent_shards), _gradient_dtype(step, path)
        waits = compiler.sums_wait and dtype != "float32"
        total += bytes_of(elements, dtype) if step.given or waits else 0
        total += 4 * elements if step.given and waits else 0
    return total


def _gathered_weights(job: Job, step: AbstractStep) -> int:
    """Return the bytes of a layer's weights that are gathered, in the format that they travel in."""
    return sum(bytes_of(elements, dtype) for dtype, _, elements in _gathered_parts(job, step))


def _gathered_parts(job: Job, step: AbstractStep) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Yield what is gathered of a layer's weights, as `weight_parts` does."""
    for product in products(job, step):
        if not product.is_head:
            yield from (part for part in weight_parts(product) if part[1])


def _streams(job: Job, step: AbstractStep) -> int:
    """Return the bytes of the residual stream, whole, where it lies split by positions.

    As input, as gradient of the output and as two gradients of the input.
    """
    layout = in_layers(layout_of(job, step))
    used = layout.rules.activations
    is_split = layout.moved(STREAM, layout.rules.residuals, used)
    return 4 * bytes_of(layout.elements(STREAM, used), job.experiment.train.compute_dtype) if is_split else 0


def _scores(job: Job, step: AbstractStep) -> int:
    """Return the bytes of the scores of a pair of attention's blocks, the shares and the gradients of both.

    A platform's kernel keeps them to itself, and a layer's q, k and v scaled and turned: about as much.
    """
    layout = in_layers(layout_of(job, step))
    used = layout.rules.activations
    block = min(BLOCK, job.length // layout.ways(layout.split("t", used)))
    return 4 * 4 * layout.elements("bn", used) * block**2


def _computed_anew(job: Job, step: AbstractStep) -> int:
    """Return the bytes that one layer would save if nothing of it were computed anew."""
    plain = job.computing_nothing_anew
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
    """Return the bytes at work in the loss.

    Logits of a chunk, shifted and exponentiated. Where the head is split over `d` it is gathered. Its gradient is whole
    where rows are split, and not where its sum will be; once more, where a chunk's is added to it; and once or, with a
    table that is looked up, too, twice where it is summed over rows that `d` isn't split over. Several micro-batches
    have it beside their sum when it is added, and from the beginning where chunks are added to it.
    """
    head, product = head_of(step.setup.table), next(p for p in products(job, step) if p.is_head)
    positions, layout, whole = chunk(job), layout_of(job, step), _gradient_bytes(step, [head], whole=True)
    shape = (job.rows, positions, step.setup.table[head].shape[0])
    logits = 4 * prod(NamedSharding(step.mesh, step.setup.settings.spec("bav", shape[1])).shard_shape(shape))
    if compiler.fuses:
        gathered = sum(bytes_of(elements, dtype) for dtype, axes, elements in weight_parts(product) if axes)
        return 3 * logits + gathered + whole
    rows, in_chunks = layout.split("ba", layout.rules.activations), chunks(job) > 1
    summed = any(axis != "stage" and axis not in product.gathered for axis in rows)
    copies = 2 if in_chunks and job.architecture.tied_head else 1
    own, added = whole * (bool(rows) + bool(product.gathered)), _gradient_bytes(step, [head]) if step.given else 0
    in_sum = added + copies * whole * summed
    return own + max(3 * logits + added * in_chunks, logits + whole * in_chunks, in_sum)


def update_bytes(job: Job, step: AbstractStep, compiler: Compiler) -> int:
    """Return the bytes that the update takes besides: next to none, as what stays is changed where it lies.

    But float32 trees for moments in codes, and for the gradients of learned scales. With latents split further than
    their parameter (ZeRO) codes come back, of all leaves at a time, or floats, of which two of the largest leaf are
    whole.
    """
    coded = compiler.coded_moments if job.experiment.optimizer.moments == "int8" else 0.0
    latents, codes, floats = 0.0, 0, [0]
    for path, parameter in step.setup.table.items():
        form, held = step.setup.formats.get(path), _local_size(parameter, whole=False)
        trees = coded + (compiler.learned_scales if form is not None and form.rule.learn_scale else 0.0)
        latents += trees * 4 * prod(parameter.shape) // prod(parameter.latent_shards)
        if parameter.latent_spec != parameter.spec and form is not None:
            codes += bytes_of(held, form.grid.code_dtype)
        elif parameter.latent_spec != parameter.spec:
            floats.append(4 * held)
    return int(latents) + codes + 2 * max(floats)
