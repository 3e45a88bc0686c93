"""Training data counts: of `prepare`, or one step of the longest conversations."""

import json
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from stages.shared.core.errors import UserError
from stages.shared.step.config import Train


@dataclass(frozen=True)
class Data:
    """Counts of the training conversations."""

    conversations: int
    tokens: int
    supervised_tokens: int
    longest: int  # tokens of the longest conversation

    @property
    def supervised_share(self) -> float:
        """Share of the tokens that are supervised."""
        return self.supervised_tokens / self.tokens

    @property
    def mean_length(self) -> float:
        """Mean tokens of a conversation."""
        return self.tokens / self.conversations


def data_of(max_length: int | None, batch_size: int, counts: Path) -> Data:
    """Counts of `prepare`, or of one step of `max_length` tokens a conversation, all supervised."""
    if max_length is None:
        return read_counts(counts)
    tokens = batch_size * max_length  # a conversation's first is never a target
    return Data(batch_size, tokens, tokens - batch_size, max_length)


def read_counts(path: Path) -> Data:
    """Read the train counts in the report of `prepare`."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        train = json.loads(path.read_text(encoding="utf-8"))["train"]
        rows = train.get("rows", train["conversations"])  # of which a batch has train.batch_size
        names = ("tokens", "supervised_tokens", "longest_tokens")
        data = Data(rows, *(train[name] for name in names))
        if min(data.conversations, data.tokens, data.longest) > 0:
            return data
    raise UserError(f"{path}: no counts of training conversations. Run `dvc repro prepare`.")


def schedule(data: Data, train: Train) -> dict[str, int]:
    """Steps and tokens of a training without early stopping."""
    steps = train.epochs * ceil(data.conversations / train.batch_size)
    return {
        "steps": min(steps, train.max_steps or steps),
        "conversations": data.conversations,
        "tokens": data.tokens,
        "tokens_per_step": round(data.mean_length * min(train.batch_size, data.conversations)),
    }
