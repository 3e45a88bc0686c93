"""The product of a frozen matrix with an adapter beside it, and its gradients.

    y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ
    ∂x = ∂y·W + s·(∂y·B)·A     ∂A = s·(∂y·B)ᵀ·x     ∂B = s·∂yᵀ·(x·Aᵀ)

Source: Hu et al. 2021, LoRA, arXiv:2106.09685, equation 3. What the frozen matrix and the adapter
return is added up within the second product, where it is not rounded in between, and neither the
dequantized matrix nor a copy of the input is kept from the forward to the backward pass.
"""

from dataclasses import dataclass
from typing import cast

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from peft.tuners.lora import LoraLayer


@dataclass(frozen=True)
class Factors:
    """The adapter of one layer, in the dtype that products run in.

    Attributes:
        a: [rank, in].
        b: [out, rank].
        scale: s, what their product is multiplied with.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float


def frozen_matrix(layer: LoraLayer, dtype: torch.dtype) -> torch.Tensor:
    """The weights [out, in] below an adapter, dequantized where they are quantized."""
    base = layer.get_base_layer()
    weight = base.weight
    if isinstance(base, Linear4bit):
        weight = cast(Params4bit, weight)
        return dequantize_4bit(weight.data, weight.quant_state).to(dtype)
    return cast(torch.Tensor, weight).detach().to(dtype)


def product(
    x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, factors: Factors
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result y [tokens, out], and x·Aᵀ [tokens, rank], of an input x [tokens, in]."""
    inner = x @ factors.a.t()
    y = x @ matrix.t() if bias is None else torch.addmm(bias.to(x.dtype), x, matrix.t())
    return y.addmm_(inner, factors.b.t(), alpha=factors.scale), inner


def factor_gradients(
    gradient: torch.Tensor, x: torch.Tensor, inner: torch.Tensor, factors: Factors
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """∂A [rank, in] and ∂B [out, rank], in fp32; and ∂y·B [tokens, rank]."""
    outer = gradient @ factors.b
    da = (outer.t() @ x).float().mul_(factors.scale)
    return da, (gradient.t() @ inner).float().mul_(factors.scale), outer


def input_gradient(
    gradient: torch.Tensor, matrix: torch.Tensor, outer: torch.Tensor, factors: Factors
) -> torch.Tensor:
    """∂x [tokens, in], of a gradient ∂y [tokens, out]."""
    return (gradient @ matrix).addmm_(outer, factors.a, alpha=factors.scale)
