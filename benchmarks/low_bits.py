"""Two bits and three values: plain straight-through against learned scales (LSQ) and annealing (PARQ), three seeds.

A byte-level decoder of about one million parameters is trained on the spot, in float, on the summaries of Multi-LexSum.
Then each contender starts from its weights and trains on, with all matrices on the grid, on the same rows in the same
order; all are judged on the same held-out documents. A seed is that of the initial weights and of the data order.

    Command:  python benchmarks/low_bits.py
    Hardware: one CPU device, two cores
"""

import argparse
import json
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from research.architecture import Architecture
from research.comparison import CorpusConfig
from research.config import MeshConfig, OptimizerConfig, Rule, TrainConfig
from research.evaluate import make_score
from research.mesh import make_mesh, prepare_devices
from research.model.placement import place_float, unplace
from research.model.transformer import Transformer
from research.setup import Setup, make_setup, put_batch
from research.tasks.batches import training_batches, window_batch, window_rows
from research.tasks.corpus import load_documents
from research.train.state import encoded_weights, serving_weights
from research.train.step import TrainState, make_optimizer, make_state, make_step

ARCHITECTURE = Architecture(
    vocabulary=256, width=128, layers=4, query_heads=4, kv_heads=4, head_width=32, feed_forward=384, context=128
)
WINDOW, ROWS, TEST_ROWS = 128, 8, 128
FLOAT_STEPS, STEPS = 200, 100
OPTIMIZER = OptimizerConfig(learning_rate=2e-3, warmup_steps=10, weight_decay=0.0)
MATRICES = "layers/(attention|mlp)/.*"


def contenders(grid: str, steps: int) -> dict[str, Rule]:
    """Return the rules that are compared for a grid, by name."""
    return {
        "straight-through": Rule(match=MATRICES, weight=grid),
        "LSQ": Rule(match=MATRICES, weight=grid, estimator="clipped", learn_scale=True),
        "PARQ": Rule(match=MATRICES, weight=grid, end_step=steps * 4 // 5, anneal="parq"),
    }


def windows_of(documents: tuple[str, ...]) -> list[np.ndarray]:
    """Return the whole windows of documents as bytes, int32 [t] each."""
    ids = [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in documents]
    return [part[i : i + WINDOW] for part in ids for i in range(0, len(part) - WINDOW + 1, WINDOW)]


def train(rules: tuple[Rule, ...], start: Mapping[str, np.ndarray], windows: Any, steps: int, seed: int, mesh: Mesh):
    """Return setup and state after `steps` on the windows, from float weights by path."""
    budget = TrainConfig(steps=max(1, steps), batch_size=ROWS, accumulate=1, loss_chunk=ROWS * WINDOW, seed=seed)
    setup = make_setup(ARCHITECTURE, rules, budget, mesh)
    tx = make_optimizer(OPTIMIZER, budget, setup.policy, setup.table)
    state = make_state(tx, place_float(start.__getitem__, setup.table, mesh), setup.table, mesh)
    step = make_step(setup.graph, tx, OPTIMIZER, budget, setup.table, mesh, state)
    batches = training_batches(window_rows(windows, WINDOW), budget)
    for number in range(steps):
        parts = batches[number]
        assert parts is not None
        state, _ = step(state, [put_batch(part, mesh) for part in parts])
    return setup, state


def loss_of(setup: Setup, state: TrainState, windows: list[np.ndarray]) -> float:
    """Return nats per byte from the codes and scales of a state."""
    score, weights = make_score(setup), serving_weights(encoded_weights(state))
    batches = [window_batch(windows[i : i + ROWS], ROWS, WINDOW) for i in range(0, len(windows), ROWS)]
    total = sum(float(np.asarray(score(weights, put_batch(batch, setup.mesh)), np.float64).sum()) for batch in batches)
    return total / (len(windows) * (WINDOW - 1))


def initial_weights(setup: Setup, seed: int) -> dict[str, np.ndarray]:
    """Return the model's own initialisation, by path."""
    weights = nnx.to_pure_dict(nnx.state(Transformer(setup.settings, nnx.Rngs(seed)), nnx.Param))
    return _by_path(weights, setup)


def _by_path(weights: Any, setup: Setup) -> dict[str, np.ndarray]:
    found = {}
    for path in setup.table:
        leaf = weights
        for name in path.split("/"):
            leaf = leaf[name]
        found[path] = unplace(path, leaf, setup.table)
    return found


def one_seed(seed: int, grids: list[str]) -> dict[str, float]:
    """Return nats per byte by model: "float", "int2 rounded", "int2 LSQ" …"""
    documents = load_documents(CorpusConfig())
    train_windows, test_windows = windows_of(documents["train"]), windows_of(documents["test"])[:TEST_ROWS]
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        setup = make_setup(ARCHITECTURE, (), TrainConfig(), mesh)
        setup, state = train((), initial_weights(setup, seed), train_windows, FLOAT_STEPS, seed, mesh)
        found = {"float": loss_of(setup, state, test_windows)}
        start = _by_path(state.params, setup)
        for grid in grids:
            plain = contenders(grid, STEPS)["straight-through"]
            found[f"{grid} rounded"] = loss_of(*train((plain,), start, train_windows, 0, seed, mesh), test_windows)
            for name, rule in contenders(grid, STEPS).items():
                trained = train((rule,), start, train_windows, STEPS, seed + 1, mesh)
                found[f"{grid} {name}"] = loss_of(*trained, test_windows)
    return found


def main() -> None:
    """Run all seeds and print the table, then one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--grids", nargs="+", default=["int2", "ternary"])
    flags = parser.parse_args()
    prepare_devices(MeshConfig())
    started = time.monotonic()
    by_seed = []
    for seed in range(flags.seeds):
        by_seed.append(one_seed(seed, flags.grids))
        print(f"seed {seed}: " + " · ".join(f"{name} {loss:.4f}" for name, loss in by_seed[-1].items()), flush=True)
    print(json.dumps({"seeds": by_seed, "seconds": time.monotonic() - started}))


if __name__ == "__main__":
    main()
