"""Attention by blocks against a whole matrix of scores: seconds of a forward and backward pass, and bytes it takes.

The shape is SmolLM2's: 9 query and 3 key/value heads of 64. The two alternate, so that whatever else the machine does
meets both; medians.

    Command:  python benchmarks/attention.py
    Hardware: whatever jax finds; one device
"""

import argparse
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from research.model.attention import BLOCK, How, Sight, attend, in_order, mutual, visible

N, K, H = 9, 3, 64
SHAPES = ((8, 128), (2, 512), (1, 1024), (1, 2048))  # b, t


def at_once(q_btnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, sight: Sight) -> jax.Array:
    """Return attention from all scores of a forward at once, [b, t, n, h]."""
    b, t, _, _ = q_btnh.shape
    q_btkgh = q_btnh.reshape(b, t, K, N // K, H)
    score_bkgts = jnp.einsum("btkgh,bskh->bkgts", q_btkgh, k_bskh) * H**-0.5
    score_bkgts = jnp.where(visible(*sight)[:, None, None], score_bkgts, jnp.finfo(jnp.float32).min)
    share_bkgts = jax.nn.softmax(score_bkgts, axis=-1)
    return jnp.einsum("bkgts,bskh->btkgh", share_bkgts, v_bskh).reshape(b, t, N, H)


def by_blocks(block: int) -> Any:
    """Return the same function by blocks of so many tokens."""
    whole = PartitionSpec(None, None, None, None)
    return lambda q, k, v, sight: attend(How(whole, whole, None, block), q, k, v, *sight)


def main() -> None:
    """Print a line for each shape, then one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="of each kind and shape, after two to warm up")
    steps = parser.parse_args().steps
    variants = {
        "at once": at_once,
        **{f"blocks of {block}": by_blocks(block) for block in (BLOCK // 2, BLOCK, 2 * BLOCK)},
    }
    rows = []
    for b, t in SHAPES:
        rng = np.random.default_rng(0)
        arrays = [jnp.asarray(rng.normal(size=(b, t, heads, H)), jnp.float32) for heads in (N, K, K, N)]
        sight = mutual(in_order(jnp.zeros((b, t), jnp.int32)))

        def run(function: Any, q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array, sight: Sight) -> Any:
            out, pull = jax.vjp(lambda *x: function(*x, sight), q, k, v)
            return out, pull(gradient)

        programs = {
            name: jax.jit(run, static_argnums=0).lower(f, *arrays, sight).compile() for name, f in variants.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(steps + 2):
            for name, program in programs.items():
                started = time.perf_counter()
                jax.block_until_ready(program(*arrays, sight))
                seconds[name].append(time.perf_counter() - started)
        row = {"b": b, "t": t}
        for name, program in programs.items():
            memory = program.memory_analysis()
            row[name] = {"seconds": float(np.median(seconds[name][2:])), "bytes": memory.temp_size_in_bytes}
        rows.append(row)
        found = ", ".join(
            f"{name} {1e3 * row[name]['seconds']:.1f} ms {row[name]['bytes'] / 2**20:.1f} MiB" for name in programs
        )
        print(f"{b} x {t} tokens: {found}", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
