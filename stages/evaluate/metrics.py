"""From sums over rows to the figures of `reports/evaluate/<variant>.json`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """What was measured on one held-out conversation.

    Attributes:
        nats: summed negative log-likelihood of its supervised tokens.
        tokens: how many they are.
        text_bytes: UTF-8 bytes of the supervised text.
        english: whether its language is English.
        stopped: whether the generated reply ended by itself; None if none was generated.
        right: whether its last line is the answer; None if there is none to compare with.
    """

    nats: float
    tokens: int
    text_bytes: int
    english: bool
    stopped: bool | None = None
    right: bool | None = None


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """All figures over the rows, weighted by token; None where there is nothing to measure.

    `bits_per_byte` does not depend on the vocabulary: nats / ln 2 / bytes. `stop_rate` is of the
    `generated_rows`, `exact_match` of the `answered_rows` among them: those with a known answer.
    """
    tokens, size = sum(r.tokens for r in rows), sum(r.text_bytes for r in rows)
    nats = math.fsum(r.nats for r in rows)
    loss = nats / tokens if tokens else None
    return {
        "loss": loss,
        "perplexity": None if loss is None else math.exp(min(loss, 700.0)),
        "bits_per_byte": nats / math.log(2) / size if size else None,
        "tokens": tokens,
        "conversations": len(rows),
        "generated_rows": sum(r.stopped is not None for r in rows),
        "answered_rows": sum(r.right is not None for r in rows),
        "stop_rate": _fraction([r.stopped for r in rows]),
        "exact_match": _fraction([r.right for r in rows]),
    }


def _fraction(values: Sequence[bool | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def report(rows: Sequence[Row]) -> dict[str, Any]:
    """The figures over all rows, and over English and other languages apart."""
    groups = {"en": [r for r in rows if r.english], "other": [r for r in rows if not r.english]}
    return summarize(rows) | {
        "by_language": {name: summarize(group) for name, group in groups.items() if group}
    }
