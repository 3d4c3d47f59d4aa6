"""What a training step sends between devices, told from shapes, axis rules and number formats alone.

Two accounts of the same step. `predicted` has a line for each thing that moves: over which mesh axes, in which dtype,
how often; it can be held against the compiled program, entry by entry. `least` is what the layout needs at least: each
weight gathered once for the forward and once for the backward pass in the format it is stored in, gradients reduced and
scattered, and the residual stream gathered and scattered once for each pair of products.

Where an array lies is a table of axis letters (research/axes.py): it moves over the mesh axes that split it where it
lies and not where it is used, and a sum over a letter that is split is reduced over the axes that split it.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import jax.numpy as jnp

from research.axes import AxisRules, MeshAxes
from research.model.parameters import Parameter
from research.plan.hlo import Collective, merged
from research.plan.program import AbstractStep, Job
from research.quant.activations import group_size, statistic_of
from research.quant.policy import Format

KNOWN_AXES = ("replica", "data", "fsdp", "tensor")
"""Mesh axes whose traffic is predicted."""

HLO_NAMES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int8": "s8", "int4": "s4", "int32": "s32"}
HLO_NAMES |= {"bool": "pred", "float8_e4m3fn": "f8e4m3fn", "float8_e5m2": "f8e5m2"}
LOSS_REDUCTIONS = 5  # maximum, sum of exponentials and the target's logit; the backward pass does the first two anew
STREAM = "btd"
"""Axes of the residual stream, which lies split by positions between products."""

Table = Mapping[str, MeshAxes]


@dataclass(frozen=True)
class Layout:
    """Sizes of all axes and of the mesh, and the tables that say what is split where."""

    sizes: Mapping[str, int]
    mesh: Mapping[str, int]
    rules: AxisRules

    def split(self, letters: str, table: Table) -> tuple[str, ...]:
        """Return the mesh axes of more than one device that split any of the letters, in the order of the mesh."""
        entries = [table.get(letter) or () for letter in letters]
        named = {axis for entry in entries for axis in ((entry,) if isinstance(entry, str) else entry)}
        return tuple(axis for axis, size in self.mesh.items() if axis in named and size > 1)

    def moved(self, letters: str, source: Table, target: Table) -> tuple[str, ...]:
        """Return the mesh axes over which an array is gathered that lies as `source` says and goes to `target`."""
        return tuple(axis for axis in self.split(letters, source) if axis not in self.split(letters, target))

    def elements(self, letters: str, table: Table, shape: Mapping[str, int] | None = None) -> int:
        """Return the elements of one device's shard; `shape`: sizes of the letters, where they aren't the model's."""
        sizes = self.sizes if shape is None else shape
        return prod(sizes[letter] for letter in letters) // self.ways(self.split(letters, table))

    def ways(self, axes: Iterable[str]) -> int:
        """Return into how many pieces some mesh axes split."""
        return prod(self.mesh[axis] for axis in axes)

    def lies(self, letters: str) -> Table:
        """Return the table of an activation between products."""
        return self.rules.residuals if letters == STREAM else self.rules.activations


@dataclass(frozen=True)
class Product:
    """One product of an activation and a weight, forward and backward.

    Attributes:
      rows: axes of the activation that are kept.
      activation: how the activation is rounded, as in `Input`; shared: whether its products round it once for all.
      compute, stored: dtype of the activation and of the weight's value.
      times: how often it is done in a micro-batch; again: whether the backward pass does it anew first.
    """

    layout: Layout
    path: str
    parameter: Parameter
    rows: str
    form: Format | None
    activation: str
    compute: str
    stored: str
    times: int
    again: bool

    @property
    def integer(self) -> bool:
        """Whether the forward multiplies codes."""
        return self.form is not None and self.form.grid.code_dtype == "int8" and self.activation != "none"

    @property
    def of_blocks(self) -> bool:
        """Whether the sums of integers are scaled, and added as float32, in blocks."""
        grouped = self.form is not None and self.form.granularity.startswith("group:")
        return self.integer and (grouped or group_size(self.activation) > 0)

    @property
    def is_head(self) -> bool:
        """Whether this is the product that gives logits."""
        return "a" in self.rows

    @property
    def letters(self) -> str:
        """Axes of the weight inside a layer."""
        return self.parameter.axes.replace("l", "")

    @property
    def kept(self) -> str:
        """Axes of the weight that the output has."""
        return "".join(letter for letter in self.letters if letter not in self.parameter.contract)

    @property
    def x(self) -> str:
        """Axes of the activation."""
        return self.rows + self.parameter.contract

    @property
    def y(self) -> str:
        """Axes of the output."""
        return self.rows + self.kept

    @property
    def gathered(self) -> tuple[str, ...]:
        """Mesh axes over which the weight is gathered."""
        return self.layout.moved(self.letters, self.layout.rules.params, self.layout.rules.activations)

    @property
    def summed(self) -> tuple[str, ...]:
        """Mesh axes over which the weight's gradient is a sum."""
        return self.layout.split(self.rows, self.layout.rules.activations)

    def used(self, letters: str) -> int:
        """Return the elements of a factor or of the outcome on a device, as the product has it."""
        return self.layout.elements(letters, self.layout.rules.activations)


def unpredicted(job: Job, step: AbstractStep) -> list[str]:
    """Return what of a step `predicted` doesn't know, in words: there the compiled program alone tells."""
    mesh = {axis: size for axis, size in dict(step.mesh.shape).items() if size > 1}
    train, copies = job.experiment.train, step.setup.settings.heads.copies
    others = {
        "the teacher's forward pass": train.distill > 0,
        "gradients of kv heads that devices of tensor share": copies > 1,
        "the gradient of the embedding's look-up under train.zero": train.zero
        and "data" in mesh
        and ("replica" in mesh or len(mesh) > 2),
    }
    axes = [f"what mesh axis {axis} sends" for axis in mesh if axis not in KNOWN_AXES]
    return [*axes, *(name for name, is_so in others.items() if is_so)]


def predicted(job: Job, step: AbstractStep) -> list[Collective]:
    """Return the collectives of an optimizer step as XLA is expected to emit them, `merged`."""
    parts = job.experiment.train.accumulate
    layout = layout_of(job, step)
    micro = [*_of_norms(job, step, layout), *_of_embedding(job, step, layout), *_of_loss(job, layout)]
    inputs: dict[tuple[str, str], Product] = {}
    for product in products(job, step):
        micro += _of_product(product)
        inputs[_input(product), product.x] = product
    for product in inputs.values():
        micro += _of_input(product)
    times = [replace(one, times=one.times * parts) for one in micro]
    return merged(one for one in [*times, *_of_update(step, layout)] if one.axes and one.bytes and one.times)


def least(job: Job, step: AbstractStep) -> list[Collective]:
    """Return the collectives that the layout needs at least, `merged`; scalars and norms are left out."""
    parts = job.experiment.train.accumulate
    found: list[Collective] = []
    streams: dict[tuple[str, str], list[Collective]] = {}
    for product in products(job, step):
        dtype = product.stored if product.form is None else product.form.held_dtype
        found.append(_one("all-gather", product.gathered, dtype, product.used(product.letters), 2 * product.times))
        found += _gradient("reduce-scatter", product)
        # The products of a block that share an input share what is sent of it, and the sum of its gradient.
        block = product.path.rpartition("/")[0]
        streams[block, "in"] = [*_stream(product, product.x, product.kept, rounded=product.activation != "none")]
        streams[block, "out"] = [*_stream(product, product.y, product.parameter.contract, rounded=False)]
    found += [one for several in streams.values() for one in several]
    return merged(replace(one, times=one.times * parts) for one in found if one.axes and one.bytes)


def _stream(product: Product, letters: str, over: str, *, rounded: bool) -> Iterator[Collective]:
    """What an end of a pair of products needs: gathered one way and scattered the other, or all reduced at once."""
    layout, rules = product.layout, product.layout.rules
    axes, moved = layout.split(over, rules.activations), layout.moved(letters, layout.lies(letters), rules.activations)
    if moved:
        yield _one("all-gather", moved, "int8" if rounded else product.compute, product.used(letters), product.times)
        yield _one("reduce-scatter", moved, product.compute, product.used(letters), product.times)
    else:
        yield _one("all-reduce", axes, product.compute, product.used(letters), product.times)


def layout_of(job: Job, step: AbstractStep) -> Layout:
    """Return the sizes and tables of a step; positions that don't divide are whole in the residual stream, too."""
    sizes = {
        letter: size
        for parameter in step.setup.table.values()
        for letter, size in zip(parameter.axes, parameter.shape, strict=True)
    }
    sizes |= {"b": job.rows, "t": job.length, "a": _chunk(job)}
    settings, mesh = step.setup.settings, dict(step.mesh.shape)
    rules = settings.rules
    if settings.heads.copies > 1:  # kv heads are whole on every device
        rules = replace(rules.with_params(k=None), activations={**rules.activations, "k": None})
    if settings.residual(job.length) == settings.spec(STREAM, job.length):
        rules = replace(rules, residuals=rules.activations)
    return Layout(sizes, mesh, rules)


def _chunk(job: Job) -> int:
    """Return the answer positions whose logits exist at one time."""
    return min(max(1, job.experiment.train.loss_chunk // job.rows), job.answer_tokens)


def _chunks(job: Job) -> int:
    return -(-job.answer_tokens // _chunk(job))


def _one(kind: str, axes: tuple[str, ...], dtype: str, elements: int, times: int = 1) -> Collective:
    return Collective(kind, axes, HLO_NAMES[dtype], elements * jnp.dtype(dtype).itemsize, times)


def products(job: Job, step: AbstractStep) -> Iterator[Product]:
    """Yield every product with a weight; the head's is the last."""
    setup, train, layout = step.setup, job.experiment.train, layout_of(job, step)
    head = "head/table_vd" if "head/table_vd" in setup.table else "embed/table_vd"
    for path, parameter in setup.table.items():
        if not parameter.contract or (path.startswith("embed/") and path != head):
            continue
        form, is_layer = setup.formats.get(path), "l" in parameter.axes
        yield Product(
            layout,
            path,
            parameter,
            rows="bt" if is_layer else "ba",
            form=form,
            activation=setup.policy.activation(path),
            compute=train.compute_dtype,
            stored="float32" if form is None else train.param_dtype,
            times=layout.sizes["l"] if is_layer else _chunks(job),
            again=train.rematerialize != "none" or not is_layer,
        )


def _input(product: Product) -> str:
    """Return a name that products have in common that round and move their input together."""
    block = product.path.rpartition("/")[0]
    return product.path if statistic_of(product.activation) else f"{block} {product.activation}"


def _of_input(product: Product) -> Iterator[Collective]:
    """What an activation's way into products takes: the scale of its tokens, and being gathered by positions."""
    layout, rules = product.layout, product.layout.rules
    times = (2 if product.again else 1) * product.times
    partial, moved = (
        layout.split(product.parameter.contract, rules.activations),
        layout.moved(product.x, layout.lies(product.x), rules.activations),
    )
    rounded, group = product.activation != "none", group_size(product.activation)
    if rounded and not group:  # the largest of a token; or, where the scale is given, whether it is finite
        dtype = "bool" if statistic_of(product.activation) else "float32"
        yield _one("all-reduce", partial, dtype, product.used(product.rows), times)
    yield _one("all-gather", moved, "int8" if rounded else product.compute, product.used(product.x), times)
    if rounded:
        dtype, scales = (
            ("float16", product.used(product.x) // group) if group else ("float32", product.used(product.rows))
        )
        yield _one("all-gather", moved, dtype, scales, times)


def _of_product(product: Product) -> Iterator[Collective]:
    """The product itself: its weight, the sums that devices have parts of, and the same backward."""
    layout, rules, times = product.layout, product.layout.rules, product.times
    # The weight is gathered in both passes. What a layer computes anew finds it gathered; that of the head stands
    # before the loop over its chunks.
    forward = 1 if product.is_head else times
    for dtype, axes, elements in weight_parts(product):
        yield _one("all-gather", axes, dtype, elements, forward + times)
    # Nothing in a layer depends on what ends it, so that isn't computed anew.
    outputs = (2 if product.again and product.parameter.contract != "f" else 1) * times
    partial = layout.split(product.parameter.contract, rules.activations)
    sums = "float32" if product.of_blocks else "int32" if product.integer else product.compute
    yield _one("all-reduce", partial, sums, product.used(product.y), outputs)
    # Backward: the gradient of the output comes to where the product is, that of the input is a sum over what is kept.
    moved = layout.moved(product.y, layout.lies(product.y), rules.activations)
    yield _one("all-gather", moved, product.compute, product.used(product.y), times)
    yield _one(
        "all-reduce", layout.split(product.kept, rules.activations), product.compute, product.used(product.x), times
    )
    yield from _gradient("all-reduce", product)


def weight_parts(product: Product) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Yield dtype, mesh axes and elements of the arrays that a weight is gathered as: codes and scales, or floats."""
    layout, form = product.layout, product.form
    yield product.stored if form is None else form.grid.code_dtype, product.gathered, product.used(product.letters)
    if form is not None and form.grid.is_scaled:
        shape = scale_sizes(product.parameter, form)
        kept = "".join(letter for letter in product.letters if shape[letter] > 1)
        axes = layout.moved(kept, layout.rules.params, layout.rules.activations)
        scales = layout.elements(kept, layout.rules.activations, shape)
        for _ in ("scale", "offset") if form.grid.is_affine else ("scale",):
            yield "float16", axes, scales


def scale_sizes(parameter: Parameter, form: Format) -> Mapping[str, int]:
    """Return the sizes of a weight's scale by axis letter."""
    return dict(zip(parameter.axes, form.scale_shape, strict=True))


def _gradient(kind: str, product: Product) -> Iterator[Collective]:
    """Sum a weight's gradient: whole over the axes that it is gathered over, then its shard over the others."""
    layout, whole = product.layout, product.used(product.letters)
    yield _one(kind, product.gathered, product.stored, whole, product.times)
    rest = tuple(axis for axis in product.summed if axis not in product.gathered)
    yield _one("all-reduce", rest, product.stored, whole // layout.ways(product.gathered), product.times)


def _of_norms(job: Job, step: AbstractStep, layout: Layout) -> Iterator[Collective]:
    """Norms: a float32 vector each, gathered in all passes, its gradient summed; and the last one's outcome."""
    rules, again = layout.rules, job.experiment.train.rematerialize != "none"
    gathered, width = layout.moved("d", rules.params, rules.activations), layout.sizes["d"]
    for parameter in step.setup.table.values():
        if not parameter.contract:
            times = layout.sizes["l"] if "l" in parameter.axes else 1
            yield _one("all-gather", gathered, "float32", width, (3 if again and "l" in parameter.axes else 2) * times)
            for letter in "bt":
                yield _one("all-reduce", layout.split(letter, rules.residuals), "float32", width, times)
    yield _whole_stream(job, layout)


def _whole_stream(job: Job, layout: Layout) -> Collective:
    """The residual stream gathered by positions: forward where it ends, backward where it begins."""
    rules = layout.rules
    axes = layout.moved(STREAM, rules.residuals, rules.activations)
    return _one("all-gather", axes, job.experiment.train.compute_dtype, layout.elements(STREAM, rules.activations))


def _of_embedding(job: Job, step: AbstractStep, layout: Layout) -> Iterator[Collective]:
    """The look-up: each device has its part of `d` for the rows of all fsdp; words split over `v` are summed."""
    rules, train = layout.rules, job.experiment.train
    stored = "float32" if "embed/table_vd" not in step.setup.formats else train.param_dtype
    across, vectors = layout.moved("b", rules.activations, rules.looked_up), layout.elements(STREAM, rules.looked_up)
    yield _one("all-gather", across, "int32", layout.elements("bt", rules.looked_up))
    yield _one("all-reduce", layout.split("v", rules.params), stored, vectors)
    yield _one("all-to-all", across, train.compute_dtype, vectors, 2)
    yield _whole_stream(job, layout)
    # The gradient is summed over rows; under ZeRO a device gets its part of `d` of all rows instead.
    zero = layout.moved("d", rules.latents, rules.params)
    if zero:
        yield _one("all-gather", zero, "int32", layout.elements("bt", rules.looked_up) * layout.ways(zero))
        yield _one("all-to-all", zero, stored, vectors)
    rest = tuple(axis for axis in layout.split("b", rules.looked_up) if axis not in zero)
    yield _one("all-reduce", rest, stored, layout.elements("vd", rules.latents))


def _of_loss(job: Job, layout: Layout) -> Iterator[Collective]:
    """The softmax over a split vocabulary, and two scalars: the loss and the number of tokens."""
    rows = layout.split("b", layout.rules.activations)
    of_chunk = layout.elements("ba", layout.rules.activations)
    vocabulary = layout.split("v", layout.rules.activations)
    yield _one("all-reduce", vocabulary, "float32", of_chunk, LOSS_REDUCTIONS * _chunks(job))
    yield _one("all-reduce", rows, "float32", 1)
    yield _one("all-reduce", rows, "int32", 1)


def _of_update(step: AbstractStep, layout: Layout) -> Iterator[Collective]:
    """Two norms of the gradient, whether it is finite, the maxima behind scales; what comes back to the parameters."""
    rules = layout.rules
    for path, parameter in step.setup.table.items():
        for letter in parameter.axes:
            axes = layout.split(letter, rules.latents)
            yield _one("all-reduce", axes, "float32", 1, 2)
            yield _one("all-reduce", axes, "bool", 1)
        form, axes = step.setup.formats.get(path), parameter.axes
        back = layout.moved(axes, rules.latents, rules.params)
        yield _one("all-gather", back, form.grid.code_dtype if form else "float32", layout.elements(axes, rules.params))
        if form is None or not form.grid.is_scaled:
            continue
        shape = scale_sizes(parameter, form)
        kept = "".join(letter for letter in axes if shape[letter] > 1)
        scales = layout.elements(kept, rules.latents, shape)
        times = 3 if form.rule.learn_scale else 1  # a scale that is learned has a gradient, and steps, which are sums
        for letter in axes:
            if shape[letter] == 1:
                yield _one("all-reduce", layout.split(letter, rules.latents), "float32", scales, times)
        back = layout.moved(kept, rules.latents, rules.params)
        yield _one("all-gather", back, "float16", layout.elements(kept, rules.params, shape), 1 + form.grid.is_affine)
