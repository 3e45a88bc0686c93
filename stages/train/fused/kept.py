"""What a step's products keep from one to the next, and let go of when its gradient is there.

On a GPU adapters as products want them: each is multiplied with in the forward and the backward
pass of every micro-batch. On a CPU it costs as much to fetch them again as to make them, and there
is one room for the dequantized matrix of the moment instead: a product that reads it where the last
one was read finds it in the cache.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch

from stages.train.fused.kernels import gpu

Factors = tuple[torch.Tensor, list[torch.Tensor]]


class _Kept:
    def __init__(self) -> None:
        self.factors: dict[Any, Factors] = {}
        self.rooms: dict[torch.dtype, torch.Tensor] = {}


_kept: _Kept | None = None


@contextmanager
def for_a_step() -> Iterator[None]:
    """While it is entered things are kept, and adapters must not change."""
    global _kept  # noqa: PLW0603
    _kept = _Kept()
    try:
        yield
    finally:
        _kept = None


def factors(key: Any, device: torch.device, make: Callable[[], Factors]) -> Factors:
    """What `make` returns; on a GPU, what it returned for this key before."""
    if _kept is None or not gpu.covers(device):
        return make()
    if key not in _kept.factors:
        _kept.factors[key] = make()
    return _kept.factors[key]


def room(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
    """Room of a shape, the same for all: what stood in it is gone. None where nothing is kept."""
    if _kept is None:
        return None
    size, there = prod(shape), _kept.rooms.get(dtype)
    if there is None or len(there) < size:
        there = _kept.rooms[dtype] = torch.empty(size, dtype=dtype)
    return there[:size].view(*shape)
