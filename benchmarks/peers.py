"""Training steps of this framework beside those of others: one model, random weights, the same rows of random tokens.

Full fine-tuning with AdamW in float32; every token but a row's first is predicted. Each has a process of its own, and
the rounds go around all of them, so that whatever else the machine does meets all. Needs requirements-peers.txt.

    Command:  python benchmarks/peers.py
    Hardware: whatever jax and torch find; here two CPU cores
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from typing import Any

import numpy as np

from research.architecture import Architecture
from research.config import Experiment, MeshConfig, Rule, TaskConfig, TrainConfig
from research.environment import peak_host_bytes
from research.foundation import load_architecture
from research.report import make_console, make_table
from research.train.open_run import open_checkpoint
from research.units import format_bytes, format_rate

PRODUCTS = "layers/(attention|mlp)/.*|(embed|head)/table_vd"
OURS = {
    "ours, float": (),
    "ours, int8 weights": (Rule(match=PRODUCTS, weight="int8"),),
    "ours, w8a8": (Rule(match=PRODUCTS, weight="int8", activation="int8"),),
    "ours, w8a8, backward too": (Rule(match=PRODUCTS, weight="int8", activation="int8", backward="int8"),),
}
WARM_UP = 2
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Shape:
    """What is trained: a model, and rows of tokens for a step."""

    architecture: Architecture
    rows: int
    length: int

    def tokens(self) -> Iterator[np.ndarray]:
        """Yield the rows of each step, [b, t]."""
        rng = np.random.default_rng(0)
        while True:
            yield rng.integers(0, self.architecture.vocabulary, (self.rows, self.length))


def ours(shape: Shape, rules: tuple[Rule, ...]) -> Callable[[], Any]:
    """Return our training step, as scripts/benchmark.py times it."""
    import jax

    from research.mesh import make_mesh, prepare_devices
    from research.plan.measure import RandomSteps
    from research.plan.program import Job

    prepare_devices(MeshConfig())
    experiment = Experiment(
        task=TaskConfig(lengths=(shape.length,)),
        quantization=rules,
        train=TrainConfig(steps=1000, batch_size=shape.rows, accumulate=1),
    )
    jax.set_mesh(make_mesh(MeshConfig()))
    steps = RandomSteps(Job(experiment, shape.architecture, shape.length - 1), make_mesh(MeshConfig()))
    return lambda: steps.run(1)


def qwix(shape: Shape) -> Callable[[], Any]:
    """Return a step of our float model under Qwix's QAT provider, with optax.adamw and the loss of all logits at once.

    Qwix knows one method of a model, and it must be `__call__`: here it is the loss.
    """
    import jax
    import optax
    from flax import nnx
    from qwix import QtProvider, QtRule, quantize_model

    from research.mesh import make_mesh
    from research.model.attention import in_order, mutual
    from research.model.placement import place_float
    from research.plan.measure import random_weights
    from research.setup import make_setup

    class Loss(nnx.Module):
        def __init__(self, model: Any) -> None:
            self.model = model

        def __call__(self, tokens_bt: Any) -> Any:
            segments = in_order(np.zeros(tokens_bt.shape, np.int32))
            hidden_btd, _ = self.model(tokens_bt, segments.index_bt, mutual(segments))
            logits_btv = self.model.logits(hidden_btd[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits_btv, tokens_bt[:, 1:]).mean()

    mesh = make_mesh(MeshConfig())
    jax.set_mesh(mesh)
    setup = make_setup(shape.architecture, (), TrainConfig(), mesh)
    model = nnx.merge(setup.graph, place_float(random_weights(setup.table), setup.table, mesh))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    batches = (jax.device_put(rows.astype(np.int32), whole) for rows in shape.tokens())
    rule = QtRule(module_path=".*", weight_qtype="int8", act_qtype="int8")
    graph, weights = nnx.split(quantize_model(Loss(model), QtProvider([rule]), next(batches)))
    tx = optax.adamw(LEARNING_RATE)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(weights: Any, state: Any, tokens_bt: Any) -> Any:
        value, gradients = jax.value_and_grad(lambda w: nnx.merge(graph, w)(tokens_bt))(weights)
        updates, state = tx.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state, value

    state = jax.jit(tx.init)(weights)

    def run() -> None:
        nonlocal weights, state
        weights, state, value = step(weights, state, next(batches))
        jax.block_until_ready((weights, value))

    return run


def transformers(shape: Shape, compiled: bool = False, quantized: bool = False) -> Callable[[], Any]:
    """Return a step of Hugging Face's Llama in torch; `quantized`: with torchao's QAT, int8 weights and activations."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    a = shape.architecture
    config = LlamaConfig(
        vocab_size=a.vocabulary, hidden_size=a.width, num_hidden_layers=a.layers, num_attention_heads=a.query_heads,
        num_key_value_heads=a.kv_heads, head_dim=a.head_width, intermediate_size=a.feed_forward,
        max_position_embeddings=a.context, tie_word_embeddings=a.tied_head, attn_implementation="sdpa",
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).train()
    if quantized:
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        inputs = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)  # it refuses symmetric ones
        weights = IntxFakeQuantizeConfig(torch.int8, "per_channel")
        quantize_(model, QATConfig(activation_config=inputs, weight_config=weights, step="prepare"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    forward = torch.compile(model) if compiled else model
    batches = (torch.from_numpy(rows) for rows in shape.tokens())

    def run() -> None:
        tokens = next(batches)
        forward(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


PEERS: dict[str, Callable[[Shape], Callable[[], Any]]] = {
    **{name: lambda shape, rules=rules: ours(shape, rules) for name, rules in OURS.items()},
    "transformers, torch": transformers,
    "transformers, torch.compile": lambda shape: transformers(shape, compiled=True),
    "torchao QAT, w8a8": lambda shape: transformers(shape, quantized=True),
    "torchao QAT, w8a8, torch.compile": lambda shape: transformers(shape, compiled=True, quantized=True),
    "Qwix QAT on our model, w8a8": qwix,
}


def measure(name: str, shape: Shape, steps: int) -> tuple[list[float], float, int]:
    """Return the seconds of steps, those until the first one was done, and the peak memory of the process in bytes."""
    started = time.perf_counter()
    run = PEERS[name](shape)
    run()
    first = time.perf_counter() - started
    seconds = []
    for _ in range(WARM_UP + steps):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return seconds[WARM_UP:], first, peak_host_bytes()


def main() -> None:
    """Go around all peers and print one table, then one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--foundation", default="smollm2-135m-instruct", help="whose shape is trained")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="of a row")
    parser.add_argument("--steps", type=int, default=5, help="of each in a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=list(PEERS), default=list(PEERS), metavar="NAME")
    flags = parser.parse_args()
    architecture = load_architecture(flags.foundation, report=lambda _: None, open_checkpoint=open_checkpoint)
    shape = Shape(replace(architecture, rope_scaling=None), flags.rows, flags.tokens)
    found: dict[str, list[tuple[list[float], float, int]]] = {name: [] for name in flags.only}
    for _ in range(flags.rounds):
        for name in flags.only:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                found[name].append(pool.submit(measure, name, shape, flags.steps).result())
            print(f"{name}: {found[name][-1]}", file=sys.stderr)
    table = make_table()
    table.add_column("")
    for header in ("a step", "quartiles", "speed", "first step", "peak memory"):
        table.add_column(header, justify="right", no_wrap=True)
    results = {}
    for name, rounds in found.items():
        seconds = np.concatenate([taken for taken, _, _ in rounds])
        low, median, high = np.percentile(seconds, [25, 50, 75])
        rate, first, peak = flags.rows * flags.tokens / median, rounds[0][1], rounds[0][2]
        results[name] = {
            "tokens_per_second": rate,
            "seconds": seconds.tolist(),
            "first_step": first,
            "peak_bytes": peak,
        }
        spread = f"{low:.2f} – {high:.2f} s"
        table.add_row(name, f"{median:.2f} s", spread, format_rate(rate), f"{first:.0f} s", format_bytes(peak))
    make_console().print(table)
    packages = ("jax", "torch", "transformers", "torchao", "qwix")
    print(json.dumps({"peers": results, "versions": {package: version(package) for package in packages}}))


if __name__ == "__main__":
    main()
