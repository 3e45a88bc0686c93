"""Rendering turn by turn: what a server sends for a reply, and the reply as the model writes it.

A template may drop earlier thoughts, write the last turn in its own way, or open the reply's think
block itself. So each prompt is rendered, and each conversation up to its reply. Text of messages is
found between marks of private-use characters, and the rendering without them must be the same.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stages.shared.chat.conversation import Conversation, Message, RejectedRow
from stages.shared.chat.rendered import CONTEXT, Marks, Part, Rendered

Chat = list[dict[str, Any]]  # OpenAI's messages
Arguments = tuple[Chat, Sequence[Any] | None, Mapping[str, Any]]
Apply = Callable[[Chat, bool, Sequence[Any] | None, Mapping[str, Any]], str]

_NOTHING = re.compile("(?!)")
_OPENING = "the chat template's generation prompt is not how its replies begin"
# What a generation prompt may write of a reply: a think block, open or empty.
_THINK = re.compile(
    r"(?:<|\[)(?P<tag>(?:\w+:)?(?:think|thinking|thought|reasoning))(?:>|\])\s*"
    r"(?P<closed>(?:<|\[)/(?P=tag)(?:>|\])\s*)?",
    re.IGNORECASE,
)


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
