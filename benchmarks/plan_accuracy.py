"""How far off is a plan that nothing is compiled for? Jobs and meshes drawn at random, told from shapes and compiled.

Decoders of 4 to 12 layers on up to 8 simulated devices: heads that share keys or not, tied tables or not, rounded or
not, layers computed anew or not, a teacher or none. Memory is that of the fullest moment, traffic equal entry by entry.

    Command:  python benchmarks/plan_accuracy.py --jobs 40 --seed 1
    Hardware: 8 simulated devices, for which programs are compiled and not run; 6 minutes on two cores
"""

import argparse
import json
import random
from dataclasses import replace
from statistics import median

import jax

from research.architecture import Architecture
from research.config import Experiment, MeshConfig, Rule, TaskConfig, TrainConfig
from research.errors import UserError
from research.mesh import make_mesh, prepare_devices, sizes
from research.plan.compiler import CPU
from research.plan.hardware import HARDWARE
from research.plan.plan import Plan, as_predicted, compile_plan, estimate_plan, show_mesh
from research.plan.program import Job
from research.units import format_bytes

DEVICES = 8
CPU_DEVICE = replace(HARDWARE["h100"], name="cpu", compiler=CPU)  # times don't matter here
MOST_TOKENS = 8192  # of a step whose layers keep everything
RULES = {
    "w8a8": (Rule(match=".*", weight="int8", activation="int8"),),
    "w8": (Rule(match=".*", weight="int8"),),
    "float": (Rule(match=".*"),),
}


def draw_mesh(draw: random.Random) -> MeshConfig:
    """Return a mesh of up to `DEVICES`, axes of two or four in any order of preference."""
    left, axes = DEVICES, ["data", "fsdp", "tensor", "context", "stage"]
    found = {}
    for axis in draw.sample(axes, len(axes)):
        ways = draw.choice((1, 1, 2, 4))
        if 1 < ways <= left:
            found[axis], left = ways, left // ways
    return MeshConfig(**found)


def draw_job(draw: random.Random) -> tuple[str, Job]:
    """Return the name of its rules, and a job."""
    heads, width = draw.choice((4, 8, 12)), draw.choice((128, 256, 384, 512))
    architecture = Architecture(
        vocabulary=draw.choice((2048, 8192, 16_000)),
        width=width,
        layers=draw.choice((4, 8, 12)),
        query_heads=heads,
        kv_heads=draw.choice([kv for kv in (1, 2, 4, 8, 12) if heads % kv == 0]),
        head_width=draw.choice((32, 64)),
        feed_forward=width * draw.choice((2, 3, 4)),
        context=512,
        tied_head=draw.random() < 0.6,
        head_norms=draw.random() < 0.3,
    )
    rows, length, anew = draw.choice((16, 32, 64)), draw.choice((64, 128, 256)), draw.choice(("none", "full", "dots"))
    if anew == "none":
        length = min(length, MOST_TOKENS // rows)
    train = TrainConfig(
        batch_size=rows, accumulate=draw.choice((1, 1, 2)), rematerialize=anew, distill=draw.choice((0, 0, 0, 0.5))
    )
    name = draw.choice(list(RULES))
    experiment = Experiment(task=TaskConfig(lengths=(length,)), quantization=RULES[name], train=train)
    return name, Job(experiment, architecture, answer_tokens=draw.choice((8, 31)))


def compiled(job: Job, config: MeshConfig) -> Plan:
    """Return the plan of a job on a mesh, compiled; raises `UserError` where the mesh can't be."""
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        return compile_plan(job, estimate_plan(job, sizes(config), CPU_DEVICE), mesh)


def main() -> None:
    """Print a line for each job, how many estimates are within 5 %, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    flags = parser.parse_args()
    prepare_devices(MeshConfig(data=DEVICES))
    draw, errors, equal = random.Random(flags.seed), [], 0
    while len(errors) < flags.jobs:
        (name, job), config = draw_job(draw), draw_mesh(draw)
        try:
            plan = compiled(job, config)
        except UserError:  # heads or rows that the mesh can't split
            continue
        errors.append(plan.estimated.peak / plan.memory.peak - 1)
        equal += as_predicted(plan)
        traffic = "as predicted" if as_predicted(plan) else "NOT as predicted"
        train, peak = job.experiment.train, format_bytes(plan.memory.peak)
        options = f"{name}, {train.rematerialize} anew, {train.accumulate} micro-batches, distill {train.distill}"
        where = f"{show_mesh(plan.mesh)}; {options}"
        print(f"{100 * errors[-1]:+6.1f} % of {peak:>9}, traffic {traffic}: {where}", flush=True)
    within, worst = sum(abs(error) < 0.05 for error in errors), max(errors, key=abs)
    print(f"memory within 5 %: {within} of {len(errors)}, median {100 * median(map(abs, errors)):.1f} %, ", end="")
    print(f"worst {100 * worst:+.1f} %; traffic as predicted: {equal} of {len(errors)}")
    print(json.dumps({"errors": errors, "within_5_percent": within, "traffic_as_predicted": equal}))


if __name__ == "__main__":
    main()
