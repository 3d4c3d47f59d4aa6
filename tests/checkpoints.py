"""What the tests of checkpoints share: bitwise comparison, special values, and the saving of one checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.train.checkpoint import Checkpointer


def bits(x: Any) -> bytes:
    """Return shape, dtype and content of an array: equal only if every bit is."""
    x = np.asarray(x)
    return repr((x.shape, x.dtype)).encode() + x.tobytes()


def special(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> np.ndarray:
    """Return random numbers among which are -0.0, infinities, a subnormal and a NaN with a payload."""
    x = np.random.default_rng(seed).normal(size=shape).astype(dtype)
    if np.dtype(dtype).kind != "i":
        x.reshape(-1)[:4] = np.array([-0.0, np.inf, -np.inf, np.finfo(np.float16).smallest_subnormal], dtype)
        x.reshape(-1).view(f"u{x.itemsize}")[4] |= np.array(0x7FC5 if x.itemsize == 2 else 0x7FC00123, f"u{x.itemsize}")
    return x


def quiet(line: str) -> None:
    """Take a report and drop it."""


def save(directory: Path, step: int, items: Any, score: float | None = None, keep: int = 9) -> Path:
    """Save one checkpoint and wait for it."""
    with Checkpointer(directory, keep, quiet) as checkpointer:
        checkpointer.save(step, items, {"step": step}, score=score)
    return directory / f"{step:08d}"


def tiny(value: float = 1.0) -> dict[str, Any]:
    return {"weights": {"w": jnp.full((4,), value)}}


def one_line(call: Callable[[], Any]) -> str:
    """Return the one line of the `UserError` that `call` raises."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)
