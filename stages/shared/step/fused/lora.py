"""QLoRA matmul with its backward pass: a frozen 4-bit weight W and a LoRA adapter s·B·A.

    y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ                  x [tokens, in], W [out, in], A [r, in], B [out, r]

Backward, from ∂y, the gradient of the loss L in y (W is frozen and has none):

    ∂x = ∂y·W + s·(∂y·B)·A            ∂A = s·(∂y·B)ᵀ·x            ∂B = s·∂yᵀ·(x·Aᵀ)

Each term of y is a product, so a factor's gradient is ∂y times the transposes of the others: for A,
dL = ⟨∂y, s·x·dAᵀ·Bᵀ⟩ = ⟨s·(∂y·B)ᵀ·x, dA⟩.

Saved for it are x and x·Aᵀ (`x_a`, r numbers a token); ∂y·B (`dy_b`) serves ∂x and ∂A. W is
dequantized for one matmul at a time, in both passes, and never saved. The adapter's small product
comes first, and the large matmul accumulates onto it: the sum is rounded once, and y is written in
one pass.

Sources: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, equations 5 and 6; Hu et al. 2021, LoRA,
arXiv:2106.09685, equation 3.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from stages.shared.step.fused import gpu
from stages.shared.weights.bnb import (
    Linear4bit,
    Params4bit,
    dequantize_4bit_into,
    dequantize_blockwise,
)

ADAPTER = "default"  # peft's name of the only adapter
Gradients = tuple[torch.Tensor | None, ...]  # of a function's arguments; None without one
CastWeights = tuple[torch.Tensor, list[torch.Tensor]]

_cast_cache: dict[Any, CastWeights] | None = None  # None outside of a step
_buffers: dict[torch.dtype, torch.Tensor] = {}


@contextmanager
def step_cache() -> Iterator[None]:
    """Per-step cache: LoRA weights cast to the compute dtype on a GPU, on a CPU one buffer.

    The weights are read in both passes of every micro-batch, and must not change in the block; a
    CPU reads a cached copy no faster than it casts again. The buffer is for the dequantized weight
    of the moment: in fresh pages, a matmul takes 2.6 ms for 2.4 (1536 × 576 and 512 tokens), or 37
    for 22 (4096 × 4096 and 256 tokens).
    """
    global _cast_cache  # noqa: PLW0603
    _cast_cache = {}
    try:
        yield
    finally:
        _cast_cache = None
        _buffers.clear()


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
        """`weights` from `lora_weights`, cast to the compute dtype `dtype`."""
        self._layers, self._dtype = layers, dtype
        self.a, self.b = _cast(layers[0], weights, dtype)
        self.scale = layers[0].scaling[ADAPTER]

    def matmul_lora(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Y [tokens, out] of each layer, to which `residual` is added; and x_a [tokens, sum of r].

        x is [tokens, in], in the compute dtype.
        """
        x_a = x @ self.a.t()
        ys = []
        for layer, x_a_part, b in zip(self._layers, self._by_layer(x_a), self.b, strict=True):
            addend = _addend(layer, residual, self._dtype)
            y = (
                x.new_empty(len(x), len(b)).addmm_(x_a_part, b.t(), beta=0, alpha=self.scale)
                if addend is None
                else torch.addmm(addend, x_a_part, b.t(), alpha=self.scale)
            )
            ys.append(y.addmm_(x, dequantize(layer, self._dtype).t()))
        return ys, x_a

    def dy_b(self, dys: Sequence[torch.Tensor]) -> torch.Tensor:
        """∂y·B of all layers, [tokens, sum of r]."""
        parts = [dy @ b for dy, b in zip(dys, self.b, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def lora_gradients(
        self, dys: Sequence[torch.Tensor], x: torch.Tensor, x_a: torch.Tensor, dy_b: torch.Tensor
    ) -> list[torch.Tensor]:
        """∂A and ∂B of each layer in turn, in fp32."""
        da = (dy_b.t() @ x).float().mul_(self.scale).split([b.shape[1] for b in self.b])
        pairs = zip(self._by_layer(x_a), dys, strict=True)
        transposed = [(x_a_part.t() @ dy).t() for x_a_part, dy in pairs]
        fp32, contiguous = torch.float32, torch.contiguous_format  # as B: autograd would copy it
        db = [x.to(fp32, memory_format=contiguous).mul_(self.scale) for x in transposed]
        return [gradient for pair in zip(da, db, strict=True) for gradient in pair]

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
    """The frozen weight [out, in] below an adapter; on a CPU the next call overwrites it."""
    base = layer.get_base_layer()
    weight = base.weight
    if isinstance(base, Linear4bit):
        weight = cast(Params4bit, weight)
        if gpu.on_gpu(weight.device):
            return gpu.kernels().dequantize(weight.data, weight.quant_state, dtype)
        return dequantize_4bit_into(weight.data, weight.quant_state, _buffer).to(dtype)
    return cast(torch.Tensor, weight).detach().to(dtype)


def dequantize_absmax(model: nn.Module) -> None:
    """Undo double quantization on a CPU: each block's absmax becomes fp32 again, once and for all.

    A byte a block becomes four, 0.4 bits a parameter; with a few hundred tokens a micro-batch a
    step is 4 % faster. The dequantized weights are the same.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit) and module.weight.device.type == "cpu":
            state = cast(Params4bit, module.weight).quant_state
            if state.nested:
                state.absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
                state.nested, state.state2, state.offset = False, None, None


def _cast(first: LoraLayer, weights: Sequence[torch.Tensor], dtype: torch.dtype) -> CastWeights:
    """`a` and `b` of `LoraLinears`; a layer comes first in one call alone, so it is the key."""
    key = first, dtype
    if _cast_cache and key in _cast_cache:
        return _cast_cache[key]
    a, b = ([w.detach().to(dtype) for w in weights[start::2]] for start in (0, 1))
    cast_weights = torch.cat(a) if len(a) > 1 else a[0], b
    if _cast_cache is not None and gpu.on_gpu(weights[0].device):
        _cast_cache[key] = cast_weights
    return cast_weights


def _buffer(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    if _cast_cache is None:
        return torch.empty(shape, dtype=dtype)
    if dtype not in _buffers or len(_buffers[dtype]) < shape.numel():
        _buffers[dtype] = torch.empty(shape.numel(), dtype=dtype)
    return _buffers[dtype][: shape.numel()].view(shape)


def _addend(
    layer: LoraLayer, residual: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """Bias and residual together; None without either."""
    bias: Any = layer.get_base_layer().bias
    if bias is None:
        return residual
    bias = bias.detach().to(dtype)
    return bias if residual is None else residual + bias
