"""Adapters as products want them, on a GPU: kept until the step's gradient is there.

Each is multiplied with in the forward and the backward pass of every micro-batch. On a CPU it
costs as much to fetch them again as to make them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from stages.shared.step.fused import gpu

Factors = tuple[torch.Tensor, list[torch.Tensor]]


_kept: dict[Any, Factors] | None = None


@contextmanager
def for_a_step() -> Iterator[None]:
    """While it is entered adapters are kept, and must not change."""
    global _kept  # noqa: PLW0603
    _kept = {}
    try:
        yield
    finally:
        _kept = None


def factors(key: Any, device: torch.device, make: Callable[[], Factors]) -> Factors:
    """What `make` returns; on a GPU, what it returned for this key before."""
    if _kept is None or not gpu.on_gpu(device):
        return make()
    if key not in _kept:
        _kept[key] = make()
    return _kept[key]
