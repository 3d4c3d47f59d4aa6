"""Where a static scale of activations comes from: the range of each of many texts, and an average over the texts.

The range of a text is its largest magnitude ("ema"), or a percentile of its magnitudes; of the latter, what is beyond
saturates. A range per text and not per batch, so that neither the size of a batch, which a mesh may round up, nor the
padding of its rows changes it; maxima and counts are order-free, so that equal activations have equal ranges on every
mesh, bit for bit.
"""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from research.quant.activations import LARGEST_CODE
from research.quant.policy import Format

EMA_DECAY = 0.99
"""Weight of a text in the moving average, relative to that of the next one."""


def uncalibrated(form: Format) -> jax.Array | None:
    """Return what stands for a static scale until it is known: NaN, so that no product comes out of it."""
    return None if form.input_scale_shape is None else jnp.full(form.input_scale_shape, jnp.nan, jnp.float32)


def text_ranges(statistic: str, x: jax.Array, real_bt: jax.Array, elements: int) -> jax.Array:
    """Return the range of each row of the activation `x`, [b, t, …], float32 [b]; not finite if an element isn't.

    `statistic`: as `statistic_of` gives it. `real_bt`: boolean, the tokens that count. `elements`: of a token, without
    padding, which is zero. A percentile is that of the nearest rank, counted from the largest.
    """
    within = tuple(range(1, x.ndim))
    counts = real_bt.reshape(*real_bt.shape, *[1] * (x.ndim - 2))
    sizes = jnp.where(counts, jnp.abs(x.astype(jnp.float32)), 0)
    largest_b = sizes.max(axis=within)
    if statistic == "ema":
        return largest_b
    beyond = float((100 - Fraction(statistic)) / 100)
    larger_b = jnp.floor(real_bt.sum(axis=1).astype(jnp.float32) * elements * beyond).astype(jnp.int32)
    return jnp.where(jnp.isfinite(largest_b), _largest_but(sizes, larger_b, within), largest_b)


def _largest_but(sizes: jax.Array, larger_b: jax.Array, within: tuple[int, ...]) -> jax.Array:
    """Return, for each row, the largest magnitude but `larger_b` of them.

    Bit by bit, since magnitudes have the order of their bits: a bit is set if more elements than that reach the number.
    No sort: that would gather what the mesh splits; and a count of integers is exact in any order.
    """
    bits = jax.lax.bitcast_convert_type(sizes, jnp.int32)

    def add_bit(index: jax.Array, found_b: jax.Array) -> jax.Array:
        candidate_b = found_b | (1 << (30 - index))
        reach_b = (bits >= candidate_b.reshape(-1, *[1] * len(within))).sum(axis=within, dtype=jnp.int32)
        return jnp.where(reach_b > larger_b, candidate_b, found_b)

    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, add_bit, jnp.zeros_like(larger_b)), jnp.float32)


def static_scale(statistic: str, ranges: np.ndarray) -> np.ndarray:
    """Return the scale, float32 […], for the ranges of texts, […, e], in their order; 1 where all of them are zero.

    "ema": their exponential moving average without the bias of its start; a percentile: their mean.
    """
    decay = EMA_DECAY if statistic == "ema" else 1.0
    weight_e = decay ** np.arange(ranges.shape[-1])[::-1]
    average = (ranges.astype(np.float64) * weight_e).sum(axis=-1) / weight_e.sum()
    return np.where(average == 0, 1, average / LARGEST_CODE).astype(np.float32)
