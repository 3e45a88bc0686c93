"""The root-mean-square norm with a frozen weight: it keeps its input as it is, and the root.

The library's own keeps the input in fp32. The forward pass is the same, bit for bit.

    y = w·x·ρ,  ρ = 1/√(mean(x²) + ε)
    ∂x = ρ·(g − x̂·mean(g·x̂)),  g = w·∂y,  x̂ = x·ρ

Source: Zhang and Sennrich 2019, Root Mean Square Layer Normalization, arXiv:1910.07467, equation 4.
"""

from typing import Any

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Of x [..., width]; computed in fp32, returned in the dtype of weight times x."""
    return _RMSNorm.apply(x, weight, epsilon)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide = x.float()
        root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, root, weight)
        return weight * (wide * root).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, root, weight = ctx.saved_tensors
        normed = x.float() * root  # a tensor of its own where x is fp32 already
        wide = (gradient * weight).float()
        along = (wide * normed).mean(-1, keepdim=True)
        return wide.sub(normed.mul_(along)).mul_(root).to(x.dtype), None, None
