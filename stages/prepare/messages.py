"""Messages of OpenAI's form and of ShareGPT's: roles, parts, tools, thoughts and weights."""

import re
from collections.abc import Mapping, Sequence, Set
from inspect import signature
from itertools import count
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from stages.prepare.rows import is_nan, kind_of, loaded, present
from stages.shared.chat.conversation import Message, RejectedRow, Role, ToolCall, dump, normalize

_ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
    **dict.fromkeys(("tool_response", "function_response"), "tool"),
    **dict.fromkeys(("tool_call", "function_call"), "assistant"),  # ShareGPT: its value is calls
}
_CALLS = ("tool_calls", "function_call")
_CALL_ROLES = ("tool_call", "function_call")
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thoughts", "thought")
_WEIGHTS = ("weight", "train", "loss", "trainable", "training", "loss_weight", "loss_scale")
_OF_TOOLS: tuple[Literal["tool_call_id", "name"], ...] = ("tool_call_id", "name")
_READ = {"role", "from", "content", "value", *_WEIGHTS}
_READ_OF: dict[str, set[str]] = {"assistant": {*_CALLS, *THOUGHTS}, "tool": {*_OF_TOOLS}}
# Without the opening tag where the model's prompt wrote it (DeepSeek-R1, QwQ).
_THINK = re.compile(r"\s*<think>(.*?)</think>(.*)|((?:(?!<think>).)*?)\n</think>\n(.*)", re.DOTALL)

TOOLS = ("tools", "functions")
KWARGS = "chat_template_kwargs"
# Arguments of apply_chat_template itself, and a name that prepare sets.
_RESERVED = {*signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"}
_RESERVED |= {"strftime_now"}

_TOOLS, _MEDIA = "tool calls", "images, audio or video"
_UNREAD = {
    **dict.fromkeys(("tools", "tool_calls", "tool_call_id", "functions", "function_call"), _TOOLS),
    **dict.fromkeys(("reasoning_details", *THOUGHTS), "thoughts"),
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), _MEDIA),
    **dict.fromkeys(("chosen", "rejected", "rejected_response"), "preference data"),
    **dict.fromkeys(("label", "kto_tag"), "preference data"),
    **dict.fromkeys((*_WEIGHTS, "train_detail", "training_detail", "weights"), "weight"),
    **dict.fromkeys(("context", "contexts", "documents"), "context"),
    "history": "earlier turns",
    "refusal": "refusal",
    "chat_template_kwargs": "template arguments",
}


def parse_messages(value: Any, unknown: set[str]) -> list[Message]:
    """Parse OpenAI's `role`/`content` or ShareGPT's `from`/`value`, also as a JSON string.

    Names of unread fields are added to `unknown`.
    """
    value = loaded(value)
    if not isinstance(value, list):
        raise RejectedRow(f"the messages are {kind_of(value)}, expected a list")
    messages: list[Message] = []
    for number, one in enumerate(value, start=1):
        message, is_call = _message(number, one, unknown)
        if is_call and messages and messages[-1]["role"] == "assistant":
            calls = message["tool_calls"]  # of the reply before it, or parallel ones
            messages[-1]["tool_calls"] = [*messages[-1].get("tool_calls", ()), *calls]
        else:
            messages.append(message)
    empty_system = messages and messages[0]["role"] == "system" and not messages[0]["content"]
    return messages[1:] if empty_system else messages


def _message(number: int, fields: Any, unknown: set[str]) -> tuple[Message, bool]:
    """Parse a message, and whether it is ShareGPT's turn of calls alone."""
    if not isinstance(fields, dict):
        raise RejectedRow(f"message {number} is {kind_of(fields)}, expected an object")
    where = f" of message {number}"
    plain = fields.keys() == {"role", "content"}
    if not plain:
        fields = present(fields)  # Parquet gives every message the fields of all
    spelled = agreed(fields, ("role", "from"), where)
    role = _ROLES.get(spelled.lower()) if isinstance(spelled, str) else None
    if role is None:
        known = ", ".join(_ROLES)
        raise RejectedRow(f"message {number} is of role {spelled!r}, expected one of {known}")
    content = agreed(fields, ("content", "value"), where)
    calls, is_call = list[ToolCall](), spelled.lower() in _CALL_ROLES
    if is_call:
        calls, content = parse_calls(content, where, unknown), None
    elif role == "assistant" and not plain:
        lists = {
            name: parse_calls(fields[name], where, unknown)
            for name in _CALLS
            if has_content(fields.get(name))
        }
        calls = agreed(lists, _CALLS, where) or []
    if role == "tool" and not (isinstance(content, str | None) or _are_parts(content)):
        content = dump(content)  # a result that is JSON
    if isinstance(content, list):
        content = "".join(_part(part, where, unknown) for part in content)
    if not isinstance(content, str) and not (content is None and (calls or role == "tool")):
        raise RejectedRow(f"message {number} holds {kind_of(content)}, expected a text")
    message: Message = {"role": role, "content": normalize(content or "")}
    if role == "assistant":
        add_thoughts(message, fields, where)
    if calls:
        message["tool_calls"] = calls
    if not plain:
        _add_fields(message, fields, where, unknown)
    return message, is_call


def _add_fields(message: Message, fields: dict[str, Any], where: str, unknown: set[str]) -> None:
    """Add a message's other fields, and name those that are not read."""
    if message["role"] == "tool":
        for name in _OF_TOOLS:
            if has_content(fields.get(name)):
                message[name] = str(fields[name])
    rest = fields.keys() - _READ - _READ_OF.get(message["role"], set())
    unknown |= {f"messages.{name}" for name in unread(fields, rest, where)}
    if (weight := _weight(fields, where)) != 1:
        message["weight"] = weight


def _are_parts(content: Any) -> bool:
    return isinstance(content, list) and all(
        isinstance(part, str) or (isinstance(part, dict) and "type" in part) for part in content
    )


def _part(part: Any, where: str, unknown: set[str]) -> str:
    if isinstance(part, dict):
        part = present(part)
        if part.get("type", "text") not in ("text", "input_text", "output_text"):
            raise RejectedRow(f"a part{where} is of type {part['type']!r}, which is not read")
        names = unread(part, part.keys() - {"type", "text"}, f" of a part{where}")
        unknown |= {f"messages.content.{name}" for name in names}
        part = part.get("text")
    if not isinstance(part, str):
        raise RejectedRow(f"a part{where} is {kind_of(part)}, expected a text")
    return part


def parse_calls(value: Any, where: str, unknown: set[str]) -> list[ToolCall]:
    """Parse calls, one or a list, or the JSON text of them."""
    value = loaded(value)
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise RejectedRow(f"the calls{where} are an empty list")
    return [_call(one, f" of call {n}{where}", unknown) for n, one in enumerate(calls, start=1)]


def _call(value: Any, where: str, unknown: set[str]) -> ToolCall:
    """Parse OpenAI's `{id, function: {name, arguments}}`, or `{name, arguments}`."""
    value = loaded(value)
    if not isinstance(value, dict):
        raise RejectedRow(
            f"call{where.removeprefix(' of call')} is {kind_of(value)}: {value!r:.40}"
        )
    fields = present(value)
    if isinstance(function := fields.pop("function", None), dict):
        fields |= present(function)
    if fields.pop("type", "function") != "function":
        raise RejectedRow(f"`type`{where} is {value['type']!r}, which is not read")
    names = unread(fields, fields.keys() - {"id", "name", "arguments"}, where)
    unknown |= {f"messages.tool_calls.{name}" for name in names}
    name, arguments = fields.get("name"), fields.get("arguments", {})
    if not isinstance(name, str) or not name:
        raise RejectedRow(f"`name`{where} is {kind_of(name)}, expected a function's name")
    if isinstance(arguments, str):
        arguments = loaded(arguments) if has_content(arguments) else {}
    if not isinstance(arguments, dict):
        kind = kind_of(arguments)
        raise RejectedRow(
            f"`arguments`{where} is {kind}, expected a JSON object: {arguments!s:.40}"
        )
    call: ToolCall = {"name": name, "arguments": arguments}
    if has_content(fields.get("id")):
        call["id"] = str(fields["id"])
    return call


def parse_tools(fields: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Parse function schemas, OpenAI's or bare ones, also as JSON text."""
    lists = {name: loaded(fields[name]) for name in TOOLS if has_content(fields.get(name))}
    values = {name: v if isinstance(v, list) else [v] for name, v in lists.items()}
    return agreed({name: [*map(_tool, v, count(1))] for name, v in values.items()}, TOOLS)


def _tool(value: Any, number: int) -> dict[str, Any]:
    value = loaded(value)
    if not isinstance(value, dict):
        raise RejectedRow(f"tool {number} is {kind_of(value)}, expected a function's schema")
    if not isinstance(value.get("function"), dict):
        value = {"function": value}
    tool = {"type": "function"} | value
    name = tool["function"].get("name")
    if not isinstance(name, str) or not name or tool["type"] != "function":
        raise RejectedRow(f"tool {number} is no schema of a function with a name")
    return tool


def parse_kwargs(fields: dict[str, Any]) -> dict[str, Any]:
    """Parse the row's own arguments for the chat template."""
    value = loaded(fields.get(KWARGS))
    if not has_content(value):
        return {}
    if not isinstance(value, dict):
        raise RejectedRow(f"`{KWARGS}` is {kind_of(value)}, expected an object")
    if reserved := sorted(value.keys() & _RESERVED):
        raise RejectedRow(f"`{KWARGS}` sets `{reserved[0]}`, which the row or prepare gives")
    return present(value)


def add_thoughts(message: Message, fields: dict[str, Any], where: str) -> None:
    """Add the thoughts of a reply: of its fields, or of `<think>` at the beginning of its text."""
    thoughts = set[str]()
    for name in THOUGHTS:
        if has_content(value := fields.get(name)):
            if not isinstance(value, str):
                raise RejectedRow(f"`{name}`{where} is {kind_of(value)}, expected a text")
            thoughts.add(normalize(value))
    if "</think>" in message["content"] and (match := _THINK.fullmatch(message["content"])):
        thoughts.add(normalize(match[1] or match[3] or ""))
        message["content"] = normalize(match[2] or match[4] or "")
    if len(thoughts) > 1:
        raise RejectedRow(f"the thoughts{where} stand twice and differ; remove one")
    if thoughts:
        message["reasoning"] = thoughts.pop()


def _weight(fields: dict[str, Any], where: str) -> float:
    weights = {name: fields[name] for name in _WEIGHTS if has_content(fields.get(name))}
    for name, weight in weights.items():
        if not isinstance(weight, int | float) or (weight and not 1e-6 <= weight <= 1e6):
            raise RejectedRow(f"`{name}`{where} is {weight!r:.40}, expected 0 or 1e-6 to 1e6")
    weight = agreed(weights, _WEIGHTS, where)
    return 1.0 if weight is None else float(weight)


def agreed(fields: Mapping[str, Any], names: Sequence[str], where: str = "") -> Any:
    """Value of the fields of these names, which must be equal; None where there is none."""
    values = {name: fields[name] for name in names if name in fields}
    value = next(iter(values.values()), None)
    if any(other != value for other in values.values()):
        both = " and ".join(f"`{name}`" for name in values)
        raise RejectedRow(f"{both}{where} differ; remove one")
    return value


def unread(fields: dict[str, Any], names: Set[str], where: str = "") -> set[str]:
    """Filter names of non-empty fields; `RejectedRow` for one that carries meaning."""
    filled = {name for name in names if has_content(fields[name])}
    for name in sorted(filled & _UNREAD.keys()):
        if not (_UNREAD[name] == "weight" and fields[name] == 1):
            advice = "; map it by prepare.columns: {input: context}" if name == "context" else ""
            raise RejectedRow(f"`{name}`{where} is not read ({_UNREAD[name]}){advice}")
    return filled - _UNREAD.keys()


def has_content(value: Any) -> bool:
    """Whether a value is not null, NaN or empty, at any depth."""
    if isinstance(value, dict | list):
        return any(map(has_content, value.values() if isinstance(value, dict) else value))
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    return value is not None and not is_nan(value)
