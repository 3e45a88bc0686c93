"""The amount of training data: what `prepare` counted, or one step of the longest conversations."""

import json
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from stages.shared.core.errors import UserError
from stages.shared.step.config import Train


@dataclass(frozen=True)
class Data:
    """The training conversations: their number, their tokens and targets, the longest's tokens."""

    conversations: int
    tokens: int
    supervised_tokens: int
    longest: int

    @property
    def supervised_share(self) -> float:
        """Share of the tokens that are targets."""
        return self.supervised_tokens / self.tokens

    @property
    def mean_length(self) -> float:
        """Tokens of a conversation."""
        return self.tokens / self.conversations


def data_of(max_length: int | None, batch_size: int, counts: Path) -> Data:
    """The counts of `prepare`, or a step of conversations of `max_length` tokens, all targets."""
    if max_length is None:
        return read_counts(counts)
    tokens = batch_size * max_length
    return Data(batch_size, tokens, tokens - batch_size, max_length)


def read_counts(path: Path) -> Data:
    """The training split in the report of `prepare`.

    Raises:
        UserError: it is missing, no JSON, or without training conversations.
    """
    try:
        train = json.loads(path.read_text(encoding="utf-8"))["train"]
        data = Data(
            train["conversations"],
            train["tokens"],
            train["supervised_tokens"],
            train["longest_tokens"],
        )
        usable = min(data.conversations, data.tokens, data.longest) > 0
    except (OSError, ValueError, KeyError, TypeError):
        usable = False
    if not usable:
        raise UserError(f"{path}: no counts of training conversations. Run `dvc repro prepare`.")
    return data


def schedule(data: Data, train: Train) -> dict[str, int]:
    """Steps and tokens of a training that does not stop early."""
    steps = train.epochs * ceil(data.conversations / train.batch_size)
    return {
        "steps": min(steps, train.max_steps or steps),
        "conversations": data.conversations,
        "tokens": data.tokens,
        "tokens_per_step": round(data.mean_length * min(train.batch_size, data.conversations)),
    }
