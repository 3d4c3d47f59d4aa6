"""Grids below eight bits, eight-bit floats and the numbers of scales, against formulas in numpy and other libraries."""

from math import sqrt

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from exam import bits
from jax.sharding import NamedSharding, PartitionSpec

from research.quant.grid import GRIDS, calibrate, decode, encode, find_offset, round_scale

pytestmark = pytest.mark.optimized

SHAPE, SCALE_SHAPE = (61, 256), (61, 8)
FP8 = {"fp8_e4m3": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2}


def weights(seed: int = 0) -> np.ndarray:
    w = np.random.default_rng(seed).normal(0, 0.05, SHAPE).astype(np.float32)
    w[7, 32:64] = 0
    return w


def quantize(name: str, w: np.ndarray, **options: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return scale, codes, weight, in groups of 32, in one program."""

    @jax.jit
    def program(w: jax.Array) -> tuple[jax.Array | None, jax.Array, jax.Array]:
        scale = calibrate(GRIDS[name], w, SCALE_SHAPE, **options)  # pyright: ignore[reportArgumentType]
        offset = find_offset(GRIDS[name], w, SCALE_SHAPE)
        codes = encode(GRIDS[name], w, scale, offset)
        return scale, codes, decode(GRIDS[name], codes, scale, "float32", offset)

    scale, codes, w_hat = program(jnp.asarray(w))
    return np.asarray(scale), np.asarray(codes), np.asarray(w_hat)


def wide(scale: np.ndarray) -> np.ndarray:
    return np.repeat(scale.astype(np.float32), 32, axis=1)


@pytest.mark.parametrize(("name", "largest"), [("int4", 7), ("int3", 3)])
def test_symmetric_grids_equal_numpy(name: str, largest: int) -> None:
    w = weights()
    absmax = np.abs(w).reshape(61, 8, 32).max(axis=2)
    expected = np.where(absmax == 0, 1, absmax * np.float32(1 / largest)).astype(np.float16)
    scale, codes, w_hat = quantize(name, w)
    assert np.array_equal(bits(scale), bits(expected)) and set(codes.ravel()) == set(range(-largest, largest + 1))
    assert np.array_equal(codes, np.clip(np.round(w * (1 / wide(scale))), -largest, largest))
    assert np.array_equal(w_hat, codes * wide(scale))


def test_q4_0_is_that_of_gguf() -> None:
    """GGUF encodes with the scale not yet rounded to float16: a few codes differ, of what we write it loses nothing."""
    w = weights()
    kind = gguf.GGMLQuantizationType.Q4_0
    blocks = gguf.quants.quantize(w, kind).reshape(61, 8, 18)
    theirs = blocks[..., :2].copy().view(np.float16)[..., 0]
    scale, codes, w_hat = quantize("q4_0", w)
    zero = np.zeros(SCALE_SHAPE, bool)
    zero[7, 1] = True
    assert np.array_equal(bits(scale)[~zero], bits(theirs)[~zero]) and (scale < 0).any() and scale[7, 1] == 1
    nibbles = codes.reshape(61, 8, 32).astype(np.int16) + 8
    packed = (nibbles[..., :16] | nibbles[..., 16:] << 4).astype(np.uint8)
    assert 0 < (packed != blocks[..., 2:]).mean() < 0.01
    ours = np.concatenate([scale[..., None].view(np.uint8), packed], axis=-1).reshape(61, -1)
    assert np.array_equal(gguf.quants.dequantize(ours, kind), w_hat)
    again = gguf.quants.dequantize(gguf.quants.quantize(w_hat, kind), kind)
    assert np.array_equal(again, w_hat), "each block has its extreme code: GGUF's own quantizer keeps it"


def test_q4_1_is_that_of_gguf() -> None:
    """As for Q4_0: GGUF encodes with scale and offset not yet rounded; both are equal, and what we write is kept."""
    w = weights()
    w[3, 64:96] = 0.3  # equal weights: no extent, and scale 1 instead of a zero
    kind = gguf.GGMLQuantizationType.Q4_1
    blocks = gguf.quants.quantize(w, kind).reshape(61, 8, 20)
    theirs = blocks[..., :4].copy().view(np.float16)
    scale, codes, w_hat = quantize("q4_1", w)
    offset = np.asarray(find_offset(GRIDS["q4_1"], jnp.asarray(w), SCALE_SHAPE))
    flat = np.zeros(SCALE_SHAPE, bool)
    flat[7, 1] = flat[3, 2] = True
    # (max - min) / 15 there, · (1 / 15) here: an ulp of float32, which one float16 in many shows
    differ = bits(scale)[~flat] != bits(theirs[..., 0])[~flat]
    assert differ.mean() < 0.01 and (scale > 0).all() and (scale[flat] == 1).all()
    assert np.array_equal(bits(offset), bits(theirs[..., 1] + np.float16(0)))
    assert set(codes.ravel()) == set(range(16)) and not codes.reshape(61, 8, 32)[flat].any()
    assert (w_hat.reshape(61, 8, 32)[3, 2] == np.float16(0.3)).all() and not w_hat.reshape(61, 8, 32)[7, 1].any()
    assert np.array_equal(w_hat, codes * wide(scale) + wide(offset))
    packed = codes.reshape(61, 8, 32).astype(np.uint8)
    packed = packed[..., :16] | packed[..., 16:] << 4
    assert 0 < (packed != blocks[..., 4:])[~flat].mean() < 0.02
    numbers = np.stack([scale, offset], axis=-1).view(np.uint8)
    ours = np.concatenate([numbers, packed], axis=-1).reshape(61, -1)
    assert np.array_equal(gguf.quants.dequantize(ours, kind), w_hat)


def test_an_affine_grid_lies_between_the_smallest_and_the_largest_weight() -> None:
    """Also far from zero, and whatever the sign; within half a step and what float16 rounds of scale and offset."""
    for shift in (-0.5, 0.0, 0.5, 8.0):
        w = weights() + np.float32(shift)
        scale, _, w_hat = quantize("q4_1", w)
        bound = wide(scale) * (0.5 + 15 * 2.0**-11) + np.abs(w).max() * 2.0**-11
        assert (np.abs(w_hat - w) <= bound).all()


def test_int2_has_four_levels_and_zero_only_for_zeros() -> None:
    w = weights()
    scale, codes, w_hat = quantize("int2", w)
    assert set(codes[w != 0]) == {-3, -1, 1, 3} and not codes[7, 32:64].any() and not w_hat[7, 32:64].any()
    levels = np.array([-3, -1, 1, 3], np.float32)
    nearest = levels[np.abs((w / wide(scale))[..., None] - levels).argmin(axis=-1)]
    assert np.array_equal(codes[w != 0], nearest[w != 0])
    # Half of the step that is best for a normal distribution (Max 1960).
    assert scale[w.reshape(61, 8, 32).any(axis=2)].astype(np.float32).mean() == pytest.approx(0.05 * 0.4979, rel=0.01)


def test_ternary_is_that_of_bitnet() -> None:
    w = weights()
    scale, codes, _ = quantize("ternary", w)
    mean = np.abs(w.astype(np.float64)).reshape(61, 8, 32).mean(axis=2)
    real = mean > 0
    assert np.abs(scale[real] / mean[real] - 1).max() < 2.0**-11 + 1e-6  # half an ulp of float16
    assert set(codes.ravel()) == {-1, 0, 1} and np.array_equal(codes, np.clip(np.round(w * (1 / wide(scale))), -1, 1))


def test_means_do_not_count_padding() -> None:
    w = weights()
    padded = np.concatenate([w, np.zeros((61, 44), np.float32)], axis=1)
    plain, counted, all_counted = (
        np.asarray(calibrate(GRIDS["ternary"], jnp.asarray(x), (61, 1), elements=n), np.float32)
        for x, n in ((w, 0), (padded, 256), (padded, 0))
    )
    assert np.array_equal(plain, counted) and (all_counted < 0.9 * plain).all()


def test_means_are_the_same_bits_in_any_order(mesh_of) -> None:
    w = np.random.default_rng(2).normal(size=(512, 24)).astype(np.float32)
    found = []
    for order in (slice(None), slice(None, None, -1)):
        for spec in ((None, None), ("tensor", None)):
            placed = jax.device_put(w[order], NamedSharding(mesh_of(tensor=8), PartitionSpec(*spec)))
            scale = jax.jit(lambda w: calibrate(GRIDS["int2"], w, (1, 24)))(placed)
            found.append(bits(scale).tobytes())
    assert len(set(found)) == 1


@pytest.mark.parametrize("name", FP8)
def test_eight_bit_floats_equal_ml_dtypes(name: str) -> None:
    w = weights()
    scale, codes, w_hat = quantize(name, w)
    largest = float(ml_dtypes.finfo(FP8[name]).max)
    absmax = np.abs(w).reshape(61, 8, 32).max(axis=2)
    needed = absmax[absmax > 0].astype(np.float64) * np.float32(1 / largest)
    assert np.array_equal(scale[absmax > 0], np.maximum(2.0 ** np.ceil(np.log2(needed)), 2.0**-24).astype(np.float16))
    expected = (w / wide(scale)).astype(FP8[name])
    assert np.array_equal(bits(codes), bits(np.where(expected == 0, np.zeros_like(expected), expected)))
    assert np.array_equal(w_hat, codes.astype(np.float32) * wide(scale))


@pytest.mark.parametrize("name", FP8)
def test_eight_bit_floats_saturate(name: str) -> None:
    largest = float(ml_dtypes.finfo(FP8[name]).max)
    w = jnp.asarray([[1e30, -1e30, 0.0]], jnp.float32)
    codes = np.asarray(encode(GRIDS[name], w, jnp.ones((1, 1), jnp.float16)), np.float32)
    assert codes.tolist() == [[largest, -largest, 0.0]]


SIZES = np.float32(2.0) ** np.linspace(-30, 20, 2001).astype(np.float32)


def test_scales_of_bfloat16_are_float16_numbers_too() -> None:
    found = np.asarray(jax.jit(lambda x: round_scale(x, "bf16"))(SIZES), np.float64)
    inside = (SIZES >= 2.0**-17) & (SIZES <= 65280)
    assert np.array_equal(found[inside], SIZES[inside].astype(ml_dtypes.bfloat16).astype(np.float64))
    assert (found[SIZES < 2.0**-17] == 2.0**-17).all() and (found[SIZES > 65536] == 65504).all()


@pytest.mark.parametrize("up", [True, False])
def test_scales_of_powers_of_two(up: bool) -> None:
    found = np.asarray(jax.jit(lambda x: round_scale(x, "pow2", up=up))(SIZES), np.float64)
    inside = (SIZES > 2.0**-24) & (SIZES < 2.0**15)
    exponent = np.log2(found)
    assert (exponent == np.round(exponent)).all() and found.min() == 2.0**-24 and found.max() == 2.0**15
    ratio = found[inside] / SIZES[inside]
    low, high = (1.0, 2.0) if up else (sqrt(0.5), sqrt(2))
    assert ratio.min() >= low * (1 - 1e-6) and ratio.max() <= high * (1 + 1e-6)


def test_scale_of_nan_stays_nan() -> None:
    for numbers in ("fp16", "bf16", "pow2"):
        assert np.isnan(np.asarray(round_scale(jnp.float32([np.nan]), numbers), np.float32)).all()
    for name in ("int4", "q4_0", "q4_1", "int2", "fp8_e4m3"):
        w, grid = jnp.asarray([[np.nan, 1.0]], jnp.float32), GRIDS[name]
        scale, offset = calibrate(grid, w, (1, 1)), find_offset(grid, w, (1, 1))
        w_hat = decode(grid, encode(grid, w, scale, offset), scale, "float32", offset)
        assert np.isnan(np.asarray(w_hat)).all(), name


def test_coarser_grids_are_further_away() -> None:
    """Mean squared error of normal weights in groups of 32, relative to their variance."""
    w = np.random.default_rng(3).normal(size=SHAPE).astype(np.float32)
    errors = {
        name: float(np.mean((quantize(name, w)[2] - w) ** 2))
        for name in ("int8", "q4_1", "q4_0", "int4", "int3", "int2")
    }
    assert list(errors) == sorted(errors, key=lambda name: errors[name])
    assert errors["int2"] == pytest.approx(0.1188, rel=0.15)  # Max 1960 for four uniform levels and known variance
