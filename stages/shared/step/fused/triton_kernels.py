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


def dequantize(codes: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
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


NUMBERS, SWIGLU_WARPS = 2048, 8  # that a program takes


def swiglu_backward(gate: torch.Tensor, up: torch.Tensor, gradient: torch.Tensor) -> None:
    """∂g becomes `gate`, ∂u `up`, and y becomes `gradient`, which was ∂y; all contiguous."""
    _swiglu_backward[(triton.cdiv(gate.numel(), NUMBERS),)](
        gate, up, gradient, gate.numel(), NUMBERS=NUMBERS, num_warps=SWIGLU_WARPS
    )


@triton.jit
def _swiglu_backward(gate, up, gradient, size, NUMBERS: tl.constexpr):  # noqa: N803
    where = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    there = where < size
    g = tl.load(gate + where, there, other=0.0).to(tl.float32)
    u = tl.load(up + where, there, other=0.0).to(tl.float32)
    dy = tl.load(gradient + where, there, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-g))
    activated = g * sigmoid
    dtype = gate.dtype.element_ty
    tl.store(gate + where, (dy * u * (sigmoid + activated * (1 - sigmoid))).to(dtype), there)
    tl.store(up + where, (dy * activated).to(dtype), there)
    # Rounded in between, as it was in the forward pass.
    tl.store(gradient + where, (activated.to(dtype).to(tl.float32) * u).to(dtype), there)


LOGITS, LOSS_WARPS = 8192, 16  # that a program takes at once


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor) -> None:
    """Losses [tokens], fp32, of logits [tokens, vocabulary], which become their gradients.

    Args:
        logits: z, contiguous, in the dtype that products run in.
        targets: int64 [tokens].
        losses: room for them, contiguous.
    """
    _cross_entropy[(len(logits),)](
        logits, targets, losses, VOCABULARY=logits.shape[1], LOGITS=LOGITS, num_warps=LOSS_WARPS
    )


@triton.jit
def _cross_entropy(
    logits,
    targets,
    losses,
    VOCABULARY: tl.constexpr,  # noqa: N803  (a model has one)
    LOGITS: tl.constexpr,  # noqa: N803
):
    """A program a token; with the largest logit goes the sum of exp(z − largest)."""
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * VOCABULARY
    target = tl.load(targets + token)
    targeted = tl.load(row + target).to(tl.float32)
    largest = float("-inf")
    total = 0.0
    for start in range(0, VOCABULARY, LOGITS):
        where = start + tl.arange(0, LOGITS)
        z = tl.load(row + where, where < VOCABULARY, other=float("-inf")).to(tl.float32)
        before = largest
        largest = tl.maximum(largest, tl.max(z, 0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(z - largest), 0)
    tl.store(losses + token, largest + tl.log(total) - targeted)
    for start in range(0, VOCABULARY, LOGITS):
        where = start + tl.arange(0, LOGITS)
        there = where < VOCABULARY
        z = tl.load(row + where, there, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(z - largest) / total - tl.where(where == target, 1.0, 0.0)
        tl.store(row + where, gradient.to(logits.dtype.element_ty), there)
