"""RMSNorm with a frozen weight w: saves its input as it is, and 1/rms (ρ, `rstd`).

    y = w·x̂,  x̂ = x·ρ,  ρ = 1/√(mean(x²) + ε)
    ∂x = ρ·(g − x̂·mean(g·x̂)),  g = w·∂y

transformers' own saves its input in fp32 and rounds before it multiplies with the weight.

Source: Zhang and Sennrich 2019, Root Mean Square Layer Normalization, arXiv:1910.07467, equation 4.
"""

from typing import Any

import torch

from stages.shared.step.fused import gpu


def rms_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """The norm of x [..., width], computed in fp32, in the dtype of x."""
    return _RMSNorm.apply(x, norm)


def rms_norm_forward(norm: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """y, in the dtype of x, and ρ, in fp32 [..., 1]."""
    if gpu.uses_liger(x.device):
        return gpu.rms_norm_forward(norm, x)
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
    rstd = torch.rsqrt(squares.div_(x.shape[-1]).add_(norm.variance_epsilon))
    return _scale(norm, x, rstd), rstd


def recompute_rms_norm(norm: Any, x: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
    """The norm's output again, in the backward pass."""
    if gpu.uses_liger(x.device):
        return gpu.rms_norm_forward(norm, x)[0]
    return _scale(norm, x, rstd)


def rms_norm_backward(
    norm: Any, dy: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor
) -> torch.Tensor:
    """∂x, in the dtype of x."""
    if gpu.uses_liger(x.device):
        return gpu.rms_norm_backward(norm, dy, x, rstd)
    normed = x * rstd  # in fp32, as ρ is
    g = (dy * norm.weight).float()
    mean = (g * normed).mean(-1, keepdim=True)
    return g.addcmul_(normed, mean, value=-1).mul_(rstd).to(x.dtype)


def _scale(norm: Any, x: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
    return (x * rstd).mul_(norm.weight).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm: Any) -> torch.Tensor:
        y, rstd = rms_norm_forward(norm, x)
        ctx.norm = norm
        ctx.save_for_backward(x, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return rms_norm_backward(ctx.norm, dy, *ctx.saved_tensors), None
