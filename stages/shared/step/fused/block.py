"""Decoder block of the Llama kind, each half as functions whose backward pass is written by hand.

    x ← x + o_proj(attention(rope(q), rope(k), v)),  q, k, v = projections of norm(x)
    x ← x + down(silu(gate(n))·up(n)),               n = norm(x)      an expert: down(…), n = x

Saved for the backward pass are x, 1/rms of the norms, x·Aᵀ of each adapter, and what attention or
SwiGLU reads; everything between is computed again. Losses and gradients are compared with those of
autograd in `tests/shared/step/test_fused.py`.

Source: Touvron et al. 2023, LLaMA, arXiv:2302.13971, section 2.2.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.functional import silu
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stages.shared.step.fused import gpu
from stages.shared.step.fused.lora import Gradients, LoraLinears, lora_weights
from stages.shared.step.fused.rms_norm import (
    recompute_rms_norm,
    rms_norm,
    rms_norm_backward,
    rms_norm_forward,
)
from stages.shared.weights import precision

Rope = tuple[torch.Tensor, torch.Tensor]  # cos and sin, [tokens, head size]


def decoder_block(
    block: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Output of a block for a packed row [1, tokens, width], a mixture's experts included."""
    x = hidden_states.squeeze(0)  # an index would copy the gradient, into zeros
    cos, sin = (part[0] for part in position_embeddings)
    attended = _attend(block.self_attn, _heads(block, x, (cos, sin)), attention_mask, kwargs)
    x = o_proj(x, block.self_attn.o_proj, attended)
    if hasattr(block.mlp, "experts"):
        normed = rms_norm(block.post_attention_layernorm, x)
        _, weights, index = block.mlp.gate(normed)
        return (x + block.mlp.experts(normed, index, weights))[None]
    return swiglu_mlp(block.post_attention_layernorm, block.mlp, x)[None]


def _heads(block: Any, x: torch.Tensor, rope: Rope) -> list[torch.Tensor]:
    """Queries, keys and values of x [tokens, width]: [1, heads, tokens, head size] each."""
    module = block.self_attn
    layers = (module.q_proj, module.k_proj, module.v_proj)
    normed = hasattr(module, "q_norm")  # Qwen3: head by head, before RoPE
    projections = qkv(block.input_layernorm, layers, x, None if normed else rope)
    heads = [part.unflatten(1, (-1, module.head_dim)) for part in projections]
    if normed:
        for i, norm in enumerate((module.q_norm, module.k_norm)):
            heads[i] = apply_rope(rms_norm(norm, heads[i]).flatten(1), *rope).view_as(heads[i])
    return [part.transpose(0, 1)[None] for part in heads]


def _attend(
    module: Any, heads: list[torch.Tensor], mask: torch.Tensor | None, kwargs: dict[str, Any]
) -> torch.Tensor:
    """The model's attention function: [tokens, heads · head size]."""
    config = module.config
    result, _ = ALL_ATTENTION_FUNCTIONS[config._attn_implementation](
        module,
        *heads,
        mask,
        dropout=module.attention_dropout if module.training else 0.0,
        scaling=module.scaling,
        sliding_window=getattr(module, "sliding_window", getattr(config, "sliding_window", None)),
        **kwargs,
    )
    return result.squeeze(0).flatten(1)


def qkv(
    norm: nn.Module, layers: Sequence[LoraLayer], x: torch.Tensor, rope: Rope | None
) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values [tokens, their width] of the residual stream x [tokens, width]."""
    return _Projections.apply(x, None, norm, rope, layers, *lora_weights(*layers))


def o_proj(residual: torch.Tensor, layer: LoraLayer, x: torch.Tensor) -> torch.Tensor:
    """The output projection of attention's result x [tokens, in], added to the residual stream."""
    (y,) = _Projections.apply(x, residual, None, None, [layer], *lora_weights(layer))
    return y


class _Projections(torch.autograd.Function):
    """Linear layers of x, or of its norm; after them RoPE or a residual, where there is one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        norm: nn.Module | None,
        rope: Rope | None,
        layers: Sequence[LoraLayer],
        *lora: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.norm, ctx.rope, ctx.layers, ctx.dtype = norm, rope, layers, precision.matmul_dtype(x)
        normed, rstd = rms_norm_forward(norm, x) if norm else (x, None)
        residual = None if residual is None else residual.to(ctx.dtype)
        linears = LoraLinears(layers, lora, ctx.dtype)
        ys, x_a = linears.matmul_lora(normed.to(ctx.dtype), residual)
        if rope:
            ys[0], ys[1] = apply_rope_qk(ys[0], ys[1], *rope)
        ctx.save_for_backward(x, rstd, x_a, *lora)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor) -> Gradients:
        x, rstd, x_a, *lora = ctx.saved_tensors
        if ctx.rope:
            cos, sin = ctx.rope
            dq, dk, dv = dys
            dys = *apply_rope_qk(dq, dk, cos, -sin), dv
        linears = LoraLinears(ctx.layers, lora, ctx.dtype)
        normed = (recompute_rms_norm(ctx.norm, x, rstd) if ctx.norm else x).to(ctx.dtype)
        dy_b = linears.dy_b(dys)
        lora_gradients = linears.lora_gradients(dys, normed, x_a, dy_b)
        del normed
        dx = None
        if ctx.needs_input_grad[0]:  # below the first block nothing is trainable
            dx = linears.input_gradient(dys, dy_b)
            dx = rms_norm_backward(ctx.norm, dx, x, rstd) if ctx.norm else dx
        dresidual = dys[0] if ctx.needs_input_grad[1] else None
        return dx, dresidual, None, None, None, *lora_gradients


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


def swiglu_mlp(norm: nn.Module, mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The MLP of the normed residual stream x [tokens, width], added to x."""
    layers: Any = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return _MLP.apply(x, norm, layers, *lora_weights(*layers))


def expert_mlp(expert: Any, x: torch.Tensor) -> torch.Tensor:
    """Output [tokens, width] of an `experts.Expert` for x [tokens, width], routed to it."""
    layers: Any = tuple(getattr(expert, name) for name in expert.names)
    return _MLP.apply(x, None, layers, *lora_weights(*layers))


class _MLP(torch.autograd.Function):
    """SwiGLU. Source: Shazeer 2020, GLU Variants, arXiv:2002.05202, equation 6."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        norm: nn.Module | None,
        layers: Sequence[LoraLayer],
        *lora: torch.Tensor,
    ) -> torch.Tensor:
        ctx.norm, ctx.layers, ctx.dtype = norm, layers, precision.matmul_dtype(x)
        normed, rstd = rms_norm_forward(norm, x) if norm else (x, None)
        residual = x.to(ctx.dtype) if norm else None
        gate_up, down = _linears(layers, lora, ctx.dtype)
        (gate, up), x_a = gate_up.matmul_lora(normed.to(ctx.dtype))
        del normed
        (y,), down_x_a = down.matmul_lora(swiglu(gate, up), residual)
        ctx.save_for_backward(x, rstd, gate, up, x_a, down_x_a, *lora)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Gradients:
        x, rstd, gate, up, x_a, down_x_a, *lora = ctx.saved_tensors
        gate_up, down = _linears(ctx.layers, lora, ctx.dtype)
        # First of all: its fp32 temporaries would be the peak beside the gradients of gate and up.
        normed = (recompute_rms_norm(ctx.norm, x, rstd) if ctx.norm else x).to(ctx.dtype)
        dys, down_gradients = _down_backward(down, dy.to(ctx.dtype), gate, up, down_x_a)
        dy_b = gate_up.dy_b(dys)
        gate_up_gradients = gate_up.lora_gradients(dys, normed, x_a, dy_b)
        del normed
        dx = gate_up.input_gradient(dys, dy_b)
        dys.clear()
        if ctx.norm:
            dx = rms_norm_backward(ctx.norm, dx, x, rstd).add_(dy)
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
