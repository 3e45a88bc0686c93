"""Neighbours in a packed row that are about as long as each other, padded to one length."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

LANES = 16  # fp32 numbers that a CPU takes at once; a softmax of 61 takes as long as one of 90
# Padding costs as many pairs of tokens as a conversation of so many tokens has, before it is not
# worth it: fewer and larger products are.
PADDING_TOKENS = 128


@dataclass(frozen=True)
class Alike:
    """Conversations that lie behind each other in a packed row.

    Attributes:
        start: where the first begins, in tokens.
        lengths: of each, in tokens.
    """

    start: int
    lengths: tuple[int, ...]

    @property
    def conversations(self) -> int:
        """How many they are."""
        return len(self.lengths)

    @property
    def length(self) -> int:
        """What they are padded to, in tokens; of one alone, its own."""
        longest = max(self.lengths)
        return longest if self.conversations == 1 else -(-longest // LANES) * LANES

    @property
    def span(self) -> slice:
        """Their part of the row."""
        return slice(self.start, self.start + sum(self.lengths))

    def taken(self, row: torch.Tensor) -> torch.Tensor:
        """Of values of a row, [tokens, ...], theirs: [conversations, length, ...], zeros behind."""
        own = row[self.span]
        if self.conversations == 1:
            return own[None]
        with_zero = torch.cat([own, own.new_zeros(1, *own.shape[1:])])
        return with_zero.index_select(0, self._sources).unflatten(0, (-1, self.length))

    def put(self, taken: torch.Tensor, row: torch.Tensor) -> None:
        """The way back, into a row; what stands in the padding is dropped."""
        by_place = taken.flatten(0, 1)
        row[self.span] = (
            by_place if self.conversations == 1 else by_place.index_select(0, self._places)
        )

    @cached_property
    def _places(self) -> torch.Tensor:
        """Of each token its place among the padded ones: int64 [their tokens]."""
        places = [torch.arange(n) + i * self.length for i, n in enumerate(self.lengths)]
        return torch.cat(places)

    @cached_property
    def _sources(self) -> torch.Tensor:
        """Of each place its token, or one past them all: int64 [conversations · length]."""
        tokens = len(self._places)
        sources = torch.full((self.conversations * self.length,), tokens)
        sources[self._places] = torch.arange(tokens)
        return sources


@lru_cache(maxsize=4)  # all layers of a step ask for the same
def alike(lengths: tuple[int, ...]) -> tuple[Alike, ...]:
    """All conversations of a row, in groups of neighbours.

    `packing.split` orders conversations by length, so that neighbours are alike.
    """
    groups, padding = list[list[int]](), 0
    for one in lengths:
        padding += abs(groups[-1][0] ** 2 - one**2) if groups else 0
        if groups and padding < PADDING_TOKENS**2:
            groups[-1].append(one)
        else:
            groups.append([one])
            padding = 0
    found, start = list[Alike](), 0
    for group in groups:
        found.append(Alike(start, tuple(group)))
        start += sum(group)
    return tuple(found)
