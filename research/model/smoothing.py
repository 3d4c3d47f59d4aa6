"""SmoothQuant: what makes an activation hard to quantize moves into the weight behind it (Xiao et al. 2022).

Channel j of a product's input is divided by f_j = max|X_j|^α / max|W_j|^(1-α), its rows of the weight are multiplied by
it. The division is folded into what makes the channel: the norm before q, k, v and before gate, up; v before o; up
before down. So the smoothed model is an ordinary one of the same function. max|X_j| comes from a calibration: a forward
of the float model on a few texts. Norms of heads don't matter: channels of queries and keys are left as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.architecture import Architecture
from research.model.attention import Segments
from research.model.folding import FloatModel
from research.model.layers import Settings
from research.model.observing import observe
from research.model.parameters import ROUTER, TABLE, Parameter
from research.padding import Padding

LARGEST_FACTOR = 1e5  # and its inverse the smallest: scales of int8 weights must stay float16 numbers


@dataclass(frozen=True)
class Boundary:
    """A place where channels can be rescaled: made by one leaf, read by the products of others."""

    axes: str
    """Letters of the factors."""
    divided: str
    """Path of the leaf that makes the channels."""
    multiplied: tuple[str, ...]
    """Paths of the weights that read them; all have the same input."""


_ATTENTION = (
    Boundary(
        "ld",
        "layers/attention_norm/scale_d",
        ("layers/attention/q_dnh", "layers/attention/k_dkh", "layers/attention/v_dkh"),
    ),
    Boundary("lkh", "layers/attention/v_dkh", ("layers/attention/o_nhd",)),
)
BOUNDARIES = (
    *_ATTENTION,
    Boundary("ld", "layers/mlp_norm/scale_d", ("layers/mlp/gate_df", "layers/mlp/up_df")),
    Boundary("lf", "layers/mlp/up_df", ("layers/mlp/down_fd",)),
)
# The router reads what the experts do, and of all tokens. What goes into an expert's down projection stays as it is: in
# a calibration too few tokens come to an expert to tell.
BOUNDARIES_OF_EXPERTS = (
    *_ATTENTION,
    Boundary("ld", "layers/mlp_norm/scale_d", (ROUTER, "layers/mlp/gate_edf", "layers/mlp/up_edf")),
)


def boundaries_of(architecture: Architecture) -> tuple[Boundary, ...]:
    """Return where the channels of a model are rescaled."""
    return BOUNDARIES_OF_EXPERTS if architecture.experts else BOUNDARIES


def smooth(model: FloatModel, maxima: Mapping[str, np.ndarray], alpha: float) -> FloatModel:
    """Return a model of the same function with smoother activations.

    `maxima`: largest magnitude of each input channel of the products in the layers, see `logical_maxima`. `alpha`:
    share of the difficulty that moves from activations to weights, 0 to 1. Float64 inside, leaves are float32.
    """
    boundaries = boundaries_of(model.architecture)
    factors = {boundary: smoothing_factors(boundary, model, maxima, alpha) for boundary in boundaries}

    def read(path: str) -> np.ndarray:
        logical = model.read(path)
        axes, w = _by_group(TABLE[path][0], logical.astype(np.float64), model.architecture)
        for boundary, factor in factors.items():
            if path == boundary.divided:
                w = np.einsum(f"{axes},{boundary.axes}->{axes}", w, 1 / factor)
            if path in boundary.multiplied:
                w = np.einsum(f"{axes},{boundary.axes}->{axes}", w, factor)
        return w.reshape(logical.shape).astype(np.float32)

    return FloatModel(model.architecture, read)


def smoothing_factors(
    boundary: Boundary, model: FloatModel, maxima: Mapping[str, np.ndarray], alpha: float
) -> np.ndarray:
    """Return the factors of a boundary, float64, axes `boundary.axes`; 1 where an activation or its weights are 0."""
    architecture = model.architecture
    reader = boundary.multiplied[0]
    x = _largest(*_by_group(_input_axes(reader), maxima[reader], architecture), boundary.axes)
    w = np.maximum.reduce(
        [
            _largest(*_by_group(TABLE[path][0], model.read(path), architecture), boundary.axes)
            for path in boundary.multiplied
        ]
    )
    moves = (x > 0) & (w > 0)
    factor = np.where(moves, x, 1.0) ** alpha / np.where(moves, w, 1.0) ** (1 - alpha)
    return np.where(moves, np.clip(factor, 1 / LARGEST_FACTOR, LARGEST_FACTOR), 1.0)


def _input_axes(path: str) -> str:
    """Return the letters of the input of a stacked weight, layer first."""
    axes, contract = TABLE[path]
    return "".join(letter for letter in axes if letter == "l" or letter in contract)


def _by_group(axes: str, x: np.ndarray, architecture: Architecture) -> tuple[str, np.ndarray]:
    """Return the letters and the array with query heads `n` told apart as kv head and query of its group, `kg`."""
    if "n" not in axes:
        return axes, x
    n = axes.index("n")
    split = (architecture.kv_heads, architecture.queries_per_kv)
    return axes.replace("n", "kg"), x.reshape(*x.shape[:n], *split, *x.shape[n + 1 :])


def _largest(axes: str, x: np.ndarray, kept: str) -> np.ndarray:
    """Return the largest magnitudes over all axes but those `kept`, float64."""
    return np.abs(x).max(axis=tuple(i for i, letter in enumerate(axes) if letter not in kept)).astype(np.float64)


def input_maxima(
    settings: Settings, weights: Any, tokens_bt: jax.Array, position_bt: jax.Array, segments: Segments
) -> dict[str, jax.Array]:
    """Return path → largest magnitude of each input channel of that product, float32 [l, contracted axes, padded].

    To be jitted; of the products in the layers, arguments as in `observe`.
    """

    def measure(path: str, x: jax.Array, real_bt: jax.Array) -> jax.Array | None:
        counts = real_bt.reshape(*real_bt.shape, *[1] * (x.ndim - 2))
        largest = jnp.where(counts, jnp.abs(x.astype(jnp.float32)), 0).max(axis=(0, 1))
        return largest if path.startswith("layers/") else None

    return observe(settings, measure, weights, tokens_bt, position_bt, segments)


def logical_maxima(maxima: Mapping[str, jax.Array], table: Mapping[str, Parameter]) -> dict[str, np.ndarray]:
    """Return what `input_maxima` found as host arrays without padding, float32 [l, contracted axes]."""

    def unpad(path: str, found: jax.Array) -> np.ndarray:
        parameter, axes = table[path], _input_axes(path)
        padding = zip(parameter.axes, parameter.padding.axes, strict=True)
        return np.asarray(Padding(tuple(axis for letter, axis in padding if letter in axes)).unpad(np.asarray(found)))

    return {path: unpad(path, found) for path, found in maxima.items()}
