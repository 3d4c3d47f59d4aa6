"""Tokens a second of this framework and of llama.cpp, batch 1: one trained model, from its codes and as GGUF.

Command:  python scripts/export.py --checkpoint runs/int8_tp4 --format gguf --type Q8_0 --output model.gguf
          python benchmarks/generation.py --checkpoint runs/int8_tp4 --gguf model.gguf
Hardware: whatever jax finds, one device; llama.cpp has all cores
"""

import argparse
import json
import os
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import xllamacpp

from research.config import MeshConfig
from research.mesh import make_mesh, prepare_devices
from research.model.for_tokens import laid_out_for_tokens
from research.model.generate import generate
from research.report import make_console, make_table
from research.train.open_run import Opened, open_trained
from research.train.serve import serve_trained
from research.units import format_rate

PROMPT = "The court held that the agreement between both parties was binding, because"


def llama_cpp(path: Path) -> xllamacpp.Server:
    """Return a server of llama.cpp with its own defaults, on all cores."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.verbosity = 1024, 1, 0
    parameters.cpuparams.n_threads = os.cpu_count() or 1
    return xllamacpp.Server(parameters)


def rate_of_llama_cpp(server: xllamacpp.Server, ids: Sequence[int], tokens: int) -> float:
    """Return the tokens a second behind the prompt, as llama.cpp times them."""
    content = {"prompt": list(ids), "n_predict": tokens, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
    headers = {"Content-Type": "application/json"}
    url = server.listening_address + "/completion"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(content).encode(), headers)) as answer:
        return json.loads(answer.read())["timings"]["predicted_per_second"]


def engine_of(opened: Opened, ids: Sequence[int], tokens: int, unroll: int) -> Callable[[], float]:
    """Return what measures our tokens a second behind the prompt; its programs are compiled before."""
    experiment = replace(opened.experiment, train=replace(opened.experiment.train, unroll=unroll))
    served = serve_trained(opened, experiment, make_mesh(MeshConfig()))
    weights = laid_out_for_tokens(served.setup.settings, served.weights)

    def rate() -> float:
        stream = generate(served.setup.graph, weights, ids, max_tokens=tokens)
        next(stream)  # the prompt
        started = time.perf_counter()
        return sum(1 for _ in stream) / (time.perf_counter() - started)

    rate()
    return rate


def main() -> None:
    """Take turns and print the rates, then one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--gguf", required=True, type=Path)
    parser.add_argument("--tokens", type=int, default=64, help="generated behind the prompt")
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    prepare_devices(MeshConfig())
    mesh = make_mesh(MeshConfig())
    server = llama_cpp(flags.gguf)
    with jax.set_mesh(mesh):
        opened = open_trained(flags.checkpoint, report=lambda line: print(line, file=sys.stderr))
        ids = opened.tokenizer.encode(PROMPT)
        engines: dict[str, Callable[[], float]] = {
            "ours, int8": engine_of(opened, ids, flags.tokens, unroll=1),
            "the same, --config.train.unroll=all layers": engine_of(
                opened, ids, flags.tokens, unroll=opened.architecture.layers
            ),
            "llama.cpp, Q8_0": partial(rate_of_llama_cpp, server, ids, flags.tokens),
        }
        rates = {name: [] for name in engines}
        for _ in range(flags.rounds):
            for name, rate in engines.items():
                rates[name].append(rate())
    medians = {name: float(np.median(found)) for name, found in rates.items()}
    theirs = medians["llama.cpp, Q8_0"]
    table = make_table()
    for header in ("", "generation", "of llama.cpp's"):
        table.add_column(header, justify="right")
    for name, rate in medians.items():
        table.add_row(name, format_rate(rate), f"{rate / theirs:.2f}")
    make_console().print(table)
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
