"""Rendering turn by turn: what a server sends for a reply, and the reply as the model writes it.

A template may drop earlier thoughts, write the last turn in its own way, or open the reply's think
block itself. So each prompt is rendered, and each conversation up to its reply. Text of messages is
found between marks of private-use characters, and the rendering without them must be the same.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from stages.shared.chat.conversation import Conversation, Message, RejectedRow

Chat = list[dict[str, Any]]  # OpenAI's messages
Arguments = tuple[Chat, Sequence[Any] | None, Mapping[str, Any]]
Apply = Callable[[Chat, bool, Sequence[Any] | None, Mapping[str, Any]], str]

CONTEXT = -1  # owner of text that is no message's: tools, template arguments
_MARK = re.compile("\ue000([0-9]+)\ue001|\ue002")
_WORD = re.compile(r"[\w .,:/+-]*")
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
    kind: str  # content, reasoning, name (of a call or tool), value (anything else)


@dataclass(frozen=True, slots=True)
class Text:
    """Rendered text, and the parts of it that are the conversation's, in order."""

    text: str
    parts: tuple[Part, ...] = ()

    def __add__(self, other: "Text") -> "Text":
        at = len(self.text)
        moved = (p._replace(start=p.start + at, end=p.end + at) for p in other.parts)
        return Text(self.text + other.text, (*self.parts, *moved))

    def cut(self, start: int, end: int | None = None) -> "Text":
        """The text from `start` to `end`, neither within a part."""
        end = len(self.text) if end is None else end
        parts = (p for p in self.parts if start <= p.start and p.end <= end)
        moved = tuple(p._replace(start=p.start - start, end=p.end - start) for p in parts)
        return Text(self.text[start:end], moved)

    def begins_with(self, other: "Text") -> bool:
        """Whether text and parts begin alike."""
        within = tuple(part for part in self.parts if part.start < len(other.text))
        return self.text.startswith(other.text) and within == other.parts

    def holds(self, owner: int, kind: str) -> int:
        """Number of an owner's parts of a kind."""
        return len({p.start for p in self.parts if (p.owner, p.kind) == (owner, kind)})

    def written(self, start: int, end: int) -> bool:
        """Whether the template wrote [start, end) itself."""
        return all(p.end <= start or end <= p.start for p in self.parts)


class Turn(NamedTuple):
    """A reply in its rendering."""

    text: Text  # the prompt, then the reply to the end of its end token
    start: int  # of the reply

    @property
    def span(self) -> tuple[int, int]:
        """Characters of the reply."""
        return self.start, len(self.text.text)

    @property
    def reply(self) -> str:
        """Text of the reply."""
        return self.text.text[self.start :]


@dataclass
class _Marks:
    """Puts text of a conversation between marks, or (inactive) leaves it alone."""

    unsafe: re.Pattern[str]  # control tokens and markers
    active: bool
    sources: list[tuple[int, str]] = field(default_factory=list)

    def wrap(self, text: str, owner: int, kind: str) -> str:
        if not (self.active and text):
            return text
        self.sources.append((owner, kind))
        return f"\ue000{len(self.sources) - 1}\ue001{text}\ue002"

    def value(self, value: Any, owner: int) -> Any:
        """Strings within a value, but words: templates compare these (`object`, `required`)."""
        match value:
            case str():
                harmless = _WORD.fullmatch(value) and not self.unsafe.search(value)
                return value if harmless else self.wrap(value, owner, "value")
            case dict():
                items = value.items()
                return {self.value(k, owner): self.value(v, owner) for k, v in items}
            case list():
                return [self.value(one, owner) for one in value]
            case _:
                return value

    def tool(self, tool: Mapping[str, Any]) -> dict[str, Any]:
        found = self.value(dict(tool), CONTEXT)
        for holder, original in ((found.get("function"), tool.get("function")), (found, tool)):
            if isinstance(holder, dict) and isinstance(original, dict) and "name" in original:
                holder["name"] = self.wrap(str(original["name"]), CONTEXT, "name")
                break
        return dict(found)

    def read(self, marked: str) -> Text:
        """Take the marks out of a rendering."""
        text, parts, last, start = "", list[Part](), 0, -1
        number = None  # of the part that is open
        for mark in _MARK.finditer(marked):
            text += marked[last : mark.start()]
            last = mark.end()
            if (mark[1] is None) == (number is None):
                raise RejectedRow("the chat template takes the text of a message apart")
            if number is None:
                start, number = len(text), int(mark[1])
            else:
                parts.append(Part(start, len(text), *self.sources[number]))
                number = None
        if number is not None:
            raise RejectedRow("the chat template takes the text of a message apart")
        return Text(text + marked[last:], tuple(parts))


class TurnRenderer:
    """Renders conversations of any shape by a template that `apply` calls."""

    def __init__(self, apply: Apply, unsafe: re.Pattern[str]) -> None:
        """`unsafe` matches control tokens and markers."""
        self._apply, self._unsafe = apply, unsafe
        self.ends = re.compile("(?!)")  # tokens that end a reply
        self.arguments_as_text = False  # of calls, where the template takes no objects

    def render(self, conversation: Conversation, count: int, *, prompt: bool) -> Text:
        """Render the first messages, as `apply_chat_template` does."""
        marks = _Marks(self._unsafe, active=True)
        arguments = self._arguments(marks, conversation, count)
        marked = marks.read(self._apply(arguments[0], prompt, *arguments[1:]))
        arguments = self.arguments(conversation, count)
        if marked.text != self._apply(arguments[0], prompt, *arguments[1:]):
            raise RejectedRow("the chat template reads the text of a message, and changes by it")
        return marked

    def arguments(self, conversation: Conversation, count: int) -> Arguments:
        """Of the template: the first messages, tools, and its own."""
        return self._arguments(_Marks(self._unsafe, active=False), conversation, count)

    def _arguments(self, marks: _Marks, conversation: Conversation, count: int) -> Arguments:
        chat = [
            self._message(marks, index, message)
            for index, message in enumerate(conversation.messages[:count])
        ]
        tools = [marks.tool(tool) for tool in conversation.tools or ()] or None
        return chat, tools, marks.value(conversation.template_kwargs, CONTEXT)

    def _message(self, marks: _Marks, index: int, message: Message) -> dict[str, Any]:
        """A message in OpenAI's form."""
        chat: dict[str, Any] = {
            "role": message["role"],
            "content": marks.wrap(message["content"], index, "content"),
        }
        if message.get("reasoning"):
            chat["reasoning_content"] = marks.wrap(message["reasoning"], index, "reasoning")
        for name in ("tool_call_id", "name"):
            if name in message:
                chat[name] = marks.value(message[name], index)
        if calls := message.get("tool_calls"):
            chat["tool_calls"] = [self._call(marks, index, call) for call in calls]
        return chat

    def _call(self, marks: _Marks, index: int, call: Mapping[str, Any]) -> dict[str, Any]:
        arguments = marks.value(call["arguments"], index)
        if self.arguments_as_text:
            arguments = json.dumps(arguments, ensure_ascii=False)
        function = {"name": marks.wrap(call["name"], index, "name"), "arguments": arguments}
        own_id = {"id": marks.value(call["id"], index)} if "id" in call else {}
        return {**own_id, "type": "function", "function": function}

    def turns(
        self, conversation: Conversation, selected: Sequence[int]
    ) -> tuple[Text, list[Turn], bool]:
        """Render a conversation and its replies.

        Returns:
            The whole rendering; all replies, and True, if it has each prompt and reply as a server
            has them; else the `selected` ones, and False.
        """
        messages = conversation.messages
        whole = self.render(conversation, len(messages), prompt=False)
        self._require_all(conversation, whole, len(messages))
        turns, is_one = dict[int, Turn](), True
        for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
            try:
                turns[i] = self._turn(conversation, i, whole)
            except RejectedRow:
                if i in selected:
                    raise
                is_one = False
            else:
                is_one = is_one and whole.begins_with(turns[i].text)
        if is_one:
            return whole, [*turns.values()], True
        return whole, [turns[i] for i in selected], False

    def _turn(self, conversation: Conversation, index: int, whole: Text) -> Turn:
        count, message = index + 1, conversation.messages[index]
        after = whole
        if count < len(conversation.messages):
            after = self.render(conversation, count, prompt=False)
        prompt = self.render(conversation, index, prompt=True)
        reply = _reply(prompt, after, message, index)
        self._require_reply(reply, message, index)
        last = max((part.end for part in reply.parts), default=0)
        for end in self.ends.finditer(reply.text):
            if reply.written(*end.span()):
                if end.start() < last:
                    raise RejectedRow(f"the chat template ends a turn ({end[0]!r}) within a reply")
                return Turn(prompt + reply.cut(0, end.end()), len(prompt.text))
        raise RejectedRow("the chat template puts no end token after a reply")

    def _require_reply(self, reply: Text, message: Message, index: int) -> None:
        if reply.holds(index, "name") < len(message.get("tool_calls", ())):
            raise RejectedRow("the chat template leaves out a tool call")
        if message.get("reasoning") and not reply.holds(index, "reasoning"):
            raise RejectedRow(
                "the chat template leaves out the thoughts of a reply; set prepare.thinking to drop"
            )

    def _require_all(self, conversation: Conversation, text: Text, count: int) -> None:
        """Refuse a template that leaves out messages, calls or tools; thoughts it may."""
        for index, message in enumerate(conversation.messages[:count]):
            if message["content"] and not text.holds(index, "content"):
                raise RejectedRow(f"the chat template leaves out a message ({message['role']})")
            if text.holds(index, "name") < len(message.get("tool_calls", ())):
                raise RejectedRow("the chat template leaves out a tool call")
        if text.holds(CONTEXT, "name") < len(conversation.tools or ()):
            raise RejectedRow("the chat template leaves out the tools")


def _reply(prompt: Text, after: Text, message: Message, index: int) -> Text:
    """The reply to a prompt: what follows it in the rendering with the reply."""
    if after.begins_with(prompt):
        return after.cut(len(prompt.text))
    think = next((t for t in _THINK.finditer(prompt.text) if t.end() == len(prompt.text)), None)
    if think is None or not prompt.written(*think.span()):
        raise RejectedRow("the chat template's generation prompt is not how its replies begin")
    # The prompt writes a think block; as history the reply has none, or in another spelling.
    before = prompt.cut(0, think.start())
    if not after.begins_with(before):
        raise RejectedRow("the chat template's generation prompt is not how its replies begin")
    reply = after.cut(len(before.text))
    own = _THINK.match(reply.text)
    own = own if own and reply.written(*own.span()) else None
    if think["closed"]:
        if message.get("reasoning"):
            raise RejectedRow("the generation prompt closes the thoughts that a reply has")
        return reply.cut(own.end()) if own and own["closed"] else reply
    if own:
        return reply.cut(own.start("closed") if own["closed"] else own.end())
    close = think[0].strip().replace(think["tag"], f"/{think['tag']}", 1)
    thoughts = message.get("reasoning", "")
    opened = Text(thoughts, (Part(0, len(thoughts), index, "reasoning"),) if thoughts else ())
    # The reply of DeepSeek-V3.1 begins with the closing tag.
    closes = reply.text.startswith(close) and reply.written(0, len(close))
    return opened + reply if closes else opened + Text(f"\n{close}\n\n") + reply
