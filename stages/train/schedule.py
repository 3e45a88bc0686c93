"""Data order: which conversations make an optimizer step, by seed, epoch and step alone.

A training resumed at any step goes on with the conversations that would have been next.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from stages.shared.step.config import Train


@dataclass(frozen=True)
class Schedule:
    """The optimizer steps of a training, counted from 0."""

    conversations: int  # in the training split
    batch_size: int  # conversations a step; the last step of an epoch has what is left
    epochs: int  # passes over the split, each in an order of its own
    max_steps: int | None  # None for as many as the epochs have
    random_seed: int  # of the order, and of all that is random in a step

    @classmethod
    def of(cls, train: Train, conversations: int) -> "Schedule":
        """The schedule of these parameters."""
        return cls(conversations, train.batch_size, train.epochs, train.max_steps, train.seed)

    @property
    def per_epoch(self) -> int:
        """Steps an epoch, its short last one included."""
        return math.ceil(self.conversations / self.batch_size)

    @property
    def total(self) -> int:
        """Steps in all; `max_steps` only ever shortens a training."""
        steps = self.epochs * self.per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def rows(self, step: int) -> list[int]:
        """Rows of the training split in step `step`."""
        epoch, within = divmod(step, self.per_epoch)
        start = within * self.batch_size
        return _order(self.conversations, self.random_seed, epoch)[
            start : start + self.batch_size
        ].tolist()

    def epochs_after(self, done: int) -> float:
        """Epochs that have passed after `done` steps."""
        return done / self.per_epoch

    def seed(self, step: int, rank: int) -> None:
        """Seed torch for one step of one process (dropout is all that draws).

        A function of the step, it needs no checkpoint: a resumed training drops the same.
        """
        drawn = np.random.SeedSequence([self.random_seed, step, rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(drawn[0]))


@lru_cache(maxsize=1)  # drawn once an epoch
def _order(conversations: int, seed: int, epoch: int) -> np.ndarray:
    """The rows of the training split in the order of an epoch: int64 [conversations]."""
    return np.random.default_rng([seed, epoch]).permutation(conversations)
