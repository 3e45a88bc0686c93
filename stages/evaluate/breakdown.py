"""Breakdown of an evaluation: tool calls, thoughts apart from answers, losses by role and source.

Each is there only where the held-out rows have such messages.
"""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from stages.evaluate.generate import Reply
from stages.shared.chat.conversation import Conversation, RejectedRow
from stages.shared.chat.encode import Encoder, Tokens
from stages.shared.chat.templates import Template
from stages.shared.model.packing import Example

_TAG = re.compile(r"<[^<>]+>|\[[A-Z_]+\]")
_DECODER = json.JSONDecoder()
THINKING = "thinking"  # the part of a reply before its content and its calls
RATES = {  # metrics by name: columns of the answers
    "tool_calls": {"name_match": "call_named", "exact_match": "call_exact"},
    "thinking_generated": {"stop_rate": "thought_ended", "characters": "thought_characters"},
}


def part_of_tokens(
    conversation: Conversation, example: Example, template: Template, encoder: Encoder
) -> np.ndarray | None:
    """Part of each supervised token: a role, `thinking`, or `template`; str [supervised].

    None where all are an assistant's answers, or the row's tokens are not found again, as those of
    a cut one may not be.
    """
    messages = conversation.messages
    thinks = any("reasoning" in message for message in messages)
    if not thinks and not example.loss_mask[1:3].any():  # train_on: all
        return None
    try:
        [rendered] = template.rows(conversation, [len(messages) - 1])
    except (RejectedRow, ValueError):  # whole, where it has several rows
        return None
    [tokens] = encoder.encode([rendered])
    if not isinstance(tokens, Tokens):
        return None
    tokens = tokens[: len(example)]
    if not np.array_equal(tokens.input_ids, example.input_ids):
        return None
    parts = np.full(len(tokens), "template", dtype="<U9")
    for part in rendered.parts:
        if part.owner >= 0:
            parts[tokens.overlap([part[:2]])] = messages[part.owner]["role"]
    for start, end in rendered.replies:
        parts[tokens.overlap([(start, end)])] = "assistant"
        own = [part for part in rendered.parts if start <= part.start and part.end <= end]
        if any(part.kind == "reasoning" for part in own):
            rest = [part.start for part in own if part.kind != "reasoning"]
            parts[tokens.overlap([(start, min(rest, default=end))])] = THINKING
    return parts[1:][example.predictors]


def by_part(parts: dict[int, np.ndarray], losses: dict[int, np.ndarray]) -> dict[str, Any]:
    """Loss in nats a token by role, and of thoughts apart from answers."""
    if not parts:
        return {}
    names = np.concatenate([*parts.values()])
    nats = np.concatenate([losses[row] for row in parts]).astype(np.float64)
    found = {
        str(name): {"loss": math.fsum(nats[names == name]) / count, "tokens": int(count)}
        for name, count in zip(*np.unique(names, return_counts=True), strict=True)
    }
    roles = {name: value for name, value in found.items() if name != THINKING}
    metrics: dict[str, Any] = {"by_role": roles} if len(roles) > 1 else {}
    if THINKING in found:
        metrics |= {"thinking": found[THINKING]}
        metrics |= {"answers": roles["assistant"]} if "assistant" in roles else {}
    return metrics


def thoughts(row: Conversation, reference: str, reply: Reply) -> dict[str, Any] | None:
    """Whether a reply's thoughts end, and characters to there; None: the reference has none."""
    reasoning = row.messages[-1].get("reasoning") if row.messages else None
    close = (
        _TAG.search(reference, reference.find(reasoning) + len(reasoning)) if reasoning else None
    )
    if close is None:
        return None
    at = reply.raw.find(close[0])
    return {"thought_ended": at >= 0, "thought_characters": at if at >= 0 else len(reply.raw)}


def calls(row: Conversation, reference: str, reply: Reply) -> dict[str, bool] | None:
    """Whether a reply calls the reference's tools, by name and exactly; None: it calls none.

    Arguments are compared as JSON, so white space and the order of keys make no difference, and
    what is said before the calls makes none either.
    """
    if not row.messages or not row.messages[-1].get("tool_calls"):
        return None
    expected, last = reference, row.messages[-1]
    for text, is_thought in ((last.get("reasoning"), True), (last["content"], False)):
        if text and text in expected:
            expected = expected[expected.index(text) + len(text) :].lstrip()
            close = _TAG.match(expected) if is_thought else None
            expected = expected[close.end() :].lstrip() if close else expected
    tag = _TAG.match(expected)
    at = reply.raw.find(tag[0] if tag else expected[:1])
    found = reply.raw[at:] if at >= 0 else ""
    return {
        "call_named": _canonical(found, names_only=True) == _canonical(expected, names_only=True),
        "call_exact": _canonical(found) == _canonical(expected),
    }


def _canonical(text: str, *, names_only: bool = False) -> str:
    """Text with its JSON values in one spelling, or reduced to the names that they hold."""
    result, at = "", 0
    while at < len(text):
        value: Any = None
        if text[at] in "{[":
            try:
                value, end = _DECODER.raw_decode(text, at)
            except (ValueError, RecursionError):
                value = None
        if isinstance(value, dict | list):
            if names_only:
                several = value if isinstance(value, list) else [value]
                value = [one.get("name") for one in several if isinstance(one, dict)]
            result += json.dumps(value, sort_keys=True, ensure_ascii=False)
            at = end
        else:
            result += text[at]
            at += 1
    return " ".join(result.split())


def rates(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Fractions of the generated rows that have calls, or thoughts, in their reference."""
    frame = pd.DataFrame(answers)
    metrics: dict[str, Any] = {}
    for name, columns in RATES.items():
        if {*columns.values()} <= {*frame}:
            some = frame[[*columns.values()]].dropna()
            means = {key: float(some[column].mean()) for key, column in columns.items()}
            metrics[name] = {"rows": len(some), **means}
    return metrics
