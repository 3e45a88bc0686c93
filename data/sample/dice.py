"""Random choices that come out the same on every Python.

Python promises a stable sequence for `random.Random(seed).random()` alone; `choice`, `sample` and
`shuffle` may change between versions. So everything here is built on that one method.
"""

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Dice:
    """A seeded source of choices."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311  (no secret depends on it)

    def number(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return low + int(self._random.random() * (high - low + 1))

    def choice(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.number(0, len(items) - 1)]

    def weighted(self, items: Sequence[T], weights: Sequence[int]) -> T:
        """One of the items, as often as its weight says."""
        ticket = self.number(1, sum(weights))
        for item, weight in zip(items, weights, strict=True):
            ticket -= weight
            if ticket <= 0:
                return item
        raise ValueError("weights must be positive")

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` of the items, each at most once, in random order."""
        left = list(items)
        return [left.pop(self.number(0, len(left) - 1)) for _ in range(count)]
