"""Backward products of integers: exact from their codes, right on average, the same on every mesh, other noise anew."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training as tiny
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.config import Rule
from research.model.product import Route
from research.model.seam import einsum
from research.quant.activations import dequantize_tokens, quantize_tokens
from research.quant.gradients import gradient_seed, round_at_random
from research.quant.grid import GRIDS, calibrate, encode
from research.quant.nodes import Quantized
from research.quant.noise import at_index
from research.quant.policy import Format
from research.setup import put_batch

RULE = Rule(match=".*", weight="int8", activation="int8", backward="int8")
W8A8_BACKWARD = (RULE,)
SIZES = {"b": 4, "t": 3, "a": 3, "d": 64, "n": 8, "h": 32, "f": 128, "v": 12}
PRODUCTS = ["btd,dnh->btnh", "btnh,nhd->btd", "bad,vd->bav"]


def _letters(subscripts: str) -> tuple[str, str, str]:
    factors, y = subscripts.split("->")
    return *factors.split(","), y


def _normal(axes: str, seed: int) -> jax.Array:
    shape = tuple(SIZES[axis] for axis in axes)
    # Values of many sizes, as gradients have them: most are small beside the largest of their row and column.
    return jnp.asarray(np.random.default_rng(seed).standard_t(2, size=shape), jnp.float32)


def _weight(subscripts: str, grid: str = "int8", seed: int | None = 5) -> Quantized:
    """Return a weight of one scale a channel; `seed` None: with backward products of floats."""
    _, axes, y = _letters(subscripts)
    shape = tuple(SIZES[axis] if axis in y else 1 for axis in axes)
    w = _normal(axes, 7)
    scale = calibrate(GRIDS[grid], w, shape)
    codes = encode(GRIDS[grid], w, scale, None)
    noise = None if seed is None else jax.random.bits(jax.random.key(seed), shape, jnp.uint32)
    found = Quantized(None, codes, scale, GRIDS[grid], "float32", seed=noise)
    return replace(found, value=found.dense())


@partial(jax.jit, static_argnums=0)
def _gradients(subscripts: str, x: jax.Array, w: Quantized, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    def of(x: jax.Array, value: jax.Array) -> jax.Array:
        return einsum(subscripts, x, replace(w, value=value), activation="int8")

    return jax.vjp(of, x, w.value)[1](g)


def _reference(subscripts: str, x: jax.Array, w: Quantized, g: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Both gradients in numpy: int64 sums of the codes of factors and of the rounded gradient, then its scale."""
    x_axes, w_axes, y_axes = _letters(subscripts)
    rows = [i for i, axis in enumerate(y_axes) if axis not in w_axes]
    columns = [i for i, axis in enumerate(y_axes) if axis in w_axes]
    x_codes, x_scale = quantize_tokens(x, tuple(i for i, axis in enumerate(x_axes) if axis in w_axes))
    s_x = np.asarray(x_scale).reshape([SIZES[axis] if axis in x_axes else 1 for axis in y_axes])
    s_w, seed = (
        np.asarray(part).reshape([SIZES[axis] if axis in w_axes else 1 for axis in y_axes])
        for part in (w.scale, w.seed)
    )
    index = np.arange(np.prod([g.shape[i] for i in rows]), dtype=np.uint32)
    index = index.reshape([size if i in rows else 1 for i, size in enumerate(g.shape)])
    noise = np.asarray(at_index(jnp.asarray(seed), jnp.asarray(index)))

    def product(other: str, codes: jax.Array, scaled: np.ndarray, over: list[int], bits: np.ndarray, out: str):
        g_codes, g_scale = round_at_random(jnp.asarray(scaled), tuple(over), jnp.asarray(bits.astype(np.uint16)))
        sums = np.einsum(f"{y_axes},{other}->{out}", np.asarray(g_codes, np.int64), np.asarray(codes, np.int64))
        scale = np.asarray(g_scale).reshape(
            [SIZES[a] if a in y_axes and y_axes.index(a) not in over else 1 for a in out]
        )
        return sums.astype(np.float32) * scale

    g = np.asarray(g)
    dx = product(w_axes, w.codes, g * s_w.astype(np.float32), columns, noise, x_axes)
    return dx, product(x_axes, x_codes, g * s_x, rows, noise >> 16, w_axes)


@pytest.mark.parametrize("subscripts", PRODUCTS)
@pytest.mark.optimized
def test_both_products_are_of_integers(subscripts: str) -> None:
    x, g = (_normal(axes, seed) for seed, axes in enumerate((_letters(subscripts)[0], _letters(subscripts)[2])))
    w = _weight(subscripts)
    for found, expected in zip(_gradients(subscripts, x, w, g), _reference(subscripts, x, w, g), strict=True):
        np.testing.assert_array_equal(found, expected)
    program = _gradients.lower(subscripts, x, w, g).as_text()
    # The forward product isn't needed for gradients: two are left.
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) == 2 and all("xi8>" in line and "xi32>" in line for line in products)


@pytest.mark.parametrize("subscripts, grid", [(PRODUCTS[0], "int8"), (PRODUCTS[1], "int4"), (PRODUCTS[2], "int8")])
@pytest.mark.optimized
def test_gradients_are_right_on_average(subscripts: str, grid: str) -> None:
    """Their mean over many seeds is the straight-through gradient of floats, within what so many can tell."""
    x, g = (_normal(axes, seed) for seed, axes in enumerate((_letters(subscripts)[0], _letters(subscripts)[2])))
    count = 1000

    def one(seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        w = _weight(subscripts, grid)
        assert w.seed is not None
        bits = jax.random.bits(seed, w.seed.shape, jnp.uint32)
        return _gradients(subscripts, x, replace(w, seed=bits), g)

    found = jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.key(0), count))
    expected = _gradients(subscripts, x, _weight(subscripts, grid, seed=None), g)
    for many, mean in zip(found, expected, strict=True):
        error = np.asarray(many.std(axis=0)) / count**0.5
        # Where every rounding is certain there is no spread, but float32's own.
        error = np.maximum(error, 1e-6 * np.abs(np.asarray(mean)).max())
        z = np.asarray(many.mean(axis=0) - mean) / error
        # Thousands of elements of unit variance: their mean square is 1 within a few percent, none is beyond 6.
        assert 0.8 < np.square(z).mean() < 1.2 and np.abs(z).max() < 6


# mesh; where x lies and is used, w lies and is used, y lies
MESHES = [
    ({"data": 4}, ["data,,", "data,,", ",", ",", "data,,"]),
    ({"tensor": 4}, [",,", ",,", ",tensor", ",tensor", ",,tensor"]),
    ({"tensor": 4}, [",,tensor", ",,tensor", "tensor,", "tensor,", ",,"]),
    ({"fsdp": 4}, ["fsdp,,", "fsdp,,", "fsdp,", ",", "fsdp,,"]),
    ({"fsdp": 2, "tensor": 4}, ["fsdp,,tensor", "fsdp,,tensor", "tensor,fsdp", "tensor,", "fsdp,,"]),
]  # fmt: skip


def _spec(told: str) -> PartitionSpec:
    return PartitionSpec(*(tuple(entry.split()) or None for entry in told.split(",")))


@pytest.mark.parametrize("sizes, told", MESHES, ids=str)
@pytest.mark.optimized
def test_gradients_are_the_same_on_every_mesh(
    sizes: dict[str, int], told: list[str], mesh_of: Callable[..., Mesh]
) -> None:
    subscripts, mesh, route = "btf,fd->btd", mesh_of(**sizes), Route(*map(_spec, told))
    x, w, g = _normal("btf", 0), _weight("btf,fd->btd"), _normal("btd", 1)
    expected = _reference(subscripts, x, w, g)
    put = lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec))  # noqa: E731

    @jax.jit
    def gradients(x: jax.Array, w: Quantized, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        def of(x: jax.Array, value: jax.Array) -> jax.Array:
            return einsum(subscripts, x, replace(w, value=value), activation="int8", route=route)

        return jax.vjp(of, x, w.value)[1](g)

    with jax.set_mesh(mesh):
        vector = PartitionSpec(None, route.w[1])
        parts = put(w.value, route.w), put(w.codes, route.w), put(w.scale, vector)
        split = Quantized(*parts, w.grid, w.dtype, seed=put(w.seed, vector))
        found = gradients(put(x, route.x), split, put(g, route.y))
    for ours, reference in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, reference)


def test_what_is_not_finite_is_told() -> None:
    """A gradient that is not finite leaves its token's and its channel's gradients so, for the step to be skipped."""
    subscripts = "btd,dnh->btnh"
    x, w, g = _normal("btd", 0), _weight(subscripts), _normal("btnh", 1)
    for bad in (jnp.nan, jnp.inf):
        dx, dw = _gradients(subscripts, x, w, g.at[1, 2, 3, 4].set(bad))
        assert not np.isfinite(dx[1, 2]).any() and not np.isfinite(dw[:, 3, 4]).any()
        assert np.isfinite(np.delete(dx.reshape(12, -1), 5, axis=0)).all()


def test_noise_is_another_one_for_each_step_micro_batch_layer_channel_and_row() -> None:
    form = Format(GRIDS["int8"], (2, 1, 6), "channel", RULE, path="layers/mlp/up_df")
    seeds = [
        np.asarray(gradient_seed(replace(form, path=path), jnp.int32(step), part))
        for path in ("layers/mlp/up_df", "layers/mlp/gate_df")
        for step in (0, 1)
        for part in (0, 24)
    ]
    assert len(set(np.concatenate(seeds, axis=None).tolist())) == 8 * 2 * 6
    noise = np.asarray(at_index(jnp.asarray(seeds[0][0]), jnp.arange(500, dtype=jnp.uint32)[:, None]))
    assert len(set(noise.ravel().tolist())) == noise.size
    for bits in (noise & 0xFFFF, noise >> 16):  # of 3,000 fair coins, 5 standard deviations
        assert abs((bits >= 2**15).mean() - 0.5) < 5 * 0.5 / noise.size**0.5


def test_rules_of_floats_have_no_seed() -> None:
    assert gradient_seed(Format(GRIDS["int8"], (1, 6), "channel", tiny.W8A8[0]), jnp.int32(0), 0) is None


@pytest.fixture(scope="module")
def losses() -> list[float]:
    return tiny.start(W8A8_BACKWARD).advance(5)


@pytest.mark.optimized
def test_training_goes_as_with_gradients_of_floats(losses: list[float]) -> None:
    straight = tiny.start(tiny.W8A8).advance(5)
    assert losses[0] == straight[0]  # the forward pass is the same
    assert losses[1:] != straight[1:]
    # The noise is about 1 % of a gradient, and a step changes the loss by up to 10 %.
    np.testing.assert_allclose(losses, straight, rtol=5e-3)


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "tensor": 4}, pytest.param({"fsdp": 4}, marks=pytest.mark.slow)], ids=str
)
def test_training_is_the_same_on_meshes(sizes: dict[str, int], losses: list[float]) -> None:
    """With padding, too: noise goes by the place without it. Stages see pieces of a micro-batch, and round those."""
    bounds = tiny.w8a8_bounds(5)
    deviation = np.abs(np.array(tiny.start(W8A8_BACKWARD, **sizes).advance(5)) / losses - 1)
    assert (deviation <= bounds).all(), deviation


@pytest.mark.parametrize("rules, differs", [(tiny.W8A8, False), (W8A8_BACKWARD, True)], ids=["float", "int8"])
@pytest.mark.optimized
def test_a_micro_batch_that_comes_again_is_rounded_otherwise(rules: tuple[Rule, ...], differs: bool) -> None:
    run = tiny.start(rules, train=replace(tiny.TRAIN, accumulate=2))
    rows = put_batch(run.split(tiny.batch())[0], run.mesh)
    with jax.set_mesh(run.mesh):
        once = jax.device_get(run.step.add(run.state, rows, run.step.zeros()).gradients)
        twice = jax.device_get(run.step.add(run.state, rows, run.step.add(run.state, rows, run.step.zeros())).gradients)
    for first, both in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        if first.ndim > 2:  # matrices of the layers
            # Of floats the second is the first to the bit, and their sum is twice the first.
            assert np.array_equal(both, 2 * first) != differs
            np.testing.assert_allclose(both, 2 * first, atol=0.1 * np.abs(first).max())


@pytest.mark.optimized
def test_without_a_seed_products_keep_gradients_of_floats() -> None:
    """The activation's codes are what dL/dw is taken with: x̂ of the forward pass, not x."""
    subscripts = PRODUCTS[0]
    x, w, g = _normal("btd", 0), _weight(subscripts, seed=None), _normal("btnh", 1)
    x_hat = dequantize_tokens(*quantize_tokens(x, (2,)), jnp.dtype("float32"))
    expected = jax.vjp(partial(jnp.einsum, subscripts), x_hat, w.value)[1](g)
    for found, reference in zip(_gradients(subscripts, x, w, g), expected, strict=True):
        np.testing.assert_array_equal(found, reference)
