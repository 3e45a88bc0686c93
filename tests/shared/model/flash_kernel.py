"""torch's flash-attention kernel written out for a CPU, in fp64 and as plainly as it can be.

torch has it for a GPU alone. With this in its place, what we ask of it (boundaries, window, scale,
layout) can be held against other attention on any machine.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


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
