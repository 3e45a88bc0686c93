"""SwiGLU MLP as one function: a block's, with RMSNorm and residual, or an expert's.

    y = x + down(silu(gate(n))·up(n)),  n = norm(x)         an expert: y = down(…), n = x

Saved are x, gate and up; everything between them and y is computed again in the backward pass.

Source: Shazeer 2020, GLU Variants Improve Transformer, arXiv:2002.05202, equation 6.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.functional import silu

from stages.shared.step.fused import gpu
from stages.shared.step.fused.lora import Gradients, LoraLinears, lora_weights
from stages.shared.step.fused.rms_norm import (
    recompute_rms_norm,
    rms_norm_backward,
    rms_norm_forward,
)
from stages.shared.weights import precision


def swiglu_mlp(norm: nn.Module, mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The MLP of the normed residual stream x [tokens, width], added to x."""
    layers: Any = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return _MLP.apply(x, norm, layers, *lora_weights(*layers))


def expert_mlp(expert: Any, x: torch.Tensor) -> torch.Tensor:
    """Output [tokens, width] of an `experts.Expert` for x [tokens, width], routed to it."""
    layers: Any = tuple(getattr(expert, name) for name in expert.names)
    return _MLP.apply(x, None, layers, *lora_weights(*layers))


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, norm: Any, layers: Sequence[LoraLayer], *lora: torch.Tensor
    ) -> torch.Tensor:
        ctx.norm, ctx.layers, ctx.dtype = norm, layers, precision.matmul_dtype(x)
        normed, rstd, residual = x, None, None
        if norm is not None:
            normed, rstd = rms_norm_forward(x, norm.weight, norm.variance_epsilon)
            residual = x.to(ctx.dtype)
        gate_up, down = _linears(layers, lora, ctx.dtype)
        (gate, up), x_a = gate_up.matmul_lora(normed.to(ctx.dtype))
        del normed
        (y,), down_x_a = down.matmul_lora(swiglu(gate, up), residual)
        ctx.save_for_backward(x, rstd, gate, up, x_a, down_x_a, *lora)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Gradients:
        x, rstd, gate, up, x_a, down_x_a, *lora = ctx.saved_tensors
        norm, normed = ctx.norm, x
        gate_up, down = _linears(ctx.layers, lora, ctx.dtype)
        # First of all: its fp32 temporaries would be the peak beside the gradients of gate and up.
        if norm is not None:
            normed = recompute_rms_norm(x, rstd, norm.weight, norm.variance_epsilon)
        normed = normed.to(ctx.dtype)
        dys, down_gradients = _down_backward(down, dy.to(ctx.dtype), gate, up, down_x_a)
        dy_b = gate_up.dy_b(dys)
        gate_up_gradients = gate_up.lora_gradients(dys, normed, x_a, dy_b)
        del normed
        dx = gate_up.input_gradient(dys, dy_b)
        dys.clear()
        if norm is not None:
            dx = rms_norm_backward(dx, x, rstd, norm.weight).add_(dy)
        return dx, None, None, *gate_up_gradients, *down_gradients


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate)·up."""
    return gpu.swiglu(gate, up) if gpu.uses_liger(gate.device) else silu(gate).mul_(up)


def _linears(
    layers: Sequence[LoraLayer], lora: Sequence[torch.Tensor], dtype: torch.dtype
) -> tuple[LoraLinears, LoraLinears]:
    """Gate and up, which share an input, and down."""
    return LoraLinears(layers[:2], lora[:4], dtype), LoraLinears(layers[2:], lora[4:], dtype)


def _down_backward(
    down: LoraLinears, dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, x_a: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """∂gate and ∂up; and ∂A and ∂B of `down`. Overwrites gate and up on a GPU."""
    dy_b = down.dy_b([dy])
    if gpu.on_gpu(gate.device):  # by one kernel: nothing reads gate and up afterwards
        x = down.input_gradient([dy], dy_b)
        gpu.kernels().swiglu_backward(gate, up, x)  # from ∂x to x
        return [gate, up], down.lora_gradients([dy], x, x_a, dy_b)
    activated = silu(gate)
    x = activated * up
    lora_gradients = down.lora_gradients([dy], x, x_a, dy_b)
    del x
    dx = down.input_gradient([dy], dy_b)
    dup = activated.mul_(dx)
    dgate = dx.mul_(up)
    torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
    return [dgate, dup], lora_gradients
