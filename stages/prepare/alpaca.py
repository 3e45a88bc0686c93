"""Alpaca's form: an `instruction`, perhaps an `input` to it, and the `output`."""

from typing import Any

from stages.prepare.rows import kind_of
from stages.shared.chat.conversation import Message, RejectedRow, normalize


def parse(fields: dict[str, Any]) -> list[Message]:
    """Make one exchange of a row: the input follows the instruction after an empty line.

    Raises:
        RejectedRow: there is no instruction or no output, or a field is no text.
    """
    instruction, output = _text(fields, "instruction"), _text(fields, "output")
    given = _text(fields, "input") if "input" in fields else ""
    return [
        {"role": "user", "content": "\n\n".join(part for part in (instruction, given) if part)},
        {"role": "assistant", "content": output},
    ]


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        found = "missing" if value is None else kind_of(value)
        raise RejectedRow(f"`{name}` is {found}, expected a text")
    return normalize(value)
