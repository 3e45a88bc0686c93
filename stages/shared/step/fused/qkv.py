"""RMSNorm, query, key and value projections and RoPE as one function; and the output projection.

The backward pass is written by hand; `tests/shared/step/test_fused.py` holds it to fp64.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from stages.shared.step.fused import liger
from stages.shared.step.fused.lora import LoraLinears, lora_weights
from stages.shared.step.fused.rms_norm import (
    recompute_rms_norm,
    rms_norm_backward,
    rms_norm_forward,
)
from stages.shared.weights import precision


def qkv(
    norm: nn.Module,
    layers: Sequence[LoraLayer],
    x: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values [tokens, their width] of the residual stream x [tokens, width].

    `layers` are q_proj, k_proj and v_proj; `rope` is cos and sin [tokens, head size], or None.
    """
    dtype = precision.matmul_dtype(x)
    cos, sin = rope or (None, None)
    return _QKV.apply(
        x, norm.weight, norm.variance_epsilon, cos, sin, layers, dtype, *lora_weights(*layers)
    )


def o_proj(residual: torch.Tensor, layer: LoraLayer, x: torch.Tensor) -> torch.Tensor:
    """The output projection of attention's result x [tokens, in], added to the residual stream."""
    return _OProj.apply(residual, x, layer, precision.matmul_dtype(x), *lora_weights(layer))


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
    if liger.covers(query.device):
        return liger.apply_rope_qk(query, key, cos, sin)
    return apply_rope(query, cos, sin), apply_rope(key, cos, sin)


class _QKV(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        epsilon: float,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        layers: Sequence[LoraLayer],
        dtype: torch.dtype,
        *lora: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        normed, rstd = rms_norm_forward(x, weight, epsilon)
        (q, k, v), x_a = LoraLinears(layers, lora, dtype).matmul_lora(normed.to(dtype))
        if cos is not None and sin is not None:
            q, k = apply_rope_qk(q, k, cos, sin)
        ctx.save_for_backward(x, rstd, weight, x_a, cos, sin, *lora)
        ctx.layers, ctx.dtype, ctx.epsilon = layers, dtype, epsilon
        return q, k, v

    @staticmethod
    def backward(
        ctx: Any, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        x, rstd, weight, x_a, cos, sin, *lora = ctx.saved_tensors
        if cos is not None:
            dq, dk = apply_rope_qk(dq, dk, cos, -sin)
        linears = LoraLinears(ctx.layers, lora, ctx.dtype)
        dys = (dq, dk, dv)
        normed = recompute_rms_norm(x, rstd, weight, ctx.epsilon).to(ctx.dtype)
        dy_b = linears.dy_b(dys)
        lora_gradients = linears.lora_gradients(dys, normed, x_a, dy_b)
        del normed
        dx = None
        if ctx.needs_input_grad[0]:  # below the first block nothing is trainable
            dx = rms_norm_backward(linears.input_gradient(dys, dy_b), x, rstd, weight)
        return dx, *[None] * 6, *lora_gradients


class _OProj(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: torch.Tensor,
        x: torch.Tensor,
        layer: LoraLayer,
        dtype: torch.dtype,
        *lora: torch.Tensor,
    ) -> torch.Tensor:
        (y,), x_a = LoraLinears([layer], lora, dtype).matmul_lora(x.to(dtype), residual.to(dtype))
        ctx.save_for_backward(x, x_a, *lora)
        ctx.layer, ctx.dtype = layer, dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, x_a, *lora = ctx.saved_tensors
        linear = LoraLinears([ctx.layer], lora, ctx.dtype)
        dy_b = linear.dy_b([dy])
        lora_gradients = linear.lora_gradients([dy], x, x_a, dy_b)
        return dy, linear.input_gradient([dy], dy_b), None, None, *lora_gradients
