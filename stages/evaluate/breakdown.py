"""Breakdown of an evaluation: tool calls, thoughts apart from answers, losses by role and source.

Each is there only where the held-out rows have such messages.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd

from stages.evaluate.generate import Reply
from stages.shared.chat.conversation import Conversation, RejectedRow
from stages.shared.chat.encode import Encoder
from stages.shared.chat.templates import Template
from stages.shared.model.packing import Example

_TAG = re.compile(r"<[^<>]+>|\[[A-Z_]+\]")
_DECODER = json.JSONDecoder()
THINKING = "thinking"  # the part of a reply before its content and its calls
RATES = {  # metrics by name: columns of the answers
    "tool_calls": {"name_match": "call_named", "exact_match": "call_exact"},
    "thinking_generated": {"stop_rate": "thought_ended", "characters": "thought_characters"},
}


def by_part(
    conversations: Sequence[Conversation],
    examples: Sequence[Example],
    losses: Mapping[int, np.ndarray],
    template: Template,
    encoder: Encoder,
) -> dict[str, Any]:
    """Loss by role, and of thoughts apart from answers; `losses` by row, in nats [supervised]."""
    names, nats = [], []
    for row, (conversation, example) in enumerate(zip(conversations, examples, strict=True)):
        own = _part_of_tokens(conversation, example, template, encoder)
        if own is not None:
            names.append(own)
            nats.append(losses[row])
    if not names:
        return {}
    tokens = pd.Series(np.concatenate(nats), np.concatenate(names), dtype=np.float64)
    parts = {
        str(name): {"loss": math.fsum(group) / len(group), "tokens": len(group)}
        for name, group in tokens.groupby(level=0)
    }
    roles = {name: value for name, value in parts.items() if name != THINKING}
    metrics: dict[str, Any] = {"by_role": roles} if len(roles) > 1 else {}
    if THINKING in parts:
        metrics |= {"thinking": parts[THINKING]}
        metrics |= {"answers": roles["assistant"]} if "assistant" in roles else {}
    return metrics


def _part_of_tokens(
    conversation: Conversation, example: Example, template: Template, encoder: Encoder
) -> np.ndarray | None:
    """Part of each supervised token: a role, `thinking`, or `template`; str [supervised].

    None where all are an assistant's answers, or where encoding the row again gives other tokens,
    as it may for a truncated one.
    """
    messages = conversation.messages
    thinks = any("reasoning" in message for message in messages)
    if not thinks and not example.loss_mask[1:3].any():  # train_on: all
        return None
    try:
        [rendered] = template.rows(conversation, [len(messages) - 1])
        tokens = encoder.encode(rendered)[: len(example)]
    except (RejectedRow, ValueError):  # whole, where it has several rows
        return None
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


def thoughts(row: Conversation, reference: str, reply: Reply) -> dict[str, Any]:
    """Whether a reply's thoughts end, and characters to there; {} where the reference has none."""
    reasoning = row.messages[-1].get("reasoning")
    end = reference.find(reasoning) + len(reasoning) if reasoning else len(reference)
    close = _TAG.search(reference, end)
    if close is None:
        return {}
    at = reply.raw.find(close[0])
    return {"thought_ended": at >= 0, "thought_characters": at if at >= 0 else len(reply.raw)}


def calls(row: Conversation, reference: str, reply: Reply) -> dict[str, Any]:
    """Whether a reply calls the reference's tools, by name and exactly; {} where it calls none.

    Arguments are compared as JSON, so white space and the order of keys make no difference, and
    what is said before the calls makes none either.
    """
    last = row.messages[-1]
    if not last.get("tool_calls"):
        return {}
    expected = reference
    for text, is_thought in ((last.get("reasoning"), True), (last["content"], False)):
        if text and text in expected:
            expected = expected[expected.index(text) + len(text) :].lstrip()
            close = _TAG.match(expected) if is_thought else None
            expected = expected[close.end() :].lstrip() if close else expected
    tag = _TAG.match(expected)
    at = reply.raw.find(tag[0] if tag else expected[:1])
    called = reply.raw[at:] if at >= 0 else ""
    return {
        "call_named": _canonical(called, names_only=True) == _canonical(expected, names_only=True),
        "call_exact": _canonical(called) == _canonical(expected),
    }


def _canonical(text: str, *, names_only: bool = False) -> str:
    """Text with its JSON values in one spelling, or reduced to the names that they hold."""
    result, at = "", 0
    while at < len(text):
        piece, end = text[at], at + 1
        if piece in "{[":
            with suppress(ValueError, RecursionError):  # no JSON, or nested too deep
                value, after = _DECODER.raw_decode(text, at)
                if names_only:
                    several = value if isinstance(value, list) else [value]
                    value = [one.get("name") for one in several if isinstance(one, dict)]
                piece, end = json.dumps(value, sort_keys=True, ensure_ascii=False), after
        result += piece
        at = end
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
