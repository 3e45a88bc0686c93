"""Row forms (Guanaco, messages, Alpaca, trees, plain text), each into a conversation.

An unread field that carries meaning rejects its row; other unread fields are reported.
"""

import math
import re
from collections.abc import Iterable, Mapping, Set
from typing import Any, Literal

from stages.prepare import guanaco
from stages.prepare.config import Column
from stages.prepare.messages import THOUGHTS, add_thoughts, loaded, parse_messages, says, unread
from stages.prepare.rows import is_nan, kind_of, present
from stages.prepare.tools import KWARGS, TOOLS, parse_kwargs, parse_tools
from stages.shared.chat.conversation import (
    Conversation,
    Message,
    RejectedRow,
    Role,
    drop_unanswered,
    language_of,
    normalize,
    problem_with,
)

Form = Literal["guanaco", "messages", "alpaca", "oasst", "text"]

_FIELDS: dict[Form, set[str]] = {
    "guanaco": {"text"},
    "messages": {"messages", "conversations"},
    "alpaca": {"input", "history", *THOUGHTS},  # and a pair
    "oasst": {"prompt"},
    "text": {"text"},
}
_PAIRS = (("instruction", "output"), ("prompt", "completion"))
_TURNS = {"text", "messages", "conversations", "instruction", "input", "output"}
_TURNS |= {"prompt", "completion"}
_SYSTEM = ("system", "system_prompt")
_CONTEXT = {*_SYSTEM, *TOOLS, KWARGS, "answer"}
_REPLIES = {"response", "reply", "target"}
_RENAMES = {
    **dict.fromkeys(("question", "query"), "instruction"),
    **dict.fromkeys(("conversation", "dialogue", "dialog", "chat"), "messages"),
    "context": "input",
}
# NUL and C1: UTF-16 or Windows-1252 converted as ISO-8859-1.
_CONTROL = re.compile("[\0\x80-\x9f]")
# Turns that another template has rendered, which are no plain text.
_RENDERED = re.compile(
    r"<\|(?:im_start|start_header_id|user|assistant|start)\|>|<start_of_turn>|\[INST\]"
    r"|^### (?:Instruction|Response):|<｜(?:User|Assistant)｜>",
    re.MULTILINE,
)
_DEEPEST = 64  # templates and JSON writers recurse
_TREE = {"text", "role", "replies", "rank", "lang", "deleted"}


def parse(
    fields: dict[str, Any],
    form: Form | Literal["auto"] = "auto",
    columns: Mapping[Column, str] | None = None,
) -> Conversation:
    """Parse a row's fields, none of them null or NaN, into a conversation, or reject it.

    `columns` maps fields to the columns of the row that hold them.
    """
    unknown: set[str] = set()
    if columns:
        fields = _mapped(fields, columns, unknown)
    chosen = form_of(fields) if form == "auto" else form
    text = _text(fields, "text") if chosen == "text" else None
    messages = _with_system(fields, _turns(fields, chosen, unknown)) if text is None else []
    rest = fields.keys() - _read(fields, chosen) - {"language"}
    rest -= _CONTEXT if text is None else set()
    if rest:
        if form == "auto":
            _require_agreement({name: fields[name] for name in rest & _TURNS}, messages)
            rest -= _TURNS
        unknown |= unread(fields, rest)
    kept = drop_unanswered(messages)
    if text == "":
        raise RejectedRow("`text` is empty")
    if text is None and (problem := problem_with(kept)) is not None:
        replied = any(message["role"] == "assistant" for message in messages)
        raise RejectedRow(problem if replied else "no reply")
    tools, kwargs = parse_tools(fields), parse_kwargs(fields)
    answer = _answer(fields.get("answer")) if text is None else None
    language = fields.get("language") or (chosen == "oasst" and fields["prompt"].get("lang"))
    for one in (*(message["content"] for message in kept), text, answer, language):
        if isinstance(one, str):
            _require_characters(one)
    for message in kept:
        if len(message) > 2:
            _require_characters(*_texts_of([*message.values()]))
    if tools or kwargs:
        _require_characters(*_texts_of([tools, kwargs]))
    if not isinstance(language, str) or not language:
        language = language_of(kept or [{"role": "user", "content": text or ""}])
    return Conversation(
        messages=kept,
        tools=tools,
        template_kwargs=kwargs,
        text=text,
        answer=answer,
        language=language,
        form=chosen,
        dropped_turn=len(kept) < len(messages),
        unknown=sorted(unknown),
    )


def _mapped(
    fields: dict[str, Any], columns: Mapping[Column, str], unknown: set[str]
) -> dict[str, Any]:
    """Fields under their names; a column that has the name of a mapped one is not read."""
    rest = fields.keys() - {*columns.values()}
    unknown |= {name for name in rest & columns.keys() if says(fields[name])}
    mapped = {name: fields[column] for name, column in columns.items() if column in fields}
    if not mapped:
        lacks = ", ".join(f"`{column}`" for column in columns.values())
        raise RejectedRow(f"prepare.columns names {lacks}, but the row has {', '.join(fields):.80}")
    return {name: fields[name] for name in fields if name in rest - columns.keys()} | mapped


def form_of(fields: dict[str, Any]) -> Form:
    """Detect a row's form by its fields; `RejectedRow` where none is known."""
    text = fields.get("text")
    if isinstance(text, str) and "### Human:" in text:
        return "guanaco"
    if not fields.keys().isdisjoint(_FIELDS["messages"]):
        return "messages"
    if isinstance(prompt := fields.get("prompt"), dict) and "text" in prompt:
        return "oasst"
    renames = _renames(fields.keys())
    is_complete = any({*pair} <= fields.keys() for pair in _PAIRS)
    if is_complete or ("instruction" in fields and not renames):
        return "alpaca"
    unread(fields, fields.keys() - {"context", "history", *THOUGHTS, *_CONTEXT})
    if isinstance(text, str) and not renames:
        if not text.strip() or "### Assistant:" in text:
            return "guanaco"
        if "parent_id" in fields:
            raise RejectedRow("a row is one message of a tree; take the export of whole trees")
        if match := _RENDERED.search(text):
            raise RejectedRow(
                f"`text` is a chat rendered with {match[0]!r}; give its messages, or set "
                "prepare.format: text"
            )
        return "text"
    advice = ""
    if renames:
        pairs = ", ".join(f"{new}: {name}" for name, new in renames.items())
        advice = f"; set prepare.columns: {{{pairs}}}"
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
        names = (name for name in _FIELDS[form] if says(fields.get(name)))
        lists = [parse_messages(fields[name], unknown) for name in names]
        if not lists:
            raise RejectedRow(f"no `messages`, but {', '.join(fields)[:80]}")
        if lists[0] != lists[-1]:
            raise RejectedRow("`messages` and `conversations` differ; remove one")
        return lists[0]
    if form == "oasst":
        return parse_messages([*_best_path(fields.get("prompt"))], unknown)
    user, output = _pair(fields)
    if _is_conversational(fields):
        return _prompt_completion(fields, unknown)
    texts = [_text(fields, name) for name in (user, "input") if name == user or name in fields]
    reply: Message = {"role": "assistant", "content": _text(fields, output)}
    add_thoughts(reply, fields, "")
    question: Message = {"role": "user", "content": "\n\n".join(filter(None, texts))}
    return [*_history(fields.get("history")), question, reply]


def _read(fields: dict[str, Any], form: Form) -> Set[str]:
    """Names of the fields that make the turns."""
    if form != "alpaca":
        return _FIELDS[form]
    return {*_pair(fields)} | (set() if _is_conversational(fields) else _FIELDS[form])


def _pair(fields: dict[str, Any]) -> tuple[str, str]:
    return _PAIRS["prompt" in fields and "instruction" not in fields]


def _is_conversational(fields: dict[str, Any]) -> bool:
    return (
        any(isinstance(fields.get(name), list) for name in _PAIRS[1]) and _pair(fields) == _PAIRS[1]
    )


def _prompt_completion(fields: dict[str, Any], unknown: set[str]) -> list[Message]:
    """Parse TRL's conversational prompt and completion, each messages or one message's text."""
    sides: tuple[tuple[str, Role], ...] = (("prompt", "user"), ("completion", "assistant"))
    prompt, completion = (
        parse_messages(fields[name], unknown)
        if isinstance(fields.get(name), list)
        else [Message(role=role, content=_text(fields, name))]
        for name, role in sides
    )
    for message in prompt:
        if message["role"] == "assistant":
            message["weight"] = 0  # as in TRL: loss on the completion alone
    return [*prompt, *completion]


def _best_path(node: Any) -> Iterable[dict[str, Any]]:
    """Messages of an OpenAssistant tree, from its prompt to a leaf: each the best ranked reply."""
    number = 1
    while node is not None:
        if not isinstance(node, dict):
            raise RejectedRow(f"message {number} of the tree is {kind_of(node)}")
        node = present(node)
        rest = {name: node[name] for name in node.keys() - _TREE}
        yield {"role": node.get("role"), "content": node.get("text"), **rest}
        replies = node.get("replies", [])
        if not isinstance(replies, list):
            raise RejectedRow(f"`replies` of message {number} of the tree is {kind_of(replies)}")
        ranked = [r for r in replies if not (isinstance(r, dict) and r.get("deleted"))]
        node, number = min(ranked, key=_rank, default=None), number + 1


def _rank(reply: Any) -> float:
    rank = reply.get("rank") if isinstance(reply, dict) else None
    return float(rank) if isinstance(rank, int | float) else math.inf


def _history(value: Any) -> list[Message]:
    """Parse Alpaca's earlier exchanges, a list of pairs."""
    messages: list[Message] = []
    value = loaded(value) if says(value) else []
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
    contents = {_text(fields, name) for name in _SYSTEM if says(fields.get(name))}
    if not contents:
        return messages
    first = [message["content"] for message in messages[:1] if message["role"] == "system"]
    if len(contents.union(first)) > 1:
        raise RejectedRow("the row has two system messages that differ; remove one")
    return messages if first else [{"role": "system", "content": contents.pop()}, *messages]


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        kind = "missing" if value is None else kind_of(value)
        raise RejectedRow(f"`{name}` is {kind}, expected a text")
    return normalize(value)


def _require_agreement(others: dict[str, Any], messages: list[Message]) -> None:
    """Refuse fields of other formats that contradict the messages."""
    contents = [message["content"] for message in messages]
    for name in sorted(filter(lambda name: says(others[name]), others)):
        value = others[name]
        if not isinstance(value, str):
            same = all(message in messages for message in parse_messages(value, set()))
        else:  # paragraphs of a message, or all of it (of the prompt) rendered by some template
            text = normalize(value)
            said = [m["content"] for m in messages if name == "text" or m["role"] == "user"]
            rendered = all(part in text for one in said for part in one.split("\n\n"))
            same = (rendered and name in ("text", "prompt")) or any(
                f"\n\n{text}\n\n" in f"\n\n{one}\n\n" for one in contents
            )
        if not same:
            raise RejectedRow(
                f"`{name}` contradicts the other fields; remove it or set prepare.format"
            )


def _answer(value: Any) -> str | None:
    if value is None or isinstance(value, bool | list | dict) or is_nan(value):
        return None
    return str(value).strip() or None


def _texts_of(value: Any, depth: int = 0) -> Iterable[str]:
    """All strings of a JSON value, names of fields among them; `RejectedRow` for a deep one."""
    if depth > _DEEPEST:
        raise RejectedRow(f"a call, tool or argument is nested more than {_DEEPEST} deep")
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in (*value.keys(), *value.values()) if isinstance(value, dict) else value:
            yield from _texts_of(one, depth + 1)


def _require_characters(*texts: str) -> None:
    """Refuse lone surrogates, and control characters of a wrong conversion."""
    text = "\n".join(texts)
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
