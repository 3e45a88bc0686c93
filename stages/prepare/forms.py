"""Row formats (Guanaco, messages, Alpaca, prompt and completion), each into a conversation.

An unread field that carries meaning rejects its row; other unread fields are reported.
"""

import json
import re
from collections.abc import Set
from typing import Any, Literal, NamedTuple

from stages.prepare import guanaco
from stages.prepare.rows import is_nan, kind_of, present
from stages.shared.chat.conversation import (
    Message,
    RejectedRow,
    Role,
    drop_unanswered,
    language_of,
    normalize,
    problem_with,
)

Form = Literal["guanaco", "messages", "alpaca"]

_FIELDS: dict[Form, set[str]] = {
    "guanaco": {"text"},
    "messages": {"messages", "conversations"},
    "alpaca": {"instruction", "input", "output", "history", "prompt", "completion"},
}
_TURNS = set[str]().union(*_FIELDS.values()) - {"history"}
_SYSTEM = ("system", "system_prompt")
_ROLES: dict[str, Role] = {"system": "system", "developer": "system"}
_ROLES |= {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_WEIGHTS = ("weight", "train")  # of a message: OpenAI's and TRL's, Axolotl's
_TOOLS, _THOUGHTS, _MEDIA = "tool calls", "thoughts", "images, audio or video"
_PREFERENCE, _WEIGHT = "preference data", "weight"
_UNREAD = {
    **dict.fromkeys(("tools", "tool_calls", "tool_call_id", "functions", "function_call"), _TOOLS),
    **dict.fromkeys(("reasoning", "reasoning_content", "reasoning_details"), _THOUGHTS),
    **dict.fromkeys(("thinking", "thought", "thoughts"), _THOUGHTS),
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), _MEDIA),
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "label", "kto_tag"), _PREFERENCE),
    **dict.fromkeys(("loss", "trainable", "training", "train_detail", "weights"), _WEIGHT),
    **dict.fromkeys(_WEIGHTS, _WEIGHT),  # of a whole row
    **dict.fromkeys(("context", "contexts", "documents"), "context"),
    "history": "earlier turns",
    "refusal": "refusal",
    "chat_template_kwargs": "template arguments",
}
_REPLIES = {"response", "reply", "target"}
_RENAMES = {
    **dict.fromkeys(("question", "query"), "instruction"),
    **dict.fromkeys(("conversation", "dialogue", "dialog", "chat"), "messages"),
    "context": "input",
}
# NUL and C1: UTF-16 or Windows-1252 converted as ISO-8859-1.
_CONTROL = re.compile("[\0\x80-\x9f]")


class Conversation(NamedTuple):
    """A row's conversation."""

    messages: list[Message]  # normalized; the last is a reply
    answer: str | None  # the short answer that the last reply comes to
    language: str  # the row's own, else by `language_of`
    dropped_turn: bool  # a final user turn without a reply was dropped
    unknown: list[str]  # unread fields; of messages as `messages.<field>`


def parse(fields: dict[str, Any], form: Form | Literal["auto"] = "auto") -> Conversation:
    """Parse a row's fields, none of them null or NaN, into a conversation, or reject it."""
    unknown: set[str] = set()
    chosen = form_of(fields) if form == "auto" else form
    messages = _with_system(fields, _turns(fields, chosen, unknown))
    rest = fields.keys() - _FIELDS[chosen] - {"answer", "language", *_SYSTEM}
    if rest:
        if form == "auto":
            _require_agreement({name: fields[name] for name in rest & _TURNS}, messages)
            rest -= _TURNS
        unknown |= _unknown(fields, rest)
    kept = drop_unanswered(messages)
    if (problem := problem_with(kept)) is not None:
        replied = any(message["role"] == "assistant" for message in messages)
        raise RejectedRow(problem if replied else "no reply")
    answer, language = _answer(fields.get("answer")), fields.get("language")
    for text in (*(message["content"] for message in kept), answer, language):
        if isinstance(text, str):
            _require_characters(text)
    return Conversation(
        messages=kept,
        answer=answer,
        language=language if isinstance(language, str) and language else language_of(kept),
        dropped_turn=len(kept) < len(messages),
        unknown=sorted(unknown),
    )


def form_of(fields: dict[str, Any]) -> Form:
    """Detect a row's format by its fields; `RejectedRow` where none is known."""
    text = fields.get("text")
    if isinstance(text, str) and "### Human:" in text:
        return "guanaco"
    if not fields.keys().isdisjoint(_FIELDS["messages"]):
        return "messages"
    renames = _renames(fields.keys())
    complete = ({"instruction", "output"}, {"prompt", "completion"})
    is_complete = any(names <= fields.keys() for names in complete)
    if is_complete or ("instruction" in fields and not renames):
        return "alpaca"
    _unknown(fields, fields.keys() - {"context", "history"})
    if isinstance(text, str):
        if not text.strip() or "### Assistant:" in text:
            return "guanaco"
        raise RejectedRow("`text` has no `### Human:`; plain text is not read")
    pairs = [f"`{name}` to `{new}`" for name, new in renames.items()]
    advice = f"; rename {' and '.join(pairs)}" if pairs else ""
    raise RejectedRow(f"no known form in {', '.join(fields)[:80] or 'an empty row'}{advice}")


def _renames(names: Set[str]) -> dict[str, str]:
    reply = "completion" if "prompt" in names else "output"
    new = _RENAMES | dict.fromkeys(_REPLIES, reply)
    if names.isdisjoint(_REPLIES | {"output", "completion"}):
        new["answer"] = reply
    elif "instruction" not in names and names.isdisjoint(_RENAMES):
        new["input"] = "instruction"
    return {name: new[name] for name in new if name in names}


def _turns(fields: dict[str, Any], form: Form, unknown: set[str]) -> list[Message]:
    if form == "guanaco":
        return guanaco.parse(_text(fields, "text"))
    if form == "messages":
        names = (name for name in _FIELDS[form] if _says(fields.get(name)))
        lists = [_messages(fields[name], unknown) for name in names]
        if not lists:
            raise RejectedRow(f"no `messages`, but {', '.join(fields)[:80]}")
        if lists[0] != lists[-1]:
            raise RejectedRow("`messages` and `conversations` differ; remove one")
        return lists[0]
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        context = _messages(prompt, unknown)
        for message in context:
            if message["role"] == "assistant":
                message["weight"] = 0  # as in TRL: loss on the completion alone
        return [*context, *_messages(completion, unknown)]
    user, reply = "instruction", "output"
    if prompt is not None and user not in fields:
        user, reply = "prompt", "completion"
    texts = [_text(fields, name) for name in (user, "input") if name == user or name in fields]
    return [
        *_history(fields.get("history")),
        {"role": "user", "content": "\n\n".join(filter(None, texts))},
        {"role": "assistant", "content": _text(fields, reply)},
    ]


def _messages(value: Any, unknown: set[str]) -> list[Message]:
    """Parse OpenAI's `role`/`content` or ShareGPT's `from`/`value`, also as a JSON string."""
    value = _loaded(value)
    if not isinstance(value, list):
        raise RejectedRow(f"the messages are {kind_of(value)}, expected a list")
    messages = [_message(number, one, unknown) for number, one in enumerate(value, start=1)]
    empty_system = messages and messages[0]["role"] == "system" and not messages[0]["content"]
    return messages[1:] if empty_system else messages


def _message(number: int, fields: Any, unknown: set[str]) -> Message:
    if not isinstance(fields, dict):
        raise RejectedRow(f"message {number} is {kind_of(fields)}, expected an object")
    where = f" of message {number}"
    plain = fields.keys() == {"role", "content"}
    if not plain:
        fields = present(fields)  # Parquet gives every message the fields of all
        rest = fields.keys() - {"role", "from", "content", "value", *_WEIGHTS}
        unknown |= {f"messages.{name}" for name in _unknown(fields, rest, where)}
    role = _one_of(fields, "role", "from", where)
    content = _one_of(fields, "content", "value", where)
    if not isinstance(role, str) or role not in _ROLES:
        raise RejectedRow(
            f"message {number} is of role {role!r}, expected one of {', '.join(_ROLES)}"
        )
    if isinstance(content, list):
        content = "".join(_part(part, where, unknown) for part in content)
    if not isinstance(content, str):
        raise RejectedRow(f"message {number} holds {kind_of(content)}, expected a text")
    message: Message = {"role": _ROLES[role], "content": normalize(content)}
    if not plain and _has_no_weight(fields, where):
        message["weight"] = 0
    return message


def _part(part: Any, where: str, unknown: set[str]) -> str:
    if isinstance(part, dict):
        part = present(part)
        if part.get("type", "text") not in ("text", "input_text", "output_text"):
            raise RejectedRow(f"a part{where} is of type {part['type']!r}, which is not read")
        names = _unknown(part, part.keys() - {"type", "text"}, f" of a part{where}")
        unknown |= {f"messages.content.{name}" for name in names}
        part = part.get("text")
    if not isinstance(part, str):
        raise RejectedRow(f"a part{where} is {kind_of(part)}, expected a text")
    return part


def _has_no_weight(fields: dict[str, Any], where: str) -> bool:
    weights = {name: fields[name] for name in _WEIGHTS if _says(fields.get(name))}
    for name, weight in weights.items():
        if weight not in (0, 1):
            raise RejectedRow(f"`{name}`{where} is {weight!r}; only 0 and 1 are read")
    if len(set(weights.values())) > 1:
        raise RejectedRow(f"`weight` and `train`{where} differ; remove one")
    return 0 in weights.values()


def _history(value: Any) -> list[Message]:
    """Parse Alpaca's earlier exchanges, a list of pairs."""
    messages: list[Message] = []
    value = _loaded(value) if _says(value) else []
    for pair in value if isinstance(value, list) else [value]:
        match pair:
            case [str(question), str(reply)]:
                messages.append({"role": "user", "content": normalize(question)})
                messages.append({"role": "assistant", "content": normalize(reply)})
            case _:
                raise RejectedRow("`history` is no list of pairs of a question and a reply")
    return messages


def _with_system(fields: dict[str, Any], messages: list[Message]) -> list[Message]:
    """Prepend the row's own system message, if any."""
    contents = {_text(fields, name) for name in _SYSTEM if _says(fields.get(name))}
    if not contents:
        return messages
    first = [message["content"] for message in messages[:1] if message["role"] == "system"]
    if len(contents.union(first)) > 1:
        raise RejectedRow("the row has two system messages that differ; remove one")
    return messages if first else [{"role": "system", "content": contents.pop()}, *messages]


def _one_of(fields: dict[str, Any], name: str, other: str, where: str) -> Any:
    if name in fields and other in fields and fields[name] != fields[other]:
        raise RejectedRow(f"`{name}` and `{other}`{where} differ; remove one")
    return fields.get(name, fields.get(other))


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        kind = "missing" if value is None else kind_of(value)
        raise RejectedRow(f"`{name}` is {kind}, expected a text")
    return normalize(value)


def _loaded(value: Any) -> Any:
    """Parse a string that is JSON, as lists are written in CSV."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _unknown(fields: dict[str, Any], names: Set[str], where: str = "") -> set[str]:
    """Filter names of non-empty fields; `RejectedRow` for one that carries meaning."""
    said = {name for name in names if _says(fields[name])}
    for name in sorted(said & _UNREAD.keys()):
        if not (_UNREAD[name] == _WEIGHT and fields[name] == 1):
            advice = "; rename it to `input`" if name == "context" else ""
            raise RejectedRow(f"`{name}`{where} is not read ({_UNREAD[name]}){advice}")
    return said - _UNREAD.keys()


def _require_agreement(others: dict[str, Any], messages: list[Message]) -> None:
    """Refuse fields of other formats that contradict the messages."""
    contents = [message["content"] for message in messages]
    for name in sorted(filter(lambda name: _says(others[name]), others)):
        value = others[name]
        if not isinstance(value, str):
            same = all(message in messages for message in _messages(value, set()))
        elif name == "text":  # all of it, rendered by some template
            text = normalize(value)
            same = all(part in text for content in contents for part in content.split("\n\n"))
        else:  # paragraphs of a message
            same = any(f"\n\n{normalize(value)}\n\n" in f"\n\n{one}\n\n" for one in contents)
        if not same:
            raise RejectedRow(
                f"`{name}` contradicts the other fields; remove it or set prepare.format"
            )


def _says(value: Any) -> bool:
    """Whether a value is more than null, NaN or empty, at any depth."""
    if isinstance(value, dict | list):
        return any(map(_says, value.values() if isinstance(value, dict) else value))
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    return value is not None and not is_nan(value)


def _answer(value: Any) -> str | None:
    if value is None or isinstance(value, bool | list | dict) or is_nan(value):
        return None
    return str(value).strip() or None


def _require_characters(text: str) -> None:
    """Refuse lone surrogates, and control characters of a wrong conversion."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RejectedRow("a text holds half a surrogate pair, which is no character") from None
    if match := _CONTROL.search(text):
        origin = "UTF-16" if match[0] == "\0" else "Windows-1252"
        raise RejectedRow(
            f"a text holds the control character U+{ord(match[0]):04X}, left where {origin} was "
            "converted as ISO-8859-1"
        )
