"""SwiGLU MLP of an expert as one function.

    y = down(silu(gate(x))·up(x))

Saved are x, gate and up, of the tokens that are routed to the expert alone; each of its matrices is
dequantized for one matmul at a time, in both passes.
"""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from stages.shared.step.fused import mlp
from stages.shared.step.fused.lora import lora_weights
from stages.shared.weights import precision


def expert_mlp(expert: Any, x: torch.Tensor) -> torch.Tensor:
    """Output [tokens, hidden] of an `experts.Expert` for x [tokens, hidden]."""
    layers: Any = tuple(getattr(expert, name) for name in expert.names)
    return _Expert.apply(x, layers, precision.matmul_dtype(x), *lora_weights(*layers))


class _Expert(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        layers: tuple[LoraLayer, ...],
        dtype: torch.dtype,
        *lora: torch.Tensor,
    ) -> torch.Tensor:
        x = x.to(dtype)
        gate_up, down = mlp.linears(layers, lora, dtype)
        (gate, up), x_a = gate_up.matmul_lora(x)
        (y,), down_x_a = down.matmul_lora(mlp.swiglu(gate, up))
        ctx.save_for_backward(x, gate, up, x_a, down_x_a, *lora)
        ctx.layers, ctx.dtype = layers, dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, gate, up, x_a, down_x_a, *lora = ctx.saved_tensors
        gate_up, down = mlp.linears(ctx.layers, lora, ctx.dtype)
        dys, down_gradients = mlp.down_backward(down, dy.to(ctx.dtype), gate, up, down_x_a)
        dy_b = gate_up.dy_b(dys)
        gate_up_gradients = gate_up.lora_gradients(dys, x, x_a, dy_b)
        dx = gate_up.input_gradient(dys, dy_b)
        return dx, None, None, *gate_up_gradients, *down_gradients
