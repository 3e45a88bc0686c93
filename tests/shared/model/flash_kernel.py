"""torch's flash-attention kernel written out for a CPU, in fp64 and as plainly as it can be.

torch has it for a GPU alone. With this in its place, what we ask of it (boundaries, window, scale,
layout) can be held against other attention on any machine.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention


def assert_exact(
    result: torch.Tensor,
    inputs: Sequence[torch.Tensor],
    scale: float,
    lengths: Sequence[int],
    window: int | None = None,
    tolerance: float = 1e-6,
) -> None:
    """Result and gradients, relative to those of torch in fp64 with a mask."""
    gradient = torch.randn_like(result)
    gradients = torch.autograd.grad(result, inputs, gradient)
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    blocks = [torch.ones(n, n).tril() for n in lengths]
    if window:
        blocks = [block.triu(1 - window) for block in blocks]  # itself and window - 1 before it
    q, k, v = (x.transpose(0, 1)[None] for x in exact)
    mask = torch.block_diag(*blocks).bool()
    expected = scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
    expected = expected[0].transpose(0, 1)
    due = torch.autograd.grad(expected, exact, gradient.cpu().double())
    for one, other in zip((result, *gradients), (expected, *due), strict=True):
        assert (one.cpu() - other).norm() < tolerance * max(1.0, other.norm())


@contextmanager
def on_a_cpu() -> Iterator[None]:
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        yield


def parts(
    query: torch.Tensor, key: torch.Tensor, starts: torch.Tensor, scale: float, left: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """The probabilities [heads, queries, keys] of each conversation; -1 to the left is all."""
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        span = slice(start, end)
        scores = torch.einsum("qhd,khd->hqk", query[span], key[span]) * scale
        back = torch.arange(end - start)[:, None] - torch.arange(end - start)
        hidden = (back < 0) | ((back > left) if left >= 0 else False)
        yield span, scores.masked_fill(hidden, -torch.inf).softmax(-1)


def wide(sharing: int, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.double().repeat_interleave(sharing if i else 1, 1) for i, x in enumerate(tensors)]


def forward(q: Any, k: Any, v: Any, starts: Any, same: Any, *args: Any, **kwargs: Any) -> Any:
    """`aten::_flash_attention_forward` without dropout."""
    assert q.dtype == k.dtype == v.dtype
    assert torch.equal(starts, same)
    assert starts.dtype == torch.int32
    longest = int((starts[1:] - starts[:-1]).max())
    assert args[:3] == (longest, longest, 0.0)
    assert kwargs["window_size_right"] == 0
    query, key, value = wide(q.shape[1] // k.shape[1], q, k, v)
    result = torch.full_like(query, torch.nan)
    for span, seen in parts(query, key, starts, kwargs["scale"], kwargs["window_size_left"]):
        result[span] = torch.einsum("hqk,khd->qhd", seen, value[span])
    unused = q.new_empty(0)
    return result.to(q.dtype), unused, unused, unused.clone(), unused.clone()


def backward(g: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, starts: Any, *_: Any, **kw: Any):
    """`aten::_flash_attention_backward`."""
    sharing = q.shape[1] // k.shape[1]
    query, key, value = wide(sharing, q, k, v)
    gradient = g.double()
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in (query, key, value))
    for span, seen in parts(query, key, starts, kw["scale"], kw["window_size_left"]):
        dseen = torch.einsum("qhd,khd->hqk", gradient[span], value[span])
        dscores = seen * (dseen - (seen * dseen).sum(-1, keepdim=True)) * kw["scale"]
        dv[span] = torch.einsum("hqk,qhd->khd", seen, gradient[span])
        dq[span] = torch.einsum("hqk,khd->qhd", dscores, key[span])
        dk[span] = torch.einsum("hqk,qhd->khd", dscores, query[span])
    dk, dv = (x.unflatten(1, (-1, sharing)).sum(2) for x in (dk, dv))
    return tuple(x.to(q.dtype) for x in (dq, dk, dv))
