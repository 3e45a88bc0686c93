"""Probes of a chat template: whether it writes BOS, its control tokens, ends and turn markers."""

import contextlib
import re
from collections.abc import Collection

from stages.shared.chat.conversation import Conversation, Message, RejectedRow, Role, ToolCall
from stages.shared.chat.rendering import Apply, Rendered, TurnRenderer
from stages.shared.chat.tokenizer import pattern_of

_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")


def placeholders(*roles: Role) -> Conversation:
    """Conversation of these roles."""
    return Conversation([Message(role=role, content=f"two{i}") for i, role in enumerate(roles)])


WITH_SYSTEM = placeholders("system", "user", "assistant", "user", "assistant")
_EXCHANGES = placeholders("user", "assistant", "user", "assistant")
_SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}}
_TOOL = {"name": "f", "description": "two", "parameters": _SCHEMA}
_CALLS: list[ToolCall] = [{"id": "abcdefghi", "name": "f", "arguments": {"x": 7}}]
_CALL = Conversation(
    [
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "", "tool_calls": _CALLS},
        {"role": "tool", "content": "four", "tool_call_id": "abcdefghi", "name": "f"},
        {"role": "assistant", "content": "four", "reasoning": "two"},
    ],
    tools=[{"type": "function", "function": _TOOL}],
)


def begins_with(turns: TurnRenderer, bos: str) -> bool:
    """Whether a template begins conversations with BOS; `RejectedRow` where only some."""
    begins = {rendered.text.startswith(bos) for rendered in _probe(turns)}
    if len(begins) > 1:
        raise RejectedRow(f"the chat template begins only some conversations with {bos!r}")
    return begins != {False}


def _probe(turns: TurnRenderer) -> list[Rendered]:
    """Two exchanges, without and with a system message."""
    rendered = []
    for probe in (_EXCHANGES, WITH_SYSTEM):
        with contextlib.suppress(RejectedRow):  # many templates take no system message
            rendered.append(turns.render(probe, len(probe.messages)))
    return rendered


def find_control_tokens(
    apply: Apply, chat_template: str, special: Collection[str], other: Collection[str]
) -> frozenset[str]:
    """Special tokens, and other added tokens that the template writes for any role."""
    # Role tokens may lack the special flag: `<｜User｜>` (DeepSeek), `<|observation|>` (GLM).
    names = (re.sub(r"\W", "", token) for token in other)
    roles = dict.fromkeys([*_ROLES, *(name for name in names if re.fullmatch(r"\D+", name))])
    written = set[str]()
    for role in roles if other else ():
        for chat in ((role,), ("user", role), (role, "user"), ("user", "assistant", role)):
            with contextlib.suppress(RejectedRow):
                messages = [{"role": name, "content": "\ue000"} for name in chat]
                written.add(apply(messages, True, None, {}))
    # And those of branches that need tools or thoughts: `<tool_call>`, `</think>` (Qwen).
    written.update(token for token in other if re.search(r"\W", token) and token in chat_template)
    text = "\n".join(written)
    return frozenset(special) | {token for token in other if token.strip() and token in text}


def find_end(turns: TurnRenderer, control: re.Pattern[str]) -> str:
    """Token that ends a reply; `RejectedRow` where it has none, or no generation prompt."""
    whole = turns.render(_EXCHANGES, 4)
    if [part.owner for part in whole.parts] != [*range(4)]:
        raise RejectedRow("the chat template leaves a message out, or repeats it")
    end = re.match(rf"\s*(?:{control.pattern})", whole.literals()[-1])
    if end is None or not end[0].strip():
        raise RejectedRow("the chat template puts no end token after a reply")
    prompt, after = turns.render(_EXCHANGES, 1, prompt=True), turns.render(_EXCHANGES, 2)
    if after.begins_with(prompt) and prompt == turns.render(_EXCHANGES, 1):
        lead = after.cut(len(prompt.text)).literals()[0]
        if lead.strip():
            raise RejectedRow(
                f"the chat template has no generation prompt: the model would write {lead!r}"
            )
    return end[0].strip()


def find_call_ends(turns: TurnRenderer, eos: str, control: re.Pattern[str]) -> list[str]:
    """Token that ends a reply with a tool call, where it is another; sets `arguments_as_text`."""
    for turns.arguments_as_text in (False, True):
        with contextlib.suppress(RejectedRow):
            prompt = turns.render(_CALL, 1, prompt=True)
            reply = turns.render(_CALL, 2).text[len(prompt.text) :]
            if "'x': 7" not in reply:  # as Python writes an object
                found = [*control.finditer(reply.rstrip())][-1:]
                ends = [end[0] for end in found if end.end() == len(reply.rstrip())]
                return ends if eos not in reply else []
    turns.arguments_as_text = False
    return []


def find_markers(turns: TurnRenderer, ends: set[str], control: re.Pattern[str]) -> list[str]:
    """Plain text after an end token or BOS that opens a turn."""
    end = pattern_of(ends - {""}).pattern
    literals = (literal for rendered in _probe(turns) for literal in rendered.literals()[:-1])
    openings = (re.sub(rf"^(?:\s|{end})+", "", literal).strip() for literal in literals)
    return sorted({text for text in openings if text and not control.search(text)})
