"""Rotation of a float model: another basis for its residual stream and its values, in which it computes the same.

A few channels of a trained model's residual stream are far larger than the others, and a token has one scale for all of
its channels. In a basis turned at random no channel stands out (QuaRot, Ashkboos et al. 2024; SpinQuant, Liu et al.
2024): their R1 and R2 are folded into the weights here, offline, so the rotated model is an ordinary one. Their R3 and
R4 would be computed at run time, and no other engine knows them.

Float64 inside, float32 outside, one leaf at a time. In einsums the upper-case letter is the rotated axis: D of d.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np

from research.architecture import Architecture

Read = Callable[[str], np.ndarray]
"""Path → array of the logical, stacked shape."""


@dataclass(frozen=True)
class FloatModel:
    """A float model as numpy arrays; `read` returns a leaf as float32."""

    architecture: Architecture
    read: Read


# path: (norm whose output the product reads, its scale's axes, the weight's axes)
_BEHIND_NORMS = {
    "layers/attention/q_dnh": ("layers/attention_norm/scale_d", "ld", "ldnh"),
    "layers/attention/k_dkh": ("layers/attention_norm/scale_d", "ld", "ldkh"),
    "layers/attention/v_dkh": ("layers/attention_norm/scale_d", "ld", "ldkh"),
    "layers/mlp/gate_df": ("layers/mlp_norm/scale_d", "ld", "ldf"),
    "layers/mlp/up_df": ("layers/mlp_norm/scale_d", "ld", "ldf"),
    "layers/mlp/router_de": ("layers/mlp_norm/scale_d", "ld", "lde"),
    "layers/mlp/gate_edf": ("layers/mlp_norm/scale_d", "ld", "ledf"),
    "layers/mlp/up_edf": ("layers/mlp_norm/scale_d", "ld", "ledf"),
    "head/table_vd": ("norm/scale_d", "d", "vd"),
}
# path: axes of what reads the residual stream, or writes to it
_ON_RESIDUAL = {path: axes for path, (_, _, axes) in _BEHIND_NORMS.items()} | {
    "embed/table_vd": "vd",
    "layers/attention/o_nhd": "lnhd",
    "layers/mlp/down_fd": "lfd",
    "layers/mlp/down_efd": "lefd",
}
_NORMS = frozenset(norm for norm, _, _ in _BEHIND_NORMS.values())
HEAD, EMBED, FINAL_NORM = "head/table_vd", "embed/table_vd", "norm/scale_d"


def rotate(model: FloatModel, seed: int) -> FloatModel:
    """Return a model of the same function whose residual stream (R1) and values (R2) are rotated at random.

    The scales of the norms are folded into the products behind them, and are ones then. Where the head is tied to the
    embedding that can't be done with the final norm: if its scale is one number for all channels it keeps it, and the
    head stays tied; if not, the head becomes a table of its own, and the returned architecture says `tied_head=False`.
    Norms of heads stay as they are: they stand behind the projections, on queries and keys, which are not rotated.
    """
    a = model.architecture
    tied = a.tied_head and bool(np.ptp(model.read(FINAL_NORM)) == 0)
    flat = _fold_norms(model.read, was_tied=a.tied_head, tied=tied)
    turned = _rotate_residual(flat, orthogonal(a.width, (seed, 0)))
    turned = _rotate_values(turned, _value_rotations(a, seed))
    return FloatModel(replace(a, tied_head=tied), lambda path: turned(path).astype(np.float32))


def _fold_norms(read: Read, *, was_tied: bool, tied: bool) -> Read:
    """Return a reader of the same function in which norms have scales of ones; float64."""

    def folded(path: str) -> np.ndarray:
        if path in _NORMS and not (path == FINAL_NORM and tied):
            return np.ones_like(read(path), np.float64)
        w = read(EMBED if path == HEAD and was_tied else path).astype(np.float64)
        if path not in _BEHIND_NORMS:
            return w
        norm, norm_axes, axes = _BEHIND_NORMS[path]
        return np.einsum(f"{axes},{norm_axes}->{axes}", w, read(norm).astype(np.float64))

    return folded


def _rotate_residual(read: Read, rotation_dd: np.ndarray) -> Read:
    """Return a reader in whose model the residual stream is `x_btd @ rotation_dd`, given norms without scales."""

    def rotated(path: str) -> np.ndarray:
        axes = _ON_RESIDUAL.get(path)
        if axes is None:
            return read(path)
        return np.einsum(f"{axes},dD->{axes.replace('d', 'D')}", read(path), rotation_dd, optimize=True)

    return rotated


def _rotate_values(read: Read, rotation_lkhh: np.ndarray) -> Read:
    """Return a reader in whose model the values of each kv head are rotated; its queries' outputs are turned back."""

    def rotated(path: str) -> np.ndarray:
        w = read(path)
        if path == "layers/attention/v_dkh":
            return np.einsum("ldkh,lkhH->ldkH", w, rotation_lkhh, optimize=True)
        if path == "layers/attention/o_nhd":
            layers, kv_heads, head_width, _ = rotation_lkhh.shape
            w_lkghd = w.reshape(layers, kv_heads, -1, head_width, w.shape[-1])
            return np.einsum("lkghd,lkhH->lkgHd", w_lkghd, rotation_lkhh, optimize=True).reshape(w.shape)
        return w

    return rotated


def _value_rotations(architecture: Architecture, seed: int) -> np.ndarray:
    """Return a rotation for each kv head of each layer, float64 [l, k, h, h]."""
    a = architecture
    return np.stack(
        [
            np.stack([orthogonal(a.head_width, (seed, 1, layer, head)) for head in range(a.kv_heads)])
            for layer in range(a.layers)
        ]
    )


def orthogonal(size: int, seed: tuple[int, ...]) -> np.ndarray:
    """Return an orthogonal matrix with entries of about equal size, float64 [size, size], a function of its arguments.

    Random signs times the Hadamard matrix of the power of two in `size`, times (Kronecker) the discrete Hartley
    transform of the odd rest (Bracewell 1983), whose entries are at most √2 times their root mean square.
    """
    power = size & -size
    hadamard = reduce(np.kron, [np.array([[1.0, 1.0], [1.0, -1.0]])] * (power.bit_length() - 1), np.ones((1, 1)))
    return _signs(size, seed)[:, None] * np.kron(hadamard, _hartley(size // power)) / np.sqrt(size)


def _hartley(size: int) -> np.ndarray:
    """Return cos + sin of 2π·i·j / size, float64 [size, size]; over √size it is orthogonal."""
    index = np.arange(size)
    angle = 2 * np.pi * (np.outer(index, index) % size) / size  # the remainder keeps the angles small and exact
    return np.cos(angle) + np.sin(angle)


def _signs(size: int, seed: tuple[int, ...]) -> np.ndarray:
    """Return random signs, float64 [size], the same with every version of numpy: the words of a SeedSequence are."""
    words = np.random.SeedSequence(seed).generate_state(-(-size // 32))
    bits = np.unpackbits(words.astype("<u4").view(np.uint8), count=size)
    return 1.0 - 2.0 * bits.astype(np.float64)
