"""The products of a training step with their weights, forward and backward, and how their parts lie on the mesh."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

from research.axes import AxisRules, MeshAxes
from research.model.parameters import Parameter, head_of
from research.model.pipeline import count_pieces
from research.plan.program import AbstractStep, Job
from research.quant.activations import group_size
from research.quant.policy import Format

STREAM = "btd"
"""Axes of the residual stream, which lies split by positions between products."""

Table = Mapping[str, MeshAxes]


@dataclass(frozen=True)
class Layout:
    """Sizes of all axes and of the mesh, and the tables that say what is split where."""

    sizes: Mapping[str, int]
    mesh: Mapping[str, int]
    rules: AxisRules
    ticks: int = 1
    """How often a stage works in a micro-batch, the bubble included (pipeline.py); `sizes` has the rows of a piece."""
    directions: int = 2
    """In which the model is passed: forward and backward, or forward alone, as a teacher is."""

    @property
    def passes(self) -> int:
        """How many layers a device works on in a micro-batch, each as often as a piece comes, or none."""
        return self.sizes["l"] // self.mesh["stage"] * self.ticks

    @property
    def backward(self) -> int:
        """How often the model is passed backward: once or not at all."""
        return self.directions - 1

    @property
    def gathers(self) -> int:
        """How often a pass gathers a layer's weights: of one layer alone XLA sees that all pieces need the same."""
        return 1 if self.sizes["l"] == self.mesh["stage"] else self.passes

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
      times: how often it is done in a micro-batch; anew: what the backward pass does anew first, as `rematerialize`.
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
    anew: str

    @property
    def integer(self) -> bool:
        """Whether the forward multiplies codes."""
        return self.form is not None and self.form.grid.code_dtype == "int8" and self.activation != "none"

    @property
    def integer_backward(self) -> bool:
        """Whether the backward pass multiplies codes, too."""
        return self.integer and self.form is not None and self.form.rule.backward == "int8"

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
    def is_router(self) -> bool:
        """Whether this is a router's, whose weight is split in two axes, and used whole."""
        return self.parameter.leaf.is_router

    @property
    def is_repeated(self) -> bool:
        """Whether all devices of tensor make the same product, as in `Route`."""
        return self.is_router or ("k" in self.letters and self.layout.rules.activations["k"] is None)

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

    def used(self, letters: str) -> int:
        """Return the elements of a factor or of the outcome on a device, as the product has it."""
        return self.layout.elements(letters, self.layout.rules.activations)


def layout_of(job: Job, step: AbstractStep) -> Layout:
    """Return the sizes and tables of a step; positions that don't divide are whole, in the residual stream, too."""
    sizes = {
        letter: size
        for parameter in step.setup.table.values()
        for letter, size in zip(parameter.axes, parameter.shape, strict=True)
    }
    sizes |= {"b": job.rows, "t": job.length, "a": chunk(job)}
    settings, mesh = step.setup.settings, dict(step.mesh.shape)
    rules = settings.rules
    if settings.heads.copies > 1:  # kv heads are whole on every device
        rules = replace(rules.with_params(k=None), activations={**rules.activations, "k": None})
    if settings.spec("ba", chunk(job))[1] is None:
        rules = replace(rules, activations={**rules.activations, "a": None})
    if settings.residual(job.length)[1] == settings.spec(STREAM, job.length)[1]:
        rules = replace(rules, residuals={**rules.residuals, "t": rules.activations["t"]})
    return Layout(sizes, mesh, rules, directions=2 if step.is_trained else 1)


def in_layers(layout: Layout) -> Layout:
    """Return the layout of what happens in a layer: of a piece of rows that the stages don't share."""
    stages, b = layout.mesh["stage"], layout.rules.residuals["b"]
    if stages == 1:
        return layout
    pieces = count_pieces(layout.sizes["b"] // layout.ways(layout.split("b", layout.rules.residuals)), stages)
    return Layout(
        {**layout.sizes, "b": layout.sizes["b"] // pieces},
        layout.mesh,
        replace(layout.rules, activations={**layout.rules.activations, "b": b}),
        pieces + stages - 1,
        layout.directions,
    )


def chunk(job: Job) -> int:
    """Return the answer positions whose logits exist at one time."""
    return min(max(1, job.experiment.train.loss_chunk // job.rows), job.answer_tokens)


def chunks(job: Job) -> int:
    """Return how many times the head is applied in a micro-batch."""
    return -(-job.answer_tokens // chunk(job))


def products(job: Job, step: AbstractStep) -> Iterator[Product]:
    """Yield every product with a weight but those of experts; the head's is the last."""
    head = head_of(step.setup.table)
    outside, inside = layout_of(job, step), in_layers(layout_of(job, step))
    for path, parameter in step.setup.table.items():
        if is_of_experts(parameter) or not parameter.contract or (path.startswith("embed/") and path != head):
            continue
        if "l" in parameter.axes:
            yield _product(job, step, path, inside, "bt", inside.passes)
        else:
            yield _product(job, step, path, outside, "ba", chunks(job))


def expert_products(job: Job, step: AbstractStep) -> Iterator[Product]:
    """Yield the products of a mixture of experts: gate, up and down; each device has its experts whole in `d`."""
    layout = in_layers(layout_of(job, step))
    layout = replace(
        layout, rules=replace(layout.rules, activations={**layout.rules.activations, "e": layout.rules.params["e"]})
    )
    for path, parameter in step.setup.table.items():
        if is_of_experts(parameter):
            yield _product(job, step, path, layout, "bt", layout.passes)


def is_of_experts(parameter: Parameter) -> bool:
    """Whether a parameter is that of many experts; the router is not."""
    return "e" in parameter.axes and not parameter.leaf.is_router


def _product(job: Job, step: AbstractStep, path: str, layout: Layout, rows: str, times: int) -> Product:
    setup, train = step.setup, job.experiment.train
    form, parameter = setup.formats.get(path), setup.table[path]
    return Product(
        layout,
        path,
        parameter,
        rows,
        form,
        setup.policy.activation(path),
        compute="float32" if parameter.leaf.is_router else train.compute_dtype,
        stored="float32" if form is None else train.param_dtype,
        times=times,
        anew=train.rematerialize if "l" in parameter.axes else "none",
    )


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
