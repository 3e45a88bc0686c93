"""Products of frozen matrices with adapters beside them, and their gradients.

    y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ
    ∂x = ∂y·W + s·(∂y·B)·A     ∂A = s·(∂y·B)ᵀ·x     ∂B = s·∂yᵀ·(x·Aᵀ)

Source: Hu et al. 2021, LoRA, arXiv:2106.09685, equation 3. What the frozen matrix and the adapter
return is added up within the larger product, where it is not rounded in between, and neither the
dequantized matrix nor a copy of the input is kept from the forward to the backward pass. The
adapter's comes first: so the larger product adds to it in passing, and nothing goes over its result
once more.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from stages.shared.bnb import Linear4bit, Params4bit, dequantize_4bit, dequantize_blockwise
from stages.shared.step.fused import gpu, kept

ADAPTER = "default"  # the name that peft gives the only one
Gradients = list[torch.Tensor]


def factors_of(*layers: LoraLayer) -> list[torch.Tensor]:
    """A [rank, in] and B [out, rank] of each layer in turn: what autograd is to see."""
    pairs = ((layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]) for layer in layers)
    return [factor.weight for pair in pairs for factor in pair]


class Adapted:
    """Linear layers on one input, each with its adapter; their A are multiplied with as one.

    Attributes:
        a: [sum of ranks, in].
        b: [out, rank] of each layer.
        scale: s, what the product of both is multiplied with.
    """

    def __init__(
        self, layers: Sequence[LoraLayer], factors: Sequence[torch.Tensor], dtype: torch.dtype
    ) -> None:
        """For products in `dtype`; `factors` as of `factors_of`."""
        self._layers, self._dtype = layers, dtype
        key, device = (layers[0], dtype), factors[0].device
        self.a, self.b = kept.factors(key, device, lambda: _made_ready(factors, dtype))
        self.scale = layers[0].scaling[ADAPTER]

    def results(
        self, x: torch.Tensor, added: torch.Tensor | None = None
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Each layer's y [tokens, out], and x·Aᵀ [tokens, ranks], of an input x [tokens, in].

        Args:
            x: the input.
            added: [tokens, out], to be added to y within the product.
        """
        inner = x @ self.a.t()
        found: list[torch.Tensor] = []
        for layer, part, b in zip(self._layers, self._parts(inner), self.b, strict=True):
            start = _start(layer, added, self._dtype)
            y = (
                part.new_empty(len(part), len(b)).addmm_(part, b.t(), beta=0, alpha=self.scale)
                if start is None
                else torch.addmm(start, part, b.t(), alpha=self.scale)
            )
            found.append(y.addmm_(x, frozen_matrix(layer, self._dtype).t()))
        return found, inner

    def outer(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """∂y·B of all layers, [tokens, ranks]."""
        products = [dy @ b for dy, b in zip(gradients, self.b, strict=True)]
        return products[0] if len(products) == 1 else torch.cat(products, 1)

    def factor_gradients(
        self,
        gradients: Sequence[torch.Tensor],
        x: torch.Tensor,
        inner: torch.Tensor,
        outer: torch.Tensor,
    ) -> Gradients:
        """∂A and ∂B of each layer in turn, in fp32."""
        da = (outer.t() @ x).float().mul_(self.scale).split([b.shape[1] for b in self.b])
        db = [
            _wide((part.t() @ dy).t()).mul_(self.scale)
            for dy, part in zip(gradients, self._parts(inner), strict=True)
        ]
        return [gradient for pair in zip(da, db, strict=True) for gradient in pair]

    def input_gradient(
        self, gradients: Sequence[torch.Tensor], outer: torch.Tensor
    ) -> torch.Tensor:
        """∂x [tokens, in], of gradients ∂y [tokens, out]."""
        found = outer.new_empty(len(outer), self.a.shape[1])
        found.addmm_(outer, self.a, beta=0, alpha=self.scale)
        for layer, dy in zip(self._layers, gradients, strict=True):
            found.addmm_(dy, frozen_matrix(layer, self._dtype))
        return found

    def _parts(self, inner: torch.Tensor) -> Sequence[torch.Tensor]:
        return inner.split([b.shape[1] for b in self.b], 1)


def _made_ready(factors: Sequence[torch.Tensor], dtype: torch.dtype) -> kept.Factors:
    """The A of all layers as one matrix and the B of each, in the dtype of products."""
    a = [a.detach().to(dtype) for a in factors[::2]]
    return torch.cat(a) if len(a) > 1 else a[0], [b.detach().to(dtype) for b in factors[1::2]]


def frozen_matrix(layer: LoraLayer, dtype: torch.dtype) -> torch.Tensor:
    """The weights [out, in] below an adapter, dequantized where they are quantized."""
    base = layer.get_base_layer()
    weight = base.weight
    if isinstance(base, Linear4bit):
        weight = cast(Params4bit, weight)
        if gpu.on_gpu(weight.device):
            return gpu.kernels().dequantize(weight.data, weight.quant_state, dtype)
        return dequantize_4bit(weight.data, weight.quant_state).to(dtype)
    return cast(torch.Tensor, weight).detach().to(dtype)


def dequantize_constants(model: nn.Module) -> None:
    """On a CPU, what double quantization made of the blocks' largest values, once and for all.

    A byte a block becomes four, 0.4 bits a parameter; with a few hundred tokens a micro-batch a
    step is 4 % faster for it. The weights are the same.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit) and module.weight.device.type == "cpu":
            state = cast(Params4bit, module.weight).quant_state
            if state.nested:
                state.absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
                state.nested, state.state2, state.offset = False, None, None


def _start(layer: LoraLayer, added: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """What a product is added to: the layer's bias, a residual stream, both or nothing."""
    bias: Any = layer.get_base_layer().bias
    if bias is None:
        return added
    bias = bias.detach().to(dtype)
    return bias if added is None else added + bias


def _wide(x: torch.Tensor) -> torch.Tensor:
    """In fp32, row by row."""
    return x.to(torch.float32, memory_format=torch.contiguous_format)
