"""Freed pages are given back, and caches of compiled matmuls are bounded."""

import mmap

import pytest
import torch

from stages.shared.model import loading
from stages.shared.weights import heap


def test_matmuls_of_many_shapes_leave_little_behind() -> None:
    """Two caches keep what was compiled for a shape; with either unbounded it is 140 MB."""
    assert loading  # which bounds them, before the first matmul
    matrix = torch.ones(64, 96, dtype=torch.bfloat16)
    heap.trim()
    before = heap.resident_bytes()
    for rows in range(1, 401):
        torch.ones(rows, 64, dtype=torch.bfloat16) @ matrix
    heap.trim()
    assert heap.resident_bytes() - before < 80_000_000


def test_trim_gives_back_holes_between_results() -> None:
    holes = [bytearray(50_000) for _ in range(2000)]
    del holes[::2]  # too small to be mapped by themselves, and none at the end of the heap
    before = heap.resident_bytes()
    heap.trim()
    assert before - heap.resident_bytes() > 25_000_000


def test_trim_waits_for_growth_or_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed: list[bool] = []
    monkeypatch.setattr(heap, "trim", lambda: trimmed.append(True))
    each = heap.each(range(4), "test", "item")
    next(each)
    next(each)
    heap.trim_above(heap.resident_bytes() + 10**8)
    assert not trimmed
    # Mapped by the system: the heap of a process that ran other tests may have as much in memory.
    with mmap.mmap(-1, 2 * heap.GROWTH_BYTES) as grown:
        grown[:: mmap.PAGESIZE] = bytes(len(grown) // mmap.PAGESIZE)
        assert [*each] == [2, 3]
    assert len(trimmed) == 1
    heap.trim_above(heap.resident_bytes() - 10**6)
    assert len(trimmed) == 2
