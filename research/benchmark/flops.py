"""The operations that a model's mathematics asks for, whatever is padded or computed twice on the way."""

from collections.abc import Mapping
from math import prod

from research.axes import AxisRules
from research.model.parameters import ROUTER, head_of, parameter_table
from research.plan.program import Job
from research.setup import Setup


def model_flops(job: Job) -> float:
    """Return the operations of a training step: six a weight and token, and those of causal attention.

    A lookup in the embedding counts nothing, the head as many tokens as are predicted; of a mixture's experts those
    count that a token goes to. PaLM (Chowdhery et al. 2022, appendix B), with half the square of attention.
    """
    architecture, length = job.architecture, job.length
    seen = length * (length + 1) / 2  # keys that the queries of a row see, all together
    attention = 4 * architecture.layers * architecture.query_heads * architecture.head_width * seen
    return 3 * (sum(_of_products(job).values()) + _rows(job) * attention)


def integer_flops(job: Job, setup: Setup) -> float:
    """Return those of `model_flops` that are products of int8 with int8: forward, and backward where that is asked."""
    total = 0.0
    for path, forward in _of_products(job).items():
        weight = setup.formats.get(path)
        if weight and weight.grid.code_dtype == "int8" and setup.settings.activations.get(path, "none") != "none":
            total += forward * (3 if weight.rule.backward == "int8" else 1)
    return total


def _rows(job: Job) -> int:
    """Return the rows of a step."""
    return job.rows * job.experiment.train.accumulate


def _of_products(job: Job) -> Mapping[str, float]:
    """Return the operations of the forward products of a step by the weight's path."""
    experts = job.architecture.experts
    active = experts.chosen / experts.experts if experts else 1.0
    table = parameter_table(job.architecture, AxisRules(), {})
    head, flops = head_of(table), {}
    for path, parameter in table.items():
        if parameter.contract and (path == head or not path.endswith("table_vd")):
            share = active if "e" in parameter.axes and path != ROUTER else 1.0
            tokens = job.answer_tokens if path == head else job.length
            flops[path] = 2.0 * _rows(job) * tokens * prod(parameter.shape) * share
    return flops
