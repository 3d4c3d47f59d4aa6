"""Rules: which tensor gets which grid, and the table that shows it. A rule that matches nothing is an error."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from research.config import Rule
from research.errors import UserError, nearest
from research.padding import Padding
from research.quant.activations import group_size, statistic_of
from research.quant.grid import GRIDS, Grid, Shape, bytes_of
from research.quant.rules import check, group_of

STACKED = "le"
"""Letters of axes that stack whole tensors, layers and experts: they never share a scale."""


@dataclass(frozen=True)
class Leaf:
    """What a model tells of one parameter: its axis letters, which of them a product sums over, and its layout.

    `logical`: size of each axis without padding; `shards`: into how many pieces the mesh splits each axis; `padding`:
    where the logical indices lie, None: first on each axis.
    """

    axes: str
    contract: str
    logical: Shape
    shards: Shape
    padding: Padding | None = None
    is_router: bool = False
    """Whether it decides which other weights are used: then it stays float, whatever rule matches it."""

    @property
    def is_multiplied(self) -> bool:
        """Whether a product runs over it that may be rounded."""
        return bool(self.contract) and not self.is_router


@dataclass(frozen=True)
class Format:
    """The grid of one tensor, and the shape and the numbers of its scale.

    `elements`: weights that share a scale, without padding; 0 for cast grids. `earlier`: grids that the tensor is on
    before, each with the step that ends it. `path`, `size` and `padding`: of the tensor; how many weights it has, and
    where they lie, without padding. `input_scale_shape`: of the static scale of what it multiplies, None without.
    """

    grid: Grid
    scale_shape: Shape
    granularity: str
    rule: Rule
    elements: int = 0
    earlier: tuple[tuple[Grid, int], ...] = ()
    path: str = ""
    size: int = 0
    padding: Padding | None = None
    input_scale_shape: Shape | None = None

    @property
    def held_dtype(self) -> str:
        """Dtype of codes where they aren't trained: four bits, two to a byte, if those of every grid on the way fit."""
        dtypes = {grid.held_dtype for grid in (self.grid, *(grid for grid, _ in self.earlier))}
        return dtypes.pop() if len(dtypes) == 1 else self.grid.code_dtype


@dataclass(frozen=True)
class Policy:
    """An ordered list of rules, first match wins, and what the model tells of its leaves (by path)."""

    rules: tuple[Rule, ...] = ()
    leaves: Mapping[str, Leaf] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        for rule in self.rules:
            check(rule)

    def rule(self, path: str) -> Rule | None:
        """Return the rule for the parameter at `path`, None if no rule matches."""
        return next((rule for rule in self.rules if re.fullmatch(rule.match, path)), None)

    def formats(self, shapes: Mapping[str, Shape]) -> dict[str, Format]:
        """Return the format of every parameter that is quantized, by path.

        Vectors and scalars (norms, biases) and routers stay float whatever matches them. Raises `UserError` for a rule
        that no path matches, and for a granularity that the shape or the mesh does not allow.
        """
        matched = {path: rule for path in shapes if (rule := self.rule(path)) is not None}
        unseen = dict.fromkeys(shapes)
        for rule in self.rules:
            first = [path for path in unseen if re.fullmatch(rule.match, path)]
            if not first:
                raise UserError(
                    f"quantization rule match={rule.match!r} is the first match of no parameter"
                    + nearest(rule.match, shapes)
                )
            unseen = {path: None for path in unseen if path not in first}
        formats = {}
        for path, rule in matched.items():
            grid, leaf = GRIDS[rule.weight], _leaf(path, shapes[path], rule, self.leaves.get(path))
            if not _is_matrix(leaf, shapes[path]):
                continue
            _check_activation(path, shapes[path], leaf, rule)
            if grid.is_identity:
                continue
            formats[path] = _format(path, shapes[path], rule, grid, leaf)
        return formats

    def activation(self, path: str) -> str:
        """Return the grid of the activation that the weight at `path` multiplies, as in `Rule.activation`."""
        rule, leaf = self.rule(path), self.leaves.get(path)
        return rule.activation if rule and not (leaf and leaf.is_router) else "none"


def _format(path: str, shape: Shape, rule: Rule, grid: Grid, leaf: Leaf | None) -> Format:
    padding = leaf.padding if leaf else None
    size = prod(leaf.logical if leaf else shape)
    inputs = _scale_shape(path, shape, _known(leaf, path, shape), "tensor") if statistic_of(rule.activation) else None
    if not grid.is_scaled:
        return Format(grid, (), "", rule, path=path, size=size, padding=padding, input_scale_shape=inputs)
    leaf = _known(leaf, path, shape)
    scale_shape = _scale_shape(path, shape, leaf, rule.granularity)
    earlier = tuple((GRIDS[name], end) for name, end in rule.earlier_grids)
    elements = _elements(leaf, rule.granularity)
    return Format(grid, scale_shape, rule.granularity, rule, elements, earlier, path, size, padding, inputs)


def path_of(key_path: tuple[Any, ...]) -> str:
    """Return a jax key path as "a/b/c"."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def leaves_by_path(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Return {path: leaf} of a pytree."""
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)}


def shapes_by_path(params: Any) -> dict[str, Shape]:
    """Return {path: shape} of a pytree of arrays."""
    return {path: tuple(jnp.shape(leaf)) for path, leaf in leaves_by_path(params).items()}


def _leaf(path: str, shape: Shape, rule: Rule, leaf: Leaf | None) -> Leaf | None:
    """Return what is known of the axes: from the rule for models that don't tell, otherwise from the model."""
    if not rule.axes or len(shape) < 2:
        return leaf
    if len(rule.axes) != len(shape) or not set(rule.contract) <= set(rule.axes):
        raise UserError(
            f"quantization rule {rule.match!r}: axes={rule.axes!r}, contract={rule.contract!r} don't name the"
            f" {len(shape)} axes of {path} {list(shape)}"
        )
    return Leaf(rule.axes, rule.contract, shape, (1,) * len(shape))


def _is_matrix(leaf: Leaf | None, shape: Shape) -> bool:
    """Whether a product runs over the tensor that may be rounded; stacked vectors [l, d] are vectors."""
    return len(shape) >= 2 and (leaf is None or leaf.is_multiplied)


def _known(leaf: Leaf | None, path: str, shape: Shape) -> Leaf:
    if leaf is None:
        raise UserError(
            f"{path} {list(shape)} doesn't tell its axes; give them in its rule, e.g. Rule(axes='io', contract='i')"
        )
    return leaf


def _elements(leaf: Leaf, granularity: str) -> int:
    """Return how many weights share a scale, padding not counted."""
    if group := group_of(granularity):
        return group
    shared = leaf.contract if granularity == "channel" else set(leaf.axes) - set(STACKED)
    return prod(size for letter, size in zip(leaf.axes, leaf.logical, strict=True) if letter in shared)


def _scale_shape(path: str, shape: Shape, leaf: Leaf, granularity: str) -> Shape:
    if granularity == "tensor":
        return tuple(size if letter in STACKED else 1 for letter, size in zip(leaf.axes, shape, strict=True))
    if granularity == "channel":
        return tuple(1 if letter in leaf.contract else size for letter, size in zip(leaf.axes, shape, strict=True))
    group = group_of(granularity)
    innermost = _grouped_axis(path, shape, leaf, group, f"granularity={granularity!r}")
    return tuple(size // group if axis == innermost else size for axis, size in enumerate(shape))


def _check_activation(path: str, shape: Shape, leaf: Leaf | None, rule: Rule) -> None:
    group = group_size(rule.activation)
    if group:
        _grouped_axis(path, shape, _known(leaf, path, shape), group, f"activation={rule.activation!r}")


def _grouped_axis(path: str, shape: Shape, leaf: Leaf, group: int, what: str) -> int:
    """Return the innermost contracted axis; `UserError` that names valid sizes if groups don't divide it or a shard."""
    innermost = max(leaf.axes.index(letter) for letter in leaf.contract)
    whole = shape[innermost] // leaf.shards[innermost]
    for size, part in ((leaf.logical[innermost], "axis"), (whole, "shard")):
        if size % group:
            valid = [str(g) for g in range(2, 257) if leaf.logical[innermost] % g == 0 and whole % g == 0]
            raise UserError(
                f"{path}: {what} doesn't divide the {part} {leaf.axes[innermost]!r} of {size};"
                f" valid group sizes: {', '.join(valid) or 'none'}"
            )
    return innermost


@dataclass(frozen=True)
class Coverage:
    """One line of the coverage table."""

    path: str
    shape: Shape
    weight: str
    granularity: str
    activation: str
    rule: str
    bytes: int


def coverage(policy: Policy, params: Any) -> list[Coverage]:
    """Return, for every parameter, how it is stored and which rule says so; shapes are those of `params`."""
    shapes = shapes_by_path(params)
    formats = policy.formats(shapes)
    return [_row(policy, path, shape, formats.get(path)) for path, shape in shapes.items()]


def _row(policy: Policy, path: str, shape: Shape, form: Format | None) -> Coverage:
    rule = policy.rule(path)
    if rule is None:
        return Coverage(path, shape, "fp32", "", "none", "no rule", 4 * prod(shape))
    multiplied = _is_matrix(_leaf(path, shape, rule, policy.leaves.get(path)), shape)
    activation = rule.activation if multiplied else "none"
    if form is None:
        return Coverage(path, shape, "fp32", "", activation, f"{rule.match} (kept float)", 4 * prod(shape))
    code_bytes = bytes_of(prod(shape), form.held_dtype)
    scale_bytes = (form.grid.is_scaled + form.grid.is_affine) * 2 * prod(form.scale_shape)
    if form.input_scale_shape is not None:
        scale_bytes += 4 * prod(form.input_scale_shape)
    names = " → ".join((*(grid.name for grid, _ in form.earlier), form.grid.name))
    return Coverage(path, shape, names, form.granularity, activation, rule.match, code_bytes + scale_bytes)
