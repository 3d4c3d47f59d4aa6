"""What every format gives when it opens a model: its shape, its tokenizer, and a way to read one leaf at a time.

Also the list of a decoder's leaves with their logical shapes, which every reader checks against and every writer
walks over: one definition for all formats.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from research.architecture import Architecture
from research.errors import UserError
from research.tokenizer import Tokenizer

ReadLeaf = Callable[[str], np.ndarray]


@dataclass(frozen=True)
class ModelSource:
    """An opened model file or directory; weights stay on disk until `read` asks for them."""

    architecture: Architecture
    tokenizer: Tokenizer
    paths: tuple[str, ...]
    """Paths of the leaves, e.g. "layers/attention/q_dnh"."""
    read: ReadLeaf
    """Path → float32 array of the logical, stacked shape; one leaf in host memory at a time."""
    description: str
    """Where it came from, for a person."""


def leaf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return path → logical shape of every parameter of a decoder, layers stacked on the leading axis `l`."""
    a = architecture
    per_layer = {
        "attention_norm/scale_d": (a.width,),
        "attention/q_dnh": (a.width, a.query_heads, a.head_width),
        "attention/k_dkh": (a.width, a.kv_heads, a.head_width),
        "attention/v_dkh": (a.width, a.kv_heads, a.head_width),
        "attention/o_nhd": (a.query_heads, a.head_width, a.width),
        "mlp_norm/scale_d": (a.width,),
        "mlp/gate_df": (a.width, a.feed_forward),
        "mlp/up_df": (a.width, a.feed_forward),
        "mlp/down_fd": (a.feed_forward, a.width),
    }
    if a.head_norms:
        per_layer |= {"attention/q_norm/scale_h": (a.head_width,), "attention/k_norm/scale_h": (a.head_width,)}
    if a.experts:
        e = a.experts.experts
        per_layer = {name: shape for name, shape in per_layer.items() if not name.startswith("mlp/")} | {
            "mlp/router_de": (a.width, e),
            "mlp/gate_edf": (e, a.width, a.feed_forward),
            "mlp/up_edf": (e, a.width, a.feed_forward),
            "mlp/down_efd": (e, a.feed_forward, a.width),
        }
    shapes: dict[str, tuple[int, ...]] = {"embed/table_vd": (a.vocabulary, a.width)}
    shapes |= {f"layers/{name}": (a.layers, *shape) for name, shape in per_layer.items()}
    shapes["norm/scale_d"] = (a.width,)
    if not a.tied_head:
        shapes["head/table_vd"] = (a.vocabulary, a.width)
    return shapes


def check_shape(where: str, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise a `UserError` if a stored tensor hasn't the shape that the architecture implies."""
    if tuple(found) != tuple(expected):
        raise UserError(f"{where}: tensor {name} has shape {tuple(found)}, its metadata implies {tuple(expected)}")
