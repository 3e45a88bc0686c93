"""Which conversations make an optimizer step: `batch_size` of them, drawn by seed and epoch.

All of it is a function of the step's number, so that a training that goes on from any step goes on
with the conversations that would have been next.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from stages.shared.step.config import Train


@dataclass(frozen=True)
class Schedule:
    """The optimizer steps of a training, counted from 0.

    Attributes:
        conversations: in the training split.
        batch_size: conversations a step; the last step of an epoch has what is left.
        epochs: passes over the split, each in an order of its own.
        max_steps: the most steps; None for as many as the epochs have.
        random_seed: of the order, and of all that is random in a step.
    """

    conversations: int
    batch_size: int
    epochs: int
    max_steps: int | None
    random_seed: int

    @classmethod
    def of(cls, train: Train, conversations: int) -> "Schedule":
        """The steps that the parameters ask for."""
        return cls(conversations, train.batch_size, train.epochs, train.max_steps, train.seed)

    @property
    def per_epoch(self) -> int:
        """How many steps an epoch has, its short last one included."""
        return math.ceil(self.conversations / self.batch_size)

    @property
    def total(self) -> int:
        """How many steps there are; `max_steps` only ever shortens a training."""
        steps = self.epochs * self.per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def rows(self, step: int) -> list[int]:
        """The rows of the training split that step `step` learns from."""
        epoch, within = divmod(step, self.per_epoch)
        start = within * self.batch_size
        return _order(self.conversations, self.random_seed, epoch)[
            start : start + self.batch_size
        ].tolist()

    def epochs_after(self, done: int) -> float:
        """How many epochs have passed after `done` steps."""
        return done / self.per_epoch

    def seed(self, step: int, rank: int) -> None:
        """Seed torch for one step of one process (dropout is all that draws).

        A random state that is a function of the step need not be kept: a resumed training drops
        what the uninterrupted one drops, whatever was drawn before.
        """
        drawn = np.random.SeedSequence([self.random_seed, step, rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(drawn[0]))


@lru_cache(maxsize=1)  # steps follow each other: an epoch's order is drawn once, not at each step
def _order(conversations: int, seed: int, epoch: int) -> np.ndarray:
    """The rows of the training split in the order of an epoch: int64 [conversations]."""
    return np.random.default_rng([seed, epoch]).permutation(conversations)
