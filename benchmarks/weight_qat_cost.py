"""What quantization-aware training of weights costs: an int8 step against a float step, one after the other.

Both train the same foundation on the same rows; weights are int8 per channel, activations float. Steps alternate, so
that whatever else the machine does meets both; the cost is the median of the ratios of neighbours.

    Command:  python benchmarks/weight_qat_cost.py
    Hardware: whatever jax finds; one device
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from research.config import MeshConfig, OptimizerConfig, Rule, TrainConfig
from research.foundation import Foundation, load_foundation
from research.mesh import make_mesh, prepare_devices
from research.model.placement import place_float
from research.setup import make_setup, put_batch
from research.tasks.batches import window_batch
from research.train.step import make_optimizer, make_state, make_step

RULES = {"float": (), "int8 weights": (Rule(match="layers/(attention|mlp)/.*|(embed|head)/table_vd", weight="int8"),)}


def make_runner(rules: tuple[Rule, ...], foundation: Foundation, batch: Any, mesh: Mesh) -> Callable[[], float]:
    """Return a function that takes one step and returns its seconds."""
    optimizer, budget = OptimizerConfig(), TrainConfig(steps=1000, batch_size=len(batch.tokens_bt), accumulate=1)
    setup = make_setup(foundation.architecture, rules, budget, mesh)
    tx = make_optimizer(optimizer, budget, setup.policy, setup.table)
    state = make_state(tx, place_float(foundation.read, setup.table, mesh), setup.table, mesh)
    step = make_step(setup.graph, tx, optimizer, budget, setup.table, mesh, state)
    rows = put_batch(batch, mesh)

    def run() -> float:
        nonlocal state
        started = time.perf_counter()
        state, metrics = step(state, [rows])
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - started

    return run


def main() -> None:
    """Alternate the steps and print medians, the ratio and its spread, then one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--foundation", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="of a row")
    parser.add_argument(
        "--steps", type=int, default=15, help="of each kind, after one that compiles and one to warm up"
    )
    flags = parser.parse_args()
    prepare_devices(MeshConfig())
    foundation, mesh = load_foundation(flags.foundation), make_mesh(MeshConfig())
    rng = np.random.default_rng(0)
    windows = rng.integers(0, foundation.architecture.vocabulary, (flags.rows, flags.tokens)).astype(np.int32)
    batch = window_batch(list(windows), flags.rows, flags.tokens)
    with jax.set_mesh(mesh):
        runners = {name: make_runner(rules, foundation, batch, mesh) for name, rules in RULES.items()}
        for _ in range(2):
            _ = [run() for run in runners.values()]
        seconds = np.array([[run() for run in runners.values()] for _ in range(flags.steps)])
    ratios = seconds[:, 1] / seconds[:, 0]
    low, median, high = np.percentile(ratios, [25, 50, 75])
    for name, taken in zip(runners, seconds.T, strict=True):
        print(f"{name}: {np.median(taken):.3f} s a step, {flags.rows * flags.tokens / np.median(taken):.0f} tokens/s")
    print(f"cost: {100 * (median - 1):+.1f} % (quartiles {100 * (low - 1):+.1f} … {100 * (high - 1):+.1f} %)")
    print(json.dumps({"ratio": median, "quartiles": [low, high], "seconds": seconds.tolist()}))


if __name__ == "__main__":
    main()
