"""The root-mean-square norm with a frozen weight: it keeps its input as it is, and the root.

The library's own keeps the input in fp32, and rounds before it multiplies with the weight.

    y = w·x̂,  x̂ = x·ρ,  ρ = 1/√(mean(x²) + ε)
    ∂x = ρ·(g − x̂·mean(g·x̂)),  g = w·∂y

Source: Zhang and Sennrich 2019, Root Mean Square Layer Normalization, arXiv:1910.07467, equation 4.
"""

from typing import Any

import torch
from torch import nn

from stages.shared.step.fused import liger


def rms_norm(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What `norm` returns for x [..., width], computed in fp32; in the dtype of x."""
    return _RMSNorm.apply(x, norm.weight, norm.variance_epsilon)


def normed(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """y, in the dtype of x, and ρ, in fp32 [..., 1]."""
    if liger.cover(x.device):
        return liger.normed(x, weight, epsilon)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    root = torch.rsqrt(length.square_().div_(x.shape[-1]).add_(epsilon))
    return _scaled(x, root, weight), root


def normed_again(
    x: torch.Tensor, root: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """The same y once more."""
    return (
        liger.normed(x, weight, epsilon)[0] if liger.cover(x.device) else _scaled(x, root, weight)
    )


def norm_gradient(
    gradient: torch.Tensor, x: torch.Tensor, root: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """∂x, in the dtype of x, for a gradient ∂y."""
    if liger.cover(x.device):
        return liger.norm_gradient(gradient, x, root, weight)
    standard = x * root  # in fp32, as the root is
    wide = (gradient * weight).float()
    along = (wide * standard).mean(-1, keepdim=True)
    return wide.addcmul_(standard, along, value=-1).mul_(root).to(x.dtype)


def _scaled(x: torch.Tensor, root: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x * root).mul_(weight).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        y, root = normed(x, weight, epsilon)
        ctx.save_for_backward(x, root, weight)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return norm_gradient(gradient, *ctx.saved_tensors), None, None
