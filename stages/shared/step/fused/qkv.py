"""RMSNorm, query, key and value projections and RoPE as one function; and the output projection.

The backward pass is written by hand; `tests/shared/step/test_fused.py` holds it to fp64.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from stages.shared.step.fused import gpu
from stages.shared.step.fused.lora import Gradients, LoraLinears, lora_weights
from stages.shared.step.fused.rms_norm import (
    recompute_rms_norm,
    rms_norm_backward,
    rms_norm_forward,
)
from stages.shared.weights import precision

Rope = tuple[torch.Tensor, torch.Tensor]  # cos and sin, [tokens, head size]


def qkv(
    norm: nn.Module, layers: Sequence[LoraLayer], x: torch.Tensor, rope: Rope | None
) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values [tokens, their width] of the residual stream x [tokens, width]."""
    return _QKV.apply(x, norm, rope, layers, *lora_weights(*layers))


def o_proj(residual: torch.Tensor, layer: LoraLayer, x: torch.Tensor) -> torch.Tensor:
    """The output projection of attention's result x [tokens, in], added to the residual stream."""
    return _OProj.apply(residual, x, layer, *lora_weights(layer))


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of x [tokens, heads · head size]; backward with −sin.

    Each pair (i, i + half a head) is rotated by an angle: cos and sin are [tokens, head size], both
    halves the same.

    Source: Su et al. 2021, RoFormer, arXiv:2104.09864, equation 34, in the order of transformers.
    """
    half = cos.shape[-1] // 2
    heads = x.view(len(x), -1, 2 * half)
    rotated = heads * cos[:, None]
    rotated[..., :half].addcmul_(heads[..., half:], sin[:, None, half:], value=-1)
    rotated[..., half:].addcmul_(heads[..., :half], sin[:, None, :half])
    return rotated.view_as(x)


def apply_rope_qk(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """RoPE of queries and keys, by one kernel where liger-kernel covers the device."""
    if gpu.uses_liger(query.device):
        return gpu.apply_rope_qk(query, key, cos, sin)
    return apply_rope(query, cos, sin), apply_rope(key, cos, sin)


class _QKV(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        norm: Any,
        rope: Rope | None,
        layers: Sequence[LoraLayer],
        *lora: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.norm, ctx.rope, ctx.layers, ctx.dtype = norm, rope, layers, precision.matmul_dtype(x)
        normed, rstd = rms_norm_forward(x, norm.weight, norm.variance_epsilon)
        (q, k, v), x_a = LoraLinears(layers, lora, ctx.dtype).matmul_lora(normed.to(ctx.dtype))
        if rope:
            q, k = apply_rope_qk(q, k, *rope)
        ctx.save_for_backward(x, rstd, x_a, *lora)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> Gradients:
        x, rstd, x_a, *lora = ctx.saved_tensors
        weight, epsilon = ctx.norm.weight, ctx.norm.variance_epsilon
        if ctx.rope:
            cos, sin = ctx.rope
            dq, dk = apply_rope_qk(dq, dk, cos, -sin)
        linears = LoraLinears(ctx.layers, lora, ctx.dtype)
        dys = (dq, dk, dv)
        normed = recompute_rms_norm(x, rstd, weight, epsilon).to(ctx.dtype)
        dy_b = linears.dy_b(dys)
        lora_gradients = linears.lora_gradients(dys, normed, x_a, dy_b)
        del normed
        dx = None
        if ctx.needs_input_grad[0]:  # below the first block nothing is trainable
            dx = rms_norm_backward(linears.input_gradient(dys, dy_b), x, rstd, weight)
        return dx, None, None, None, *lora_gradients


class _OProj(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual: torch.Tensor, x: torch.Tensor, layer: LoraLayer, *lora: torch.Tensor
    ) -> torch.Tensor:
        ctx.layer, ctx.dtype = layer, precision.matmul_dtype(x)
        linear = LoraLinears([layer], lora, ctx.dtype)
        (y,), x_a = linear.matmul_lora(x.to(ctx.dtype), residual.to(ctx.dtype))
        ctx.save_for_backward(x, x_a, *lora)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Gradients:
        x, x_a, *lora = ctx.saved_tensors
        linear = LoraLinears([ctx.layer], lora, ctx.dtype)
        dy_b = linear.dy_b([dy])
        lora_gradients = linear.lora_gradients([dy], x, x_a, dy_b)
        return dy, linear.input_gradient([dy], dy_b), None, *lora_gradients
