"""Conversation schema of the pipeline, whatever the source's format."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypedDict

Role = Literal["system", "user", "assistant", "tool"]


class RejectedRow(ValueError):  # noqa: N818  (about data, not an error of the program)
    """A row that cannot be trained on; the message is the reason."""


class ToolCall(TypedDict):
    """Call of a function by the assistant."""

    name: str
    arguments: dict[str, Any]
    id: NotRequired[str]


class Message(TypedDict):
    """One turn."""

    role: Role
    content: str  # normalized, as is the reasoning
    reasoning: NotRequired[str]  # thoughts before the reply; "" for an empty block in the text
    tool_calls: NotRequired[list[ToolCall]]  # at least one
    tool_call_id: NotRequired[str]  # the call that a tool message answers
    name: NotRequired[str]  # the function that a tool message comes from
    weight: NotRequired[float]  # of its loss, where not 1; 0: in the context, but not supervised


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages with their context, or a plain text without messages."""

    messages: list[Message]  # the last is a reply
    tools: list[dict[str, Any]] | None = None  # OpenAI's function schemas, at least one
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # for the chat template
    text: str | None = None  # continued pre-training: no messages, all supervised
    answer: str | None = None  # the short answer that the last reply comes to
    language: str | None = None
    source: str | None = None  # where a training has several
    form: str | None = None  # of the row
    dropped_turn: bool = False  # turns at the end without a reply were dropped
    unknown: list[str] = field(default_factory=list)  # unread fields; `messages.<field>`
    # Other paths of a tree, best first, and how many messages each shares with one before it,
    branches: list[tuple[list[Message], int]] = field(default_factory=list)
    shared: int = 0  # which that one alone supervises


def normalize(content: str) -> str:
    """Convert line ends to LF and strip; white space at the ends is the template's."""
    return content.replace("\r\n", "\n").replace("\r", "\n").strip()


def conversation_id(messages: list[Message], **context: Any) -> str:
    """SHA-256, 64 hex digits, of compact JSON: `[[role, content], ...]`.

    A weight follows, other fields of a message as an object, and so does the context (tools,
    template_kwargs, text) after the messages; keys are sorted, empty ones left out.
    """
    turns: list[Any] = [
        [m["role"], m["content"], *(_other_fields(m) if len(m) > 2 else ())] for m in messages
    ]
    context = {name: value for name, value in context.items() if value}
    return hashlib.sha256(_encode([*turns, context] if context else turns).encode()).hexdigest()


# Made once, which takes longer than to encode.
_encode = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode


def _other_fields(message: Message) -> Iterator[Any]:
    if (weight := message.get("weight")) is not None:
        yield int(weight) if weight == int(weight) else weight
    names = message.keys() - {"role", "content", "weight"}
    rest = {name: message[name] for name in names if message[name] is not None}  # type: ignore[literal-required]
    if rest:
        yield rest


def to_columns(messages: list[Message]) -> list[Any]:
    """Messages as Parquet holds them: a call's arguments are JSON text."""
    return [
        {**m, "tool_calls": [{**c, "arguments": dump(c["arguments"])} for c in m["tool_calls"]]}
        if "tool_calls" in m
        else m
        for m in messages
    ]


def from_columns(row: Mapping[str, Any]) -> Conversation:
    """Conversation of a row of `data/prepared`, read by `to_pylist`."""
    messages: list[Any] = []
    for one in row["messages"]:
        message = {name: value for name, value in one.items() if value is not None}
        for call in message.get("tool_calls", ()):
            call["arguments"] = json.loads(call["arguments"])
            if call["id"] is None:
                del call["id"]
        messages.append(message)
    return Conversation(
        messages,
        tools=json.loads(row["tools"]) if row.get("tools") else None,
        template_kwargs=json.loads(row["template_kwargs"]) if row.get("template_kwargs") else {},
        text=None if messages else row["text"],
        answer=row.get("answer"),
        language=row.get("language"),
        source=row.get("source"),
    )


def dump(value: Any) -> str:
    """JSON text of a value, its keys in their order."""
    return json.dumps(value, ensure_ascii=False)


_NEXT = {
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool", "user"),
}


def problem_with(messages: list[Message]) -> str | None:
    """Why messages cannot be trained on, or None; an empty reply is valid (ends its turn).

    After a system message: a user, then replies, each to a user or to the results of tools. Tools
    follow a reply, whose calls may stand in its text. Two users or two replies never follow.
    """
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not turns:
        return "no turns"
    expected: tuple[str, ...] = ("user",)
    for number, turn in enumerate(turns, start=1):
        role = turn["role"]
        if role not in expected:
            return f"turn {number} is of role {role}, expected {' or '.join(expected)}"
        if role == "user" and not turn["content"]:
            return f"turn {number} of the user is empty"
        expected = _NEXT[role]
    if turns[-1]["role"] != "assistant":
        return "no reply after the last turn of the user"
    return None


def drop_unanswered(messages: list[Message]) -> list[Message]:
    """Drop a final user turn, and results of tools, without a reply."""
    end = len(messages) - (messages[-1]["role"] == "user" if messages else 0)
    while end and messages[end - 1]["role"] == "tool":
        end -= 1
    return messages[:end]


_NOT_LATIN = re.compile(r"[^\u0000-\u024f\u2000-\u2bff\ufe0f\U0001f000-\U0001faff]")
_WORD = re.compile(r"[^\W\d_]+")
_ENGLISH = frozenset(
    _WORD.findall("the of and to in is that for it with as are on be this by you what")
)


def language_of(messages: list[Message]) -> Literal["en", "other"]:
    """Guess the language of a conversation whose source states none, by its users and replies.

    `en`: at most one character in 50 outside Latin script, punctuation and symbols, and at least
    one word in 16, and one at all, a common English function word.
    """
    text = " ".join(m["content"] for m in messages if m["role"] in ("user", "assistant"))
    words = _WORD.findall(text.lower())
    if not words or len(_NOT_LATIN.findall(text)) * 50 > len(text):
        return "other"
    common = sum(map(_ENGLISH.__contains__, words))
    return "en" if common and common * 16 >= len(words) else "other"
