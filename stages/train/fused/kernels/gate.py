"""The gate's gradients and its result once more, in one pass, in the place of what they came from.

    y = silu(g)·u     ∂u = ∂y·silu(g)     ∂g = ∂y·u·σ(g)·(1 + g·(1 − σ(g)))

Source: Shazeer 2020, GLU Variants Improve Transformer, arXiv:2002.05202, equation 6.
"""

import torch
import triton
import triton.language as tl

NUMBERS, WARPS = 2048, 8  # that a program takes


def gradients(gate: torch.Tensor, up: torch.Tensor, gradient: torch.Tensor) -> None:
    """∂g becomes `gate`, ∂u `up`, and y becomes `gradient`, which was ∂y; all contiguous."""
    _gradients[(triton.cdiv(gate.numel(), NUMBERS),)](
        gate, up, gradient, gate.numel(), NUMBERS=NUMBERS, num_warps=WARPS
    )


@triton.jit
def _gradients(gate, up, gradient, size, NUMBERS: tl.constexpr):  # noqa: N803
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
