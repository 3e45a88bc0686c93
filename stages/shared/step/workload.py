"""Workload: the micro-batches that a training will see, for any number of tokens in each."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from stages.shared.model import packing
from stages.shared.model.packing import Example
from stages.shared.step.setup import MicroBatch, micro_batch_of


@dataclass(frozen=True)
class Workload:
    """The conversations of each optimizer step; those that repeat others may be left out."""

    steps: Sequence[Sequence[Example]]
    _packed: dict[int, set[MicroBatch]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def longest(self) -> int:
        """Tokens of the longest conversation, as it goes through the model."""
        return max(example.input_tokens for step in self.steps for example in step)

    def micro_batches(self, tokens: int) -> set[MicroBatch]:
        """Micro-batches of at most so many tokens; a longer conversation stands alone."""
        if tokens not in self._packed:
            self._packed[tokens] = {
                micro_batch_of(batch) for step in self.steps for batch in packing.bins(step, tokens)
            }
        return self._packed[tokens]

    def cut(self, length: int) -> "Workload":
        """The same with conversations of at most so many tokens, about as `prepare` cuts them."""
        return Workload([[_cut(example, length) for example in step] for step in self.steps])


def workload_of_counts(longest: int, batch_size: int, supervised_share: float) -> Workload:
    """A step of `batch_size` conversations of the greatest length, where only counts are known."""
    mask = np.arange(longest + 1) > longest - max(1, round(longest * supervised_share))
    ids = np.zeros(longest + 1, dtype=np.int64)
    return Workload([[Example(ids, mask, row) for row in range(batch_size)]])


def _cut(example: Example, length: int) -> Example:
    return Example(example.input_ids[:length], example.loss_mask[:length], example.row)
