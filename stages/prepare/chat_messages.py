"""Lists of messages: OpenAI's `role` and `content`, ShareGPT's `from` and `value`."""

import json
from typing import Any

from stages.prepare.rows import kind_of
from stages.shared.chat.conversation import Message, RejectedRow, Role, normalize

_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


def parse(value: Any) -> list[Message]:
    """Read a list of messages; in CSV it is written as JSON.

    Raises:
        RejectedRow: it is no list of messages, a role is unknown, or a content is no text.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RejectedRow("the messages are a text that is not JSON") from None
    if not isinstance(value, list):
        raise RejectedRow(f"the messages are {kind_of(value)}, expected a list")
    messages = [_message(number, message) for number, message in enumerate(value, start=1)]
    if messages and messages[0] == {"role": "system", "content": ""}:
        return messages[1:]
    return messages


def _message(number: int, message: Any) -> Message:
    if not isinstance(message, dict):
        raise RejectedRow(f"message {number} is {kind_of(message)}, expected an object")
    # Parquet gives every message the fields of all, most of them null.
    role = _first(message, "role", "from")
    content = _first(message, "content", "value")
    if not isinstance(role, str) or role not in _ROLES:
        raise RejectedRow(
            f"message {number} is of role {role!r}, expected one of {', '.join(_ROLES)}"
        )
    if not isinstance(content, str):
        raise RejectedRow(f"message {number} holds {kind_of(content)}, expected a text")
    return {"role": _ROLES[role], "content": normalize(content)}


def _first(message: dict[str, Any], *names: str) -> Any:
    return next((message[name] for name in names if message.get(name) is not None), None)
