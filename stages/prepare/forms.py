"""Rows of any known form as conversations: Guanaco, messages, Alpaca, prompt and completion.

A field that carries meaning and is not read rejects its row by the field's name. Any other field
that is not read is told by name.
"""

import json
import re
from collections.abc import Callable, Set
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

_ROLES: dict[str, Role] = {"system": "system", "developer": "system"}
_ROLES |= {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_TURNS = {"text", "messages", "conversations", "instruction", "input", "output"}
_TURNS |= {"prompt", "completion"}  # fields that hold turns, in one form or another
_SYSTEM = ("system", "system_prompt")
_READ = {"answer", "language", *_SYSTEM}
_WEIGHTS = ("weight", "train")  # of a message: OpenAI's and TRL's, Axolotl's
_TEXT_PARTS = (None, "text", "input_text", "output_text")
# Fields that carry meaning and are not read, and what they hold.
_TOOLS, _THOUGHTS, _MEDIA = "tool calls", "thoughts", "images, audio or video"
_PREFERENCE, _WEIGHT = "preference data", "a weight"
_UNREAD = {
    **dict.fromkeys(("tools", "tool_calls", "tool_call_id", "functions", "function_call"), _TOOLS),
    **dict.fromkeys(("reasoning", "reasoning_content", "reasoning_details"), _THOUGHTS),
    **dict.fromkeys(("thinking", "thought", "thoughts"), _THOUGHTS),
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), _MEDIA),
    **dict.fromkeys(("chosen", "rejected", "label", "kto_tag"), _PREFERENCE),
    **dict.fromkeys(("loss", "trainable", "training", "train_detail", "weights"), _WEIGHT),
    **dict.fromkeys(_WEIGHTS, _WEIGHT),  # of a whole row
    **dict.fromkeys(("context", "contexts", "documents"), "a context"),
    "history": "earlier turns",
    "refusal": "a refusal",
    "chat_template_kwargs": "arguments of a template",
}
# What others call a field that is read.
_RENAMES = {"question": "instruction", "query": "instruction", "response": "output"}
_RENAMES |= {"reply": "output", "target": "output", "context": "input", "dialog": "messages"}
_RENAMES |= {"conversation": "messages", "dialogue": "messages", "chat": "messages"}
# NUL and C1: what UTF-16 and Windows-1252 become when they are read as ISO-8859-1.
_CONTROL = re.compile("[\0\x80-\x9f]")


class Conversation(NamedTuple):
    """A conversation that can be trained on, as far as can be seen without a tokenizer.

    Attributes:
        messages: normalized; the last is a reply.
        answer: the checkable answer of the last reply, or None.
        language: as the source says, or `en`/`other` by the stated rule.
        dropped_turn: a last turn of the user that nobody answered was dropped.
        unknown: fields that were not read; those of messages as `messages.<field>`.
    """

    messages: list[Message]
    answer: str | None
    language: str
    dropped_turn: bool
    unknown: list[str]

    @property
    def question(self) -> str:
        """The first message of the user."""
        return next(m["content"] for m in self.messages if m["role"] == "user")


def parse(fields: dict[str, Any], form: Form | Literal["auto"] = "auto") -> Conversation:
    """Make a conversation of a row's fields, which are neither null nor NaN.

    Raises:
        RejectedRow: the row does not fit the form, its turns make no conversation, or a field
            carries meaning that is not read.
    """
    chosen = form_of(fields) if form == "auto" else form
    unknown: set[str] = set()
    messages, read = _READERS[chosen](fields, unknown)
    messages = _with_system(messages, fields)
    rest = fields.keys() - read - _READ
    if rest:
        _refuse_unread(fields, rest, "")
        if form == "auto":
            _refuse_contradictions(fields, rest & _TURNS, messages)
            rest -= _TURNS
        unknown |= {name for name in rest - _UNREAD.keys() if _says(fields[name])}
    kept = drop_unanswered(messages)
    if (problem := problem_with(kept)) is not None:
        replied = any(message["role"] == "assistant" for message in messages)
        raise RejectedRow(problem if replied else "no reply")
    answer, language = _answer(fields.get("answer")), fields.get("language")
    for text in (*(m["content"] for m in kept), answer, language):
        if isinstance(text, str):
            _require_text(text)
    return Conversation(
        messages=kept,
        answer=answer,
        language=language if isinstance(language, str) and language else language_of(kept),
        dropped_turn=len(kept) < len(messages),
        unknown=sorted(unknown),
    )


def form_of(fields: dict[str, Any]) -> Form:
    """The form that a row's fields show.

    Raises:
        RejectedRow: none.
    """
    text = fields.get("text")
    if isinstance(text, str) and "### Human:" in text:
        return "guanaco"
    if "messages" in fields or "conversations" in fields:
        return "messages"
    renames = [f"`{name}` to `{_RENAMES[name]}`" for name in fields if name in _RENAMES]
    if ("instruction" in fields and not renames) or fields.keys() >= {"prompt", "completion"}:
        return "alpaca"
    if fields.keys() >= {"instruction", "output"}:
        return "alpaca"
    _refuse_unread(fields, fields.keys() - {"context"}, "")
    if isinstance(text, str) and text.strip() and "### Assistant:" not in text:
        raise RejectedRow("`text` has no `### Human:`; plain text is not read")
    if isinstance(text, str):
        return "guanaco"
    advice = f"; rename {' and '.join(renames)}" if renames else ""
    raise RejectedRow(f"no known form in {', '.join(fields)[:80] or 'an empty row'}{advice}")


def _read_guanaco(fields: dict[str, Any], unknown: set[str]) -> tuple[list[Message], set[str]]:
    return guanaco.parse(_text(fields, "text")), {"text"}


def _read_messages(fields: dict[str, Any], unknown: set[str]) -> tuple[list[Message], set[str]]:
    """OpenAI's `role` and `content`, ShareGPT's `from` and `value`."""
    names = [name for name in ("messages", "conversations") if _says(fields.get(name))]
    if not names:
        raise RejectedRow(
            f"no `messages` or `conversations`; its fields are {', '.join(fields)[:80]}"
        )
    first, *others = ([*_messages(fields[name], unknown)] for name in names)
    if any(other != first for other in others):
        raise RejectedRow("`messages` and `conversations` differ; remove one")
    return first, {"messages", "conversations"}


def _read_alpaca(fields: dict[str, Any], unknown: set[str]) -> tuple[list[Message], set[str]]:
    """`instruction` and `input`, after an empty line; or TRL's `prompt`; `history` before them."""
    if "instruction" not in fields and "prompt" in fields:
        return _read_completion(fields, unknown), {"prompt", "completion"}
    turns = [_text(fields, "instruction")]
    if "input" in fields:
        turns.append(_text(fields, "input"))
    messages = [*_history(fields.get("history"))]
    messages.append({"role": "user", "content": "\n\n".join(turn for turn in turns if turn)})
    messages.append({"role": "assistant", "content": _text(fields, "output")})
    return messages, {"instruction", "input", "output", "history"}


def _read_completion(fields: dict[str, Any], unknown: set[str]) -> list[Message]:
    """Both texts, or both lists of messages; replies within a prompt are context."""
    prompt, completion = fields["prompt"], fields.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        context = _messages(prompt, unknown)
        for message in context:
            if message["role"] == "assistant":
                message["weight"] = 0
        return context + _messages(completion, unknown)
    return [
        {"role": "user", "content": _text(fields, "prompt")},
        {"role": "assistant", "content": _text(fields, "completion")},
    ]


_Reader = Callable[[dict[str, Any], set[str]], tuple[list[Message], set[str]]]
_READERS: dict[Form, _Reader] = {
    "guanaco": _read_guanaco,
    "messages": _read_messages,
    "alpaca": _read_alpaca,
}


def _messages(value: Any, unknown: set[str]) -> list[Message]:
    """A list of messages; in CSV it is written as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RejectedRow("the messages are a text that is not JSON") from None
    if not isinstance(value, list):
        raise RejectedRow(f"the messages are {kind_of(value)}, expected a list")
    messages = [_message(number, message, unknown) for number, message in enumerate(value, start=1)]
    if messages and messages[0]["role"] == "system" and not messages[0]["content"]:
        return messages[1:]
    return messages


def _message(number: int, fields: Any, unknown: set[str]) -> Message:
    if not isinstance(fields, dict):
        raise RejectedRow(f"message {number} is {kind_of(fields)}, expected an object")
    where = f" of message {number}"
    plain = fields.keys() == {"role", "content"}
    if not plain:
        fields = present(fields)  # Parquet gives every message the fields of all, most of them null
        rest = fields.keys() - {"role", "from", "content", "value", *_WEIGHTS}
        _refuse_unread(fields, rest, where)
        rest -= _UNREAD.keys()
        unknown |= {f"messages.{name}" for name in rest if _says(fields[name])}
    role = _only(fields, "role", "from", where)
    content = _only(fields, "content", "value", where)
    if not isinstance(role, str) or role not in _ROLES:
        raise RejectedRow(
            f"message {number} is of role {role!r}, expected one of {', '.join(_ROLES)}"
        )
    if isinstance(content, list):
        content = "".join(_part(part, number, unknown) for part in content)
    if not isinstance(content, str):
        raise RejectedRow(f"message {number} holds {kind_of(content)}, expected a text")
    message: Message = {"role": _ROLES[role], "content": normalize(content)}
    if not plain and _weight(fields, where) == 0:
        message["weight"] = 0
    return message


def _only(fields: dict[str, Any], name: str, other: str, where: str) -> Any:
    if name in fields and other in fields and fields[name] != fields[other]:
        raise RejectedRow(f"`{name}` and `{other}`{where} differ; remove one")
    return fields.get(name, fields.get(other))


def _part(part: Any, number: int, unknown: set[str]) -> str:
    """The text of a part of a message."""
    if isinstance(part, dict):
        part = present(part)
        if part.get("type") not in _TEXT_PARTS:
            raise RejectedRow(
                f"message {number} has a part of type {part['type']!r}, which is not read"
            )
        rest = part.keys() - {"type", "text"}
        _refuse_unread(part, rest, f" of a part of message {number}")
        rest -= _UNREAD.keys()
        unknown |= {f"messages.content.{name}" for name in rest if _says(part[name])}
        part = part.get("text")
    if not isinstance(part, str):
        raise RejectedRow(f"message {number} has a part that is {kind_of(part)}, expected a text")
    return part


def _weight(fields: dict[str, Any], where: str) -> int:
    weights = {}
    for name in _WEIGHTS:
        if _says(fields.get(name)):
            if fields[name] not in (0, 1):
                raise RejectedRow(f"`{name}`{where} is {fields[name]!r}; only 0 and 1 are read")
            weights[name] = int(fields[name])
    if len(set(weights.values())) > 1:
        raise RejectedRow(f"`{'` and `'.join(weights)}`{where} differ; remove one")
    return min(weights.values(), default=1)


def _history(value: Any) -> list[Message]:
    """Alpaca's earlier exchanges, a list of pairs."""
    if not _says(value):
        return []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    messages: list[Message] = []
    for pair in value if isinstance(value, list) else [None]:
        match pair:
            case [str(question), str(reply)]:
                messages.append({"role": "user", "content": normalize(question)})
                messages.append({"role": "assistant", "content": normalize(reply)})
            case _:
                raise RejectedRow("`history` is no list of pairs of a question and a reply")
    return messages


def _with_system(messages: list[Message], fields: dict[str, Any]) -> list[Message]:
    """The messages, behind the row's own system message where it has one."""
    contents = {_text(fields, name) for name in _SYSTEM if _says(fields.get(name))}
    if not contents:
        return messages
    own = [message["content"] for message in messages[:1] if message["role"] == "system"]
    if len(contents.union(own)) > 1:
        raise RejectedRow("the row has two system messages that differ; remove one")
    return messages if own else [{"role": "system", "content": contents.pop()}, *messages]


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise RejectedRow(
            f"`{name}` is {'missing' if value is None else kind_of(value)}, expected a text"
        )
    return normalize(value)


def _refuse_unread(fields: dict[str, Any], names: Set[str], where: str) -> None:
    for name in sorted(names & _UNREAD.keys()):
        value, kind = fields[name], _UNREAD[name]
        if _says(value) and not (kind == _WEIGHT and value == 1):
            advice = "; rename it to `input`" if name == "context" else ""
            raise RejectedRow(f"`{name}`{where} holds {kind}, which is not read{advice}")


def _refuse_contradictions(
    fields: dict[str, Any], names: Set[str], messages: list[Message]
) -> None:
    """Refuse a second form of the row that says something else."""
    contents = [message["content"] for message in messages]
    for name in sorted(names):
        value = fields[name]
        if not _says(value):
            continue
        if not isinstance(value, str):
            same = all(message in messages for message in _messages(value, set()))
        elif name == "text":  # all of it, rendered by some template
            same = all(content in normalize(value) for content in contents)
        else:  # paragraphs of a message
            same = any(f"\n\n{normalize(value)}\n\n" in f"\n\n{c}\n\n" for c in contents)
        if not same:
            raise RejectedRow(
                f"`{name}` differs from the rest of the row; remove one or set prepare.format"
            )


def _says(value: Any) -> bool:
    """Whether a value is more than null, NaN and emptiness, at any depth."""
    if isinstance(value, dict):
        return any(map(_says, value.values()))
    if isinstance(value, list):
        return any(map(_says, value))
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    return value is not None and not is_nan(value)


def _answer(value: Any) -> str | None:
    """What can be compared with the last line of a reply: nothing empty, no list, no NaN."""
    if value is None or isinstance(value, bool | list | dict):
        return None
    return None if is_nan(value) else str(value).strip() or None


def _require_text(text: str) -> None:
    """Refuse what no encoding holds, and what a wrong conversion leaves."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RejectedRow("a text holds half a surrogate pair, which is no character") from None
    if found := _CONTROL.search(text):
        origin = "UTF-16" if found[0] == "\0" else "Windows-1252"
        raise RejectedRow(
            f"a text holds the control character U+{ord(found[0]):04X}, as {origin} does that was "
            "converted as ISO-8859-1"
        )
