"""Row forms (Guanaco, messages, Alpaca, trees, plain text), each into a conversation.

An unread field that carries meaning rejects its row; other unread fields are reported.
"""

import math
import re
from collections.abc import Iterator, Mapping, Set
from itertools import takewhile
from typing import Any, Literal

from stages.prepare import guanaco
from stages.prepare.config import Column
from stages.prepare.messages import (
    KWARGS,
    THOUGHTS,
    TOOLS,
    add_thoughts,
    agreed,
    has_content,
    parse_kwargs,
    parse_messages,
    parse_tools,
    unread,
)
from stages.prepare.rows import kind_of, loaded, present, require_characters
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

_LISTS = ("messages", "conversations")
_PAIRS = (("instruction", "output"), ("prompt", "completion"))
_TURNS = {"text", "messages", "conversations", "instruction", "input", "output"}
_TURNS |= {"prompt", "completion"}
_SYSTEM = ("system", "system_prompt")
_CONTEXT = {*_SYSTEM, *TOOLS, KWARGS, "answer"}
_REPLIES = {"response", "reply", "target"}
_RENAMES = {
    **dict.fromkeys(("question", "query"), "instruction"),
    **dict.fromkeys(("conversation", "dialogue", "dialog", "chat", "items"), "messages"),
    "context": "input",
}
_TREE = {"text", "role", "replies", "rank", "lang", "deleted"}  # read, of a message
_HAS_ROLE = re.compile(r'"(?:role|from)"\s*:')
# Turns that another template has rendered, which are no plain text.
_RENDERED = re.compile(
    r"<\|(?:im_start|start_header_id|user|assistant|start)\|>|<start_of_turn>|\[INST\]"
    r"|^### (?:Instruction|Response):|<｜(?:User|Assistant)｜>",
    re.MULTILINE,
)


def parse(
    fields: dict[str, Any],
    form: Form | Literal["auto", "oasst_all"] = "auto",
    columns: Mapping[Column, str] | None = None,
) -> Conversation:
    """Parse a row's fields, none of them null or NaN, into a conversation, or reject it.

    `columns` maps fields to the columns of the row that hold them.
    """
    unknown: set[str] = set()
    if columns:
        fields = _mapped(fields, columns, unknown)
    fields |= _loaded(fields)
    chosen: Form = "oasst" if form == "oasst_all" else form_of(fields) if form == "auto" else form
    text = _text(fields, "text") if chosen == "text" else None
    paths, read = _turns(fields, chosen, unknown, every=form == "oasst_all")
    rest = fields.keys() - read - {"language"}
    if text is None:
        paths = [_with_system(fields, messages) for messages in paths]
        rest -= _CONTEXT
    if rest:
        if form == "auto":
            _require_agreement({name: fields[name] for name in rest & _TURNS}, paths[0])
            rest -= _TURNS
        unknown |= unread(fields, rest)
    answered = [drop_unanswered(messages) for messages in paths]
    shared = [
        max(_common(path, one) for one in answered[:n]) for n, path in enumerate(answered) if n
    ]
    # Another path of a tree is a row if it has a reply that none before it has.
    branches = [(path, n) for path, n in zip(answered[1:], shared, strict=True) if len(path) > n]
    answered[1:] = [path for path, _ in branches]
    if text == "":
        raise RejectedRow("`text` is empty")
    for path in answered if text is None else ():
        if (problem := problem_with(path)) is not None:
            replied = any(message["role"] == "assistant" for message in paths[0])
            raise RejectedRow(problem if replied else "no reply")
    tools, kwargs = parse_tools(fields), parse_kwargs(fields)
    answer = fields.get("answer") if text is None else None
    answer = None if isinstance(answer, bool | list | dict | None) else str(answer).strip() or None
    language = fields.get("language") or (chosen == "oasst" and fields["prompt"].get("lang"))
    values = (value for path in answered for message in path for value in message.values())
    require_characters(text, answer, language, tools, kwargs, *values)
    if not isinstance(language, str) or not language:
        language = language_of(answered[0] or [{"role": "user", "content": text or ""}])
    return Conversation(
        messages=answered[0],
        branches=branches,
        tools=tools,
        template_kwargs=kwargs,
        text=text,
        answer=answer,
        language=language,
        form=chosen,
        dropped_turn=any(path[-1]["role"] != "assistant" for path in paths if path),
        unknown=sorted(unknown),
    )


def _tree_paths(root: Any, *, every: bool) -> Iterator[list[dict[str, Any]]]:
    """Paths of OpenAssistant's tree in OpenAI's form, best ranked replies first, or that alone."""
    pending: list[tuple[Any, list[dict[str, Any]]]] = [(root, [])]
    while pending:
        value, before = pending.pop()
        where = f"message {len(before) + 1} of the tree"
        if not isinstance(value, dict):
            raise RejectedRow(f"{where} is {kind_of(value)}")
        fields = present(value)
        rest = {name: fields[name] for name in fields.keys() - _TREE}
        path = [*before, {"role": fields.get("role"), "content": fields.get("text"), **rest}]
        replies = fields.get("replies", [])
        if not isinstance(replies, list):
            raise RejectedRow(f"`replies` of {where} is {kind_of(replies)}")
        replies = [one for one in replies if not (isinstance(one, dict) and one.get("deleted"))]
        replies = sorted(replies, key=_rank)[: None if every else 1]
        pending += [(one, path) for one in replies[::-1]]
        if not replies:
            yield path


def _rank(reply: Any) -> float:
    rank = reply.get("rank") if isinstance(reply, dict) else None
    return float(rank) if isinstance(rank, int | float) else math.inf


def _common(path: list[Message], other: list[Message]) -> int:
    """Number of messages with which both begin."""
    pairs = zip(path, other, strict=False)
    return len([*takewhile(lambda pair: pair[0] == pair[1], pairs)])


def _loaded(fields: dict[str, Any]) -> dict[str, Any]:
    """Prompt and completion that are JSON text of messages or of a tree, as CSV has them."""
    parsed = {}
    for name in _PAIRS[1]:
        text = fields.get(name)
        if isinstance(text, str) and text.lstrip()[:1] in ("[", "{") and _HAS_ROLE.search(text):
            value = loaded(text)
            first = value[0] if isinstance(value, list) and value else value
            if isinstance(first, dict) and not first.keys().isdisjoint({"role", "from"}):
                parsed[name] = value
    return parsed


def _mapped(
    fields: dict[str, Any], columns: Mapping[Column, str], unknown: set[str]
) -> dict[str, Any]:
    """Fields under their names; a column that has the name of a mapped one is not read."""
    rest = fields.keys() - {*columns.values()}
    unknown |= {name for name in rest & columns.keys() if has_content(fields[name])}
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
    if not fields.keys().isdisjoint(_LISTS):
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


def _turns(
    fields: dict[str, Any], form: Form, unknown: set[str], *, every: bool
) -> tuple[list[list[Message]], Set[str]]:
    """Messages of the row, or of each path of a tree, and the fields that hold them."""
    if form == "text":
        return [[]], {"text"}
    if form == "guanaco":
        return [guanaco.parse(_text(fields, "text"))], {"text"}
    if form == "oasst":
        paths = _tree_paths(fields.get("prompt"), every=every)
        return [parse_messages(path, unknown) for path in paths], {"prompt"}
    if form == "messages":
        names = [name for name in _LISTS if has_content(fields.get(name))]
        if not names:
            raise RejectedRow(f"no messages in {', '.join(fields)[:80]}")
        lists = {name: parse_messages(fields[name], unknown) for name in names}
        return [agreed(lists, names)], {*_LISTS}
    pair = user, output = _PAIRS["prompt" in fields and "instruction" not in fields]
    if pair == _PAIRS[1] and any(isinstance(fields.get(name), list) for name in pair):
        return [_prompt_completion(fields, unknown)], {*pair}
    texts = [_text(fields, name) for name in (user, "input") if name == user or name in fields]
    question: Message = {"role": "user", "content": "\n\n".join(filter(None, texts))}
    reply: Message = {"role": "assistant", "content": _text(fields, output)}
    add_thoughts(reply, fields, "")
    messages = [*_history(fields.get("history")), question, reply]
    return [messages], {*pair, "input", "history", *THOUGHTS}


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


def _history(value: Any) -> list[Message]:
    """Parse Alpaca's earlier exchanges, a list of pairs."""
    messages: list[Message] = []
    value = loaded(value) if has_content(value) else []
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
    contents = {_text(fields, name) for name in _SYSTEM if has_content(fields.get(name))}
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


def _require_agreement(fields: dict[str, Any], messages: list[Message]) -> None:
    """Refuse fields of other formats that contradict the messages."""
    contents = [message["content"] for message in messages]
    for name in sorted(name for name in fields if has_content(fields[name])):
        value = fields[name]
        if not isinstance(value, str):
            same = all(message in messages for message in parse_messages(value, set()))
        else:  # paragraphs of a message, or all of it (of the prompt) rendered by some template
            text = normalize(value)
            prompts = [m["content"] for m in messages if name == "text" or m["role"] == "user"]
            rendered = all(part in text for one in prompts for part in one.split("\n\n"))
            same = (rendered and name in ("text", "prompt")) or any(
                f"\n\n{text}\n\n" in f"\n\n{one}\n\n" for one in contents
            )
        if not same:
            raise RejectedRow(
                f"`{name}` contradicts the other fields; remove it or set prepare.format"
            )
