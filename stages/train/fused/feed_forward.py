"""The gated feed-forward of a block with the norm before it, as one differentiable function.

    y = x + down(silu(gate(n))·up(n)),  n = norm(x)

It keeps x, gate and up: what lies between them and the result is computed again.

Source: Shazeer 2020, GLU Variants Improve Transformer, arXiv:2002.05202, equation 6.
"""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.functional import silu

from stages.shared import precision
from stages.train.fused.norm import norm_gradient, normed, root_of
from stages.train.fused.products import Adapted, factors_of


def feed_forward(norm: nn.Module, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A residual stream x [tokens, width], and what `module` returns for it normed added to it."""
    layers: Any = (module.gate_proj, module.up_proj, module.down_proj)
    dtype = precision.of_products(x)
    return _FeedForward.apply(
        x, norm.weight, norm.variance_epsilon, layers, dtype, *factors_of(*layers)
    )


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        epsilon: float,
        layers: tuple[LoraLayer, ...],
        dtype: torch.dtype,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        root = root_of(x, epsilon)
        before, after = (
            Adapted(layers[:2], factors[:4], dtype),
            Adapted(layers[2:], factors[4:], dtype),
        )
        (gate, up), inner = before.results(normed(x, root, weight).to(dtype))
        (y,), last = after.results(silu(gate).mul_(up), x.to(dtype))
        ctx.save_for_backward(x, root, weight, gate, up, inner, last, *factors)
        ctx.layers, ctx.dtype = layers, dtype
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, root, weight, gate, up, inner, last, *factors = ctx.saved_tensors
        before = Adapted(ctx.layers[:2], factors[:4], ctx.dtype)
        after = Adapted(ctx.layers[2:], factors[4:], ctx.dtype)
        activated = silu(gate)
        learnt_after, outer = after.factor_gradients([gradient], activated * up, last)
        product = after.input_gradient([gradient], outer)
        dup = activated.mul_(product)
        dgate = _silu_backward(product.mul_(up), gate)
        del activated, product  # which have become the two
        found = [dgate, dup]
        learnt, outer = before.factor_gradients(found, normed(x, root, weight).to(ctx.dtype), inner)
        del dgate, dup
        dnormed = before.input_gradient(found, outer)
        found.clear()
        dx = norm_gradient(dnormed, x, root, weight).add_(gradient)
        return dx, *[None] * 4, *learnt, *learnt_after


def _silu_backward(gradient: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """The gradient of silu at `gate`, in the place of the gradient of its result."""
    return torch.ops.aten.silu_backward.grad_input(gradient, gate, grad_input=gradient)
