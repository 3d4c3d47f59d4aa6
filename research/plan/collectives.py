"""What a training step sends between devices, told from shapes, specs and number formats alone.

Two accounts of the same step. `predicted` follows the partitioner's rules as XLA applies them today to the model as it
is written, so that it can be held against the compiled program, entry by entry. `least` is what the layout needs at
least: each weight gathered once for the forward and once for the backward pass in the format it is stored in, gradients
reduced and scattered, one reduction for each column- and row-parallel pair.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import jax.numpy as jnp

from research.axes import MeshAxes
from research.model.parameters import Parameter
from research.plan.hlo import Collective, merged
from research.plan.program import AbstractStep, Job
from research.quant.policy import Format

HLO_NAMES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int8": "s8", "int4": "s4", "int32": "s32"}
LOSS_REDUCTIONS = 5  # maximum, sum of exponentials and the target's logit; the backward pass does the first two anew


@dataclass(frozen=True)
class Layout:
    """Sizes of all axes and over which mesh axes (of more than one device) they are split."""

    sizes: Mapping[str, int]
    mesh: Mapping[str, int]
    params: Mapping[str, MeshAxes]
    activations: Mapping[str, MeshAxes]

    def split(self, letter: str, table: Mapping[str, MeshAxes]) -> tuple[str, ...]:
        """Return the mesh axes that split a letter."""
        entry = table.get(letter) or ()
        return tuple(axis for axis in ((entry,) if isinstance(entry, str) else entry) if self.mesh[axis] > 1)

    def elements(self, letters: str, table: Mapping[str, MeshAxes], without: Iterable[str] = ()) -> int:
        """Return the elements of one device's shard; as if not split over the mesh axes `without`."""
        ways = {axis for letter in letters for axis in self.split(letter, table)} - set(without)
        return prod(self.sizes[letter] for letter in letters) // prod(self.mesh[axis] for axis in ways)

    def ordered(self, axes: Iterable[str]) -> tuple[str, ...]:
        """Return mesh axes in the order of the mesh."""
        wanted = set(axes)
        return tuple(axis for axis in self.mesh if axis in wanted)


@dataclass(frozen=True)
class Product:
    """One product of an activation and a weight, forward and backward.

    Attributes:
      rows: axes of the activation that are kept.
      integer: whether the forward multiplies codes.
      compute, stored: dtype of the activation and of the weight's value.
      times: how often it is done in a micro-batch.
    """

    layout: Layout
    path: str
    parameter: Parameter
    rows: str
    form: Format | None
    integer: bool
    compute: str
    stored: str
    times: int

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
        """Mesh axes that split both the weight and the rows, over which the weight is gathered."""
        layout = self.layout
        split = {axis for letter in self.letters for axis in layout.split(letter, layout.params)}
        return layout.ordered(split & set(self.summed))

    @property
    def summed(self) -> tuple[str, ...]:
        """Mesh axes over which the weight's gradient is a sum."""
        layout = self.layout
        return layout.ordered(axis for letter in self.rows for axis in layout.split(letter, layout.activations))

    def reduced(self, letters: str) -> tuple[str, ...]:
        """Return the mesh axes that split axes of the activation or output, over which a product is a partial sum."""
        layout = self.layout
        return layout.ordered(axis for letter in letters for axis in layout.split(letter, layout.activations))

    def whole(self) -> int:
        """Return the elements of the weight on a device once it is gathered."""
        return self.layout.elements(self.letters, self.layout.params, self.gathered)

    def activation(self, letters: str) -> int:
        """Return the elements of an activation on a device."""
        return self.layout.elements(letters, self.layout.activations)

    def scale_elements(self) -> int:
        """Return the scales of the gathered weight, 0 where no gathering is needed for them."""
        if self.form is None or not self.form.grid.is_scaled or self.form.granularity != "channel":
            return 0
        split = {axis for letter in self.kept for axis in self.layout.split(letter, self.layout.params)}
        return self.layout.elements(self.kept, self.layout.params, self.gathered) if split & set(self.gathered) else 0


def predicted(job: Job, step: AbstractStep) -> list[Collective]:
    """Return the collectives of an optimizer step as XLA is expected to emit them, `merged`."""
    parts = job.experiment.train.accumulate
    layout = _layout(job, step)
    micro = [one for product in products(job, step) for one in _of_product(product, job)]
    micro += [*_of_norms(job, step, layout), *_of_embedding(job, step, layout), *_of_loss(job, step, layout)]
    times = [replace(one, times=one.times * parts) for one in micro]
    return merged(one for one in [*times, *_of_update(step, layout)] if one.axes)


def least(job: Job, step: AbstractStep) -> list[Collective]:
    """Return the collectives that the layout needs at least, `merged`; scalars and norms are left out."""
    parts = job.experiment.train.accumulate
    found: list[Collective] = []
    reductions: dict[tuple[str, str], Collective] = {}
    for product in products(job, step):
        dtype = product.stored if product.form is None else product.form.held_dtype
        found.append(_one("all-gather", product.gathered, dtype, product.whole(), 2 * product.times))
        found += _gradient("reduce-scatter", product, product.times)
        # The products of a block that share an input share the sum of its gradient.
        block, compute = product.path.rpartition("/")[0], product.compute
        for name, letters, over in (("to", product.y, product.parameter.contract), ("from", product.x, product.kept)):
            if axes := product.reduced(over):
                one = _one("all-reduce", axes, compute, product.activation(letters), product.times)
                reductions[block, name] = one
    found += reductions.values()
    return merged(replace(one, times=one.times * parts) for one in found if one.axes and one.bytes)


def _layout(job: Job, step: AbstractStep) -> Layout:
    sizes = {
        letter: size
        for parameter in step.setup.table.values()
        for letter, size in zip(parameter.axes, parameter.shape, strict=True)
    }
    sizes |= {"b": job.rows, "t": job.length, "a": _chunk(job)}
    settings = step.setup.settings
    activations, params = dict(settings.rules.activations), dict(settings.rules.params)
    if settings.heads.copies > 1:
        params["k"] = activations["k"] = None
    return Layout(sizes, dict(step.mesh.shape), params, activations)


def _chunk(job: Job) -> int:
    """Return the answer positions whose logits exist at one time."""
    return min(max(1, job.experiment.train.loss_chunk // job.rows), job.answer_tokens)


def _chunks(job: Job) -> int:
    return -(-job.answer_tokens // _chunk(job))


def _one(kind: str, axes: tuple[str, ...], dtype: str, elements: int, times: int) -> Collective:
    return Collective(kind, axes, HLO_NAMES[dtype], elements * jnp.dtype(dtype).itemsize, times)


def products(job: Job, step: AbstractStep) -> Iterator[Product]:
    """Yield every product with a weight; the head's is the last."""
    setup, train, layout = step.setup, job.experiment.train, _layout(job, step)
    head = "head/table_vd" if "head/table_vd" in setup.table else "embed/table_vd"
    for path, parameter in setup.table.items():
        if not parameter.contract or (path.startswith("embed/") and path != head):
            continue
        form = setup.formats.get(path)
        integer = form is not None and form.grid.code_dtype == "int8" and setup.policy.activation(path) != "none"
        stored = "float32" if form is None else train.param_dtype
        is_layer = "l" in parameter.axes
        times = layout.sizes["l"] if is_layer else _chunks(job)
        yield Product(
            layout, path, parameter, "bt" if is_layer else "ba", form, integer, train.compute_dtype, stored, times
        )


def _of_product(product: Product, job: Job) -> Iterator[Collective]:
    gathered, contract, times = product.gathered, product.parameter.contract, product.times
    # The backward pass computes the head anew, and layers as the config says; but not what ends a layer: nothing in the
    # layer depends on it.
    is_head = product.rows == "ba"
    again = is_head or job.experiment.train.rematerialize == "full"
    inputs = 2 * times if again else times
    outputs = 2 * times if again and contract != "f" else times
    # Where the head is applied in a loop, it is gathered once before it; its codes again in the loop that goes back.
    gathers = (1 + product.integer * times) if is_head and times > 1 else outputs
    codes = "int8" if product.integer else product.stored
    yield _one("all-gather", gathered, codes, product.whole(), gathers)
    if product.integer and product.scale_elements():
        yield _one("all-gather", gathered, "float32", product.scale_elements(), gathers)
    partial = product.reduced(contract)
    if partial and product.integer:
        yield _one("all-reduce", partial, "float32", product.activation(product.rows), inputs)
    if partial:
        dtype = "int32" if product.integer else product.compute
        yield _one("all-reduce", partial, dtype, product.activation(product.y), outputs)
    back = product.reduced(product.kept)
    yield _one("all-reduce", back, product.compute, product.activation(product.x), times)
    yield from _gather_backward(product, job.answer_tokens if is_head else 0)
    yield from _gradient("all-reduce", product, times)


def _gradient(kind: str, product: Product, times: int) -> Iterator[Collective]:
    """Sum a weight's gradient: whole over the axes that it is gathered over, then its shard over the others."""
    whole, rest = product.whole(), tuple(axis for axis in product.summed if axis not in product.gathered)
    yield _one(kind, product.gathered, product.stored, whole, times)
    shard = whole // prod(product.layout.mesh[axis] for axis in product.gathered)
    yield _one("all-reduce", rest, product.stored, shard, times)


def _gather_backward(product: Product, answer_tokens: int) -> Iterator[Collective]:
    """What the gradient of the activation needs: the weight, or the logits' gradient if that is smaller.

    `answer_tokens`: of the head, 0 for a layer.
    """
    layout, gathered = product.layout, product.gathered
    logits = layout.elements(product.y, layout.activations, gathered)
    if answer_tokens and gathered and logits < product.whole():
        yield _one("all-gather", gathered, product.compute, logits, product.times)
        states = product.activation(product.x) // layout.sizes["a"] * answer_tokens
        yield _one("all-to-all", gathered, product.compute, states, 1)
    else:
        yield _one("all-gather", gathered, product.stored, product.whole(), product.times)


def _of_norms(job: Job, step: AbstractStep, layout: Layout) -> Iterator[Collective]:
    """Norms: a float32 vector each, gathered for both passes, its gradient summed."""
    again = job.experiment.train.rematerialize == "full"
    for parameter in step.setup.table.values():
        if parameter.contract:
            continue
        is_layer = "l" in parameter.axes
        times = layout.sizes["l"] if is_layer else 1
        summed = layout.ordered(layout.split("b", layout.activations))
        gathered = layout.ordered(set(layout.split("d", layout.params)) & set(summed))
        yield _one("all-gather", gathered, "float32", layout.sizes["d"], (3 if again and is_layer else 2) * times)
        yield _one("all-reduce", summed, "float32", layout.sizes["d"], times)


def _of_embedding(job: Job, step: AbstractStep, layout: Layout) -> Iterator[Collective]:
    """The look-up: rows of a table split over `v` are summed, those split over `d` are looked up for all and sent."""
    dtype = "float32" if "embed/table_vd" not in step.setup.formats else job.experiment.train.param_dtype
    rows = layout.split("b", layout.activations)
    across = layout.ordered(set(layout.split("d", layout.params)) & set(rows))
    looked_up = layout.elements("btd", layout.activations)
    yield _one("all-reduce", layout.ordered(layout.split("v", layout.params)), dtype, looked_up, 1)
    if across:
        yield _one("all-gather", across, "int32", layout.elements("bt", layout.activations, across), 1)
        yield _one("all-to-all", across, dtype, looked_up, 2)
    rest = layout.ordered(set(rows) - set(across))
    yield _one("all-reduce", rest, dtype, layout.elements("vd", layout.params), 1)


def _of_loss(job: Job, step: AbstractStep, layout: Layout) -> Iterator[Collective]:
    """The softmax over a split vocabulary, and two scalars: the loss and the number of tokens."""
    vocabulary = layout.ordered(layout.split("v", layout.activations))
    of_chunk = layout.elements("ba", layout.activations)
    yield _one("all-reduce", vocabulary, "float32", of_chunk, LOSS_REDUCTIONS * _chunks(job))
    rows = layout.ordered(layout.split("b", layout.activations))
    yield _one("all-reduce", rows, "float32", 1, 1)
    yield _one("all-reduce", rows, "int32", 1, 1)


def _of_update(step: AbstractStep, layout: Layout) -> Iterator[Collective]:
    """Two norms of the gradient, whether it is finite, and the maxima behind scales whose weights are split."""
    for path, parameter in step.setup.table.items():
        for axis in layout.ordered(axis for letter in parameter.axes for axis in layout.split(letter, layout.params)):
            yield _one("all-reduce", (axis,), "float32", 1, 2)
            yield Collective("all-reduce", (axis,), "pred", 1)
        form = step.setup.formats.get(path)
        if form is None or not form.grid.is_scaled or form.granularity.startswith("group:"):
            continue
        kept = "".join(letter for letter in parameter.axes if letter not in parameter.contract)
        shared = parameter.contract if form.granularity == "channel" else parameter.axes.replace("l", "")
        across = layout.ordered(axis for letter in shared for axis in layout.split(letter, layout.params))
        scales = layout.elements(kept if form.granularity == "channel" else "l" * ("l" in kept), layout.params)
        yield _one("all-reduce", across, "float32", scales, 1)
