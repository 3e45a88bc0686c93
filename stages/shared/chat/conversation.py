"""Conversation schema of the pipeline, whatever the source's format."""

import hashlib
import re
from json.encoder import encode_basestring
from typing import Literal, NotRequired, TypedDict

Role = Literal["system", "user", "assistant"]


class RejectedRow(ValueError):  # noqa: N818  (about data, not an error of the program)
    """A row that cannot be trained on; the message is the reason."""


class Message(TypedDict):
    """One turn."""

    role: Role
    content: str  # normalized
    weight: NotRequired[Literal[0]]  # in the context, but not supervised


def normalize(content: str) -> str:
    """Convert line ends to LF and strip; white space at the ends is the template's."""
    return content.replace("\r\n", "\n").replace("\r", "\n").strip()


def conversation_id(messages: list[Message]) -> str:
    """SHA-256, 64 hex digits, of compact JSON: `[[role, content], ...]`, `,0` for weight 0."""
    # Formatted by hand: json.dumps takes longer than all the rest.
    turns = ",".join(
        f'["{m["role"]}",{encode_basestring(m["content"])}{",0" if "weight" in m else ""}]'
        for m in messages
    )
    return hashlib.sha256(f"[{turns}]".encode()).hexdigest()


def problem_with(messages: list[Message]) -> str | None:
    """Why messages cannot be trained on, or None; an empty reply is valid (ends its turn)."""
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not turns:
        return "no turns"
    for index, turn in enumerate(turns):
        expected = "assistant" if index % 2 else "user"
        if turn["role"] != expected:
            return f"turn {index + 1} is of role {turn['role']}, expected {expected}"
        if expected == "user" and not turn["content"]:
            return f"turn {index + 1} of the user is empty"
    if turns[-1]["role"] != "assistant":
        return "no reply after the last turn of the user"
    return None


def drop_unanswered(messages: list[Message]) -> list[Message]:
    """Drop a final user turn without a reply."""
    return messages[:-1] if messages and messages[-1]["role"] == "user" else messages


_NOT_LATIN = re.compile(r"[^\u0000-\u024f\u2000-\u2bff\ufe0f\U0001f000-\U0001faff]")
_WORD = re.compile(r"[^\W\d_]+")
_ENGLISH = frozenset(
    _WORD.findall("the of and to in is that for it with as are on be this by you what")
)


def language_of(messages: list[Message]) -> Literal["en", "other"]:
    """Guess the language of a conversation whose source states none, without system messages.

    `en`: at most one character in 50 outside Latin script, punctuation and symbols, and at least
    one word in 16, and one at all, a common English function word.
    """
    text = " ".join(m["content"] for m in messages if m["role"] != "system")
    words = _WORD.findall(text.lower())
    if not words or len(_NOT_LATIN.findall(text)) * 50 > len(text):
        return "other"
    common = sum(map(_ENGLISH.__contains__, words))
    return "en" if common and common * 16 >= len(words) else "other"
