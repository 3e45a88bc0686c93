"""What surrounds attention in a block: the norm and the projections before it, and the one after.

Gradients are those of the library's own modules: `tests/train/test_fused.py` holds both to fp64.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from stages.shared import precision
from stages.shared.step.fused import liger
from stages.shared.step.fused.lora import Adapted, factors_of
from stages.shared.step.fused.rms_norm import norm_gradient, normed, normed_again

Angles = tuple[torch.Tensor, torch.Tensor]


def projected(
    norm: nn.Module, layers: Sequence[LoraLayer], x: torch.Tensor, angles: Angles | None
) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of a residual stream x [tokens, width]: each [tokens, its width].

    Args:
        norm: the norm before the projections.
        layers: that project to queries, keys and values.
        x: the residual stream.
        angles: cosines and sines [tokens, head size], to turn queries and keys by; None not to.
    """
    dtype = precision.of_products(x)
    cos, sin = angles or (None, None)
    weight, epsilon = norm.weight, norm.variance_epsilon
    return _Projected.apply(x, weight, epsilon, cos, sin, layers, dtype, *factors_of(*layers))


def onto(residual: torch.Tensor, layer: LoraLayer, x: torch.Tensor) -> torch.Tensor:
    """A residual stream [tokens, out], and what `layer` returns for x [tokens, in] added to it."""
    return _Onto.apply(residual, x, layer, precision.of_products(x), *factors_of(layer))


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Queries or keys, each pair (i, i + half a head) of them turned by an angle.

    Args:
        x: [tokens, heads · head size].
        cos: [tokens, head size], its halves the same.
        sin: as `cos`; negative to turn back.

    Source: Su et al. 2021, RoFormer, arXiv:2104.09864, equation 34, in the order of transformers.
    """
    half = cos.shape[-1] // 2
    heads = x.view(len(x), -1, 2 * half)
    found = heads * cos[:, None]
    found[..., :half].addcmul_(heads[..., half:], sin[:, None, half:], value=-1)
    found[..., half:].addcmul_(heads[..., :half], sin[:, None, :half])
    return found.view_as(x)


def _both_turned(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if liger.cover(query.device):
        return liger.turned(query, key, cos, sin)
    return turned(query, cos, sin), turned(key, cos, sin)


class _Projected(torch.autograd.Function):
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
        *factors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        y, root = normed(x, weight, epsilon)
        adapted = Adapted(layers, factors, dtype)
        (query, key, value), inner = adapted.results(y.to(dtype))
        if cos is not None and sin is not None:
            query, key = _both_turned(query, key, cos, sin)
        ctx.save_for_backward(x, root, weight, inner, cos, sin, *factors)
        ctx.layers, ctx.dtype, ctx.epsilon = layers, dtype, epsilon
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, root, weight, inner, cos, sin, *factors = ctx.saved_tensors
        dquery, dkey, dvalue = gradients
        if cos is not None:
            dquery, dkey = _both_turned(dquery, dkey, cos, -sin)
        adapted = Adapted(ctx.layers, factors, ctx.dtype)
        found = (dquery, dkey, dvalue)
        y = normed_again(x, root, weight, ctx.epsilon).to(ctx.dtype)
        outer = adapted.outer(found)
        learnt = adapted.factor_gradients(found, y, inner, outer)
        del y
        dx = None
        if ctx.needs_input_grad[0]:  # below the first block nothing learns
            dx = norm_gradient(adapted.input_gradient(found, outer), x, root, weight)
        return dx, *[None] * 6, *learnt


class _Onto(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: torch.Tensor,
        x: torch.Tensor,
        layer: LoraLayer,
        dtype: torch.dtype,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        (y,), inner = Adapted([layer], factors, dtype).results(x.to(dtype), residual.to(dtype))
        ctx.save_for_backward(x, inner, *factors)
        ctx.layer, ctx.dtype = layer, dtype
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inner, *factors = ctx.saved_tensors
        adapted = Adapted([ctx.layer], factors, ctx.dtype)
        outer = adapted.outer([gradient])
        learnt = adapted.factor_gradients([gradient], x, inner, outer)
        return gradient, adapted.input_gradient([gradient], outer), None, None, *learnt
