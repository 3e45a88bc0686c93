"""Rows of any known form into conversations of one form."""

import math
from typing import Any, Literal, NamedTuple

from stages.prepare import alpaca, chat_messages, guanaco
from stages.prepare.rows import Row, kind_of
from stages.shared.chat.conversation import (
    Message,
    RejectedRow,
    drop_unanswered,
    language_of,
    problem_with,
)

Form = Literal["guanaco", "messages", "alpaca"]


class Conversation(NamedTuple):
    """A conversation that can be trained on, as far as can be seen without a tokenizer.

    Attributes:
        messages: normalized; the last is a reply.
        answer: the checkable answer of the last reply, or None.
        language: as the source says, or `en`/`other` by the stated rule.
        dropped_turn: a last turn of the user that nobody answered was dropped.
        line: where it stands in its file.
    """

    messages: list[Message]
    answer: str | None
    language: str
    dropped_turn: bool
    line: int

    @property
    def question(self) -> str:
        """The first message of the user."""
        return next(m["content"] for m in self.messages if m["role"] == "user")


def form_of(fields: dict[str, Any]) -> Form | None:
    """The form that a row's fields show, or None."""
    text = fields.get("text")
    if isinstance(text, str) and "### Human:" in text:
        return "guanaco"
    if "messages" in fields or "conversations" in fields:
        return "messages"
    return "alpaca" if "instruction" in fields else None


def parse(row: Row, form: Form | None) -> Conversation:
    """Make a conversation of a row; no form is known yet where `form` is None.

    Raises:
        RejectedRow: the row does not fit the form, or its turns make no conversation.
    """
    if row.problem is not None:
        raise RejectedRow(row.problem)
    if form is None:
        raise RejectedRow(f"no known form in {', '.join(row.fields)[:80] or 'an empty row'}")
    messages = _messages(row.fields, form)
    kept = drop_unanswered(messages)
    if (problem := problem_with(kept)) is not None:
        replied = any(message["role"] == "assistant" for message in messages)
        raise RejectedRow(problem if replied else "no reply")
    _require_unicode(kept)
    answer, language = _answer(row.fields.get("answer")), row.fields.get("language")
    if any(isinstance(field, str) and not _is_unicode(field) for field in (answer, language)):
        raise RejectedRow(
            "`answer` or `language` holds half a surrogate pair, which is no character"
        )
    return Conversation(
        messages=kept,
        answer=answer,
        language=language if isinstance(language, str) and language else language_of(kept),
        dropped_turn=len(kept) < len(messages),
        line=row.line,
    )


def _answer(value: Any) -> str | None:
    """What can be compared with the last line of a reply: nothing empty, no list, no NaN."""
    if value is None or isinstance(value, bool | list | dict):
        return None
    nothing = isinstance(value, float) and math.isnan(value)
    return None if nothing else str(value).strip() or None


def _messages(fields: dict[str, Any], form: Form) -> list[Message]:
    if form == "alpaca":
        return alpaca.parse(fields)
    names = ("text",) if form == "guanaco" else ("messages", "conversations")
    name = next((name for name in names if name in fields), None)
    if name is None:
        found = ", ".join(fields) or "nothing"
        raise RejectedRow(f"no `{'` or `'.join(names)}` in it; found {found[:80]}")
    if form == "messages":
        return chat_messages.parse(fields[name])
    if not isinstance(fields[name], str):
        raise RejectedRow(f"`{name}` is {kind_of(fields[name])}, expected a text")
    return guanaco.parse(fields[name])


def _require_unicode(messages: list[Message]) -> None:
    """Refuse half a surrogate pair, which JSON can spell and no encoding can hold."""
    if not all(_is_unicode(message["content"]) for message in messages):
        raise RejectedRow("a message holds half a surrogate pair, which is no character")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
