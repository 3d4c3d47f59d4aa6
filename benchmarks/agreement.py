"""What transformers makes of a w8a8 run exported as compressed-tensors, on the answers of the run's own test set.

Command:  pip install -r requirements-interop.txt
          python scripts/export.py --checkpoint runs/int8_tp4 --format compressed-tensors --type w8a8 --output exported
          python benchmarks/agreement.py --checkpoint runs/int8_tp4 --exported exported
Hardware: whatever jax finds, one device; transformers has the CPU
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import AutoModelForCausalLM

from research.config import MeshConfig
from research.evaluate import load_examples
from research.mesh import make_mesh, prepare_devices
from research.model.transformer import causal
from research.report import make_console, make_table
from research.tasks.encoding import EncodedExamples
from research.train.open_run import open_trained
from research.train.serve import serve_trained

LogProbabilities = Callable[[np.ndarray], np.ndarray]
"""Tokens of a text, int64 [t] → nats of the next one, float64 [t, v]."""


def an_ulp_off(weights: dict[str, Any]) -> dict[str, Any]:
    """Return weights whose norms before attention are an ulp larger or smaller: what any other engine is, at least."""
    scale_ld = np.asarray(weights["layers"]["attention_norm"]["scale_d"])
    up = np.random.default_rng(0).random(scale_ld.shape) < 0.5
    moved = np.nextafter(scale_ld, np.where(up, np.inf, -np.inf).astype(np.float32))
    layers = weights["layers"] | {"attention_norm": {"scale_d": jnp.asarray(moved)}}
    return weights | {"layers": layers}


def of_answers(examples: EncodedExamples, model: LogProbabilities) -> np.ndarray:
    """Return what a model says at the tokens of the true answers, each behind its prompt and the answer so far."""
    found = []
    for prompt, label in zip(examples.prompts, examples.gold_e, strict=True):
        text = np.concatenate([prompt, examples.answers[label]]).astype(np.int64)
        found.append(model(text)[len(prompt) - 1 : -1])
    return np.concatenate(found)


def main() -> None:
    """Print agreement and divergence of transformers, and of ourselves with norms an ulp off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--exported", required=True, type=Path)
    flags = parser.parse_args()
    prepare_devices(MeshConfig())
    console, mesh = make_console(), make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        opened = open_trained(flags.checkpoint, report=console.print)
        served = serve_trained(opened, opened.experiment, mesh)
        task = opened.experiment.task
        examples = load_examples(task, served.tokenizer, console, ["test"], console.print).splits["test"]
        forward = jax.jit(lambda weights, tokens_bt: causal(nnx.merge(served.setup.graph, weights), tokens_bt))
        theirs = AutoModelForCausalLM.from_pretrained(flags.exported).eval()

        def ours(weights: Any, text: np.ndarray) -> np.ndarray:
            padded_bt = np.zeros((1, task.lengths[-1]), np.int32)  # what comes later is seen by nobody
            padded_bt[0, : len(text)] = text
            logits_tv = np.asarray(forward(weights, padded_bt)[0, : len(text)], np.float64)
            return np.asarray(torch.tensor(logits_tv).log_softmax(-1))

        def of_transformers(text: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return theirs(torch.tensor(text[None])).logits[0].double().log_softmax(-1).numpy()

        engines = {
            "transformers": of_transformers,
            "ours, norms an ulp off": partial(ours, an_ulp_off(served.weights)),
        }
        wanted = of_answers(examples, partial(ours, served.weights))
        table = make_table()
        for header in (f"{len(wanted)} tokens of {len(examples.prompts)} answers", "same likeliest token", "KL, nats"):
            table.add_column(header)
        for name, engine in engines.items():
            found = of_answers(examples, engine)
            agreement = (found.argmax(-1) == wanted.argmax(-1)).mean()
            divergence = (np.exp(wanted) * (wanted - found)).sum(-1).mean()
            table.add_row(name, f"{agreement:.4f}", f"{divergence:.2e}")
        console.print(table)


if __name__ == "__main__":
    main()
