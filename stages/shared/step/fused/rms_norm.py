"""RMSNorm with a frozen weight: saves its input as it is, and 1/rms (`rstd`).

    y = w·x̂,  x̂ = x·ρ,  ρ = 1/√(mean(x²) + ε)
    ∂x = ρ·(g − x̂·mean(g·x̂)),  g = w·∂y

transformers' own saves its input in fp32 and rounds before it multiplies with the weight.

Source: Zhang and Sennrich 2019, Root Mean Square Layer Normalization, arXiv:1910.07467, equation 4.
"""

from typing import Any

import torch
from torch import nn

from stages.shared.step.fused import gpu


def rms_norm(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The norm of x [..., width], computed in fp32, in the dtype of x."""
    return _RMSNorm.apply(x, norm.weight, norm.variance_epsilon)


def rms_norm_forward(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """y, in the dtype of x, and ρ, in fp32 [..., 1]."""
    if gpu.uses_liger(x.device):
        return gpu.rms_norm_forward(x, weight, epsilon)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    rstd = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(epsilon))
    return _scale(x, rstd, weight), rstd


def recompute_rms_norm(
    x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """`y` again, in the backward pass."""
    if gpu.uses_liger(x.device):
        return gpu.rms_norm_forward(x, weight, epsilon)[0]
    return _scale(x, rstd, weight)


def rms_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """∂x, in the dtype of x."""
    if gpu.uses_liger(x.device):
        return gpu.rms_norm_backward(dy, x, rstd, weight)
    normed = x * rstd  # in fp32, as ρ is
    g = (dy * weight).float()
    mean = (g * normed).mean(-1, keepdim=True)
    return g.addcmul_(normed, mean, value=-1).mul_(rstd).to(x.dtype)


def _scale(x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x * rstd).mul_(weight).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        y, rstd = rms_norm_forward(x, weight, epsilon)
        ctx.save_for_backward(x, rstd, weight)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return rms_norm_backward(dy, *ctx.saved_tensors), None, None
