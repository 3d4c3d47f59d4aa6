"""Keys and values as a cache holds them: floats, or codes of one byte and a scale for each token and head.

The grid is that of weights (`grid.py`), calibrated on one head of one token: nothing that a later token brings can
change it, so that a forward over a whole text rounds each key and value as generation did when it wrote it. A head that
is padding is zeros, and stays so.
"""

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
