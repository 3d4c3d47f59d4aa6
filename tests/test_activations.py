"""Int8 activations: the stated order of operations in numpy, on one device and with the contracted axis split."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from research.quant.activations import dequantize_tokens, quantize_static, quantize_tokens, statistic_of

pytestmark = pytest.mark.optimized

SHAPE = (3, 11, 4, 8)  # b t n h
BOTH = pytest.mark.parametrize("axes", [(3,), (2, 3)], ids=["one axis", "two axes"])


def activations(dtype: str = "float32") -> jax.Array:
    """Return tokens of very different size, one of them zero, one with an outlier."""
    rng = np.random.default_rng(2)
    x_btnh = rng.normal(size=SHAPE) * 10.0 ** rng.integers(-6, 6, (*SHAPE[:2], 1, 1))
    x_btnh[1, 4] = 0
    x_btnh[2, 5, 3, 7] = -3e38
    return jnp.asarray(x_btnh, dtype)


def in_numpy(x: np.ndarray, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and scale by the stated order, each operation rounded to float32."""
    absmax = np.maximum(np.abs(x).max(axis=axes, keepdims=True), np.float32(1e-30))
    return np.round(x * (np.float32(127) / absmax)).astype(np.int8), absmax * np.float32(1 / 127)


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_codes_and_scales_equal_the_stated_order(dtype: str, axes: tuple[int, ...]) -> None:
    x_btnh = activations(dtype)
    for quantize in (quantize_tokens, jax.jit(quantize_tokens, static_argnums=1)):
        codes, scale = quantize(x_btnh, axes)
        expected_codes, expected_scale = in_numpy(np.asarray(x_btnh).astype(np.float32), axes)
        assert codes.dtype == jnp.int8 and scale.dtype == jnp.float32
        assert np.array_equal(codes, expected_codes) and np.array_equal(scale, expected_scale)


def test_every_token_uses_all_codes_a_zero_token_none() -> None:
    codes, scale = quantize_tokens(activations(), (2, 3))
    largest = np.abs(np.asarray(codes, np.int32)).max(axis=(2, 3))
    assert largest[1, 4] == 0 and (np.delete(largest.ravel(), 11 + 4) == 127).all()
    assert np.isfinite(np.asarray(scale)).all() and (np.asarray(scale) > 0).all()
    assert np.count_nonzero(codes[2, 5]) == 1, "one outlier of 3e38 leaves nothing of its neighbours"
    assert codes[2, 5, 3, 7] == -127


def test_halves_round_to_even() -> None:
    codes, scale = quantize_tokens(jnp.asarray([[127, 0.5, 1.5, 2.5, -0.5, -1.5]], jnp.float32), (1,))
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2]] and scale.tolist() == [[1.0]]


def test_the_reciprocal_is_multiplied() -> None:
    """Near halves of a step, x / scale would round to another code now and then."""
    absmax_t1 = np.random.default_rng(3).uniform(0.1, 10, (200, 1)).astype(np.float32)
    x_td = np.concatenate([absmax_t1, absmax_t1 * (np.arange(127, dtype=np.float32) + 0.5) / 127], axis=1)
    codes, _ = jax.jit(quantize_tokens, static_argnums=1)(jnp.asarray(x_td), (1,))
    assert np.array_equal(codes, in_numpy(x_td, (1,))[0])
    assert not np.array_equal(codes, np.round(x_td / (absmax_t1 * np.float32(1 / 127)))), "no half tells them apart"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_static_codes_saturate(dtype: str) -> None:
    """round-half-even(x · (1 / scale)), each operation rounded to float32; what rounds to ±127 is not beyond."""
    x_btnh, scale = activations(dtype), np.float32(3.7)
    steps = np.asarray(x_btnh).astype(np.float32) * (np.float32(1) / scale)
    for quantize in (quantize_static, jax.jit(quantize_static)):
        codes, inside = quantize(x_btnh, jnp.full((1, 1, 1), scale))
        assert codes.dtype == jnp.int8 and inside.dtype == bool
        np.testing.assert_array_equal(codes, np.clip(np.round(steps), -127, 127))
        np.testing.assert_array_equal(inside, np.abs(steps) <= 127.5)
    assert 0 < inside.mean() < 1
    codes, inside = quantize_static(jnp.asarray([127.5, 127.6, -127.5, -128, 0.5, 1.5, np.nan]), jnp.ones(1))
    assert codes[:-1].tolist() == [127, 127, -127, -127, 0, 2]
    assert inside.tolist() == [True, False, True, False, True, True, False]


def test_statistics_are_spelled_in_the_activation() -> None:
    found = [statistic_of(f"int8{end}") for end in (":static:ema", ":static:99.9", ":static:100", "", ":group:32")]
    assert found == ["ema", "99.9", "100", "", ""]
    assert not any(map(statistic_of, ("int8:static:", "int8:static:max", "int8:static:9e1", "int8:static:-1")))


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_seen(broken: float) -> None:
    codes, scale = quantize_tokens(jnp.asarray([[1, broken, 2], [1, 2, 3]], jnp.float32), (1,))
    restored = np.asarray(dequantize_tokens(codes, scale, jnp.float32))
    assert np.isnan(restored[0]).any() and np.isfinite(restored[1]).all()


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_restored_activations_are_within_half_a_step(dtype: str, axes: tuple[int, ...]) -> None:
    x_btnh = activations()
    codes, scale = quantize_tokens(x_btnh, axes)
    restored = dequantize_tokens(codes, scale, jnp.dtype(dtype))
    product = np.asarray(codes).astype(np.float32) * np.asarray(scale)
    assert np.array_equal(restored, product.astype(np.float32 if dtype == "float32" else ml_dtypes.bfloat16))
    assert (np.abs(product - np.asarray(x_btnh)) <= (0.5 + 1e-4) * np.asarray(scale)).all()


@BOTH
@pytest.mark.parametrize("spec", [("tensor", None), (None, "tensor")], ids=["n split", "h split"])
def test_a_split_contraction_axis_changes_nothing(mesh_of, spec: tuple[str | None, ...], axes: tuple[int, ...]) -> None:
    mesh = mesh_of(data=2, tensor=4)
    x_btnh = activations()
    split = jax.device_put(x_btnh, NamedSharding(mesh, PartitionSpec(None, None, *spec)))
    assert not split.sharding.is_fully_replicated
    for ours, theirs in zip(
        jax.jit(quantize_tokens, static_argnums=1)(split, axes), quantize_tokens(x_btnh, axes), strict=True
    ):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_bigger_program_computes_the_same(mesh_of, devices: int) -> None:
    """Activations that come out of a product and go into the true integer product, with a residual added after it."""

    @jax.jit
    def program(a_bf: jax.Array, b_fd: jax.Array, codes_do: jax.Array, scale_o: jax.Array) -> tuple[jax.Array, ...]:
        x_bd = jax.nn.silu(a_bf @ b_fd) * 1.7
        codes_bd, scale_b1 = quantize_tokens(x_bd, (1,))
        sum_bo = jnp.einsum("bd,do->bo", codes_bd, codes_do, preferred_element_type=jnp.int32)
        out_bo = sum_bo.astype(jnp.float32) * scale_b1 * scale_o
        return x_bd, codes_bd, scale_b1, sum_bo, out_bo, out_bo + x_bd[:, :8]

    rng = np.random.default_rng(4)
    mesh = mesh_of(data=devices)
    a_bf, b_fd, scale_o = (rng.normal(size=shape).astype(np.float32) for shape in ((16, 5), (5, 40), (1, 8)))
    codes_do = rng.integers(-127, 128, (40, 8), dtype=np.int8)
    place = [NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data",), (None, "data"), ("data",), (None, None))]
    x, codes, scale, sums, out, _ = program(*jax.device_put((a_bf, b_fd, codes_do, scale_o), tuple(place)))
    expected_codes, expected_scale = in_numpy(np.asarray(x), (1,))
    assert np.array_equal(codes, expected_codes) and np.array_equal(scale, expected_scale)
    assert np.array_equal(sums, expected_codes.astype(np.int32) @ codes_do.astype(np.int32))
    assert np.array_equal(out, np.asarray(sums).astype(np.float32) * expected_scale * scale_o)
