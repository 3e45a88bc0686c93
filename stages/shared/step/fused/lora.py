"""QLoRA matmul with its backward pass: a frozen 4-bit weight W and a trained LoRA adapter s·B·A.

Forward, a row of x and y being a token:

    y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ

    x [tokens, in], y [tokens, out]    compute dtype: bf16 or fp16, fp32 on a CPU without them
    W [out, in]                        stored in 4 bits (or dense), and read in the compute dtype
    A [r, in], B [out, r]              stored in fp32, cast to the compute dtype
    s                                  a number: α/r, or α/√r with rank-stabilized LoRA

Backward, from the gradient ∂y of the loss L in y; the gradients of A and B are fp32:

    ∂x = ∂y·W + s·(∂y·B)·A            ∂A = s·(∂y·B)ᵀ·x            ∂B = s·∂yᵀ·(x·Aᵀ)

They follow from dL = ⟨∂y, dy⟩, the sum of the products of all elements. If A changes by dA, then
dy = s·x·dAᵀ·Bᵀ, and dL = ⟨∂y, s·x·dAᵀ·Bᵀ⟩ = ⟨s·(∂y·B)ᵀ·x, dA⟩: what stands beside dA is ∂A.

Two small products are used twice: x·Aᵀ (`x_a`, r numbers a token), which is saved with x and gives
∂B, and ∂y·B (`dy_b`), which gives ∂x and ∂A. W is never saved: each pass dequantizes it for the one
matmul that needs it. That matmul is added to the adapter's product, which is computed first: the
sum is rounded once, and y is written in one pass.

Sources: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, equations 5 and 6; Hu et al. 2021, LoRA,
arXiv:2106.09685, equation 3; for √r, Kalajdzievski 2023, rsLoRA, arXiv:2312.03732.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer

from stages.shared.model.loading import ADAPTER
from stages.shared.step.fused import gpu
from stages.shared.weights.bnb import Linear4bit, Params4bit, dequantize_4bit_into

Gradients = tuple[torch.Tensor | None, ...]  # of a function's arguments; None without one


def lora_weights(*layers: LoraLayer) -> list[torch.Tensor]:
    """A [r, in] and B [out, r] of each layer in turn: the trainable arguments of a function."""
    pairs = ((layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]) for layer in layers)
    return [matrix.weight for pair in pairs for matrix in pair]


class LoraLinears:
    """Linear layers with LoRA adapters on one input x, such as q, k and v.

    Attributes:
        a: A of all layers, one below the other [sum of r, in]: one matmul gives every x·Aᵀ.
        b: B [out, r] of each layer.
        scale: s.
    """

    def __init__(
        self, layers: Sequence[LoraLayer], weights: Sequence[torch.Tensor], dtype: torch.dtype
    ) -> None:
        """Cast `weights`, which are `lora_weights(*layers)`, to the compute dtype."""
        self._layers, self._dtype = layers, dtype
        self.a = torch.cat([a.detach().to(dtype) for a in weights[0::2]])
        self.b = [b.detach().to(dtype) for b in weights[1::2]]
        self.scale = layers[0].scaling[ADAPTER]

    def matmul_lora(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Y [tokens, out] of each layer, plus `residual` [tokens, out]; and x_a [tokens, sum of r].

        x is [tokens, in], in the compute dtype; y has the layer's bias too.
        """
        x_a = x @ self.a.t()
        ys = []
        for layer, x_a_part, b in zip(self._layers, self._by_layer(x_a), self.b, strict=True):
            bias: Any = layer.get_base_layer().bias
            addend = residual
            if bias is not None:
                bias = bias.detach().to(self._dtype)
                addend = bias if residual is None else residual + bias
            if addend is None:  # beta 0 overwrites what is there
                y = x.new_empty(len(x), len(b)).addmm_(x_a_part, b.t(), beta=0, alpha=self.scale)
            else:
                y = torch.addmm(addend, x_a_part, b.t(), alpha=self.scale)
            ys.append(y.addmm_(x, dequantize(layer, self._dtype).t()))
        return ys, x_a

    def dy_b(self, dys: Sequence[torch.Tensor]) -> torch.Tensor:
        """∂y·B of all layers, [tokens, sum of r]."""
        return torch.cat([dy @ b for dy, b in zip(dys, self.b, strict=True)], 1)

    def lora_gradients(
        self, dys: Sequence[torch.Tensor], x: torch.Tensor, x_a: torch.Tensor, dy_b: torch.Tensor
    ) -> list[torch.Tensor]:
        """∂A [r, in] and ∂B [out, r] of each layer in turn, in fp32."""
        das = (dy_b.t() @ x).float().mul_(self.scale).split([b.shape[1] for b in self.b])
        gradients = []
        for da, x_a_part, dy in zip(das, self._by_layer(x_a), dys, strict=True):
            db = (x_a_part.t() @ dy).t()
            # Contiguous as B is: autograd would copy it.
            db = db.to(torch.float32, memory_format=torch.contiguous_format)
            gradients += [da, db.mul_(self.scale)]
        return gradients

    def input_gradient(self, dys: Sequence[torch.Tensor], dy_b: torch.Tensor) -> torch.Tensor:
        """∂x [tokens, in], summed over the layers."""
        dx = dy_b.new_empty(len(dy_b), self.a.shape[1])
        dx.addmm_(dy_b, self.a, beta=0, alpha=self.scale)
        for layer, dy in zip(self._layers, dys, strict=True):
            dx.addmm_(dy, dequantize(layer, self._dtype))
        return dx

    def _by_layer(self, x_a: torch.Tensor) -> Sequence[torch.Tensor]:
        return x_a.split([b.shape[1] for b in self.b], 1)


def dequantize(layer: LoraLayer, dtype: torch.dtype) -> torch.Tensor:
    """The frozen weight W [out, in] below an adapter; on a CPU the next call overwrites it."""
    base = layer.get_base_layer()
    weight = base.weight
    if isinstance(base, Linear4bit):
        weight = cast(Params4bit, weight)
        if gpu.on_gpu(weight.device):
            return gpu.kernels().dequantize(weight.data, weight.quant_state, dtype)
        return dequantize_4bit_into(weight.data, weight.quant_state, _buffer).to(dtype)
    return cast(torch.Tensor, weight).detach().to(dtype)


_buffers: dict[torch.dtype, torch.Tensor] | None = None  # None outside of a step


@contextmanager
def dequantization_buffer() -> Iterator[None]:
    """Context of a step, in which a CPU dequantizes every weight into one buffer.

    The system clears fresh pages each time: a matmul with its weight takes 2.6 ms instead of 2.4
    (1536 × 576 and 512 tokens), or 37 instead of 22 (4096 × 4096 and 256 tokens).
    """
    global _buffers  # noqa: PLW0603
    _buffers = {}
    try:
        yield
    finally:
        _buffers = None


def _buffer(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    if _buffers is None:
        return torch.empty(shape, dtype=dtype)
    if dtype not in _buffers or len(_buffers[dtype]) < shape.numel():
        _buffers[dtype] = torch.empty(shape.numel(), dtype=dtype)
    return _buffers[dtype][: shape.numel()].view(shape)
