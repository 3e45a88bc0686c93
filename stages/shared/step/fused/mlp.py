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
from stages.shared.step.fused import gpu, liger
from stages.shared.step.fused.lora import Adapted, Gradients, factors_of
from stages.shared.step.fused.rms_norm import norm_gradient, normed, normed_again


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
        normed_x, root = normed(x, weight, epsilon)
        before, after = (
            Adapted(layers[:2], factors[:4], dtype),
            Adapted(layers[2:], factors[4:], dtype),
        )
        (gate, up), inner = before.results(normed_x.to(dtype))
        del normed_x
        (y,), last = after.results(_gated(gate, up), x.to(dtype))
        ctx.save_for_backward(x, root, weight, gate, up, inner, last, *factors)
        ctx.layers, ctx.dtype, ctx.epsilon = layers, dtype, epsilon
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, root, weight, gate, up, inner, last, *factors = ctx.saved_tensors
        before = Adapted(ctx.layers[:2], factors[:4], ctx.dtype)
        after = Adapted(ctx.layers[2:], factors[4:], ctx.dtype)
        # First of all: in fp32 it would be the most, beside the gradients of gate and up.
        y = normed_again(x, root, weight, ctx.epsilon).to(ctx.dtype)
        through = _through_gate_by_kernel if gpu.on_gpu(gate.device) else _through_gate
        found, learnt_after = through(after, gradient, gate, up, last)
        outer = before.outer(found)
        learnt = before.factor_gradients(found, y, inner, outer)
        del y
        dnormed = before.input_gradient(found, outer)
        found.clear()
        dx = norm_gradient(dnormed, x, root, weight).add_(gradient)
        return dx, *[None] * 4, *learnt, *learnt_after


def _gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return liger.gated(gate, up) if liger.cover(gate.device) else silu(gate).mul_(up)


def _through_gate(
    after: Adapted, gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, last: torch.Tensor
) -> tuple[list[torch.Tensor], Gradients]:
    """∂gate and ∂up, and the gradients of the adapter of `down`, from that of its result."""
    activated = silu(gate)
    result = activated * up
    outer = after.outer([gradient])
    learnt = after.factor_gradients([gradient], result, last, outer)
    del result
    dgate = after.input_gradient([gradient], outer)
    dup = activated.mul_(dgate)
    dgate.mul_(up)
    torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
    return [dgate, dup], learnt


def _through_gate_by_kernel(
    after: Adapted, gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, last: torch.Tensor
) -> tuple[list[torch.Tensor], Gradients]:
    """The same in the place of gate and up: whatever saved these has no more use for them."""
    outer = after.outer([gradient])
    result = after.input_gradient([gradient], outer)
    gpu.kernels().swiglu_backward(gate, up, result)
    return [gate, up], after.factor_gradients([gradient], result, last, outer)
