"""Operations, bytes and seconds of an optimizer step on one device, and what bounds it.

The compiler's own cost analysis counts a loop's body once, so operations are counted here, from shapes.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from research.plan.hardware import Hardware
from research.plan.hlo import Collective
from research.plan.memory import Memory
from research.plan.mixtures import expert_flops, mixture
from research.plan.products import Product, in_layers, layout_of, products
from research.plan.program import AbstractStep, Job, models

# What a device sends of a collective's bytes, over (ways - 1) / ways, where devices form a ring. A permutation is one
# step of a ring: all of it.
_SENT = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "all-to-all": 1}


@dataclass(frozen=True)
class Cost:
    """Seconds of a step by what takes them; `flops`: operations of one device by dtype."""

    flops: Mapping[str, float]
    sent_bytes: Mapping[str, float]
    """What a device sends, by mesh axes joined with "+"."""
    multiply_seconds: float
    memory_seconds: float
    link_seconds: float

    @property
    def seconds(self) -> float:
        """The step: products and memory traffic at the same time, then traffic between devices, which hides nowhere."""
        return max(self.multiply_seconds, self.memory_seconds) + self.link_seconds

    @property
    def bound(self) -> str:
        """What takes most: "multiply", "memory" or "link"."""
        times = {"multiply": self.multiply_seconds, "memory": self.memory_seconds, "link": self.link_seconds}
        return max(times, key=lambda name: times[name])


def cost(job: Job, step: AbstractStep, memory: Memory, sends: Iterable[Collective], device: Hardware) -> Cost:
    """Return what an optimizer step costs on a device, given its memory and its collectives."""
    mesh, sends = dict(step.mesh.shape), list(sends)
    flops = step_flops(job, step)
    return Cost(
        flops=flops,
        sent_bytes=sent_bytes(sends, mesh),
        multiply_seconds=device.seconds_of(flops),
        memory_seconds=_moved_bytes(job, memory) / device.memory_bandwidth,
        link_seconds=sum(_sent(one, mesh) / bandwidth(one, mesh, device) for one in sends),
    )


def step_flops(job: Job, step: AbstractStep) -> dict[str, float]:
    """Return the operations of one device in matrix products, by dtype, padding and recomputation included."""
    train = job.experiment.train
    found: defaultdict[str, float] = defaultdict(float, {"int8": 0.0, train.compute_dtype: 0.0})
    for model in models(job, step):
        for dtype, count in _model_flops(*model):
            found[dtype] += count
    return {dtype: count * train.accumulate for dtype, count in found.items() if count}


def _model_flops(job: Job, step: AbstractStep) -> Iterator[tuple[str, float]]:
    """Yield the operations of a micro-batch's passes through a model, by dtype."""
    train, backward = job.experiment.train, layout_of(job, step).backward
    forwards = 2 if train.rematerialize == "full" else 1
    for product in products(job, step):
        once = _product_flops(product) * product.times
        yield "int8" if product.integer else product.compute, once * (1 if product.is_head else forwards)
        yield "int8" if product.integer_backward else product.compute, 2 * backward * once
    mix = mixture(job, step)
    yield from expert_flops(mix).items() if mix else ()
    yield train.compute_dtype, (forwards + 2 * backward) * _attention_flops(job, step)


def _product_flops(product: Product) -> float:
    """Operations of one product on a device, its weight gathered."""
    return 2.0 * product.used(product.rows) * product.used(product.letters)


def _attention_flops(job: Job, step: AbstractStep) -> float:
    """Operations of scores and weighted values of all layers; the whole square, as it is computed."""
    layout = in_layers(layout_of(job, step))
    return 2.0 * 2.0 * layout.elements("btnh", layout.rules.activations) * job.length * layout.passes


def sent_bytes(sends: Iterable[Collective], mesh_sizes: Mapping[str, int]) -> dict[str, float]:
    """Return the bytes that one device sends, by mesh axes joined with "+"."""
    found: dict[str, float] = {}
    for one in sends:
        name = "+".join(one.axes)
        found[name] = found.get(name, 0.0) + _sent(one, mesh_sizes)
    return found


def _sent(one: Collective, mesh_sizes: Mapping[str, int]) -> float:
    ways = prod(mesh_sizes[axis] for axis in one.axes)
    share = 1.0 if one.kind == "collective-permute" else _SENT[one.kind] * (ways - 1) / ways
    return share * one.total_bytes


def bandwidth(one: Collective, mesh_sizes: Mapping[str, int], device: Hardware) -> float:
    """Return the bytes a second that one device sends of a collective, on a mesh whose last axis is fastest.

    A permutation between hosts goes through the sender's own adapter.
    """
    if not device.host_devices:
        return device.link_bandwidth
    inside = [index for index, axis in enumerate(mesh_sizes) if axis in one.axes]
    outside = [index for index in range(len(mesh_sizes)) if index not in inside]
    hosts = (np.arange(prod(mesh_sizes.values())) // device.host_devices).reshape(tuple(mesh_sizes.values()))
    groups = hosts.transpose(outside + inside).reshape(-1, prod(hosts.shape[index] for index in inside))
    crossed = max(len(set(group)) for group in groups.tolist())
    on_a_host = 1 if one.kind == "collective-permute" else groups.shape[1] // crossed
    return device.bandwidth(on_a_host, crossed)


def _moved_bytes(job: Job, memory: Memory) -> float:
    """Return the bytes that a device's memory moves in a step: weights three times and what is saved twice a
    micro-batch, the state read and written once."""
    micro = 3 * (memory.parameters + memory.codes_and_scales) + 2 * memory.activations + 2 * memory.gradients
    return job.experiment.train.accumulate * micro + 2 * memory.resident
