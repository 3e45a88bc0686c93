"""Guanaco's format: one text in which `### Human:` and `### Assistant:` begin the turns.

Real files have no line end between turns (`…Norway?### Assistant: Oslo.### Human: …`).
"""

import re

from stages.shared.chat.conversation import Message, RejectedRow, Role, normalize

MARKER = re.compile(r"### (Human|Assistant):(?=\s|\Z)")
_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}

# A quotation mark opens after white space, in brackets, or in code: x="…", f"…".
_BEFORE_QUOTE = re.compile(r"(?:\A|[\s(\[{<=:,]|\b[bfru]|\b[fr][br])\Z", re.IGNORECASE)
_QUOTES = "\"'`"
_BRACKETS = "([{<“‘«„‹"


def parse(text: str) -> list[Message]:
    """Split a text into turns; text before the first is the system message."""
    messages: list[Message] = []
    role: Role = "system"
    begin = 0
    for marker in MARKER.finditer(text):
        if not starts_turn(text[begin : marker.start()]):
            continue
        if _ROLES[marker[1]] == role:
            raise RejectedRow(
                f"two turns of {marker[1]} in a row: a reply is missing, or is quoted"
            )
        messages.append({"role": role, "content": normalize(text[begin : marker.start()])})
        role, begin = _ROLES[marker[1]], marker.end()
    messages.append({"role": role, "content": normalize(text[begin:])})
    if "### Assistant:" in text and all(m["role"] != "assistant" for m in messages):
        raise RejectedRow("no reply: `### Assistant:` after a space or a quotation mark is text")
    return messages[1:] if not messages[0]["content"] else messages


def starts_turn(before: str) -> bool:
    """Tell a marker that begins a turn from a quoted one, by the current turn's text before it.

    A marker is quoted after white space within a line, an opening quotation mark or bracket, and
    in a Markdown heading; it begins a turn in an empty message, on a new line, or after a word.
    """
    last = before[-1:]
    if not last or last == "\n":
        return True
    if last.isspace():
        return not before.strip()
    if last == "#":
        return not _stands_free(before.rstrip("#"))
    if last in _BRACKETS:
        return not _stands_free(before[:-1])
    if last not in _QUOTES or before.count(last) % 2 == 0:  # an even one closes a quotation
        return True
    return _BEFORE_QUOTE.search(before.rstrip(last)[-3:]) is None


def _stands_free(before: str) -> bool:
    return not before or before[-1].isspace()
