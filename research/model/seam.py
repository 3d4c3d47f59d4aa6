"""The one place where an activation meets a weight: float, fake-quantized, or as a true product of integers.

Where both sides are int8 the product is `(Σ codes_x · codes_w) · s_x · s_w`, the sum in int32, in training and in
serving alike; so the numbers that are trained are the numbers that are served, bit for bit. With groups along the
contraction there is one such product for each group, and they are added in float32.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from research.quant.activations import dequantize_tokens, quantize_tokens
from research.quant.nodes import Quantized, Weight, dense


def einsum(
    subscripts: str,
    x: jax.Array,
    w: Weight,
    *,
    activation: str = "none",
    dtype: jnp.dtype | None = None,
    spec: PartitionSpec | None = None,
) -> jax.Array:
    """Return the product of an activation and a weight, e.g. "btd,dnh->btnh", in `dtype` (default: that of `x`).

    The output has the axes that are kept of the activation, then those kept of the weight. `activation`: "none", or
    "int8" = symmetric per token. `spec`: sharding of the output; only Explicit mesh axes need it. The backward pass is
    the straight-through estimator: dL/dx uses the weight on its grid, dL/dw the quantized activation.
    """
    product = _Product(subscripts, x.dtype, jnp.dtype(dtype or x.dtype), spec or PartitionSpec())
    if activation == "int8" and isinstance(w, Quantized) and w.grid.code_dtype == "int8":
        return _integer_product(product, x, w)
    x = x.astype(product.dtype) if activation == "none" else _fake_quantize(product, x)
    return _einsum(subscripts, x, dense(w).astype(product.dtype), product.spec)


def explicit(spec: PartitionSpec) -> PartitionSpec | None:
    """Return `spec` where the axes of the mesh in context are Explicit, None where the compiler chooses."""
    return spec if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types else None


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


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fake_quantize(product: _Product, x: jax.Array) -> jax.Array:
    """Round each token to its int8 grid; the gradient passes unchanged."""
    return dequantize_tokens(*quantize_tokens(x, product.contracted), product.dtype)


_fake_quantize.defvjp(
    lambda product, x: (_fake_quantize(product, x), None),
    lambda product, _, gradient: (gradient.astype(product.x_dtype),),
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _integer_product(product: _Product, x: jax.Array, w: Quantized) -> jax.Array:
    return _forward(product, *quantize_tokens(x, product.contracted), w)


def _forward(product: _Product, x_codes: jax.Array, x_scale: jax.Array, w: Quantized) -> jax.Array:
    """Integer sums, then · s_x, then · s_w, then the sum over groups, in float32; one cast at the end.

    A contracted axis with several scales is split into (groups, within a group); its upper-case letter is its groups.
    """
    assert w.scale is not None
    rows, columns = product.rows, product.columns
    blocks = {axis: n for axis, n in zip(product.w, w.scale.shape, strict=True) if axis in product.x and n > 1}
    groups = "".join(blocks).upper()
    x_axes, x_codes = _split(product.x, x_codes, blocks)
    w_axes, w_codes = _split(product.w, w.codes, blocks)
    spec = PartitionSpec(*[None] * len(groups), *product.spec)
    sums = _einsum(f"{x_axes},{w_axes}->{groups}{rows}{columns}", x_codes, w_codes, spec, "int32")
    # the scales' axes over which there is nothing to sum have size 1
    s_x = x_scale.squeeze(product.contracted)
    s_w = jnp.einsum(f"{_upper(product.w, groups)}->{groups}{columns}", whole(w.scale.astype(jnp.float32)))
    s_x = jnp.expand_dims(s_x, [*range(len(groups)), *range(-len(columns), 0)])
    s_w = jnp.expand_dims(s_w, [*range(len(groups), len(groups) + len(rows))])
    return (sums.astype(jnp.float32) * s_x * s_w).sum(axis=tuple(range(len(groups)))).astype(product.dtype)


def _split(axes: str, codes: jax.Array, blocks: dict[str, int]) -> tuple[str, jax.Array]:
    """Return the axes' new letters and `codes` with each axis in `blocks` split into (its number of blocks, within)."""
    shape: list[int] = []
    for axis, size in zip(axes, codes.shape, strict=True):
        shape += (blocks[axis], size // blocks[axis]) if axis in blocks else (size,)
    return "".join(axis.upper() + axis if axis in blocks else axis for axis in axes), codes.reshape(shape)


def _upper(axes: str, groups: str) -> str:
    return "".join(axis.upper() if axis.upper() in groups else axis for axis in axes)


def _integer_product_fwd(product: _Product, x: jax.Array, w: Quantized):
    x_codes, x_scale = quantize_tokens(x, product.contracted)
    # eight bits a residual instead of the thirty-two of the float activation
    return _forward(product, x_codes, x_scale, w), (x_codes, x_scale, w)


def _integer_product_bwd(product: _Product, residuals: tuple[jax.Array, jax.Array, Quantized], gradient: jax.Array):
    x_codes, x_scale, w = residuals
    x_hat, w_hat = dequantize_tokens(x_codes, x_scale, product.dtype), w.dense().astype(product.dtype)
    # jax's own transposition, so that the gradient is bit for bit that of the fake-quantized product
    dx, dw = jax.vjp(lambda x, w: _einsum(product.subscripts, x, w, product.spec), x_hat, w_hat)[1](gradient)
    value = None if w.value is None else dw.astype(w.dtype)
    # None: no cotangent, as for all integers, and for the scale, which the value doesn't depend on here
    return dx.astype(product.x_dtype), Quantized(value, None, None, w.grid, w.dtype)  # pyright: ignore[reportArgumentType]


_integer_product.defvjp(_integer_product_fwd, _integer_product_bwd)
