"""Blocks of 32 weights as GGUF stores them, Q8_0, Q4_0 and Q4_1, made of codes and scales that exist already.

Nothing is quantized here: a block is the float16 scale that covers its 32 inputs, and their codes. Q8_0 holds int8
codes in their order. Q4_0 holds code + 8 in four bits: the low half of byte j is element j, its high half element
j + 16. The value is code · scale for both, so that a scale may be negative. Q4_1 holds codes 0 … 15 so, and a float16
offset behind the scale, which is added. Layouts: llama.cpp, ggml-common.h.
"""

from dataclasses import dataclass

import numpy as np

from research.errors import UserError

BLOCK = 32
FOUR_BITS = ("Q4_0", "Q4_1")
TYPES = ("Q8_0", "Q4_0", "Q4_1")


@dataclass(frozen=True, eq=False)
class Blocks:
    """A matrix, or one layer of a stack, in blocks along its rows."""

    codes_oi: np.ndarray
    """int8, [out, in]."""
    scale_ob: np.ndarray
    """float16, [out, in / 32]."""
    offset_ob: np.ndarray | None = None
    """float16, [out, in / 32], of affine grids."""

    def pack(self, type: str) -> np.ndarray:
        """Return the bytes of a tensor of that type: uint8 [out, bytes per row]. Codes must fit, see `fits`."""
        rows, blocks = self.scale_ob.shape
        codes = self.codes_oi.reshape(rows, blocks, BLOCK)
        if type in FOUR_BITS:
            shifted = (codes + np.int8(8 if self.offset_ob is None else 0)).view(np.uint8)
            codes = shifted[..., : BLOCK // 2] | (shifted[..., BLOCK // 2 :] << 4)
        floats = [self.scale_ob] if self.offset_ob is None else [self.scale_ob, self.offset_ob]
        numbers = np.stack(floats, axis=-1).astype("<f2").view(np.uint8)
        return np.concatenate([numbers, codes.view(np.uint8)], axis=-1).reshape(rows, -1)


def fits(codes: np.ndarray, has_offset: bool, type: str) -> bool:
    """Whether a type holds codes (int8) as they are: with an offset Q4_1 alone, -8 … 7 without one Q4_0, too."""
    return type == "Q4_1" if has_offset else type == "Q8_0" or (type == "Q4_0" and _fit_four_bits(codes))


def holder(codes: np.ndarray, has_offset: bool) -> str:
    """Return the type that holds codes."""
    return "Q4_1" if has_offset else "Q4_0" if _fit_four_bits(codes) else "Q8_0"


def _fit_four_bits(codes: np.ndarray) -> bool:
    return bool(codes.min() >= -8 and codes.max() <= 7)


def make_blocks(path: str, codes_oi: np.ndarray, scale_oi: np.ndarray, offset_oi: np.ndarray | None = None) -> Blocks:
    """Return codes (int8) and the scale and offset of each of them (float16), all [out, in], as blocks.

    Raises:
        UserError: a row is no whole number of blocks, a block has more than one scale, or a scale is not finite; the
            line names the leaf `path`.
    """
    rows, inputs = codes_oi.shape
    if inputs % BLOCK:
        raise UserError(
            f"{path} sums over {inputs} inputs, no multiple of a block's {BLOCK}; type F32 holds it exactly"
        )
    numbers = scale_oi[None] if offset_oi is None else np.stack([scale_oi, offset_oi])
    numbers_nobi = numbers.reshape(-1, rows, inputs // BLOCK, BLOCK)
    if not np.isfinite(numbers_nobi).all():
        raise UserError(f"{path} has scales that are not finite; export a step from before the run diverged")
    if (numbers_nobi != numbers_nobi[..., :1]).any():
        raise UserError(
            f"{path} has more than one scale in a block of {BLOCK} inputs; type F32 holds it exactly (blocks want"
            f" granularity tensor, channel, or groups of a multiple of {BLOCK} inputs)"
        )
    return Blocks(np.ascontiguousarray(codes_oi), *(np.ascontiguousarray(x_obi[..., 0]) for x_obi in numbers_nobi))
