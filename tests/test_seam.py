"""The seam: integer products that are exact on any mesh, one stated order after them, a straight-through gradient."""

import itertools
import re
from collections.abc import Callable
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.model.seam import einsum
from research.quant.activations import dequantize_tokens, quantize_tokens
from research.quant.grid import GRIDS, calibrate, encode
from research.quant.nodes import Encoded, Quantized, stored

SIZES = {"b": 4, "t": 3, "a": 3, "d": 64, "n": 8, "h": 32, "f": 128, "v": 12}
PRODUCTS = ["btd,dnh->btnh", "btnh,nhd->btd", "bad,vd->bav"]
GRANULARITIES = ["tensor", "channel", "group:32"]


def _shape(axes: str) -> tuple[int, ...]:
    return tuple(SIZES[axis] for axis in axes)


def _axes(subscripts: str) -> tuple[str, str, str]:
    x, w, y = re.fullmatch(r"(\w+),(\w+)->(\w+)", subscripts).groups()
    return x, w, y


def _normal(axes: str, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=_shape(axes)), jnp.float32)


def _x(subscripts: str, seed: int = 0, dtype: str = "float32") -> jax.Array:
    return _normal(_axes(subscripts)[0], seed).astype(dtype)


def _scale_shape(subscripts: str, granularity: str) -> tuple[int, ...]:
    """One scale for all, or for each output channel, or for 32 along the last contracted axis and each other index."""
    _, w, y = _axes(subscripts)
    if granularity == "tensor":
        return (1,) * len(w)
    if granularity == "channel":
        return tuple(SIZES[axis] if axis in y else 1 for axis in w)
    grouped = [axis for axis in w if axis not in y][-1]
    return tuple(SIZES[axis] // 32 if axis == grouped else SIZES[axis] for axis in w)


@lru_cache
def _w(subscripts: str, granularity: str = "channel", grid: str = "int8") -> Encoded:
    w = _normal(_axes(subscripts)[1], seed=7)
    scale = calibrate(GRIDS[grid], w, _scale_shape(subscripts, granularity)) if GRIDS[grid].is_scaled else None
    return Encoded(encode(GRIDS[grid], w, scale), scale, GRIDS[grid], "float32")


def _view(w: Encoded, value: jax.Array) -> Quantized:
    return Quantized(value, w.codes, w.scale, w.grid, w.dtype)


def _quantized(subscripts: str, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_axes, w_axes, _ = _axes(subscripts)
    return quantize_tokens(x, tuple(i for i, axis in enumerate(x_axes) if axis in w_axes))


@partial(jax.jit, static_argnums=0, static_argnames=("activation", "dtype"))
def _product(subscripts: str, x: jax.Array, w, activation: str = "int8", dtype: str | None = None) -> jax.Array:
    return einsum(subscripts, x, w, activation=activation, dtype=dtype)


def _terms(subscripts: str, x: jax.Array, w: Encoded) -> np.ndarray:
    """The product in numpy from the same codes, group by group: int64 sums · s_x · s_w in float32, [groups, …]."""
    x_axes, w_axes, y_axes = _axes(subscripts)
    x_codes, x_scale = (np.asarray(part) for part in _quantized(subscripts, x))
    w_scale = np.asarray(w.scale, np.float32)
    s_x = x_scale.reshape([SIZES[axis] if axis in x_axes else 1 for axis in y_axes])
    contracted = [i for i, axis in enumerate(w_axes) if axis not in y_axes]
    terms = []
    for group in np.ndindex(*[w_scale.shape[i] for i in contracted]):
        w_part, x_part, scale_part = ([slice(None)] * len(axes) for axes in (w_axes, x_axes, w_axes))
        for i, number in zip(contracted, group, strict=True):
            width = SIZES[w_axes[i]] // w_scale.shape[i]
            scale_part[i] = slice(number, number + 1)
            w_part[i] = x_part[x_axes.index(w_axes[i])] = slice(number * width, (number + 1) * width)
        factors = x_codes[tuple(x_part)], np.asarray(w.codes)[tuple(w_part)]
        sums = np.einsum(subscripts, *(codes.astype(np.int64) for codes in factors))
        s_w = w_scale[tuple(scale_part)].squeeze(tuple(contracted))
        terms.append(sums.astype(np.float32) * s_x * s_w.reshape((1,) * (sums.ndim - s_w.ndim) + s_w.shape))
    return np.stack(terms)


@pytest.mark.parametrize(
    "subscripts, granularity", [*itertools.product(PRODUCTS, ["channel", "group:32"]), (PRODUCTS[1], "tensor")]
)
def test_product_of_integers_is_numpys(subscripts: str, granularity: str) -> None:
    x, w = _x(subscripts), _w(subscripts, granularity)
    found, terms = np.asarray(_product(subscripts, x, stored(w))), _terms(subscripts, x, w)
    assert len(terms) == {"btd,dnh->btnh": 2, "btnh,nhd->btd": 8, "bad,vd->bav": 2}[subscripts] or len(terms) == 1
    if len(terms) == 1:
        np.testing.assert_array_equal(found, terms[0])  # the sum is an integer, and the epilogue has one order
    else:  # a float32 sum over groups in any order: half an ulp of the partial sum a term
        assert (np.abs(found - terms.sum(axis=0)) <= len(terms) * 2.0**-24 * np.abs(terms).sum(axis=0)).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_value_changes_nothing(granularity: str) -> None:
    """Training (value, codes, scale) and serving (codes, scale) are the same numbers."""
    x, w = _x("btnh,nhd->btd"), _w("btnh,nhd->btd", granularity)
    trained = _product("btnh,nhd->btd", x, _view(w, w.decode()))
    np.testing.assert_array_equal(trained, _product("btnh,nhd->btd", x, stored(w)))


@pytest.mark.parametrize("subscripts, granularity", [*((s, "channel") for s in PRODUCTS), (PRODUCTS[1], "group:32")])
def test_gradient_is_straight_through(subscripts: str, granularity: str) -> None:
    """That of a fake quantizer with the identity as its derivative: the plain product's, at x̂ and ŵ."""
    x, w = _x(subscripts), _w(subscripts, granularity)
    g = _normal(_axes(subscripts)[2], seed=3)

    @jax.jit
    def ours(x: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vjp(lambda x, v: einsum(subscripts, x, _view(w, v), activation="int8"), x, value)[1](g)

    @jax.jit
    def fake(x: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        x_hat = dequantize_tokens(*_quantized(subscripts, x), jnp.dtype("float32"))
        return jax.vjp(partial(jnp.einsum, subscripts), x_hat, value)[1](g)

    for found, expected in zip(ours(x, w.decode()), fake(x, w.decode()), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_float_weights_with_int8_activations_are_fake_quantized() -> None:
    subscripts = "btd,dnh->btnh"
    x, w = _x(subscripts), _normal("dnh", seed=7)
    g = _normal("btnh", seed=3)
    x_hat = dequantize_tokens(*_quantized(subscripts, x), jnp.dtype("float32"))
    y, vjp = jax.vjp(partial(einsum, subscripts, activation="int8"), x, w)
    expected, expected_vjp = jax.vjp(partial(jnp.einsum, subscripts), x_hat, w)
    np.testing.assert_array_equal(y, expected)
    assert np.abs(x_hat - x).max() > 0  # there is something to see
    for found, gradient in zip(vjp(g), expected_vjp(g), strict=True):
        np.testing.assert_array_equal(found, gradient)


def test_cast_grids_multiply_their_values() -> None:
    """A weight on the fp16 lattice has no integer codes: fake-quantized activations, or float ones."""
    subscripts = "bad,vd->bav"
    x, w = _x(subscripts), _w(subscripts, grid="fp16")
    x_hat = dequantize_tokens(*_quantized(subscripts, x), jnp.dtype("float32"))
    for activation, factor in (("int8", x_hat), ("none", x)):
        found = _product(subscripts, x, stored(w), activation=activation)
        np.testing.assert_array_equal(found, jnp.einsum(subscripts, factor, w.codes.astype(jnp.float32)))


def test_weight_only_int8_multiplies_the_decoded_weight() -> None:
    x, w = _x("bad,vd->bav"), _w("bad,vd->bav")
    found = _product("bad,vd->bav", x, stored(w), activation="none")
    np.testing.assert_array_equal(found, jnp.einsum("bad,vd->bav", x, w.decode()))


@pytest.mark.parametrize("granularity", ["channel", "group:32"])
def test_bfloat16_is_one_cast_at_the_end(granularity: str) -> None:
    x, w = _x("btnh,nhd->btd", dtype="bfloat16"), _w("btnh,nhd->btd", granularity)
    wide = _product("btnh,nhd->btd", x.astype(jnp.float32), stored(w))
    narrow = _product("btnh,nhd->btd", x, stored(w))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))
    np.testing.assert_array_equal(_product("btnh,nhd->btd", x, stored(w), dtype="float32"), wide)


def test_gradients_have_the_dtypes_of_what_they_belong_to() -> None:
    x, w = _x("btd,dnh->btnh", dtype="bfloat16"), _w("btd,dnh->btnh")
    for weight in (_view(w, w.decode()), w.decode()):
        y, vjp = jax.vjp(lambda x, v: einsum("btd,dnh->btnh", x, v, activation="int8"), x, weight)  # noqa: B023
        dx, dw = vjp(y)
        dw = dw.value if isinstance(dw, Quantized) else dw
        assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)


def test_zeros_stay_zeros_and_what_is_not_finite_stays_in_its_token() -> None:
    x = _x("btd,dnh->btnh").at[0, 0].set(0).at[1, 1, 5].set(jnp.nan).at[2, 2, 5].set(jnp.inf)
    y = np.asarray(_product("btd,dnh->btnh", x, stored(_w("btd,dnh->btnh"))))
    assert not y[0, 0].any()
    broken = ~np.isfinite(y).all(axis=(2, 3))
    np.testing.assert_array_equal(np.argwhere(broken), [[1, 1], [2, 2]])


def test_output_axes_in_another_order_are_refused() -> None:
    with pytest.raises(ValueError, match="the output must be 'btnh'"):
        einsum("btd,dnh->bnth", _x("btd,dnh->btnh"), jnp.ones(_shape("dnh")))


# mesh, where x, w and its scale lie: batch, output channels and contraction split, the last over all devices, too
LAYOUTS = [
    ({"data": 4}, ("data", None, None), (None, None)),
    ({"tensor": 4}, (None, None, None), (None, "tensor")),
    ({"tensor": 4}, (None, None, "tensor"), ("tensor", None)),
    ({"fsdp": 4}, ("fsdp", None, None), ("fsdp", None)),
    ({"data": 2, "fsdp": 2, "tensor": 2}, (("data", "fsdp"), None, "tensor"), ("tensor", "fsdp")),
]


@pytest.mark.parametrize("sizes, x_entries, w_entries", LAYOUTS, ids=lambda part: str(part).replace(" ", ""))
def test_sums_are_the_same_on_every_mesh(
    sizes: dict[str, int], x_entries: tuple, w_entries: tuple, mesh_of: Callable[..., Mesh]
) -> None:
    subscripts = "btf,fd->btd"
    x, w = _x(subscripts), _w(subscripts)
    expected = _terms(subscripts, x, w)[0]
    mesh = mesh_of(**sizes)
    put = lambda array, *entries: jax.device_put(array, NamedSharding(mesh, PartitionSpec(*entries)))  # noqa: E731
    with jax.set_mesh(mesh):
        x, codes, scale = put(x, *x_entries), put(w.codes, *w_entries), put(w.scale, None, w_entries[1])
        program = _product.lower(subscripts, x, Quantized(None, codes, scale, w.grid, w.dtype)).compile()
        found = program(x, Quantized(None, codes, scale, w.grid, w.dtype))
    np.testing.assert_array_equal(found, expected)
    reduced = re.findall(r"= (\w+)\[[^=]*all-reduce\(", program.as_text())
    contraction_split = w_entries[0] == "tensor"
    assert ("s32" in reduced) == contraction_split
    assert not contraction_split or "f32" in reduced  # a token's absolute maximum: exact, too
