"""Parameters of training, and the schedule of optimizer steps that they set."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from stages.shared.core.params import Section
from stages.shared.step.config import Lora, Train


class Params(Section):
    """The sections that dvc.yaml declares for the stage."""

    lora: Lora
    train: Train


@dataclass(frozen=True)
class Schedule:
    """Optimizer steps, from 0: the conversations of each, by seed, epoch and step alone.

    A training resumed at any step goes on with the conversations that would have been next.
    """

    train: Train
    conversations: int  # in the training split

    @property
    def per_epoch(self) -> int:
        """Steps an epoch; its short last one has what is left."""
        return math.ceil(self.conversations / self.train.batch_size)

    @property
    def total(self) -> int:
        """Steps in all; `max_steps` only ever shortens a training."""
        steps = self.train.epochs * self.per_epoch
        return steps if self.train.max_steps is None else min(steps, self.train.max_steps)

    def rows(self, step: int) -> list[int]:
        """Rows of the training split in step `step`; each epoch has an order of its own."""
        epoch, within = divmod(step, self.per_epoch)
        start = within * self.train.batch_size
        order = _order(self.conversations, self.train.seed, epoch)
        return [int(row) for row in order[start : start + self.train.batch_size]]

    def seed(self, step: int, rank: int) -> int:
        """Seed of dropout in one step of one process; a resumed training drops the same."""
        sequence = np.random.SeedSequence([self.train.seed, step, rank])
        return int(sequence.generate_state(1, np.uint64)[0])


@lru_cache(maxsize=1)  # drawn once an epoch
def _order(conversations: int, seed: int, epoch: int) -> np.ndarray:
    """The rows of the training split in the order of an epoch: int64 [conversations]."""
    return np.random.default_rng([seed, epoch]).permutation(conversations)
