"""Which conversations make an optimizer step: `batch_size` of them, drawn by seed and epoch."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import DataLoader, Sampler

from stages.shared.examples import Example


class StepSampler(Sampler[list[int]]):
    """The indices of the conversations in each step of an epoch; the last step may be short."""

    def __init__(self, conversations: int, batch_size: int, seed: int) -> None:
        self.conversations = conversations
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return math.ceil(self.conversations / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.conversations)
        for start in range(0, self.conversations, self.batch_size):
            yield order[start : start + self.batch_size].tolist()


class StepLoader(DataLoader):
    """Yields one list of conversations an optimizer step: `list[Example]`."""

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int) -> None:
        self.steps = StepSampler(len(examples), batch_size, seed)
        super().__init__(examples, batch_sampler=self.steps, collate_fn=list)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """The Trainer says which epoch begins, counted from 0."""
        self.steps.epoch = epoch


def total_steps(conversations: int, batch_size: int, epochs: int, max_steps: int | None) -> int:
    """How many optimizer steps a training has; `max_steps` only ever shortens it."""
    steps = epochs * math.ceil(conversations / batch_size)
    return steps if max_steps is None else min(steps, max_steps)
