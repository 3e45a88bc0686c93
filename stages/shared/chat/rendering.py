"""Rendering by a chat template, and the spans in the text that are the conversation's own.

A server's prompt for each reply is rendered, and each conversation up to its reply: a template may
drop earlier thoughts, write the last turn in its own way, or open the reply's think block itself.
Text of messages is found between marks of private-use characters, and the rendering without them
must be the same.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from stages.shared.chat.conversation import Conversation, Message, RejectedRow

Span = tuple[int, int]  # [start, end) in characters
CONTEXT = -1  # owner of text that is no message's: tools, template arguments
Chat = list[dict[str, Any]]  # OpenAI's messages
Arguments = tuple[Chat, Sequence[Any] | None, Mapping[str, Any]]
Apply = Callable[[Chat, bool, Sequence[Any] | None, Mapping[str, Any]], str]

_MARK = re.compile("\ue000([0-9]+)\ue001|\ue002")
_WORD = re.compile(r"[\w .,:/+-]*")
_APART = "the chat template takes the text of a message apart"
_NOTHING = re.compile("(?!)")
_OPENING = "the chat template's generation prompt is not how its replies begin"
# What a generation prompt may write of a reply: a think block, open or empty.
_THINK = re.compile(
    r"(?:<|\[)(?P<tag>(?:\w+:)?(?:think|thinking|thought|reasoning))(?:>|\])\s*"
    r"(?P<closed>(?:<|\[)/(?P=tag)(?:>|\])\s*)?",
    re.IGNORECASE,
)


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
        wrapped = self.wrap_value(dict(tool), CONTEXT)
        levels = ((wrapped.get("function"), tool.get("function")), (wrapped, tool))
        for holder, original in levels:
            if isinstance(holder, dict) and isinstance(original, dict) and "name" in original:
                holder["name"] = self.wrap(str(original["name"]), CONTEXT, "name")
                break
        return dict(wrapped)

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


class TurnRenderer:
    """Renders conversations of any shape by a template that `apply` calls."""

    def __init__(self, apply: Apply) -> None:
        self._apply = apply
        self.unsafe = _NOTHING  # control tokens and markers
        self.ends = _NOTHING  # tokens that end a reply
        self.arguments_as_text = False  # of calls, where the template takes no objects

    def render(self, conversation: Conversation, count: int, *, prompt: bool = False) -> Rendered:
        """Render the first messages, as `apply_chat_template` does."""
        marks = Marks(self.unsafe, active=True)
        chat, tools, kwargs = self.arguments(conversation, count, marks)
        marked = marks.read(self._apply(chat, prompt, tools, kwargs))
        chat, tools, kwargs = self.arguments(conversation, count)
        if marked.text != self._apply(chat, prompt, tools, kwargs):
            raise RejectedRow("the chat template reads the text of a message, and changes by it")
        return marked

    def arguments(
        self, conversation: Conversation, count: int, marks: Marks | None = None
    ) -> Arguments:
        """Of the template: the first messages, tools, and its own."""
        marks = marks or Marks(self.unsafe, active=False)
        chat = [self._message(marks, *one) for one in enumerate(conversation.messages[:count])]
        tools = [marks.wrap_tool(tool) for tool in conversation.tools or ()] or None
        return chat, tools, marks.wrap_value(conversation.template_kwargs, CONTEXT)

    def _message(self, marks: Marks, index: int, message: Message) -> dict[str, Any]:
        """A message in OpenAI's form."""
        chat: dict[str, Any] = {
            "role": message["role"],
            "content": marks.wrap(message["content"], index, "content"),
        }
        if message.get("reasoning"):
            chat["reasoning_content"] = marks.wrap(message["reasoning"], index, "reasoning")
        for name in ("tool_call_id", "name"):
            if name in message:
                chat[name] = marks.wrap_value(message[name], index)
        if calls := message.get("tool_calls"):
            chat["tool_calls"] = [self._call(marks, index, call) for call in calls]
        return chat

    def _call(self, marks: Marks, index: int, call: Mapping[str, Any]) -> dict[str, Any]:
        arguments = marks.wrap_value(call["arguments"], index)
        if self.arguments_as_text:
            arguments = json.dumps(arguments, ensure_ascii=False)
        function = {"name": marks.wrap(call["name"], index, "name"), "arguments": arguments}
        own_id = {"id": marks.wrap_value(call["id"], index)} if "id" in call else {}
        return {**own_id, "type": "function", "function": function}

    def turns(
        self, conversation: Conversation, selected: Sequence[int]
    ) -> tuple[Rendered, list[Rendered]]:
        """Render a conversation and its replies.

        Returns:
            The whole rendering, with all replies if it has each prompt and reply as a server has
            them; and the prompt with the reply for all of these, else for the `selected` ones.
        """
        messages = conversation.messages
        whole = self.render(conversation, len(messages))
        _require_all(conversation, whole)
        turns, is_one = dict[int, Rendered](), True
        for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
            try:
                turns[i] = self._turn(conversation, i, whole)
            except RejectedRow:
                if i in selected:
                    raise
                is_one = False
            else:
                is_one = is_one and whole.begins_with(turns[i])
        if is_one:
            replies = tuple(span for turn in turns.values() for span in turn.replies)
            return Rendered(whole.text, whole.parts, replies), [*turns.values()]
        return whole, [turns[i] for i in selected]

    def _turn(self, conversation: Conversation, index: int, whole: Rendered) -> Rendered:
        """The prompt, then the reply to the end of its end token."""
        count, message = index + 1, conversation.messages[index]
        after = whole
        if count < len(conversation.messages):
            after = self.render(conversation, count)
        prompt = self.render(conversation, index, prompt=True)
        reply = _reply(prompt, after, message, index)
        _require_calls(reply, message, index)
        if message.get("reasoning") and not reply.count(index, "reasoning"):
            raise RejectedRow(
                "the chat template leaves out the thoughts of a reply; set prepare.thinking to drop"
            )
        last = max((part.end for part in reply.parts), default=0)
        for end in self.ends.finditer(reply.text):
            if reply.is_template(*end.span()):
                if end.start() < last:
                    raise RejectedRow(f"the chat template ends a turn ({end[0]!r}) within a reply")
                turn = prompt + reply.cut(0, end.end())
                span = (len(prompt.text), len(turn.text))
                return Rendered(turn.text, turn.parts, (span,), index)
        raise RejectedRow("the chat template puts no end token after a reply")


def _require_calls(text: Rendered, message: Message, index: int) -> None:
    if text.count(index, "name") < len(message.get("tool_calls", ())):
        raise RejectedRow("the chat template leaves out a tool call")


def _require_all(conversation: Conversation, text: Rendered) -> None:
    """Refuse a template that leaves out messages, calls or tools; thoughts it may."""
    for index, message in enumerate(conversation.messages):
        if message["content"] and not text.count(index, "content"):
            raise RejectedRow(f"the chat template leaves out a message ({message['role']})")
        _require_calls(text, message, index)
    if text.count(CONTEXT, "name") < len(conversation.tools or ()):
        raise RejectedRow("the chat template leaves out the tools")


def _reply(prompt: Rendered, after: Rendered, message: Message, index: int) -> Rendered:
    """The reply to a prompt: what follows it in the rendering with the reply."""
    if after.begins_with(prompt):
        return after.cut(len(prompt.text))
    think = next((t for t in _THINK.finditer(prompt.text) if t.end() == len(prompt.text)), None)
    if think is None or not prompt.is_template(*think.span()):
        raise RejectedRow(_OPENING)
    # The prompt writes a think block; as history the reply has none, or in another spelling.
    before = prompt.cut(0, think.start())
    if not after.begins_with(before):
        raise RejectedRow(_OPENING)
    reply = after.cut(len(before.text))
    own = _THINK.match(reply.text)
    own = own if own and reply.is_template(*own.span()) else None
    if think["closed"]:
        if message.get("reasoning"):
            raise RejectedRow("the generation prompt closes the thoughts that a reply has")
        return reply.cut(own.end()) if own and own["closed"] else reply
    if own:
        return reply.cut(own.start("closed") if own["closed"] else own.end())
    close = think[0].strip().replace(think["tag"], f"/{think['tag']}", 1)
    thoughts = message.get("reasoning", "")
    opened = Rendered(thoughts, (Part(0, len(thoughts), index, "reasoning"),) if thoughts else ())
    # The reply of DeepSeek-V3.1 begins with the closing tag.
    closes = reply.text.startswith(close) and reply.is_template(0, len(close))
    return opened + reply if closes else opened + Rendered(f"\n{close}\n\n") + reply
