"""A 4-bit matrix as a product reads it, in one pass: codes, constants, and constants of constants.

bitsandbytes makes the constants first, in three kernels more, and its own reads as many bytes at
two thirds of the rate. The values are the same, bit for bit.

Source: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, equations 5 and 6.
"""

from typing import Any

import torch
import triton
import triton.language as tl

CONSTANTS = 128  # that a program takes, each with its block of numbers
WARPS = 8


def dequantized(codes: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """A matrix [out, in] in `dtype`.

    Args:
        codes: uint8, two numbers a byte, the first in its upper half.
        state: `QuantState` of bitsandbytes, with or without double quantization.
        dtype: of the result.
    """
    found = torch.empty(state.shape, dtype=dtype, device=codes.device)
    nested = state.state2 if state.nested else state
    _dequantize[(triton.cdiv(state.absmax.numel(), CONSTANTS),)](
        codes,
        state.absmax,
        state.code,
        nested.absmax,
        nested.code,
        state.offset if state.nested else state.absmax,
        found,
        codes.numel(),
        found.numel(),
        NESTED=state.nested,
        BLOCK=state.blocksize,
        NESTED_BLOCK=nested.blocksize,
        CONSTANTS=CONSTANTS,
        num_warps=WARPS,
    )
    return found


@triton.jit
def _dequantize(
    codes,
    constants,
    levels,
    nested_constants,
    nested_levels,
    offset,
    found,
    bytes_of_codes,
    size,
    NESTED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    NESTED_BLOCK: tl.constexpr,  # noqa: N803
    CONSTANTS: tl.constexpr,  # noqa: N803
):
    """Each constant's block of numbers is a row."""
    rows = tl.program_id(0).to(tl.int64) * CONSTANTS + tl.arange(0, CONSTANTS)
    there = rows * BLOCK < size
    scales = tl.load(constants + rows, there, other=0)
    if NESTED:
        of_block = tl.load(nested_constants + rows // NESTED_BLOCK, there, other=0.0)
        scales = tl.load(nested_levels + scales.to(tl.int32)) * of_block + tl.load(offset)
    pairs = rows[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    both = tl.load(codes + pairs, pairs < bytes_of_codes, other=0).to(tl.int32)
    upper = tl.load(levels + (both >> 4)) * scales[:, None]
    lower = tl.load(levels + (both & 15)) * scales[:, None]
    numbers = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    values = tl.interleave(upper, lower).to(found.dtype.element_ty)
    tl.store(found + numbers, values, numbers < size)
