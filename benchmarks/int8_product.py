"""The int8 kernel against XLA's int8 product and a bfloat16 one, in the shapes of Llama-3.2-1B: TOP/s, with scales.

First the outcomes of kernel and XLA are compared, bit for bit. The share is of the best that XLA reaches on the spot in
a plain product of 8192³ without scales, in int8 with both factors contracting on their last axis, or in bfloat16.
"as it lies": from the weight as the model has it, [d, c], which the kernel wants turned.

    Command:  python benchmarks/int8_product.py
              python benchmarks/int8_product.py --tiles 128,256,128,4,8 --tiles 64,256,128,4,8
    Hardware: one H100 or H200
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.architectures import ARCHITECTURES
from research.kernels.hopper import Tiles
from research.kernels.int8_product import int8_product, scaled

LLAMA = ARCHITECTURES["llama-3.2-1b"]
CEILING = (8192, 8192, 8192)
REPEATS, ROUNDS = 20, 5
BFLOAT16 = jnp.dtype("bfloat16")


def shapes(tokens: int) -> dict[str, tuple[int, int, int]]:
    """Return rows, inner size and columns of each product of a layer, and of a chunk of the head."""
    d, f = LLAMA.width, LLAMA.feed_forward
    q, kv = LLAMA.query_heads * LLAMA.head_width, LLAMA.kv_heads * LLAMA.head_width
    layer = {"q": (d, q), "k, v": (d, kv), "o": (q, d), "gate, up": (d, f), "down": (f, d)}
    head = {"head": (256, d, LLAMA.vocabulary)}  # train.loss_chunk positions at a time
    return {name: (tokens, *sizes) for name, sizes in layer.items()} | head


def _dot(subscripts: str, x: jax.Array, w: jax.Array) -> jax.Array:
    wide = jnp.int32 if x.dtype == jnp.int8 else x.dtype
    return jnp.einsum(subscripts, x, w, preferred_element_type=wide)


def _xla(subscripts: str, x: jax.Array, w: jax.Array, *scales: jax.Array) -> jax.Array:
    return scaled(BFLOAT16, _dot(subscripts, x, w), *scales)


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Return the median time of a call, of several that are queued one behind the other."""
    run, times = jax.jit(function), []
    jax.block_until_ready(run(*arguments))
    for _ in range(ROUNDS):
        started = time.perf_counter()
        jax.block_until_ready([run(*arguments) for _ in range(REPEATS)])
        times.append((time.perf_counter() - started) / REPEATS)
    return float(np.median(times))


def _arrays(r: int, d: int, c: int) -> tuple[jax.Array, ...]:
    """Return codes of x and of w, [r, d] and [c, d], and a scale for each row and column."""
    rng = np.random.default_rng(0)
    x_rd, w_cd = (rng.integers(-127, 128, (size, d), np.int8) for size in (r, c))
    s_x, s_w = (rng.uniform(1e-3, 2e-2, size).astype(np.float32) for size in (r, c))
    return tuple(map(jnp.asarray, (x_rd, w_cd, s_x, s_w)))


def rate(sizes: tuple[int, int, int], taken: float) -> float:
    """Return 10¹² operations a second; a multiplication and an addition are two."""
    return 2 * float(np.prod(sizes)) / taken / 1e12


def ceilings() -> dict[str, float]:
    """Measure what XLA reaches in a plain product, TOP/s by dtype."""
    x, w, *_ = _arrays(*CEILING)
    plain = partial(_dot, "rd,cd->rc")
    wide = x.astype(BFLOAT16), w.astype(BFLOAT16)
    return {"int8": rate(CEILING, seconds(plain, x, w)), "bfloat16": rate(CEILING, seconds(plain, *wide))}


def measure(sizes: tuple[int, int, int], tiles: list[Tiles | None]) -> dict[str, float]:
    """Return TOP/s by what multiplies; exits where the kernel's bits are others than XLA's."""
    x_rd, w_cd, *scales = _arrays(*sizes)
    w_dc, wide = jax.block_until_ready(w_cd.T), (x_rd.astype(BFLOAT16), w_cd.T.astype(BFLOAT16))
    expected = np.asarray(jax.jit(partial(_xla, "rd,cd->rc"))(x_rd, w_cd, *scales))
    found = {}
    for each in tiles:
        kernel = partial(int8_product, BFLOAT16, tiles=each)
        if not np.array_equal(np.asarray(jax.jit(kernel)(x_rd, w_cd, *scales)), expected):
            sys.exit(f"int8_product of {sizes} with {each}: other bits than XLA's")
        name = "kernel" if each is None else f"kernel, {each}"
        found[name] = seconds(kernel, x_rd, w_cd, *scales)
    as_it_lies = lambda x, w, *s: int8_product(BFLOAT16, x, w.T, *s)  # noqa: E731
    found["kernel, as it lies"] = seconds(as_it_lies, x_rd, w_dc, *scales)
    found["xla"] = seconds(partial(_xla, "rd,cd->rc"), x_rd, w_cd, *scales)
    found["xla, as it lies"] = seconds(partial(_xla, "rd,dc->rc"), x_rd, w_dc, *scales)
    found["bfloat16"] = seconds(partial(_dot, "rd,dc->rc"), *wide)
    return {name: rate(sizes, taken) for name, taken in found.items()}


def main() -> None:
    """Print a line of JSON for each shape: TOP/s, and the share of the ceiling."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384, help="rows of the products of a layer")
    parser.add_argument(
        "--tiles", action="append", default=[], help="rows,columns,inner,stages,beside; may be repeated"
    )
    arguments = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu":
        sys.exit(f"{device.device_kind}: the int8 kernel is for an H100 or H200; interpreted it is no measurement")
    tiles = [None, *(Tiles(*map(int, text.split(","))) for text in arguments.tiles)]
    best = ceilings()
    print(json.dumps({"device": device.device_kind, "ceiling": {name: round(top) for name, top in best.items()}}))
    for name, sizes in shapes(arguments.tokens).items():
        found = measure(sizes, tiles)
        shares = {
            of: f"{top:.0f} ({top / best['bfloat16' if of == 'bfloat16' else 'int8']:.0%})" for of, top in found.items()
        }
        print(json.dumps({"product": name, "rows, inner, columns": sizes} | shares), flush=True)


if __name__ == "__main__":
    main()
