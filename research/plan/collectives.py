"""What a training step sends between devices, told from shapes, axis rules and number formats alone.

Two accounts of the same step. `predicted` has a line for each thing that moves: over which mesh axes, in which dtype,
how often; it can be held against the compiled program, entry by entry. `least` is what the layout needs at least: each
weight gathered once for the forward and once for the backward pass in the format it is stored in, gradients reduced and
scattered, and the residual stream gathered and scattered once for each pair of products.

Where an array lies is a table of axis letters (research/axes.py): it moves over the mesh axes that split it where it
lies and not where it is used, and a sum over a letter that is split is reduced over the axes that split it.
"""

from collections.abc import Iterator
from dataclasses import replace

from research.plan.hlo import Collective, merged, sent
from research.plan.mixtures import least_sends, mixture, sends
from research.plan.products import (
    STREAM,
    Layout,
    Product,
    chunks,
    in_layers,
    layout_of,
    products,
    scale_sizes,
    weight_parts,
)
from research.plan.program import AbstractStep, Job, models
from research.quant.activations import group_size, statistic_of

_HEADS = {"layers/attention/q_norm/scale_h": "btn", "layers/attention/k_norm/scale_h": "btk"}
"""Norms of heads: axes of what they norm, but for h."""
LOSS_REDUCTIONS = 3  # maximum, sum of exponentials and the target's logit
DIVERGENCE_REDUCTIONS = 6  # maximum and sum of exponentials of both models, the divergence and its gradient


def predicted(job: Job, step: AbstractStep) -> list[Collective]:
    """Return the collectives of an optimizer step as XLA is expected to emit them, `merged`."""
    parts = job.experiment.train.accumulate
    micro = [one for model in models(job, step) for one in _of_model(*model)]
    times = [replace(one, times=one.times * parts) for one in micro]
    found = [*times, *_of_update(step, layout_of(job, step))]
    return merged(one for one in found if one.axes and one.bytes and one.times)


def _of_model(job: Job, step: AbstractStep) -> Iterator[Collective]:
    """What a micro-batch's passes through a model take."""
    layout = layout_of(job, step)
    yield from _of_ring(job, step, in_layers(layout))
    yield from _of_shared_heads(job, step, in_layers(layout))
    yield from _of_stages(job, layout)
    yield from _of_norms(job, step, layout)
    yield from _of_embedding(job, step, layout)
    yield from _of_loss(job, layout)
    inputs: dict[tuple[str, str], Product] = {}
    for product in products(job, step):
        yield from _of_product(product)
        inputs[_input(product), product.x] = product
    mix = mixture(job, step)
    if mix is not None:
        yield from sends(mix)
        inputs[_input(mix.gate), mix.gate.x] = mix.gate
    for product in inputs.values():
        yield from _of_input(product)


def least(job: Job, step: AbstractStep) -> list[Collective]:
    """Return the collectives that the layout needs at least, `merged`; scalars and norms are left out."""
    parts = job.experiment.train.accumulate
    layout = layout_of(job, step)
    found = [*_of_ring(job, step, in_layers(layout)), *_of_stages(job, layout)]
    streams: dict[tuple[str, str], list[Collective]] = {}
    for product in products(job, step):
        dtype = product.stored if product.form is None else product.form.held_dtype
        gathers = 1 if product.is_head else 2 * product.times
        found.append(sent("all-gather", product.gathered, dtype, product.used(product.letters), gathers))
        found += _gradient("reduce-scatter", product)
        # The products of a block that share an input share what is sent of it, and the sum of its gradient.
        block, is_rounded = product.path.rpartition("/")[0], product.activation != "none"
        if stream := [*_stream(product, product.x, product.kept, rounded=is_rounded)]:
            streams[block, "in"] = stream
        if stream := [*_stream(product, product.y, product.parameter.contract, rounded=False)]:
            streams[block, "out"] = stream
    found += [one for several in streams.values() for one in several]
    mix = mixture(job, step)
    found += least_sends(mix) if mix else []
    return merged(replace(one, times=one.times * parts) for one in found if one.axes and one.bytes)


def _stream(product: Product, letters: str, over: str, *, rounded: bool) -> Iterator[Collective]:
    """What an end of a pair of products needs: gathered one way and scattered the other, or all reduced at once."""
    layout, rules = product.layout, product.layout.rules
    axes, moved = layout.split(over, rules.activations), layout.moved(letters, layout.lies(letters), rules.activations)
    if moved:
        yield sent("all-gather", moved, "int8" if rounded else product.compute, product.used(letters), product.times)
        yield sent("reduce-scatter", moved, product.compute, product.used(letters), product.times)
    elif axes:
        yield sent("all-reduce", axes, product.compute, product.used(letters), product.times)


def _input(product: Product) -> str:
    """Return a name that products have in common that round and move their input together."""
    block = product.path.rpartition("/")[0]
    return product.path if statistic_of(product.activation) else f"{block} {product.activation}"


def _of_input(product: Product) -> Iterator[Collective]:
    """What an activation's way into products takes: the scale of its tokens, and being gathered by positions."""
    layout, rules = product.layout, product.layout.rules
    times = (1 if product.anew == "none" else 2) * product.times
    partial, moved = (
        layout.split(product.parameter.contract, rules.activations),
        layout.moved(product.x, layout.lies(product.x), rules.activations),
    )
    rounded, group = product.activation != "none", group_size(product.activation)
    if rounded and not group:  # the largest of a token; or, where the scale is given, whether it is finite
        dtype = "bool" if statistic_of(product.activation) else "float32"
        yield sent("all-reduce", partial, dtype, product.used(product.rows), times)
    yield sent("all-gather", moved, "int8" if rounded else product.compute, product.used(product.x), times)
    if rounded:
        dtype, scales = (
            ("float16", product.used(product.x) // group) if group else ("float32", product.used(product.rows))
        )
        yield sent("all-gather", moved, dtype, scales, times)


def _of_product(product: Product) -> Iterator[Collective]:
    """The product itself: its weight, the sums that devices have parts of, and the same backward."""
    layout, rules, times = product.layout, product.layout.rules, product.times
    # The weight is gathered in both passes. What a layer computes anew finds it gathered; that of the head, whose
    # passes are one, stands before the loop over its chunks.
    if product.is_router:
        yield from _of_router(product)
    else:
        for dtype, axes, elements in weight_parts(product):
            gathers = 1 if product.is_head else layout.directions * layout.gathers
            yield sent("all-gather", axes, dtype, elements, gathers)
    # Nothing in a layer depends on what ends it, so that isn't computed anew.
    outputs = (2 if product.anew == "full" and product.parameter.contract != "f" else 1) * times
    partial = layout.split(product.parameter.contract, rules.activations)
    sums = "float32" if product.of_blocks else "int32" if product.integer else product.compute
    yield sent("all-reduce", partial, sums, product.used(product.y), outputs)
    if not layout.backward:
        return
    # Backward: the gradient of the output comes to where the product is, that of the input is a sum over what is kept.
    moved = layout.moved(product.y, layout.lies(product.y), rules.activations)
    yield sent("all-gather", moved, product.compute, product.used(product.y), times)
    partial, sums = layout.split(product.kept, rules.activations), product.compute
    if product.integer_backward:  # the largest of a token's gradient, and of a channel's
        sums = "int32"
        yield sent("all-reduce", partial, "float32", product.used(product.rows), times)
        rows = (layout.split(letter, rules.activations) for letter in product.rows)
        yield sent("all-reduce", sum(rows, ()), "float32", product.used(product.kept), times)
    yield sent("all-reduce", partial, sums, product.used(product.x), times)
    yield from _repeated_gradient(product) if product.is_repeated else _gradient("all-reduce", product)


def _of_router(product: Product) -> Iterator[Collective]:
    """The weight of a router, gathered letter by letter."""
    layout, rules = product.layout, product.layout.rules
    kept = rules.params
    for letter in reversed(product.letters):
        axes, kept = layout.moved(letter, kept, rules.activations), {**kept, letter: rules.activations.get(letter)}
        yield sent(
            "all-gather",
            axes,
            product.stored,
            layout.elements(product.letters, kept),
            layout.directions * layout.gathers,
        )


def _repeated_gradient(product: Product) -> Iterator[Collective]:
    """Sum the gradient of a weight whose product all devices of tensor make, whole."""
    layout, whole = product.layout, product.used(product.letters)
    for part in product.rows:
        yield sent("all-reduce", layout.split(part, layout.rules.activations), product.stored, whole, product.times)


def _gradient(kind: str, product: Product) -> Iterator[Collective]:
    """Sum a weight's gradient: whole over the axes that it is gathered over, then its shard over the others."""
    layout, whole = product.layout, product.used(product.letters)
    dtype = "int32" if product.integer_backward else product.stored
    yield sent(kind, product.gathered, dtype, whole, product.times)
    # Of a shard in one sum, of what is whole in one for each letter.
    letters = [product.rows] if product.gathered else product.rows
    for part in letters:
        rest = tuple(a for a in layout.split(part, layout.rules.activations) if a not in product.gathered)
        yield sent("all-reduce", rest, dtype, whole // layout.ways(product.gathered), product.times)


def _of_ring(job: Job, step: AbstractStep, layout: Layout) -> Iterator[Collective]:
    """Keys and values of a device, which travel around all others in each pass, back with their float32 gradients."""
    train, grid, rules = job.experiment.train, step.setup.settings.kv_grid, layout.rules
    ring, heads = layout.split("t", rules.activations), step.setup.settings.heads.groups // layout.mesh["tensor"]
    of_heads, steps = layout.elements("bt", rules.activations) * heads, layout.passes * (layout.ways(ring) - 1)
    kept = of_heads * layout.sizes["h"]
    # What comes in one step of the ring is no loop: XLA sees that the backward pass asks for it once more.
    passes = 3 if train.rematerialize != "none" and layout.ways(ring) > 2 else layout.directions
    yield sent(
        "collective-permute", ring, train.compute_dtype if grid is None else grid.code_dtype, kept, 2 * passes * steps
    )
    if grid is not None:
        yield sent("collective-permute", ring, "float16", of_heads, 2 * passes * steps)
    yield sent("collective-permute", ring, "float32", kept, layout.backward * 2 * (steps + layout.passes))


def _of_shared_heads(job: Job, step: AbstractStep, layout: Layout) -> Iterator[Collective]:
    """Gradients of keys and values whose heads several devices have copies of."""
    if step.setup.settings.heads.copies > 1:
        shared = layout.elements("btkh", layout.rules.activations)
        yield sent(
            "all-reduce",
            layout.split("n", layout.rules.activations),
            job.experiment.train.compute_dtype,
            shared,
            layout.backward * 2 * layout.passes,
        )


def _of_stages(job: Job, layout: Layout) -> Iterator[Collective]:
    """What passes between stages: the stream of a piece at each tick, and its gradient back; all rows at both ends.

    All stages get the stream from the last, and its gradient from the first. They share the rows after the layers: the
    gradient comes whole to the last. And all get what belongs to the rows, their places, branches and documents.
    """
    if layout.mesh["stage"] == 1:
        return
    axis, dtype = ("stage",), job.experiment.train.compute_dtype
    rules, inner = layout.rules, in_layers(layout)
    yield sent(
        "collective-permute", axis, dtype, inner.elements(STREAM, rules.residuals), layout.directions * inner.ticks
    )
    whole = layout.elements(STREAM, rules.residuals)
    yield sent("all-reduce", axis, dtype, whole, layout.directions)
    yield sent("all-gather", axis, dtype, whole, layout.backward)
    # What a teacher needs of the rows is there.
    yield sent(
        "all-gather", axis, "int32", layout.elements("b", rules.residuals) * layout.sizes["t"], 3 * layout.backward
    )


def _of_norms(job: Job, step: AbstractStep, layout: Layout) -> Iterator[Collective]:
    """Norms: a float32 vector each, gathered in all passes, its gradient summed; and the last one's outcome."""
    again, outside, inside = job.experiment.train.rematerialize != "none", layout, in_layers(layout)
    for path, parameter in step.setup.table.items():
        if not parameter.contract:
            layout = inside if "l" in parameter.axes else outside
            rules = layout.rules
            letter = parameter.axes[-1]  # d, or h where it is that of heads: their gradient is summed over heads, too
            stream = {**rules.residuals, "b": rules.activations["b"]}
            summed, table = ("bt", stream) if letter == "d" else (_HEADS[path], rules.activations)
            gathered, width = layout.moved(letter, rules.params, rules.activations), layout.sizes[letter]
            in_layer = "l" in parameter.axes
            times, gathers = (layout.passes, layout.gathers) if in_layer else (1, 1)
            yield sent("all-gather", gathered, "float32", width, (layout.directions + (again and in_layer)) * gathers)
            for over in summed:
                yield sent("all-reduce", layout.split(over, table), "float32", width, layout.backward * times)
    yield _whole_stream(job, outside)


def _whole_stream(job: Job, layout: Layout) -> Collective:
    """The residual stream gathered by positions: forward where it ends, backward where it begins."""
    rules = layout.rules
    axes = layout.moved(STREAM, rules.residuals, rules.activations)
    return sent("all-gather", axes, job.experiment.train.compute_dtype, layout.elements(STREAM, rules.activations))


def _of_embedding(job: Job, step: AbstractStep, layout: Layout) -> Iterator[Collective]:
    """The look-up: each device has its part of `d` for the rows of all fsdp; words split over `v` are summed.

    The gradient is summed over rows; under ZeRO a device has a smaller part of `d` of more rows.
    """
    rules, train = layout.rules, job.experiment.train
    stored = "float32" if "embed/table_vd" not in step.setup.formats else train.param_dtype
    across, vectors = layout.moved("b", rules.activations, rules.looked_up), layout.elements(STREAM, rules.looked_up)
    exchanged = tuple(axis for axis in across if axis != "stage")  # the stages need them all
    yield sent("all-reduce", layout.split("v", rules.params), stored, vectors)
    yield sent("all-to-all", exchanged, train.compute_dtype, vectors, layout.directions)
    if not layout.backward:  # and a teacher looks up the same
        return
    yield sent("all-gather", across, "int32", layout.elements("b", rules.looked_up) * layout.sizes["t"])
    yield _whole_stream(job, replace(layout, rules=in_layers(layout).rules))
    zero = layout.moved("d", rules.latents, rules.params)
    if zero:
        yield sent("all-gather", zero, "int32", layout.elements("bt", rules.looked_up) * layout.ways(zero))
        yield sent("all-to-all", zero, stored, vectors)
    rest = tuple(axis for axis in layout.split("bt", rules.looked_up) if axis not in zero)
    yield sent("all-reduce", rest, stored, layout.elements("vd", rules.latents))


def _of_loss(job: Job, layout: Layout) -> Iterator[Collective]:
    """Hidden states of answers, the softmax over a split vocabulary, and two scalars: the loss and how many tokens.

    Where positions are split a sum has those of all answers; the head has its share of them, if they divide.
    """
    rows, positions, answers = (layout.split(letter, layout.rules.activations) for letter in "bta")
    compute, of_slot = job.experiment.train.compute_dtype, layout.elements("bd", layout.rules.activations)
    yield sent("all-reduce", positions, compute, of_slot * job.answer_tokens)
    if not layout.backward:
        return
    yield sent("all-gather", answers, compute, of_slot * layout.sizes["a"] * chunks(job))
    losses = 1 + (job.experiment.train.distill > 0)  # the divergence is told by itself
    yield sent("all-reduce", answers, "float32", 1, losses)
    of_chunk = layout.elements("ba", layout.rules.activations)
    vocabulary = layout.split("v", layout.rules.activations)
    reductions = LOSS_REDUCTIONS + (DIVERGENCE_REDUCTIONS if losses > 1 else 0)
    yield sent("all-reduce", vocabulary, "float32", of_chunk, reductions * chunks(job))
    yield sent("all-reduce", rows, "float32", 1, losses)
    yield sent("all-reduce", rows, "int32", 1)


def _of_update(step: AbstractStep, layout: Layout) -> Iterator[Collective]:
    """The norm of the gradient, the maxima behind scales; what comes back to the parameters."""
    rules = layout.rules
    for path, parameter in step.setup.table.items():
        for letter in parameter.axes:
            yield sent("all-reduce", layout.split(letter, rules.latents), "float32", 1)
        form, axes = step.setup.formats.get(path), parameter.axes
        back = layout.moved(axes, rules.latents, rules.params)
        yield sent("all-gather", back, form.grid.code_dtype if form else "float32", layout.elements(axes, rules.params))
        if form is None or not form.grid.is_scaled:
            continue
        shape = scale_sizes(parameter, form)
        kept = "".join(letter for letter in axes if shape[letter] > 1)
        scales = layout.elements(kept, rules.latents, shape)
        times = 3 if form.rule.learn_scale else 1  # a scale that is learned has a gradient, and steps, which are sums
        for letter in axes:
            if shape[letter] == 1:
                yield sent("all-reduce", layout.split(letter, rules.latents), "float32", scales, times)
        back = layout.moved(kept, rules.latents, rules.params)
        yield sent("all-gather", back, "float16", layout.elements(kept, rules.params, shape), 1 + form.grid.is_affine)
