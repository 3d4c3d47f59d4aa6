"""Keys and values as a cache holds them: floats, or codes of one byte and a scale for each token and head.

The grid is that of weights (`grid.py`), calibrated on one head of one token: nothing that a later token brings can
change it, so that a forward over a whole text rounds each key and value as generation did when it wrote it. A head that
is padding is zeros, and stays so.
"""

from functools import partial

import jax

from research.quant.grid import Grid, calibrate, encode
from research.quant.nodes import Encoded

Kept = jax.Array | Encoded


def keep(grid: Grid | None, x_bskh: jax.Array) -> Kept:
    """Return keys or values as the cache holds them: codes and scales, float16 [b, s, k, 1], or as they are."""
    if grid is None:
        return x_bskh
    scale_bsk1 = calibrate(grid, x_bskh, (*x_bskh.shape[:-1], 1))
    return Encoded(encode(grid, x_bskh, scale_bsk1), scale_bsk1, grid, x_bskh.dtype.name, grid.held_dtype)


def read_back(kept: Kept) -> jax.Array:
    """Return what `keep` was given, on its grid, in the dtype that it had."""
    return kept.decode() if isinstance(kept, Encoded) else kept


def keep_and_read_back(grid: Grid | None, x_bskh: jax.Array) -> jax.Array:
    """Return keys or values as they will be read back from the cache; the gradient passes unchanged."""
    return x_bskh if grid is None else _round(grid, x_bskh)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _round(grid: Grid, x_bskh: jax.Array) -> jax.Array:
    return read_back(keep(grid, x_bskh))


_round.defvjp(lambda grid, x_bskh: (_round(grid, x_bskh), None), lambda grid, _, gradient: (gradient,))
