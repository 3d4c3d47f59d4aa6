"""The one place where an activation meets a weight: float, fake-quantized, or as a true product of integers.

Where both sides are int8 the product is `(Σ codes_x · codes_w) · s_x · s_w`, the sum in int32, in training and in
serving alike; so the numbers that are trained are the numbers that are served, bit for bit. With groups along the
contraction, of the weight, the activation or both, there is one such product for each group, and they are added in
float32, in order. A weight with offsets adds `(Σ codes_x) · s_x · offset` to each.

A weight that is split over more devices than a product wants (fsdp) travels as codes and scales, in the forward pass
and again in the backward pass, and is decoded where it arrives: nothing wider than its number format is gathered.
"""

from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from research.quant.activations import (
    dequantize_tokens,
    group_size,
    quantize_groups,
    quantize_static,
    quantize_tokens,
    statistic_of,
)
from research.quant.grid import GRIDS
from research.quant.nodes import Quantized, Weight, dense

W = TypeVar("W", bound=Weight)


@dataclass(frozen=True)
class Route:
    """Where the factors of a product and its outcome lie on the mesh, and where the product wants its factors.

    What lies elsewhere is moved in the format that it is multiplied in: int8 activations as codes and scales, too.
    """

    x: PartitionSpec
    x_used: PartitionSpec
    w: PartitionSpec
    w_used: PartitionSpec
    y: PartitionSpec


@dataclass(frozen=True)
class Input:
    """How an activation goes into products.

    `activation`: "none", "int8" = symmetric per token, "int8:group:32" = per 32 consecutive inputs of a token, or
    "int8:static:…" = with a scale that is given; `contracted`: axes that the products sum over; `x_dtype`, `dtype`: of
    the activation and of the products; `lies`, `used`: where it lies and where the products want it, None where nothing
    is split; `trained`: whether a static scale is to be NaN for a token that isn't finite. The others are so by
    themselves; to look for it takes the reduction that a static scale spares those who serve.
    """

    activation: str
    contracted: tuple[int, ...]
    x_dtype: jnp.dtype
    dtype: jnp.dtype
    lies: PartitionSpec | None = None
    used: PartitionSpec | None = None
    trained: bool = False


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def prepare(how: Input, x: jax.Array, input_scale: jax.Array | None) -> Weight:
    """Return an activation as products take it, where they want it: rounded, then moved as codes and scales.

    So that products of one input share the work. The gradient is straight-through: that of the rounded values, and 0
    where a static scale saturates.
    """
    return _prepare_fwd(how, x, input_scale)[0]


def _prepare_fwd(how: Input, x: jax.Array, input_scale: jax.Array | None):
    if how.activation == "none":
        return _move(x.astype(how.dtype), how), None
    inside = None
    if input_scale is not None:
        codes, scale, inside = _round_to_static(how, x, whole(input_scale))
    elif group := group_size(how.activation):
        codes, scale = quantize_groups(x, how.contracted[-1], group)
    else:
        codes, scale = quantize_tokens(x, how.contracted)
    codes, scale = _move((codes, scale), how)
    x_hat = dequantize_tokens(codes, scale, how.dtype)
    return Quantized(x_hat, codes, scale, GRIDS["int8"], how.dtype.name), inside


def _round_to_static(how: Input, x: jax.Array, input_scale: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return codes, a scale for each token, and which elements don't saturate."""
    codes, inside = quantize_static(x, input_scale)
    token = tuple(1 if axis in how.contracted else size for axis, size in enumerate(x.shape))
    scale = jnp.broadcast_to(input_scale.reshape((1,) * x.ndim), token)
    if how.trained:
        scale = jnp.where(jnp.isfinite(x).all(axis=how.contracted, keepdims=True), scale, jnp.nan)
    return codes, scale, inside


def _prepare_bwd(how: Input, inside: jax.Array | None, gradient: Weight) -> tuple[jax.Array, None]:
    g = gradient.value if isinstance(gradient, Quantized) else gradient
    assert g is not None
    g = g if how.lies is None else place(g, how.lies)
    return (g if inside is None else jnp.where(inside, g, 0)).astype(how.x_dtype), None


prepare.defvjp(_prepare_fwd, _prepare_bwd)


def _move(parts: Any, how: Input) -> Any:
    """Return an activation, or its codes and scales, where the products want it.

    Said to lie where it came first: the compiler would move the float that codes are made of, otherwise.
    """
    return parts if how.lies is None or how.used is None else split(split(parts, how.lies), how.used)


def einsum(
    subscripts: str,
    x: Weight,
    w: Weight,
    *,
    activation: str = "none",
    dtype: jnp.dtype | None = None,
    route: Route | None = None,
) -> jax.Array:
    """Return the product of an activation and a weight, e.g. "btd,dnh->btnh", in `dtype` (default: that of `x`).

    The output has the axes that are kept of the activation, then those kept of the weight. `activation`: as in `Input`,
    a static scale is the weight's `input_scale`; it says nothing of an `x` that comes from `prepare`. `route`: None
    where nothing is split. The backward pass is the straight-through estimator: dL/dx uses the weight on its grid, and
    is 0 where a static scale saturates; dL/dw uses the quantized activation.
    """
    product = _Product(subscripts, jnp.dtype(dtype or x.dtype), route)
    if not isinstance(x, Quantized):
        input_scale = w.input_scale if isinstance(w, Quantized) and statistic_of(activation) else None
        if statistic_of(activation) and input_scale is None:
            raise ValueError(f"einsum {subscripts!r}: activation={activation!r} needs a weight with an input_scale")
        places = (None, None) if route is None else (route.x, route.x_used)
        trained = isinstance(w, Quantized) and w.value is not None
        how = Input(activation, product.contracted, x.dtype, product.dtype, *places, trained)
        x = prepare(how, x, input_scale)
    if isinstance(x, Quantized) and isinstance(w, Quantized) and w.grid.code_dtype == "int8":
        return _integer_product(product, x, w)
    return _float_product(product, dense(x), w)


def explicit(spec: PartitionSpec) -> PartitionSpec | None:
    """Return `spec` where the axes of the mesh in context are Explicit, None where the compiler chooses."""
    return spec if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types else None


def constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Return `x` with sharding `spec` on the mesh in context; unchanged if there is none (one device, no mesh).

    On Explicit mesh axes nothing moves: an `x` of another sharding raises.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, spec)


def ways_of(entry: str | tuple[str, ...] | None) -> int:
    """Return into how many pieces the mesh in context splits what a spec's entry says; 1 if there is none."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return prod(sizes.get(axis, 1) for axis in ((entry,) if isinstance(entry, str) else entry or ()))


def whole(x: jax.Array) -> jax.Array:
    """Return `x`, part of a parameter, ready for elementwise use with an activation.

    A parameter's `d` may be split over the mesh axis that splits an activation's `b`. On Explicit mesh axes that is a
    type error, so `x` is made whole on every device; elsewhere the compiler chooses.
    """
    spec = explicit(PartitionSpec())
    return x if spec is None else jax.sharding.reshard(x, spec)


def place(array: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Return `array` split as `spec` says, moved there on Explicit mesh axes, too."""
    return constrain(array, spec) if explicit(spec) is None else jax.sharding.reshard(array, spec)


@dataclass(frozen=True)
class _Product:
    """What is static of a product; its subscripts by role."""

    subscripts: str
    dtype: jnp.dtype
    route: Route | None

    def __post_init__(self) -> None:
        if self.y != self.rows + self.columns:
            raise ValueError(f"einsum {self.subscripts!r}: the output must be {self.rows + self.columns!r}")

    @property
    def x(self) -> str:
        """Axes of the activation."""
        return self.subscripts.split(",")[0]

    @property
    def w(self) -> str:
        """Axes of the weight."""
        return self.subscripts.split(",")[1].split("->")[0]

    @property
    def y(self) -> str:
        """Axes of the output."""
        return self.subscripts.split("->")[1]

    @property
    def rows(self) -> str:
        """Axes that are kept of the activation: a token each."""
        return "".join(axis for axis in self.x if axis not in self.w)

    @property
    def columns(self) -> str:
        """Axes that are kept of the weight."""
        return "".join(axis for axis in self.w if axis not in self.x)

    @property
    def contracted(self) -> tuple[int, ...]:
        """Indices of the activation's axes that are summed over."""
        return tuple(index for index, axis in enumerate(self.x) if axis in self.w)

    @property
    def inner(self) -> str:
        """Axes that are summed over, in the order of the weight."""
        return "".join(axis for axis in self.w if axis in self.x)

    def entry(self, axis: str) -> Any:
        """Return the mesh axes over which an axis of the activation or of the output is split in the product."""
        if self.route is None:
            return None
        return dict(zip(self.x + self.w, (*self.route.x_used, *self.route.w_used), strict=True)).get(axis)

    @property
    def spec(self) -> PartitionSpec:
        """The sharding of the output as the product makes it, before it is moved."""
        return PartitionSpec(*map(self.entry, self.y))

    def multiply(self, x: jax.Array, w: jax.Array, dtype: str | None = None) -> jax.Array:
        """Return the product, on the mesh as `spec` says."""
        return _einsum(self.subscripts, x, w, self.spec, dtype)


def _einsum(subscripts: str, a: jax.Array, b: jax.Array, spec: PartitionSpec, dtype: str | None = None) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=dtype, out_sharding=explicit(spec))


def split(parts: Any, spec: PartitionSpec) -> Any:
    """Return arrays of one shape, codes and scales, split as `spec` says; where a scale is shared nothing is split."""

    def move(array: jax.Array) -> jax.Array:
        entries = zip(array.shape, spec, strict=True)
        return place(array, PartitionSpec(*(None if size == 1 else entry for size, entry in entries)))

    return jax.tree.map(move, parts)


def _used_w(product: _Product, w: W) -> W:
    """Return the weight where the product wants it; a quantized one goes there as codes and scales, without value."""
    route = product.route
    if route is None or not any(ways_of(entry) > 1 for entry in set(route.w) - set(route.w_used)):
        return w
    moved = replace(w, value=None, input_scale=None) if isinstance(w, Quantized) else w
    return split(moved, route.w_used)


def _laid(product: _Product, y: jax.Array) -> jax.Array:
    """Return the outcome where it is to lie; partial sums of several devices are added on the way."""
    return y if product.route is None else place(y, product.route.y)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _float_product(product: _Product, x: jax.Array, w: Weight) -> jax.Array:
    return _laid(product, product.multiply(x, dense(_used_w(product, w)).astype(product.dtype)))


def _gradients(product: _Product, x: jax.Array, w: Weight, gradient: jax.Array) -> tuple[jax.Array, Weight]:
    """Return dL/dx, and dL/dŵ in the place of the value, for the float product of `x` and `w`."""
    w_hat, route = dense(_used_w(product, w)).astype(product.dtype), product.route
    if route is not None:
        gradient = place(gradient, product.spec)
    # jax's own transposition, so that the gradient is bit for bit that of the fake-quantized product
    dx, dw = jax.vjp(product.multiply, x, w_hat)[1](gradient)
    dw = dw if route is None else place(dw, route.w)
    if not isinstance(w, Quantized):
        return dx, dw.astype(w.dtype)
    value = None if w.value is None else dw.astype(w.dtype)
    # None: no cotangent, as for all integers, and for the scale, which the value doesn't depend on here
    return dx, Quantized(value, None, None, w.grid, w.dtype)  # pyright: ignore[reportArgumentType]


# The weight is kept for the backward pass as it lies: what was gathered is gathered again.
_float_product.defvjp(
    lambda product, x, w: (_float_product(product, x, w), (x, w)),
    lambda product, factors, gradient: _gradients(product, factors[0], factors[1], gradient),
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _integer_product(product: _Product, x: Quantized, w: Quantized) -> jax.Array:
    """Integer sums, then · s_x, then · s_w, in float32; one cast at the end."""
    w = _used_w(product, w)
    assert x.scale is not None and w.scale is not None
    blocks = max(_blocks(product, product.x, x.scale), _blocks(product, product.w, w.scale))
    if blocks > 1 or w.offset is not None:
        return _laid(product, _sum_over_blocks(product, blocks, x.codes, x.scale, w).astype(product.dtype))
    w_codes = w.codes.astype(jnp.int8)  # no backend multiplies what it holds in four bits
    sums = _laid(product, product.multiply(x.codes, w_codes, "int32")).astype(jnp.float32)
    # the contracted axes of both scales have size 1: there is nothing to sum
    s_w = jnp.einsum(f"{product.w}->{product.columns}", whole(w.scale.astype(jnp.float32)))
    s_x, s_w = _beside(product, x.scale.squeeze(product.contracted), s_w)
    if product.route is not None:
        s_x = split(s_x, product.route.y)
    return (sums * s_x * s_w).astype(product.dtype)


def _integer_product_fwd(product: _Product, x: Quantized, w: Quantized):
    # eight bits a residual instead of the thirty-two of the float activation
    return _integer_product(product, x, w), (replace(x, value=None), w)


def _integer_product_bwd(product: _Product, residuals: tuple[Quantized, Quantized], gradient: jax.Array):
    x, w = residuals
    assert x.scale is not None
    dx, dw = _gradients(product, dequantize_tokens(x.codes, x.scale, product.dtype), w, gradient)
    return Quantized(dx, None, None, x.grid, x.dtype), dw  # pyright: ignore[reportArgumentType]


_integer_product.defvjp(_integer_product_fwd, _integer_product_bwd)


def _sum_over_blocks(product: _Product, blocks: int, x_codes: jax.Array, x_scale: jax.Array, w: Quantized) -> jax.Array:
    """Return Σ over blocks of f32(Σ codes_x · codes_w) · (s_x · s_w), float32, one block added after the other.

    With offsets each block adds (f32(Σ codes_x) · s_x) · offset, too.

    A device adds the blocks that it holds, and where the mesh splits the contraction the devices' sums are added last.
    It is a loop, because the sums of all blocks at once take many times the memory of the output, and more time.
    """
    assert w.scale is not None
    way = product.entry(product.inner[0])
    ways = ways_of(way)
    cut = partial(_split, product, ways, blocks)
    factors = cut(product.x, x_codes), cut(product.w, w.codes)
    scales = cut(product.x, x_scale), cut(product.w, w.scale)
    offsets = None if w.offset is None else cut(product.w, w.offset)
    spec = PartitionSpec(way, *(product.entry(axis) for axis in product.y))

    def add(number: jax.Array, total: jax.Array) -> jax.Array:
        (x_axes, x), (w_axes, w) = (_take(number, *factor) for factor in factors)
        sums = _einsum(f"{x_axes},{w_axes}->{WAY}{product.y}", x, w.astype(jnp.int8), spec, "int32").astype(jnp.float32)
        x_scale, w_scale = of_block(number, scales[0], product.rows), of_block(number, scales[1], product.columns)
        s_x, s_w = _beside(product, x_scale, w_scale)
        total = _plus(total, sums * (s_x * s_w))
        if offsets is None:
            return total
        x_sums = jnp.einsum(f"{x_axes}->{WAY}{product.rows}", x.astype(jnp.int32)).astype(jnp.float32)
        x_sums, offset = _beside(product, x_sums * x_scale, of_block(number, offsets, product.columns))
        return _plus(total, x_sums * offset)

    def of_block(number: jax.Array, scales: tuple[str, jax.Array], kept: str) -> jax.Array:
        axes, scale = _take(number, *scales)
        return jnp.einsum(f"{axes}->{WAY}{kept}", scale.astype(jnp.float32))

    sizes = dict(zip(product.x, x_codes.shape, strict=True)) | dict(zip(product.w, w.codes.shape, strict=True))
    nothing = jnp.zeros((ways, *(sizes[axis] for axis in product.y)), jnp.float32)
    return jax.lax.fori_loop(0, blocks // ways, add, place(nothing, spec)).sum(axis=0)


def _plus(total: jax.Array, term: jax.Array) -> jax.Array:
    """Return the sum of both, the term rounded before it is added.

    A selection, lest the compiler fuse product and sum into one rounding in one program and not in the next.
    """
    return total + jnp.where(term == 0, 0.0, term)


# Axes that the contracted ones are split into; in capitals, because they are in no alphabet of a model.
WAY, BLOCK, MEMBER = "W", "B", "M"


def _split(product: _Product, ways: int, blocks: int, axes: str, array: jax.Array) -> tuple[str, jax.Array]:
    """Return the contracted axes of codes as (way, block, member), those of scales as (way, block), and the letters.

    Scales that all blocks share are repeated.
    """
    first, last = axes.index(product.inner[0]), axes.index(product.inner[-1]) + 1
    if axes[first:last] != product.inner:
        raise ValueError(
            f"einsum {product.subscripts!r}: with groups, {product.inner!r} must be neighbours in {axes!r}"
        )
    before, size, after = array.shape[:first], prod(array.shape[first:last]), array.shape[last:]
    members = (size // blocks,) if size > blocks else ()
    letters = axes[:first] + WAY + BLOCK + (MEMBER if members else "") + axes[last:]
    entry = {WAY: product.entry(product.inner[0]), BLOCK: None, MEMBER: None}
    spec = PartitionSpec(*(entry.get(letter, product.entry(letter)) for letter in letters))
    shape = (*before, ways, blocks // ways, *members, *after)
    if size == 1:
        array = jnp.broadcast_to(array.reshape(*before, 1, 1, *after), shape)
    else:
        array = jax.lax.reshape(array, shape, out_sharding=explicit(spec))
    return letters, place(array, spec)


def _take(number: jax.Array, axes: str, array: jax.Array) -> tuple[str, jax.Array]:
    return axes.replace(BLOCK, ""), jax.lax.dynamic_index_in_dim(array, number, axes.index(BLOCK), keepdims=False)


def _blocks(product: _Product, axes: str, scale: jax.Array) -> int:
    """Return how many scales there are along the contraction."""
    return prod(size for axis, size in zip(axes, scale.shape, strict=True) if axis in product.inner)


def _beside(product: _Product, s_x: jax.Array, s_w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return both scales with axes of size 1, so that they broadcast against [(way,) rows, columns]."""
    rows, columns = len(product.rows), len(product.columns)
    lead = s_x.ndim - rows
    return jnp.expand_dims(s_x, [*range(-columns, 0)]), jnp.expand_dims(s_w, [*range(lead, lead + rows)])
