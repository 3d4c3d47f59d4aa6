"""The operations that a model's mathematics asks for, whatever is padded or computed twice on the way."""

from math import prod

from research.architecture import Architecture
from research.axes import AxisRules
from research.model.parameters import ROUTER, parameter_table


def model_flops(architecture: Architecture, *, rows: int, length: int, predicted: int) -> float:
    """Return the operations of a forward and backward pass: six a weight and token, and those of causal attention.

    A lookup in the embedding counts nothing, the head as many tokens as are predicted; of a mixture's experts those
    count that a token goes to. PaLM (Chowdhery et al. 2022, appendix B), with half the square of attention.

    Args:
        architecture: of the model.
        rows: of the batch.
        length: tokens of a row.
        predicted: tokens of a row whose loss is taken.
    """
    table = parameter_table(architecture, AxisRules(), {})
    experts = architecture.experts
    active = experts.chosen / experts.experts if experts else 1.0
    weights = sum(
        prod(parameter.shape) * (active if "e" in parameter.axes and path != ROUTER else 1.0)
        for path, parameter in table.items()
        if parameter.contract and not path.endswith("table_vd")
    )
    head = architecture.vocabulary * architecture.width
    seen = length * (length + 1) / 2  # keys that the queries of a row see, all together
    attention = 2 * architecture.layers * architecture.query_heads * architecture.head_width * seen
    return 6.0 * rows * (length * weights + predicted * head + attention)
