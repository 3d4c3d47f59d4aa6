"""The one place where an activation meets a weight: float, fake-quantized, or as a true product of integers.

Where both sides are int8 the product is `(Σ codes_x · codes_w) · s_x · s_w`, the sum in int32, in training and in
serving alike; so the numbers that are trained are the numbers that are served, bit for bit. With groups along the
contraction, of the weight, the activation or both, there is one such product for each group, and they are added in
float32, in order.
"""

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, NamedTuple

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
from research.quant.nodes import Quantized, Weight, dense


def einsum(
    subscripts: str,
    x: jax.Array,
    w: Weight,
    *,
    activation: str = "none",
    dtype: jnp.dtype | None = None,
    spec: PartitionSpec | None = None,
    x_spec: PartitionSpec | None = None,
) -> jax.Array:
    """Return the product of an activation and a weight, e.g. "btd,dnh->btnh", in `dtype` (default: that of `x`).

    The output has the axes that are kept of the activation, then those kept of the weight. `activation`: "none",
    "int8" = symmetric per token, "int8:group:32" = per 32 consecutive inputs of a token, or "int8:static:…" = with the
    weight's `input_scale`. `spec`, `x_spec`: sharding of the output, which only Explicit mesh axes need, and of the
    activation, which groups need on any mesh. The backward pass is the straight-through estimator: dL/dx uses the
    weight on its grid, and is 0 where a static scale saturates; dL/dw uses the quantized activation.

    An activation that isn't finite makes its token NaN; with a static scale only where the weight has its value, in
    training: to look for it takes the reduction that a static scale spares those who serve.
    """
    specs = spec or PartitionSpec(), x_spec or PartitionSpec()
    trained = isinstance(w, Quantized) and w.value is not None
    product = _Product(subscripts, x.dtype, jnp.dtype(dtype or x.dtype), *specs, group_size(activation), trained)
    input_scale = w.input_scale if isinstance(w, Quantized) and statistic_of(activation) else None
    if statistic_of(activation) and input_scale is None:
        raise ValueError(f"einsum {subscripts!r}: activation={activation!r} needs a weight with an input_scale")
    if activation != "none" and isinstance(w, Quantized) and w.grid.code_dtype == "int8":
        return _integer_product(product, x, w, input_scale)
    x = x.astype(product.dtype) if activation == "none" else _fake_quantize(product, x, input_scale)
    return _einsum(subscripts, x, dense(w).astype(product.dtype), product.spec)


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


def _einsum(subscripts: str, a: jax.Array, b: jax.Array, spec: PartitionSpec, dtype: str | None = None) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=dtype, out_sharding=explicit(spec))


@dataclass(frozen=True)
class _Product:
    """What is static of a product; its subscripts by role."""

    subscripts: str
    x_dtype: jnp.dtype
    dtype: jnp.dtype
    spec: PartitionSpec
    x_spec: PartitionSpec
    group: int
    """Consecutive inputs that share a scale; 0: all of a token."""
    trained: bool
    """Whether the weight has its value."""

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
        """Return the mesh axes over which an axis of the activation or of the output is split."""
        entries = dict(zip(self.x, self.x_spec, strict=False)) | dict(zip(self.y, self.spec, strict=False))
        return entries.get(axis)


class _Rounded(NamedTuple):
    """An activation as codes, and a scale for each token or group; `inside`: where it doesn't saturate, None: all."""

    codes: jax.Array
    scale: jax.Array
    inside: jax.Array | None = None


def _quantize(product: _Product, x: jax.Array, input_scale: jax.Array | None) -> _Rounded:
    if input_scale is not None:
        return _quantize_static(product, x, whole(input_scale))
    if product.group:
        return _Rounded(*quantize_groups(x, product.x.index(product.inner[-1]), product.group))
    return _Rounded(*quantize_tokens(x, product.contracted))


def _quantize_static(product: _Product, x: jax.Array, input_scale: jax.Array) -> _Rounded:
    codes, inside = quantize_static(x, input_scale)
    token = tuple(1 if axis in product.contracted else size for axis, size in enumerate(x.shape))
    scale = jnp.broadcast_to(input_scale.reshape((1,) * x.ndim), token)
    if product.trained:
        scale = jnp.where(jnp.isfinite(x).all(axis=product.contracted, keepdims=True), scale, jnp.nan)
    return _Rounded(codes, scale, inside)


def _straight_through(product: _Product, inside: jax.Array | None, gradient: jax.Array) -> jax.Array:
    """Return dL/dx where `gradient` is that of the rounded activation: itself, and 0 where it saturates."""
    return (gradient if inside is None else jnp.where(inside, gradient, 0)).astype(product.x_dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fake_quantize(product: _Product, x: jax.Array, input_scale: jax.Array | None) -> jax.Array:
    """Round an activation to its int8 grid; the gradient is straight-through."""
    return _fake_quantize_fwd(product, x, input_scale)[0]


def _fake_quantize_fwd(product: _Product, x: jax.Array, input_scale: jax.Array | None):
    codes, scale, inside = _quantize(product, x, input_scale)
    return dequantize_tokens(codes, scale, product.dtype), inside


_fake_quantize.defvjp(
    _fake_quantize_fwd,
    lambda product, inside, gradient: (_straight_through(product, inside, gradient), None),
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _integer_product(product: _Product, x: jax.Array, w: Quantized, input_scale: jax.Array | None) -> jax.Array:
    codes, scale, _ = _quantize(product, x, input_scale)
    return _forward(product, codes, scale, w)


def _forward(product: _Product, x_codes: jax.Array, x_scale: jax.Array, w: Quantized) -> jax.Array:
    """Integer sums, then · s_x, then · s_w, in float32; one cast at the end."""
    assert w.scale is not None
    blocks = max(_blocks(product, product.x, x_scale), _blocks(product, product.w, w.scale))
    if blocks > 1:
        return _sum_over_blocks(product, blocks, x_codes, x_scale, w).astype(product.dtype)
    w_codes = w.codes.astype(jnp.int8)  # no backend multiplies what it holds in four bits
    sums = _einsum(product.subscripts, x_codes, w_codes, product.spec, "int32").astype(jnp.float32)
    # the contracted axes of both scales have size 1: there is nothing to sum
    s_w = jnp.einsum(f"{product.w}->{product.columns}", whole(w.scale.astype(jnp.float32)))
    s_x, s_w = _beside(product, x_scale.squeeze(product.contracted), s_w)
    return (sums * s_x * s_w).astype(product.dtype)


def _sum_over_blocks(product: _Product, blocks: int, x_codes: jax.Array, x_scale: jax.Array, w: Quantized) -> jax.Array:
    """Return Σ over blocks of f32(Σ codes_x · codes_w) · (s_x · s_w), float32, one block added after the other.

    A device adds the blocks that it holds, and where the mesh splits the contraction the devices' sums are added last.
    It is a loop, because the sums of all blocks at once take many times the memory of the output, and more time.
    """
    assert w.scale is not None
    way = product.entry(product.inner[0])
    ways = ways_of(way)
    split = partial(_split, product, ways, blocks)
    factors = split(product.x, x_codes), split(product.w, w.codes)
    scales = split(product.x, x_scale), split(product.w, w.scale)
    spec = PartitionSpec(way, *(product.entry(axis) for axis in product.y))

    def add(number: jax.Array, total: jax.Array) -> jax.Array:
        (x_axes, x), (w_axes, w) = (_take(number, *factor) for factor in factors)
        sums = _einsum(f"{x_axes},{w_axes}->{WAY}{product.y}", x, w.astype(jnp.int8), spec, "int32").astype(jnp.float32)
        (x_axes, s_x), (w_axes, s_w) = (_take(number, *scale) for scale in scales)
        s_x = jnp.einsum(f"{x_axes}->{WAY}{product.rows}", s_x.astype(jnp.float32))
        s_w = jnp.einsum(f"{w_axes}->{WAY}{product.columns}", s_w.astype(jnp.float32))
        s_x, s_w = _beside(product, s_x, s_w)
        term = sums * (s_x * s_w)
        # A selection, lest the compiler fuse product and sum into one rounding in one program and not in the next.
        return total + jnp.where(term == 0, 0.0, term)

    sizes = dict(zip(product.x, x_codes.shape, strict=True)) | dict(zip(product.w, w.codes.shape, strict=True))
    nothing = jnp.zeros((ways, *(sizes[axis] for axis in product.y)), jnp.float32)
    return jax.lax.fori_loop(0, blocks // ways, add, _place(nothing, spec)).sum(axis=0)


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
    return letters, _place(array, spec)


def _place(array: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Return `array` split as `spec` says, moved there on Explicit mesh axes, too."""
    return constrain(array, spec) if explicit(spec) is None else jax.sharding.reshard(array, spec)


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


def _integer_product_fwd(product: _Product, x: jax.Array, w: Quantized, input_scale: jax.Array | None):
    rounded = _quantize(product, x, input_scale)
    # eight bits a residual (sixteen with a static scale) instead of the thirty-two of the float activation
    return _forward(product, rounded.codes, rounded.scale, w), (rounded, w)


def _integer_product_bwd(product: _Product, residuals: tuple[_Rounded, Quantized], gradient: jax.Array):
    (x_codes, x_scale, inside), w = residuals
    x_hat, w_hat = dequantize_tokens(x_codes, x_scale, product.dtype), w.dense().astype(product.dtype)
    # jax's own transposition, so that the gradient is bit for bit that of the fake-quantized product
    dx, dw = jax.vjp(lambda x, w: _einsum(product.subscripts, x, w, product.spec), x_hat, w_hat)[1](gradient)
    value = None if w.value is None else dw.astype(w.dtype)
    # None: no cotangent, as for all integers, and for the scales, which the value doesn't depend on here
    dw = Quantized(value, None, None, w.grid, w.dtype)  # pyright: ignore[reportArgumentType]
    return _straight_through(product, inside, dx), dw, None


_integer_product.defvjp(_integer_product_fwd, _integer_product_bwd)
