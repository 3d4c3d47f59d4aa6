"""Blocks of 32 weights as GGUF stores them, Q8_0 and Q4_0, made of codes and scales that exist already.

Nothing is quantized here: a block is the float16 scale that covers its 32 inputs, and their codes. Q8_0 holds int8
codes in their order. Q4_0 holds code + 8 in four bits: the low half of byte j is element j, its high half element
j + 16. The value is code · scale for both, so that a scale may be negative. Layouts: llama.cpp, ggml-common.h.
"""

from dataclasses import dataclass

import numpy as np

from research.errors import UserError

BLOCK = 32
TYPES = ("Q8_0", "Q4_0")


@dataclass(frozen=True, eq=False)
class Blocks:
    """A matrix, or one layer of a stack, in blocks along its rows."""

    codes_oi: np.ndarray
    """int8, [out, in]."""
    scale_ob: np.ndarray
    """float16, [out, in / 32]."""

    def pack(self, type: str) -> np.ndarray:
        """Return the bytes of a tensor of that type: uint8 [out, bytes per row]. Codes must fit, see `fits_q4_0`."""
        rows, blocks = self.scale_ob.shape
        codes = self.codes_oi.reshape(rows, blocks, BLOCK)
        if type == "Q4_0":
            shifted = (codes + np.int8(8)).view(np.uint8)
            codes = shifted[..., : BLOCK // 2] | (shifted[..., BLOCK // 2 :] << 4)
        scale = np.ascontiguousarray(self.scale_ob, "<f2")[..., None].view(np.uint8)
        return np.concatenate([scale, codes.view(np.uint8)], axis=-1).reshape(rows, -1)


def fits_q4_0(codes: np.ndarray) -> bool:
    """Whether all codes (int8) are among the sixteen of Q4_0, -8 … 7."""
    return bool(codes.min() >= -8 and codes.max() <= 7)


def make_blocks(path: str, codes_oi: np.ndarray, scale_oi: np.ndarray) -> Blocks:
    """Return codes (int8) and the scale of each of them (float16), both [out, in], as blocks.

    Raises:
        UserError: a row is no whole number of blocks, a block has more than one scale, or a scale is not finite; the
            line names the leaf `path`.
    """
    rows, inputs = codes_oi.shape
    if inputs % BLOCK:
        raise UserError(
            f"{path} sums over {inputs} inputs, no multiple of a block's {BLOCK}; type F32 holds it exactly"
        )
    scale_obi = scale_oi.reshape(rows, inputs // BLOCK, BLOCK)
    if not np.isfinite(scale_obi).all():
        raise UserError(f"{path} has scales that are not finite; export a step from before the run diverged")
    if (scale_obi != scale_obi[..., :1]).any():
        raise UserError(
            f"{path} has more than one scale in a block of {BLOCK} inputs; type F32 holds it exactly (blocks want"
            f" granularity tensor, channel, or groups of a multiple of {BLOCK} inputs)"
        )
    return Blocks(np.ascontiguousarray(codes_oi), np.ascontiguousarray(scale_obi[..., 0]))
