"""Rendered text of a conversation, and the spans in it that are the conversation's own."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from stages.shared.chat.conversation import RejectedRow

Span = tuple[int, int]  # [start, end) in characters
CONTEXT = -1  # owner of text that is no message's: tools, template arguments
_MARK = re.compile("\ue000([0-9]+)\ue001|\ue002")
_WORD = re.compile(r"[\w .,:/+-]*")
_APART = "the chat template takes the text of a message apart"


class Part(NamedTuple):
    """Text of a conversation in its rendering, [start, end) in characters."""

    start: int
    end: int
    owner: int  # index of the message, or `CONTEXT`
    kind: str = "content"  # or reasoning, name (of a call or tool), value (anything else)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text; all but its parts is the template's."""

    text: str
    parts: tuple[Part, ...] = ()  # in order
    replies: tuple[Span, ...] = ()  # from the prompt's end to the end token's end
    turn: int | None = None  # index of the message that alone is supervised; None: all replies

    def __add__(self, other: "Rendered") -> "Rendered":
        at = len(self.text)
        moved = (p._replace(start=p.start + at, end=p.end + at) for p in other.parts)
        return Rendered(self.text + other.text, (*self.parts, *moved))

    def cut(self, start: int, end: int | None = None) -> "Rendered":
        """Text and parts from `start` to `end`; a part across an edge is cut."""
        end = len(self.text) if end is None else end
        parts = (p for p in self.parts if p.start < end and start < p.end)
        moved = (
            p._replace(start=max(p.start, start) - start, end=min(p.end, end) - start)
            for p in parts
        )
        return Rendered(self.text[start:end], tuple(moved))

    def begins_with(self, other: "Rendered") -> bool:
        """Whether text and parts begin alike."""
        within = tuple(part for part in self.parts if part.start < len(other.text))
        return self.text.startswith(other.text) and within == other.parts

    def literals(self) -> list[str]:
        """The template's text before, between and after the parts."""
        edges = [0, *(edge for part in self.parts for edge in part[:2]), len(self.text)]
        return [self.text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]

    def count(self, owner: int, kind: str) -> int:
        """Number of an owner's parts of a kind."""
        return len({p.start for p in self.parts if (p.owner, p.kind) == (owner, kind)})

    def is_template(self, start: int, end: int) -> bool:
        """Whether the template wrote [start, end) itself."""
        return all(p.end <= start or end <= p.start for p in self.parts)


@dataclass
class Marks:
    """Private-use characters around the text of a conversation, or (inactive) none."""

    unsafe: re.Pattern[str]  # control tokens and markers
    active: bool
    sources: list[tuple[int, str]] = field(default_factory=list)

    def wrap(self, text: str, owner: int, kind: str) -> str:
        """Put marks around a text."""
        if not (self.active and text):
            return text
        self.sources.append((owner, kind))
        return f"\ue000{len(self.sources) - 1}\ue001{text}\ue002"

    def wrap_value(self, value: Any, owner: int) -> Any:
        """Put marks around strings, but words: templates compare these (`object`, `required`)."""
        match value:
            case str():
                harmless = _WORD.fullmatch(value) and not self.unsafe.search(value)
                return value if harmless else self.wrap(value, owner, "value")
            case dict():
                items = value.items()
                return {self.wrap_value(k, owner): self.wrap_value(v, owner) for k, v in items}
            case list():
                return [self.wrap_value(one, owner) for one in value]
            case _:
                return value

    def wrap_tool(self, tool: Mapping[str, Any]) -> dict[str, Any]:
        """Put marks around a schema's name and other strings."""
        found = self.wrap_value(dict(tool), CONTEXT)
        for holder, original in ((found.get("function"), tool.get("function")), (found, tool)):
            if isinstance(holder, dict) and isinstance(original, dict) and "name" in original:
                holder["name"] = self.wrap(str(original["name"]), CONTEXT, "name")
                break
        return dict(found)

    def read(self, marked: str) -> Rendered:
        """Take the marks out of a rendering."""
        text, parts, last = "", list[Part](), 0
        start, number = 0, None  # of the part that is open
        for mark in _MARK.finditer(marked):
            text += marked[last : mark.start()]
            last = mark.end()
            if (mark[1] is None) == (number is None):
                raise RejectedRow(_APART)
            if number is None:
                start, number = len(text), int(mark[1])
            else:
                parts.append(Part(start, len(text), *self.sources[number]))
                number = None
        if number is not None:
            raise RejectedRow(_APART)
        return Rendered(text + marked[last:], tuple(parts))
