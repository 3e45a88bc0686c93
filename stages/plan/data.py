"""How much there is to train on: what `prepare` counted, or what is asked for instead."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from stages.plan.settings import Train
from stages.shared.core.errors import UserError


@dataclass(frozen=True)
class Data:
    """The training conversations, in all.

    Attributes:
        conversations: how many.
        tokens: in all of them.
        supervised_tokens: that are learnt.
        longest: tokens of the longest.
    """

    conversations: int
    tokens: int
    supervised_tokens: int
    longest: int

    @property
    def supervised_share(self) -> float:
        """Of the tokens, those that are learnt."""
        return self.supervised_tokens / self.tokens

    @property
    def mean_length(self) -> float:
        """Tokens of a conversation."""
        return self.tokens / self.conversations


def read_counts(path: Path) -> Data:
    """What `prepare` counted.

    Raises:
        UserError: it is not there, no JSON, or without training conversations.
    """
    try:
        counts = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        raise UserError(
            f"{path}: missing or not JSON; expected what `prepare` counted; run `dvc repro prepare`"
        ) from None
    return of_counts(counts)


def of_counts(counts: Mapping[str, Any]) -> Data:
    """The training split of `reports/prepare.json`.

    Raises:
        UserError: the counts are not those that `prepare` writes.
    """
    try:
        train = counts["train"]
        data = Data(
            train["conversations"],
            train["tokens"],
            train["supervised_tokens"],
            train["longest_tokens"],
        )
        usable = min(data.conversations, data.tokens, data.longest) > 0
    except (KeyError, TypeError):
        usable = False
    if not usable:
        raise UserError(
            "reports/prepare.json: no train.conversations, tokens, supervised_tokens and "
            "longest_tokens above zero; expected what `prepare` writes; run `dvc repro prepare`"
        )
    return data


def schedule(data: Data, train: Train) -> dict[str, int]:
    """How much training there is, if it does not stop early."""
    steps = train.epochs * ceil(data.conversations / train.batch_size)
    return {
        "steps": min(steps, train.max_steps or steps),
        "conversations": data.conversations,
        "tokens": data.tokens,
        "tokens_per_step": round(data.mean_length * min(train.batch_size, data.conversations)),
    }
