"""Triton kernels: 4-bit dequantization, the backward pass of SwiGLU, and cross entropy."""

from typing import Any

import torch
import triton
import triton.language as tl

BLOCKS_PER_PROGRAM, DEQUANTIZE_WARPS = 128, 8
ELEMENTS_PER_PROGRAM, SWIGLU_WARPS = 2048, 8
LOGITS_AT_ONCE, CROSS_ENTROPY_WARPS = 8192, 16


def dequantize(codes: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """A 4-bit weight [out, in] in `dtype`, in one pass, double quantization included.

    `codes` are uint8, two elements a byte, the first in its upper half; `state` is bitsandbytes'
    `QuantState`. Its own kernels take three more passes for absmax, and read codes at two thirds
    of the rate. The values are the same, bit for bit.

    Source: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, equations 5 and 6.
    """
    out = torch.empty(state.shape, dtype=dtype, device=codes.device)
    nested = state.state2 if state.nested else state
    _dequantize[(triton.cdiv(state.absmax.numel(), BLOCKS_PER_PROGRAM),)](
        codes,
        state.absmax,
        state.code,
        nested.absmax,
        nested.code,
        state.offset if state.nested else state.absmax,
        out,
        codes.numel(),
        out.numel(),
        NESTED=state.nested,
        BLOCK=state.blocksize,
        NESTED_BLOCK=nested.blocksize,
        BLOCKS=BLOCKS_PER_PROGRAM,
        num_warps=DEQUANTIZE_WARPS,
    )
    return out


@triton.jit
def _dequantize(
    codes,
    absmax,
    codebook,
    nested_absmax,
    nested_codebook,
    offset,
    out,
    code_bytes,
    size,
    NESTED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    NESTED_BLOCK: tl.constexpr,  # noqa: N803
    BLOCKS: tl.constexpr,  # noqa: N803
):
    """A row a quantization block."""
    rows = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    row_mask = rows * BLOCK < size
    scales = tl.load(absmax + rows, row_mask, other=0)
    if NESTED:
        nested_scales = tl.load(nested_absmax + rows // NESTED_BLOCK, row_mask, other=0.0)
        scales = tl.load(nested_codebook + scales.to(tl.int32)) * nested_scales + tl.load(offset)
    pairs = rows[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    both = tl.load(codes + pairs, pairs < code_bytes, other=0).to(tl.int32)
    upper = tl.load(codebook + (both >> 4)) * scales[:, None]
    lower = tl.load(codebook + (both & 15)) * scales[:, None]
    elements = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    values = tl.interleave(upper, lower).to(out.dtype.element_ty)
    tl.store(out + elements, values, elements < size)


def swiglu_backward(gate: torch.Tensor, up: torch.Tensor, dy: torch.Tensor) -> None:
    """SwiGLU backward in one kernel: overwrites gate and up with their gradients, and ∂y with y.

        y = silu(g)·u     ∂u = ∂y·silu(g)     ∂g = ∂y·u·σ(g)·(1 + g·(1 − σ(g)))

    All are contiguous. Source: Shazeer 2020, arXiv:2002.05202, equation 6.
    """
    _swiglu_backward[(triton.cdiv(gate.numel(), ELEMENTS_PER_PROGRAM),)](
        gate, up, dy, gate.numel(), ELEMENTS=ELEMENTS_PER_PROGRAM, num_warps=SWIGLU_WARPS
    )


@triton.jit
def _swiglu_backward(gate, up, dy, size, ELEMENTS: tl.constexpr):  # noqa: N803
    elements = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = elements < size
    g = tl.load(gate + elements, mask, other=0.0).to(tl.float32)
    u = tl.load(up + elements, mask, other=0.0).to(tl.float32)
    d = tl.load(dy + elements, mask, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-g))
    activated = g * sigmoid
    dtype = gate.dtype.element_ty
    tl.store(gate + elements, (d * u * (sigmoid + activated * (1 - sigmoid))).to(dtype), mask)
    tl.store(up + elements, (d * activated).to(dtype), mask)
    # Rounded in between, as in the forward pass.
    tl.store(dy + elements, (activated.to(dtype).to(tl.float32) * u).to(dtype), mask)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor) -> None:
    """Losses of logits, which are overwritten with their gradients: read twice, written once.

        loss = ln Σ exp(z) − z[target],  ∂z = softmax(z) − onehot(target)

    Contiguous: z [tokens, vocabulary] in the compute dtype, targets int64 and losses fp32 [tokens].

    Source: for the sum in one pass, Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3.
    """
    _cross_entropy[(len(logits),)](
        logits,
        targets,
        losses,
        VOCABULARY=logits.shape[1],
        LOGITS=LOGITS_AT_ONCE,
        num_warps=CROSS_ENTROPY_WARPS,
    )


@triton.jit
def _cross_entropy(
    logits,
    targets,
    losses,
    VOCABULARY: tl.constexpr,  # noqa: N803  (a model has one)
    LOGITS: tl.constexpr,  # noqa: N803
):
    """A program a token: the largest logit, and the sum of exp(z − largest)."""
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * VOCABULARY
    target = tl.load(targets + token)
    targeted = tl.load(row + target).to(tl.float32)
    largest = float("-inf")
    total = 0.0
    for start in range(0, VOCABULARY, LOGITS):
        columns = start + tl.arange(0, LOGITS)
        z = tl.load(row + columns, columns < VOCABULARY, other=float("-inf")).to(tl.float32)
        before = largest
        largest = tl.maximum(largest, tl.max(z, 0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(z - largest), 0)
    tl.store(losses + token, largest + tl.log(total) - targeted)
    for start in range(0, VOCABULARY, LOGITS):
        columns = start + tl.arange(0, LOGITS)
        mask = columns < VOCABULARY
        z = tl.load(row + columns, mask, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(z - largest) / total - tl.where(columns == target, 1.0, 0.0)
        tl.store(row + columns, gradient.to(logits.dtype.element_ty), mask)
