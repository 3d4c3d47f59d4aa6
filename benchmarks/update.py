"""How long does an optimizer step take, how much memory beside what stays, and how far is it from the memory's speed?

SmolLM2's shape on one device, w8a8, AdamW. Of a weight the update reads the gradient twice (its norm comes first) and
changes latent and moments; it writes code and value: 37 bytes in float32.

    Command:  python benchmarks/update.py
    Hardware: one device
"""

import argparse
import json
import time
from statistics import median

import jax
import jax.numpy as jnp

from research.architectures import ARCHITECTURES
from research.config import Experiment, MeshConfig, Rule, TaskConfig, TrainConfig
from research.host_memory import keep_host_memory
from research.mesh import make_mesh, prepare_devices
from research.plan.hardware import measure_cpu
from research.plan.measure import RandomSteps
from research.plan.program import Job, abstract_step, compile_step
from research.units import format_bytes

W8A8 = (Rule(match="layers/(attention|mlp)/.*|embed/.*", weight="int8", activation="int8"),)
BYTES = 37
TRAIN = TrainConfig(batch_size=1, accumulate=1)


def main() -> None:
    """Print time, memory and bandwidth, then one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15)
    flags = parser.parse_args()
    keep_host_memory()
    prepare_devices(MeshConfig())
    mesh = make_mesh(MeshConfig())
    experiment = Experiment(task=TaskConfig(lengths=(16,)), quantization=W8A8, train=TRAIN)
    job = Job(experiment, ARCHITECTURES["smollm2-135m"])
    with jax.set_mesh(mesh):
        shapes = abstract_step(job, mesh)
        extra = compile_step(shapes).update.extra_bytes
        state, sums = RandomSteps(job, mesh).state, shapes.step.zeros()
        sums = sums._replace(losses=sums.losses._replace(tokens=jnp.ones(())))
        weights = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        seconds = []
        for _ in range(flags.steps + 1):
            started = time.perf_counter()
            state, _ = jax.block_until_ready(shapes.step.update(state, sums))
            seconds.append(time.perf_counter() - started)
    taken = median(seconds[1:])  # the first compiles
    moved, most = BYTES * weights / taken, measure_cpu(1).memory_bandwidth
    print(f"{weights / 1e6:.1f} M weights: {taken:.3f} s, {format_bytes(extra)} beside what stays")
    print(f"{BYTES} bytes a weight: {moved / 1e9:.1f} GB/s; a copy: {most / 1e9:.1f} GB/s")
    found = {"seconds": taken, "extra_bytes": extra, "bytes_per_second": moved, "copy_bytes_per_second": most}
    print(json.dumps(found | {"weights": weights}))


if __name__ == "__main__":
    main()
