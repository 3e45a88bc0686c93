"""Guanaco's form: one text in which `### Human:` and `### Assistant:` begin the turns.

In the real files no line end stands between turns (`…of Norway?### Assistant: Oslo.### Human: …`),
and people write about these markers in their messages too. `starts_turn` decides which is which.
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
    """Split a text into its turns; what stands before the first one is the system message.

    Raises:
        RejectedRow: two turns of one role follow each other: either a reply is missing or a message
            quotes the marker, and nothing in the text says which. Or all marks of replies are
            part of a message.
    """
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
    """Whether a marker begins a turn, from what stands before it in the current one.

    It does where the message is empty so far, at the beginning of a line, and directly after a
    character. It is part of the message after any other white space (mid-sentence), after an
    opening quotation mark or bracket, and in a longer row of `#` that stands free (a Markdown
    heading).
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
    return last not in _QUOTES or not _opens_quote(before)


def _stands_free(before: str) -> bool:
    return not before or before[-1].isspace()


def _opens_quote(before: str) -> bool:
    mark = before[-1]
    if before.count(mark) % 2 == 0:
        return False  # it closes what another opened
    return _BEFORE_QUOTE.search(before.rstrip(mark)[-3:]) is not None
