"""One differentiable function for a linear layer with an adapter, and one with the gate before it.

Gradients are those of the library's own modules: `tests/train/test_fused.py` holds both to fp64.
"""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch.nn.functional import silu

from stages.shared import precision
from stages.train.fused.products import (
    Factors,
    factor_gradients,
    frozen_matrix,
    input_gradient,
    product,
)

ADAPTER = "default"  # the name that peft gives the only one


def lora_linear(layer: LoraLayer, x: torch.Tensor) -> torch.Tensor:
    """What `layer` returns for x [..., in]: [..., out], in the dtype that products run in."""
    return _LoraLinear.apply(x, *_arguments(layer, x))


def gated_lora_linear(layer: LoraLayer, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """What `layer` returns for silu(gate)·up, which is not kept but computed again.

    Source: Shazeer 2020, GLU Variants Improve Transformer, arXiv:2002.05202, equation 6.
    """
    return _GatedLoraLinear.apply(gate, up, *_arguments(layer, gate))


def _arguments(layer: LoraLayer, x: torch.Tensor) -> tuple[Any, ...]:
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return a, b, layer, precision.of_products(x)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        layer: LoraLayer,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        flat = x.to(dtype).reshape(-1, x.shape[-1])
        factors = Factors(a.to(dtype), b.to(dtype), layer.scaling[ADAPTER])
        y, inner = product(flat, frozen_matrix(layer, dtype), layer.get_base_layer().bias, factors)
        ctx.save_for_backward(flat, inner, a, b)
        ctx.layer = layer
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inner, a, b = ctx.saved_tensors
        dy = gradient.reshape(-1, gradient.shape[-1])
        factors = Factors(a.to(dy.dtype), b.to(dy.dtype), ctx.layer.scaling[ADAPTER])
        da, db, outer = factor_gradients(dy, x, inner, factors)
        dx = None
        if ctx.needs_input_grad[0]:  # below the first block nothing learns
            dx = input_gradient(dy, frozen_matrix(ctx.layer, dy.dtype), outer, factors)
            dx = dx.view(*gradient.shape[:-1], -1)
        return dx, da, db, None, None


class _GatedLoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: torch.Tensor,
        up: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        layer: LoraLayer,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        x = (silu(gate) * up).to(dtype).view(-1, gate.shape[-1])
        factors = Factors(a.to(dtype), b.to(dtype), layer.scaling[ADAPTER])
        y, inner = product(x, frozen_matrix(layer, dtype), layer.get_base_layer().bias, factors)
        ctx.save_for_backward(gate, up, inner, a, b)
        ctx.layer = layer
        return y.view(*gate.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, inner, a, b = ctx.saved_tensors
        dy = gradient.reshape(-1, gradient.shape[-1])
        factors = Factors(a.to(dy.dtype), b.to(dy.dtype), ctx.layer.scaling[ADAPTER])
        activated = silu(gate)
        x = (activated * up).to(dy.dtype).view(-1, gate.shape[-1])
        da, db, outer = factor_gradients(dy, x, inner, factors)
        del x
        dx = input_gradient(dy, frozen_matrix(ctx.layer, dy.dtype), outer, factors).view_as(gate)
        dup = activated.mul_(dx)
        dgate = torch.ops.aten.silu_backward(dx.mul_(up), gate)
        return dgate, dup, da, db, None, None
