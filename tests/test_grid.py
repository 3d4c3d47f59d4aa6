"""The numerics of the grids against formulas written in numpy, for ordinary, extreme and all weights."""

import gguf
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from exam import bits
from hypothesis import given

from research.quant.grid import GRIDS, calibrate, decode, encode, spread

pytestmark = pytest.mark.optimized

INT8 = GRIDS["int8"]
CASTS = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16}
SHAPE = (3, 64)
SCALE_SHAPES = {"tensor": (1, 1), "channel": (3, 1), "group": (3, 2)}
EACH_SCALE_SHAPE = pytest.mark.parametrize("scale_shape", SCALE_SHAPES.values(), ids=SCALE_SHAPES)
# Magnitudes from 1e-38 to 1e30 and zeros of both signs, mixed; XLA takes float32 subnormals for zero.
WEIGHTS = arrays.arrays(np.float32, SHAPE, elements=st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False))
# Below this scale a float16 holds fewer than eight bits.
SMALLEST_EXACT_SCALE = 2.0**-17


@jax.jit
def quantize_all(w: jax.Array) -> dict:
    """Return {granularity: (scale, codes, weight)} on the int8 grid, in one program."""
    found = {}
    for name, scale_shape in SCALE_SHAPES.items():
        scale = calibrate(INT8, w, scale_shape)
        codes = encode(INT8, w, scale)
        found[name] = scale, codes, decode(INT8, codes, scale, "float32")
    return found


def in_numpy(w: np.ndarray, scale_shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return scale, codes and weight: absmax · (1/127) as float16; round(w · (1/scale)), half to even; code · scale."""
    rows, blocks = scale_shape
    absmax = np.abs(w).reshape(rows, -1, blocks, 64 // blocks).max(axis=(1, 3))
    step = np.clip(absmax * np.float32(1 / 127), 2.0**-24, 65504)
    scale = np.where(absmax == 0, 1, step).astype(np.float16)
    wide = np.repeat(scale.astype(np.float32), 64 // blocks, axis=1)
    codes = np.clip(np.round(w * (np.float32(1) / wide)), -127, 127).astype(np.int8)
    return scale, codes, codes * wide


@given(w=WEIGHTS)
def test_int8_equals_numpy(w: np.ndarray) -> None:
    for name, found in quantize_all(w).items():
        for ours, theirs in zip(found, in_numpy(w, SCALE_SHAPES[name]), strict=True):
            assert ours.dtype == theirs.dtype and np.array_equal(bits(ours), bits(theirs)), name


@given(w=WEIGHTS)
def test_int8_is_within_half_a_step(w: np.ndarray) -> None:
    """Half a step, and what the rounding of the scale to float16 cuts off the largest weights."""
    for scale, codes, w_hat in quantize_all(w).values():
        step = np.asarray(spread(scale.astype(jnp.float32), SHAPE)).astype(np.float64)
        cut_off = np.maximum(np.abs(w) - 127 * step, 0)
        assert (np.abs(np.asarray(w_hat, np.float64) - w) <= (0.5 + 1e-5) * step + cut_off).all()
        assert np.isfinite(w_hat).all() and (np.abs(np.asarray(codes, np.int32)) <= 127).all()
        assert not np.signbit(np.asarray(w_hat)[np.asarray(codes) == 0]).any()


@given(w=arrays.arrays(np.float32, SHAPE, elements=st.floats(-100, 100, width=32, allow_subnormal=False)))
def test_int8_is_idempotent(w: np.ndarray) -> None:
    for name, (scale, codes, w_hat) in quantize_all(w).items():
        again_scale, again_codes, _ = quantize_all(w_hat)[name]
        exact = np.asarray(scale) >= SMALLEST_EXACT_SCALE
        assert np.array_equal(np.asarray(again_scale)[exact], np.asarray(scale)[exact])
        changed = (again_codes != codes) & np.asarray(spread(jnp.asarray(exact), SHAPE))
        assert not changed.any()
        assert np.array_equal(encode(INT8, w_hat, scale), codes), "the stored scale reads every weight back"


def test_every_float16_scale_survives_calibration() -> None:
    scales = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16)
    largest_of = jnp.asarray(127 * scales.astype(np.float32))[:, None]
    assert np.array_equal(calibrate(INT8, largest_of, (len(scales), 1))[:, 0], scales)


@EACH_SCALE_SHAPE
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e4, 1e30, np.inf])
def test_extreme_weights(size: float, scale_shape: tuple[int, ...]) -> None:
    w = np.zeros(SHAPE, np.float32)
    w[:, ::5], w[1, 3] = -1, 0.5
    w *= np.float32(min(size, 1e30))
    w[0, 0] = size
    scale = calibrate(INT8, jnp.asarray(w), scale_shape)
    codes = encode(INT8, jnp.asarray(w), scale)
    w_hat = np.asarray(decode(INT8, codes, scale, "float32"))
    assert np.isfinite(np.asarray(scale)).all() and (np.asarray(scale) > 0).all() and np.isfinite(w_hat).all()
    assert not np.signbit(w_hat[w_hat == 0]).any()
    expected = {1e-30: 0.0, 1e30: 127 * 65504.0, np.inf: 127 * 65504.0}.get(size, size)
    assert w_hat[0, 0] == pytest.approx(expected, rel=0.03)


@EACH_SCALE_SHAPE
def test_nan_is_seen(scale_shape: tuple[int, ...]) -> None:
    """An int8 code can't be NaN; hidden in a code, a broken latent would become a weight of zero."""
    w = np.ones(SHAPE, np.float32)
    w[1, 40] = np.nan
    scale = calibrate(INT8, jnp.asarray(w), scale_shape)
    w_hat = decode(INT8, encode(INT8, jnp.asarray(w), scale), scale, "bfloat16")
    block = spread(jnp.isnan(scale), SHAPE)
    assert np.array_equal(np.isnan(np.asarray(w_hat, np.float32)), np.broadcast_to(block, SHAPE))
    assert bool(jnp.isnan(scale).sum() == 1)


@pytest.mark.parametrize("blocks", [1, 2, 64], ids=["channel", "group", "full"])
def test_int8_multiplies_by_the_reciprocal_whatever_shape_the_scale_has(blocks: int) -> None:
    """Halves of a step tell a product with 1/scale from a division, which XLA would choose between by shape."""
    rng = np.random.default_rng(0)
    scale = rng.uniform(1e-4, 1, (101, blocks)).astype(np.float16)
    wide = np.repeat(scale.astype(np.float32), 64 // blocks, axis=1)
    w = (rng.integers(-127, 127, (101, 64)) + np.float32(0.5)).astype(np.float32) * wide
    expected = np.round(w * (np.float32(1) / wide))
    for encode_with in (encode, jax.jit(encode, static_argnums=0)):
        assert np.array_equal(encode_with(INT8, jnp.asarray(w), jnp.asarray(scale)), expected)
    assert not np.array_equal(expected, np.round(w / wide)), "no half tells them apart"


def test_int8_rounds_halves_to_even() -> None:
    w = jnp.arange(-126.5, 127, dtype=jnp.float32)[None] / 4
    codes = encode(INT8, w, jnp.full((1, 1), 0.25, jnp.float16))
    assert np.array_equal(codes, np.round(np.arange(-126.5, 127))[None])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_int8_decodes_to_the_rounded_product(dtype: str) -> None:
    codes = np.tile(np.arange(-127, 128, dtype=np.int8), (7, 1))
    scale = np.array([[2.0**-24], [0.001], [0.0123], [1], [3.14], [77], [500]], np.float16)
    ours = jax.jit(lambda codes, scale: decode(INT8, codes, scale, dtype))(codes, scale)
    theirs = (codes.astype(np.float32) * scale.astype(np.float32)).astype(jnp.dtype(dtype))
    assert np.array_equal(bits(ours), bits(np.where(codes == 0, np.zeros_like(theirs), theirs)))


def test_updates_land_exactly_while_the_scale_changes_at_most_32_times() -> None:
    """The lattice argument: p + (q - p) == q in float32, for all pairs of codes."""
    p_code, q_code = (jnp.asarray(c, jnp.int8) for c in np.meshgrid(np.arange(-127, 128), np.arange(-127, 128)))
    apply = jax.jit(
        lambda p, q: (p.astype(jnp.float32) + (q.astype(jnp.float32) - p.astype(jnp.float32))).astype(p.dtype)
    )
    for ratio in (1 / 32, 0.9772, 1, 1.0007, 31.97):
        for size in (0.001234, 0.0317):
            scales = [jnp.full((1, 1), value, jnp.float16) for value in (size, size * ratio)]
            for dtype in ("float32", "bfloat16"):
                p, q = (decode(INT8, c, s, dtype) for c, s in zip((p_code, q_code), scales, strict=True))
                assert np.array_equal(bits(apply(p, q)), bits(q)), (ratio, size, dtype)


# Cast grids


@pytest.mark.parametrize("name", CASTS)
def test_every_number_of_a_cast_grid_is_its_own_code(name: str) -> None:
    numbers = np.arange(2**16, dtype=np.uint16).view(CASTS[name])
    finite = numbers[np.isfinite(numbers.astype(np.float32))]
    codes = np.asarray(jax.jit(lambda w: encode(GRIDS[name], w, None))(finite.astype(np.float32)))
    # XLA treats float32 subnormals as zero; only bfloat16 has such numbers.
    zero = np.abs(finite.astype(np.float32)) < np.finfo(np.float32).tiny
    assert np.array_equal(bits(codes)[~zero], bits(finite)[~zero])
    assert not bits(codes)[zero].any(), "negative zeros and subnormals are zero"
    assert np.array_equal(bits(encode(GRIDS[name], codes.astype(np.float32), None)), bits(codes))


@pytest.mark.parametrize("name", CASTS)
@given(w=arrays.arrays(np.float32, 97, elements=st.floats(width=32, allow_subnormal=False, allow_nan=False)))
def test_casts_round_to_even_and_stop_at_the_largest_number(name: str, w: np.ndarray) -> None:
    largest = float(ml_dtypes.finfo(CASTS[name]).max)
    expected = np.clip(w, -largest, largest).astype(CASTS[name])
    expected = np.where(expected == 0, np.zeros_like(expected), expected)
    assert np.array_equal(bits(encode(GRIDS[name], jnp.asarray(w), None)), bits(expected))


@pytest.mark.parametrize("name", CASTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_casts_have_no_scale_keep_nan_and_have_no_negative_zero(name: str, dtype: str) -> None:
    w = jnp.asarray([np.nan, -0.0, -1e-12, -1e-30, 0.5], jnp.float32)

    @jax.jit
    def there_and_back(w: jax.Array) -> tuple[jax.Array, jax.Array]:
        codes = encode(GRIDS[name], w, calibrate(GRIDS[name], w, ()))
        return codes, decode(GRIDS[name], codes, None, dtype)

    for x in there_and_back(w):
        x = np.asarray(x, np.float32)
        assert np.isnan(x[0]) and x[4] == 0.5 and not np.signbit(x[x == 0]).any()


# Blocks


@pytest.mark.parametrize(
    ("shape", "scale_shape"),
    [((), ()), ((5,), (1,)), ((4, 6, 3), (4, 2, 3)), ((4, 6, 3), (2, 1, 3)), ((1, 6), (1, 6)), ((2, 1, 9), (2, 1, 3))],
)
def test_a_scale_covers_its_block_and_no_other(shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> None:
    w = np.random.default_rng(5).normal(size=shape).astype(np.float32)
    scale = np.asarray(calibrate(INT8, jnp.asarray(w), scale_shape))
    wide = np.broadcast_to(spread(jnp.asarray(scale), shape), shape)
    for index in np.ndindex(scale_shape):
        block = tuple(
            slice(i * size // blocks, (i + 1) * size // blocks)
            for i, size, blocks in zip(index, shape, scale_shape, strict=True)
        )
        assert scale[index] == np.float16(np.abs(w[block]).max() * np.float32(1 / 127))
        assert (wide[block] == scale[index]).all()


# GGUF


def test_groups_of_32_against_gguf_q8_0() -> None:
    """GGUF divides by the scale not yet rounded to float16, through a reciprocal, and rounds halves away from zero.

    So its scales are ours, but a few of its codes are not; what we write in its format, it reads without loss.
    """
    w = np.random.default_rng(0).normal(0, 0.05, (61, 256)).astype(np.float32)
    w[7, 32:64] = 0
    blocks = gguf.quants.quantize(w, gguf.GGMLQuantizationType.Q8_0).reshape(61, 8, 34)
    theirs_scale, theirs_codes = blocks[..., :2].copy().view(np.float16)[..., 0], blocks[..., 2:].view(np.int8)
    scale = np.asarray(calibrate(INT8, jnp.asarray(w), (61, 8)))
    codes = np.asarray(encode(INT8, jnp.asarray(w), jnp.asarray(scale)))
    assert theirs_scale[7, 1] == 0 and scale[7, 1] == 1, "a block of zeros: any scale will do"
    assert np.array_equal(np.delete(scale.ravel(), 7 * 8 + 1), np.delete(theirs_scale.ravel(), 7 * 8 + 1))
    difference = np.abs(codes.reshape(61, 8, 32).astype(int) - theirs_codes.astype(int))
    assert difference.max() == 1 and 0 < difference.mean() < 0.01

    ours = np.concatenate([scale[..., None].view(np.uint8), codes.reshape(61, 8, 32).view(np.uint8)], axis=-1)
    read = gguf.quants.dequantize(ours.reshape(61, 8 * 34), gguf.GGMLQuantizationType.Q8_0)
    w_hat = decode(INT8, jnp.asarray(codes), jnp.asarray(scale), "float32")
    assert np.array_equal(bits(read), bits(w_hat))


# The compiler


def test_a_bigger_program_computes_the_same() -> None:
    """Weights that come out of a product and go into one, quantized in between, all in one program."""

    @jax.jit
    def program(a: jax.Array, b: jax.Array) -> tuple[jax.Array, ...]:
        w = jnp.tanh(a @ b) * 0.37 - 0.01
        scale = calibrate(INT8, w, SCALE_SHAPES["group"])
        codes = encode(INT8, w, scale)
        w_hat = decode(INT8, codes, scale, "bfloat16")
        half = decode(GRIDS["fp16"], encode(GRIDS["fp16"], w, None), None, "float32")
        return (
            w,
            scale,
            codes,
            w_hat,
            half,
            w_hat.astype(jnp.float32) @ b.T,
            (w_hat - w_hat[:1]) + half.astype(jnp.bfloat16),
        )

    rng = np.random.default_rng(1)
    w, scale, codes, w_hat, half, *_ = program(rng.normal(size=(3, 17)), rng.normal(size=(17, 64)))
    expected_scale, expected_codes, expected = in_numpy(np.asarray(w), SCALE_SHAPES["group"])
    assert np.array_equal(scale, expected_scale) and np.array_equal(codes, expected_codes)
    assert np.array_equal(bits(w_hat), bits(expected.astype(ml_dtypes.bfloat16)))
    assert np.array_equal(half, np.asarray(w).astype(np.float16).astype(np.float32))
