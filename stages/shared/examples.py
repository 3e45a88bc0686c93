"""Conversations as a model takes them: tokens, and which of them are learnt."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from stages.shared.core.errors import UserError


@dataclass(frozen=True)
class Example:
    """One conversation: `input_ids` int64 [tokens], `loss_mask` bool [tokens], and its row."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    row: int

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def predictors(self) -> np.ndarray:
        """Positions before a learnt token, int64 [supervised]; none is before the first token."""
        return np.flatnonzero(self.loss_mask[1:])

    @cached_property
    def supervised_tokens(self) -> int:
        """How many of its tokens are predicted."""
        return len(self.predictors)

    @cached_property
    def input_tokens(self) -> int:
        """How many of its tokens go through a model: those up to the last that predicts.

        What comes after them is seen by nothing that is learnt: the last token, and what a template
        writes behind the last reply's end. All of them where none is learnt.
        """
        return int(self.predictors[-1]) + 1 if len(self.predictors) else len(self)


def read_examples(path: Path) -> list[Example]:
    """All conversations of a split that `prepare` wrote, in order."""
    table = pq.read_table(path, columns=["input_ids", "loss_mask"])
    return [
        Example(np.asarray(ids.values, dtype=np.int64), np.asarray(mask.values, dtype=bool), row)
        for row, (ids, mask) in enumerate(zip(table["input_ids"], table["loss_mask"], strict=True))
    ]


def require_vocabulary(examples: Sequence[Example], size: int) -> None:
    """Refuse tokens that the model has no embedding of; a tokenizer may have more than are met.

    Args:
        examples: of which all tokens are looked at.
        size: rows of the embedding.

    Raises:
        UserError: names the largest.
    """
    largest = max((int(e.input_ids.max()) for e in examples), default=0)
    if largest >= size:
        raise UserError(
            f"models/tokenizer: gives data/prepared token {largest}; the model's embedding has "
            f"{size} rows; expected the model's own tokenizer; put it beside the model"
        )
