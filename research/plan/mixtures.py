"""A mixture of experts in a plan: what `model/experts.py` multiplies, sends and works with on one device.

Each device has the tokens of its group over `expert` (g), and a row (m) for each of their choices; without a capacity
the rows of other devices' experts are there, too, and come last. Operations are those of an even load.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from research.model.experts import capacity
from research.plan.hlo import Collective, sent
from research.plan.products import STREAM, Layout, Product, expert_products, weight_parts
from research.plan.program import AbstractStep, Job
from research.quant.grid import bytes_of

_MEANS = ("balance", "z", "dropped")  # over layers, of routers


@dataclass(frozen=True)
class Mixture:
    """A layer of experts on one device.

    Attributes:
      tokens: of this device.
      chosen: experts that a token goes to.
      limit: rows that its experts take at most, where they have a capacity.
    """

    gate: Product
    up: Product
    down: Product
    tokens: int
    chosen: int
    limit: int | None

    @property
    def rows(self) -> int:
        """Choices that the device holds of the tokens of its group."""
        everything = self.group * self.chosen
        return everything if self.limit is None else min(everything, self.limit)

    @property
    def layout(self) -> Layout:
        """Where things lie in a layer."""
        return self.gate.layout

    @property
    def axes(self) -> tuple[str, ...]:
        """Mesh axes that split the experts."""
        return self.layout.split("e", self.layout.rules.activations)

    @property
    def group(self) -> int:
        """Tokens of the devices that share the experts."""
        return self.tokens * self.layout.ways(self.axes)

    @property
    def projections(self) -> tuple[Product, Product, Product]:
        """Gate, up and down."""
        return self.gate, self.up, self.down

    @property
    def width(self) -> int:
        """Size of the residual stream."""
        return self.layout.sizes["d"]

    @property
    def inner(self) -> int:
        """Size of an expert's inner layer on a device."""
        return self.down.used("f")

    @property
    def across(self) -> tuple[str, ...]:
        """Mesh axes that split an expert's inner layer."""
        return self.layout.split("f", self.layout.rules.activations)

    @property
    def integer(self) -> bool:
        """Whether tokens travel as codes."""
        return self.gate.activation != "none"


def mixture(job: Job, step: AbstractStep) -> Mixture | None:
    """Return the layer of experts of a model; None where it has none."""
    sizes = job.architecture.experts
    if sizes is None:
        return None
    gate, up, down = expert_products(job, step)
    layout, limit = gate.layout, None
    if factor := job.experiment.train.expert_capacity:
        all_tokens = layout.sizes["b"] * layout.sizes["t"]
        limit = capacity(sizes, all_tokens, factor) * sizes.experts // layout.mesh["expert"]
    return Mixture(gate, up, down, layout.elements("bt", layout.rules.activations), sizes.chosen, limit)


def expert_flops(mix: Mixture) -> dict[str, float]:
    """Return the operations of all layers in a micro-batch, by dtype: forward, and forward anew and backward."""
    found: dict[str, float] = {}
    for product in mix.projections:
        once = 2.0 * min(mix.tokens * mix.chosen, mix.rows) * mix.width * mix.inner * product.times
        forward = "int8" if product.integer else product.compute
        found[forward] = found.get(forward, 0.0) + mix.layout.directions * once
        found[product.compute] = found.get(product.compute, 0.0) + 2 * mix.layout.backward * once
    return found


def bytes_at_work(mix: Mixture) -> int:
    """Return the bytes of the backward pass of one layer of experts: everything between its products is made anew.

    The tokens of the group, and in float32 their outcome, its gradient and that of the input; the rows' inputs and
    their gradients, and in float32 outcomes and theirs; three arrays of the inner layer; the weights as they come,
    decoded, and their gradients. As a TPU has it; a CPU multiplies every row with every expert.
    """
    compute = bytes_of(1, mix.gate.compute)
    tokens = mix.group * mix.width * (compute + 3 * 4)
    rows = mix.rows * (mix.width * (2 * compute + 2 * 4) + 3 * mix.inner * compute)
    weights = sum(bytes_of(elements, dtype) for one in mix.projections for dtype, _, elements in weight_parts(one))
    values = sum(one.used(one.letters) * (compute + bytes_of(1, one.stored)) for one in mix.projections)
    return tokens + rows + weights + values


def least_sends(mix: Mixture) -> Iterator[Collective]:
    """Yield, as `sends` does, what the layout needs at least: weights, their gradients, tokens there and back."""
    times, compute = mix.gate.times, mix.gate.compute
    for product in mix.projections:
        dtype = product.stored if product.form is None else product.form.held_dtype
        yield sent("all-gather", product.gathered, dtype, product.used(product.letters), 2 * times)
        yield sent("reduce-scatter", product.gathered, product.stored, product.used(product.letters), times)
    yield sent("all-gather", mix.axes, "int8" if mix.integer else compute, mix.group * mix.width, times)
    yield sent("reduce-scatter", mix.axes, compute, mix.group * mix.width, 2 * times)
    yield sent("all-gather", mix.axes, compute, mix.group * mix.width, times)


def sends(mix: Mixture) -> Iterator[Collective]:
    """Yield what one micro-batch's experts send, but for their input."""
    times, compute, layout = mix.gate.times, mix.gate.compute, mix.layout
    rules, is_piped, passes = layout.rules, layout.mesh["stage"] > 1, layout.directions * times
    tokens = layout.split("bt", rules.activations)
    elsewhere = tuple(axis for axis in tokens if axis not in mix.axes)
    for product in mix.projections:
        for dtype, axes, elements in weight_parts(product):
            yield sent("all-gather", axes, dtype, elements, passes)
    # Tokens, their choices and shares, forward and anew; what comes back.
    yield sent("all-gather", mix.axes, "int8" if mix.integer else compute, mix.group * mix.width, passes)
    if mix.integer:
        yield sent("all-gather", mix.axes, "float32", mix.group, passes)
    yield sent("all-gather", mix.axes, "int32", mix.group * mix.chosen, passes)
    yield sent("all-gather", mix.axes, "float32", mix.group * mix.chosen, passes)
    yield sent("reduce-scatter", mix.axes, "float32", mix.group * mix.width, passes)
    # Where an inner layer is split: the scale of its rounding, and the sums of products, forward and anew.
    if mix.down.activation != "none":
        yield sent("all-reduce", mix.across, "float32", mix.rows, passes)
    yield sent("all-reduce", mix.across, "int32" if mix.down.integer else compute, mix.rows * mix.width, passes)
    # How often each expert is chosen in each part of the rows and positions, where a capacity counts them.
    experts, counted = layout.sizes["e"], mix.limit is not None
    if counted:
        rows, positions = (layout.split(letter, rules.activations) for letter in "bt")
        parts = layout.ways(positions) * experts
        yield sent("all-gather", positions, "int32", layout.elements("b", rules.activations) * parts, times)
        yield sent("all-gather", rows, "int32", layout.sizes["b"] * parts, times)
    if not layout.backward:
        return
    # What the router's losses are made of: choices, probabilities, squares, and how many tokens there are.
    for letter in "bt":
        axes = layout.split(letter, rules.activations)
        for dtype, elements in (("int32", experts), ("float32", experts), ("float32", 1)):
            yield sent("all-reduce", axes, dtype, elements, times)
        yield sent("all-reduce", axes, "int32", 1, 2 * layout.ticks if is_piped else 1)
        yield sent("all-reduce", axes, "int32", 1, times if counted else 0)
    yield sent("all-reduce", ("stage",) if is_piped else (), "float32", 1, len(_MEANS))
    for product in mix.projections:
        whole, rest = product.used(product.letters), tuple(a for a in elsewhere if a not in product.gathered)
        yield sent("reduce-scatter", product.gathered, "float32", whole, times)
        yield sent("all-reduce", rest, "float32", whole // layout.ways(product.gathered), times)
    # The gradient of the outcome, which comes from where the residual stream lies, and those of the shares.
    moved = layout.moved(STREAM, rules.residuals, rules.activations)
    yield sent("all-gather", moved, compute, mix.tokens * mix.width, times)
    yield sent("all-gather", mix.axes, "float32", mix.group * mix.width, times)
    yield sent("reduce-scatter", mix.axes, "float32", mix.group * mix.chosen, times)
    yield sent("all-reduce", mix.across, "float32", mix.group * mix.width, times)
