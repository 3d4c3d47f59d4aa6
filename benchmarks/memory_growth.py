"""Does memory grow with layers as a line does, and with the chunks of logits not at all? Compiled only.

SmolLM2's shape, w8a8, eight rows on one device. More layers add what each of them adds; more predicted positions make
more chunks of logits, of which one is in memory at a time. Bytes beside parameters and the optimizer's state, as the
compiler tells them.

    Command:  python benchmarks/memory_growth.py
    Hardware: one device, for which programs are compiled and not run
"""

import argparse
import json
from dataclasses import replace
from functools import cache

import jax
import numpy as np

from research.architectures import ARCHITECTURES
from research.config import Experiment, MeshConfig, Rule, TaskConfig, TrainConfig
from research.mesh import make_mesh, prepare_devices
from research.plan.program import Job, abstract_step, compile_step
from research.units import format_bytes

LAYERS = (5, 10, 15, 20, 25, 30)
CHUNKS = (2, 4, 8)  # a lone one needs no loop, and 8 % less memory
ROWS, LENGTH, CHUNK = 8, 257, 256
W8A8 = (Rule(match="layers/(attention|mlp)/.*|embed/.*", weight="int8", activation="int8"),)


def job(layers: int, chunks: int) -> Job:
    """Return a training step that predicts as many positions as make so many chunks."""
    train = TrainConfig(batch_size=ROWS, accumulate=1, loss_chunk=CHUNK)
    experiment = Experiment(task=TaskConfig(lengths=(LENGTH,)), quantization=W8A8, train=train)
    return Job(experiment, replace(ARCHITECTURES["smollm2-135m"], layers=layers), chunks * CHUNK // ROWS)


@cache  # both series have a job in common
def working_bytes(layers: int, chunks: int) -> int:
    """Return the most bytes that a program of the step takes beside its arguments."""
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        compiled = compile_step(abstract_step(job(layers, chunks), mesh))
    return max(compiled.add.extra_bytes, compiled.update.extra_bytes)


def main() -> None:
    """Print both series and how far they are from a line and from a constant, then one JSON object."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    prepare_devices(MeshConfig())
    by_layers = {layers: working_bytes(layers, CHUNKS[0]) for layers in LAYERS}
    by_chunks = {chunks: working_bytes(LAYERS[0], chunks) for chunks in CHUNKS}
    for name, series in (("layers", by_layers), ("chunks", by_chunks)):
        for count, found in series.items():
            print(f"{count:3} {name}: {format_bytes(found)}")
    counts, sizes = np.array(list(by_layers.items()), float).T
    off = np.abs(np.polyval(np.polyfit(counts, sizes, 1), counts) / sizes - 1).max()
    print(f"from a line in layers at most {100 * off:.2f} %")
    growth = (by_chunks[CHUNKS[-1]] - by_chunks[CHUNKS[0]]) / by_chunks[CHUNKS[0]]
    print(f"from {CHUNKS[0]} to {CHUNKS[-1]} chunks {100 * growth:+.2f} %")
    print(json.dumps({"layers": by_layers, "chunks": by_chunks, "off_a_line": off, "growth_of_chunks": growth}))


if __name__ == "__main__":
    main()
