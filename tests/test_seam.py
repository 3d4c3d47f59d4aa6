"""The seam: integer products that are exact on any mesh, one stated order after them, a straight-through gradient."""

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import quants
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.model.product import Route
from research.model.seam import einsum
from research.quant.activations import dequantize_tokens, quantize_groups, quantize_static, quantize_tokens
from research.quant.grid import GRIDS, calibrate, encode, find_offset
from research.quant.nodes import Encoded, Quantized, stored, view_of

pytestmark = pytest.mark.optimized

SIZES = {"b": 4, "t": 3, "a": 3, "d": 64, "n": 8, "h": 32, "f": 128, "v": 12}
PRODUCTS = ["btd,dnh->btnh", "btnh,nhd->btd", "bad,vd->bav"]
GRANULARITIES = ["tensor", "channel", "group:32"]
STATIC = "int8:static:ema"
INPUT_SCALE = 0.015  # every twentieth of the random activations lies beyond 127 of these steps


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
    shape = _scale_shape(subscripts, granularity)
    scale, offset = calibrate(GRIDS[grid], w, shape), find_offset(GRIDS[grid], w, shape)
    codes, inputs = encode(GRIDS[grid], w, scale, offset), jnp.full((1,) * w.ndim, INPUT_SCALE, jnp.float32)
    return Encoded(codes, scale, GRIDS[grid], "float32", GRIDS[grid].held_dtype, offset, inputs)


def _view(w: Encoded, value: jax.Array) -> Quantized:
    return view_of(w, value)


def _inside(x: jax.Array, activation: str) -> jax.Array:
    """What no static scale saturates."""
    return jnp.abs(x) <= 127.5 * INPUT_SCALE if activation == STATIC else jnp.ones(x.shape, bool)


def _quantized(subscripts: str, x: jax.Array, activation: str = "int8") -> tuple[jax.Array, jax.Array]:
    x_axes, w_axes, _ = _axes(subscripts)
    contracted = tuple(i for i, axis in enumerate(x_axes) if axis in w_axes)
    if activation == STATIC:
        scale = jnp.full([1 if i in contracted else size for i, size in enumerate(x.shape)], INPUT_SCALE, jnp.float32)
        return quantize_static(x, jnp.float32(INPUT_SCALE))[0], scale
    return quantize_tokens(x, contracted) if activation == "int8" else quantize_groups(x, contracted[-1], 32)


@partial(jax.jit, static_argnums=0, static_argnames=("activation", "dtype"))
def _product(subscripts: str, x: jax.Array, w, activation: str = "int8", dtype: str | None = None) -> jax.Array:
    return einsum(subscripts, x, w, activation=activation, dtype=dtype)


def _reference(subscripts: str, x: jax.Array, w: Encoded, activation: str = "int8") -> np.ndarray:
    """The product in numpy from the same codes: int64 sums · s_x · s_w, or Σ sum · (s_x · s_w), block after block.

    With offsets each block adds (Σ codes_x · s_x) · offset.
    """
    x_axes, w_axes, y_axes = _axes(subscripts)
    x_codes, x_scale = (np.asarray(part) for part in _quantized(subscripts, x, activation))
    w_codes, w_scale = np.asarray(w.codes), np.asarray(w.scale)
    contracted = [axis for axis in w_axes if axis not in y_axes]
    counts = [max(x_scale.shape[x_axes.index(axis)], w_scale.shape[w_axes.index(axis)]) for axis in contracted]

    def part(array: np.ndarray, letters: str, block: dict[str, int]) -> np.ndarray:
        for axis, count in zip(contracted, counts, strict=True):
            i = letters.index(axis)
            if array.shape[i] > 1:
                array = np.split(array, count, axis=i)[block[axis]]
        return array

    total = None
    for numbers in np.ndindex(*counts):
        block = dict(zip(contracted, numbers, strict=True))
        arrays = (x_codes, x_axes), (w_codes, w_axes), (x_scale, x_axes), (w_scale, w_axes)
        parts = [part(array, letters, block) for array, letters in arrays]
        sums = np.einsum(subscripts, *(codes.astype(np.int64) for codes in parts[:2])).astype(np.float32)
        s_x = parts[2].astype(np.float32).reshape([SIZES[axis] if axis in x_axes else 1 for axis in y_axes])
        s_w = parts[3].astype(np.float32)
        s_w = s_w.reshape([s_w.shape[w_axes.index(axis)] if axis in w_axes else 1 for axis in y_axes])
        term = sums * s_x * s_w if set(counts) == {1} and w.offset is None else sums * (s_x * s_w)
        total = term if total is None else total + term
        if w.offset is not None:
            offset = part(np.asarray(w.offset, np.float32), w_axes, block)
            offset = offset.reshape([offset.shape[w_axes.index(axis)] if axis in w_axes else 1 for axis in y_axes])
            inputs = tuple(i for i, axis in enumerate(x_axes) if axis in contracted)
            x_sums = parts[0].astype(np.int64).sum(axis=inputs).astype(np.float32)
            x_sums = x_sums.reshape([SIZES[axis] if axis in x_axes else 1 for axis in y_axes])
            total = total + (x_sums * s_x) * offset
    assert total is not None
    return total


WEIGHTS_AND_ACTIVATIONS = [
    ("int8", "channel", "int8"),
    ("int8", "group:32", "int8"),
    ("q4_0", "group:32", "int8:group:32"),
    ("int8", "channel", "int8:group:32"),
    ("q4_1", "group:32", "int8:group:32"),
]


FORMS = [
    *((PRODUCTS[1], form) for form in [*WEIGHTS_AND_ACTIVATIONS, ("int8", "tensor", "int8")]),
    *itertools.product([PRODUCTS[0], PRODUCTS[2]], WEIGHTS_AND_ACTIVATIONS[::2]),
    (PRODUCTS[1], ("int8", "group:32", STATIC)),
]


@pytest.mark.parametrize("subscripts, form", FORMS, ids=lambda part: str(part).replace(" ", ""))
def test_product_of_integers_is_numpys(subscripts: str, form: tuple[str, str, str]) -> None:
    """Sums are integers, and what comes after them has one order, which no fused operation changes."""
    grid, granularity, activation = form
    x, w = _x(subscripts), _w(subscripts, granularity, grid)
    found = _product(subscripts, x, stored(w), activation=activation)
    np.testing.assert_array_equal(found, _reference(subscripts, x, w, activation))


@pytest.mark.parametrize("subscripts, form", FORMS, ids=lambda part: str(part).replace(" ", ""))
def test_a_token_alone_is_what_it_is_among_others(subscripts: str, form: tuple[str, str, str]) -> None:
    """Generation multiplies one row, with zeros beside it: two are several times faster on a CPU, and no other bits."""
    grid, granularity, activation = form
    x, w = _x(subscripts), stored(_w(subscripts, granularity, grid))
    alone, among = x[1:2, 2:3], _product(subscripts, x, w, activation=activation)
    found = _product(subscripts, alone, w, activation=activation)
    np.testing.assert_array_equal(found, among[1:2, 2:3])
    program = str(jax.make_jaxpr(partial(_product, subscripts, activation=activation))(alone, w))
    shapes = re.findall(r":i32\[([\d,]+)\] = dot_general", program)
    assert {math.prod(map(int, shape.split(","))) for shape in shapes} == {2 * found.size}


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_value_changes_nothing(granularity: str) -> None:
    """Training (value, codes, scale) and serving (codes, scale) are the same numbers."""
    x, w = _x("btnh,nhd->btd"), _w("btnh,nhd->btd", granularity)
    for activation in ("int8", "int8:group:32", STATIC):
        trained = _product("btnh,nhd->btd", x, _view(w, w.decode()), activation=activation)
        np.testing.assert_array_equal(trained, _product("btnh,nhd->btd", x, stored(w), activation=activation))


STRAIGHT = [
    *((subscripts, "channel", "int8") for subscripts in PRODUCTS),
    (PRODUCTS[1], "group:32", "int8"),
    (PRODUCTS[1], "group:32", "int8:group:32"),
    (PRODUCTS[1], "channel", STATIC),
]


@pytest.mark.parametrize("subscripts, granularity, activation", STRAIGHT)
def test_gradient_is_straight_through(subscripts: str, granularity: str, activation: str) -> None:
    """That of a fake quantizer with the identity as its derivative: the plain product's, at x̂ and ŵ.

    Of a static one, which clips, the derivative is 0 beyond its range.
    """
    x, w = _x(subscripts), _w(subscripts, granularity)
    g = _normal(_axes(subscripts)[2], seed=3)

    @jax.jit
    def ours(x: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vjp(lambda x, v: einsum(subscripts, x, _view(w, v), activation=activation), x, value)[1](g)

    @jax.jit
    def fake(x: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        x_hat = dequantize_tokens(*_quantized(subscripts, x, activation), jnp.dtype("float32"))
        dx, dw = jax.vjp(partial(jnp.einsum, subscripts), x_hat, value)[1](g)
        return jnp.where(_inside(x, activation), dx, 0), dw

    assert bool(_inside(x, activation).all()) == (activation != STATIC)
    for found, expected in zip(ours(x, w.decode()), fake(x, w.decode()), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("activation", ["int8", "int8:group:32"])
def test_float_weights_with_int8_activations_are_fake_quantized(activation: str) -> None:
    subscripts = "btd,dnh->btnh"
    x, w = _x(subscripts), _normal("dnh", seed=7)
    g = _normal("btnh", seed=3)
    x_hat = dequantize_tokens(*_quantized(subscripts, x, activation), jnp.dtype("float32"))
    y, vjp = jax.vjp(partial(einsum, subscripts, activation=activation), x, w)
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
    clipped = dequantize_tokens(*_quantized(subscripts, x, STATIC), jnp.dtype("float32"))
    for activation, factor in (("int8", x_hat), ("none", x), (STATIC, clipped)):
        found = _product(subscripts, x, stored(w), activation=activation)
        np.testing.assert_array_equal(found, jnp.einsum(subscripts, factor, w.codes.astype(jnp.float32)))


def test_cast_grids_have_the_clipped_gradient_with_a_static_scale() -> None:
    subscripts = "bad,vd->bav"
    x, w, g = _x(subscripts), _w(subscripts, grid="fp16"), _normal("bav", seed=3)
    dx = jax.vjp(lambda x: einsum(subscripts, x, _view(w, w.decode()), activation=STATIC), x)[1](g)[0]
    expected = jax.vjp(lambda x: jnp.einsum(subscripts, x, w.decode()), x)[1](g)[0]
    np.testing.assert_array_equal(dx, jnp.where(_inside(x, STATIC), expected, 0))


def test_a_static_scale_comes_with_the_weight() -> None:
    w = _w("bad,vd->bav")
    for weight in (w.decode(), replace(stored(w), input_scale=None)):
        with pytest.raises(ValueError, match="'int8:static:ema' needs a weight with an input_scale"):
            einsum("bad,vd->bav", _x("bad,vd->bav"), weight, activation=STATIC)


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


def test_a_static_scale_shows_what_is_not_finite_in_training() -> None:
    """Serving saves the reduction that this takes, and gives the other tokens the same bits."""
    w, x = _w("btd,dnh->btnh"), _x("btd,dnh->btnh")
    broken = x.at[1, 1, 5].set(jnp.nan).at[2, 2, 5].set(jnp.inf).at[0, 0].set(0)
    trained = np.asarray(_product("btd,dnh->btnh", broken, _view(w, w.decode()), activation=STATIC))
    np.testing.assert_array_equal(np.argwhere(~np.isfinite(trained).all(axis=(2, 3))), [[1, 1], [2, 2]])
    served = np.asarray(_product("btd,dnh->btnh", broken, stored(w), activation=STATIC))
    others = np.isfinite(trained)
    np.testing.assert_array_equal(served[others], trained[others])
    assert not served[0, 0].any()


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
    expected = _reference(subscripts, x, w)
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


def test_serving_with_a_static_scale_looks_for_no_maximum(mesh_of: Callable[..., Mesh]) -> None:
    """With a split contraction the integer sums are all that devices exchange; a dynamic scale is a maximum more."""
    subscripts, mesh = "btf,fd->btd", mesh_of(tensor=4)
    x, w = _x(subscripts), _w(subscripts)
    put = lambda array, *entries: jax.device_put(array, NamedSharding(mesh, PartitionSpec(*entries)))  # noqa: E731
    with jax.set_mesh(mesh):
        split = replace(stored(w), codes=put(w.codes, "tensor"), scale=put(w.scale), input_scale=put(w.input_scale))
        arguments = put(x, None, None, "tensor"), split
        program = _product.lower(subscripts, *arguments, activation=STATIC).compile()
        found = program(*arguments)
    np.testing.assert_array_equal(found, _reference(subscripts, x, w, STATIC))
    assert re.findall(r"= (\w+)\[[^=]*all-reduce\(", program.as_text()) == ["s32"]


BLOCKED = [
    pytest.param(
        {"fsdp": 2, "tensor": 2},
        ("fsdp", None, None),
        ("fsdp", "tensor", None),
        ("fsdp", None, "tensor", None),
        PRODUCTS[0],
        id="columns",
    ),
    pytest.param(
        {"tensor": 4},
        (None, None, "tensor"),
        ("tensor", None),
        (None, None, None),
        "btf,fd->btd",
        id="rows",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("sizes, x_spec, w_spec, y_spec, subscripts", BLOCKED)
def test_blocks_on_a_mesh(
    sizes: dict[str, int], x_spec: tuple, w_spec: tuple, y_spec: tuple, subscripts: str, mesh_of: Callable[..., Mesh]
) -> None:
    """The same bits where no device holds a part of the sum only; codes, not floats, are made whole for it."""
    x, w = _x(subscripts), _w(subscripts, "group:32")
    expected, mesh = _reference(subscripts, x, w, "int8:group:32"), mesh_of(**sizes)
    put = lambda array, spec: jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731

    @jax.jit
    def product(x: jax.Array, w: Quantized) -> jax.Array:
        w_used = (None if entry == "fsdp" else entry for entry in w_spec)
        route = Route(*(PartitionSpec(*spec) for spec in (x_spec, x_spec, w_spec, w_used, y_spec)))
        return einsum(subscripts, x, w, activation="int8:group:32", route=route)

    with jax.set_mesh(mesh):
        split = Quantized(None, put(w.codes, w_spec), put(w.scale, w_spec), w.grid, w.dtype)
        program = product.lower(put(x, x_spec), split).compile()
        found = np.asarray(program(put(x, x_spec), split))
    rows_split = x_spec[-1] == "tensor"
    moved = set(re.findall(r"= (\w+)\[[^=]*(all-reduce|all-gather)\(", program.as_text()))
    assert moved == ({("f32", "all-reduce")} if rows_split else {("s8", "all-gather"), ("f16", "all-gather")})
    if rows_split:  # four sums of one block each, added in an order of the mesh's: half an ulp of a partial sum a time
        size = np.abs(_reference(subscripts, jnp.abs(x), _positive(w), "int8:group:32"))
        assert (np.abs(found - expected) <= 4 * 2.0**-24 * size).all()
    else:
        np.testing.assert_array_equal(found, expected)


def _positive(w: Encoded) -> Encoded:
    return Encoded(jnp.abs(w.codes), w.scale, w.grid, w.dtype, w.held_dtype)


@pytest.mark.parametrize("type", [Type.Q8_0, Type.Q4_0])
def test_groups_are_what_llama_cpp_computes(type: Type) -> None:
    """Blocks of both sides as the `gguf` package makes and decodes them: Σ sum · (d_x · d_w), in their order."""
    x_rk, w_ck = (np.asarray(_normal(axes, seed)) for axes, seed in (("tf", 1), ("df", 2)))
    x_blocks, w_blocks = quants.quantize(x_rk, Type.Q8_0), quants.quantize(w_ck, type)
    x_codes, x_scale = _codes(x_blocks, Type.Q8_0)
    w_codes, w_scale = _codes(w_blocks, type)
    decoded = w_codes.reshape(*w_scale.shape, 32) * w_scale.astype(np.float32)[..., None]
    np.testing.assert_array_equal(decoded.reshape(w_ck.shape), quants.dequantize(w_blocks, type))
    found_codes, found_scale = quantize_groups(jnp.asarray(x_rk), 1, 32)
    np.testing.assert_array_equal(found_codes, x_codes)
    np.testing.assert_array_equal(found_scale, x_scale)
    expected = np.float32(0)
    for block in range(x_scale.shape[1]):
        part = slice(32 * block, 32 * block + 32)
        sums = (x_codes[:, part].astype(np.int32) @ w_codes[:, part].T.astype(np.int32)).astype(np.float32)
        expected = expected + sums * (x_scale[:, block, None].astype(np.float32) * w_scale[:, block].astype(np.float32))
    grid = GRIDS["int8" if type == Type.Q8_0 else "q4_0"]
    w = Quantized(None, jnp.asarray(w_codes), jnp.asarray(w_scale), grid, "float32")
    np.testing.assert_array_equal(_product("tf,df->td", jnp.asarray(x_rk), w, activation="int8:group:32"), expected)


def _codes(blocks: np.ndarray, type: Type) -> tuple[np.ndarray, np.ndarray]:
    """Return codes, int8 [r, k], and scales, float16 [r, k / 32], of the bytes of rows of blocks."""
    blocks = blocks.reshape(len(blocks), -1, {Type.Q8_0: 34, Type.Q4_0: 18}[type])
    scale, packed = np.ascontiguousarray(blocks[:, :, :2]).view(np.float16)[:, :, 0], blocks[:, :, 2:]
    if type == Type.Q4_0:
        packed = np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.int8) - np.int8(8)
    return packed.astype(np.int8, casting="unsafe").reshape(len(blocks), -1), scale


def test_groups_of_two_axes_that_are_no_neighbours_are_refused() -> None:
    w = Encoded(jnp.ones((8, 3, 32), jnp.int8), jnp.ones((8, 3, 1), jnp.float16), GRIDS["int8"], "float32", "int8")
    with pytest.raises(ValueError, match="'nh' must be neighbours in 'nah'"):
        einsum("btnh,nah->bta", _x("btnh,nhd->btd"), stored(w), activation="int8:group:32")
