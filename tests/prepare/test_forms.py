"""Rows of each form as conversations; what is read, what is told, and what rejects a row."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from stages.prepare import guanaco
from stages.prepare.forms import Form, parse
from stages.shared.chat.conversation import Message, RejectedRow, conversation_id
from tests.conversations import assistant, system, user

TWO = [user("two"), assistant("four")]
GUANACO = "### Human: two### Assistant: four"


def without_weight(content: str) -> Message:
    return {"role": "assistant", "content": content, "weight": 0}


def messages(*turns: dict[str, Any], **row: Any) -> dict[str, Any]:
    """A row of the messages form: `two`, and a reply with more fields."""
    return {"messages": [user("two"), *turns], **row}


ADD: dict[str, Any] = {"type": "function", "function": {"name": "add", "parameters": {}}}


def call(arguments: Any = "{}") -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}


def reply(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "four", **fields}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"text": GUANACO}, TWO),
        ({"text": f"{GUANACO}### Human: why"}, TWO),
        ({"messages": TWO}, TWO),
        ({"messages": [*TWO, user("why")]}, TWO),
        ({"messages": [system(""), *TWO]}, TWO),
        ({"messages": [system(" S "), *TWO]}, [system("S"), *TWO]),
        ({"messages": [{"role": "developer", "content": "S"}, *TWO]}, [system("S"), *TWO]),
        ({"messages": json.dumps(TWO)}, TWO),
        ({"messages": [m | {"from": None, "value": float("nan")} for m in TWO]}, TWO),
        ({"instruction": "two", "output": "four"}, TWO),
        ({"instruction": "two", "input": "", "output": "four"}, TWO),
        ({"instruction": "add", "input": "2, 2", "output": "4"},
         [user("add\n\n2, 2"), assistant("4")]),
        ({"instruction": "two", "output": "four", "history": [["a", "b"]], "system": "S"},
         [system("S"), user("a"), assistant("b"), *TWO]),
        ({"instruction": "two", "output": "four", "history": '[["a", "b"]]'},
         [user("a"), assistant("b"), *TWO]),
        ({"prompt": "two", "completion": "four"}, TWO),
        ({"prompt": [user("a"), assistant("b"), user("two")], "completion": [assistant("four")]},
         [user("a"), without_weight("b"), *TWO]),
        ({"prompt": json.dumps([user("two")]), "completion": json.dumps([assistant("four")])}, TWO),
        ({"prompt": '{"role": "prompter", "text": "two", "replies": [{"role": "assistant", '
          '"text": "four"}]}'}, TWO),
        ({"messages": TWO, "system": "S"}, [system("S"), *TWO]),
        ({"text": GUANACO, "system_prompt": "S"}, [system("S"), *TWO]),
        ({"messages": [system("S"), *TWO], "system": "S\n"}, [system("S"), *TWO]),
        (messages(reply(content=[{"type": "text", "text": "fo"}, "ur"])), TWO),
        # One thing said twice.
        ({"messages": TWO, "conversations": TWO}, TWO),
        ({"messages": TWO, "prompt": "two", "text": "user: two\nassistant: four"}, TWO),
        ({"instruction": "add", "input": "2, 2", "output": "4",
          "text": "Below.\n\n### Instruction:\nadd\n\n### Input:\n2, 2\n\n### Response:\n4"},
         [user("add\n\n2, 2"), assistant("4")]),
        ({"instruction": "add", "output": "4", "prompt": "Below.\n\n### Instruction:\nadd"},
         [user("add"), assistant("4")]),
        ({"messages": [m | {"from": m["role"]} for m in TWO]}, TWO),
    ],
)  # fmt: skip
def test_rows_of_each_form(fields: dict[str, Any], expected: list[Message]) -> None:
    found = parse(fields)
    assert found.messages == expected
    assert found.unknown == []


@pytest.mark.parametrize("name", ["tools", "tool_calls", "reasoning", "images", "label", "context"])
@pytest.mark.parametrize("value", [None, float("nan"), "", " ", [], {}, "[]", {"a": [None, ""]}])
def test_empty_fields_are_harmless(name: str, value: Any) -> None:
    assert parse({"messages": TWO, name: value}).messages == TWO
    assert parse(messages(reply(**{name: value}))).messages == TWO


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "no known form in an empty row"),
        ({"instruction": "two", "context": "c", "output": "four"}, "{input: context}"),
        ({"text": "<s>[INST] two [/INST] four"}, "a chat rendered with '[INST]'; give its"),
        ({"text": "two", "role": "prompter", "parent_id": "1"}, "one message of a tree"),
        ({"text": "two", "response": "four"}, "no known form in text, response; set prepare.col"),
        ({"text": "### Human: two"}, "no reply"),
        ({"text": "### Human: ### Assistant: four"}, "turn 1 of the user is empty"),
        ({"text": "### Human: two ### Assistant: four"}, "after a space"),
        ({"text": "### Assistant: four"}, "turn 1 is of role assistant"),
        ({"messages": []}, "no messages in messages"),
        ({"messages": "not json"}, "the messages are a text, expected a list"),
        ({"messages": {"role": ["user"]}}, "an object, expected a list"),
        ({"messages": ["two"]}, "message 1 is a text, expected an object"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "of role 'critic'"),
        ({"messages": [user("a"), {"role": "tool", "content": "x"}, assistant("b")]},
         "turn 2 is of role tool, expected assistant"),
        ({"messages": [{"role": "user", "content": None}]}, "holds null"),
        ({"messages": [*TWO, *TWO, system("S")]}, "turn 5 is of role system"),
        ({"messages": [*TWO, user("a"), user("b")]}, "no reply after the last turn"),
        ({"messages": [user("a"), user("b"), assistant("c")]}, "turn 2 is of role user"),
        ({"instruction": "two"}, "`output` is missing"),
        ({"instruction": ["two"], "output": "four"}, "`instruction` is a list"),
        ({"instruction": "", "output": "four"}, "turn 1 of the user is empty"),
        ({"instruction": "two", "output": "four", "history": ["a"]}, "`history` is no list of"),
        ({"prompt": "two", "chosen": "a", "rejected": "b"}, "`chosen` is not read (pref"),
        ({"prompt": "two", "completion": "four", "label": False}, "`label` is not read (pref"),
        (messages(reply(), images=["a.png"]), "`images` is not read (images, audio or video)"),
        (messages(reply(), tools=["add"]), "tool 1 is a text, expected a function's schema"),
        (messages(reply(), tools=[{"description": "add"}]), "tool 1 is no schema of a function"),
        (messages(reply(), tools=[ADD], functions=[{"name": "b"}]), "`tools` and `functions` diff"),
        (messages(reply(), chat_template_kwargs={"tools": 1}), "sets `tools`, which the row"),
        (messages(reply(), chat_template_kwargs={"max_length": 1}), "sets `max_length`, which"),
        (messages(reply(), history=[["a", "b"]]), "`history` is not read (earlier turns)"),
        (messages(reply(), weight=0.5), "`weight` is not read (weight)"),
        (messages(reply(tool_calls=[{"id": "1"}])), "`name` of call 1 of message 2 is null"),
        (messages(reply(tool_calls=[{"type": "custom", "name": "add"}])), "is 'custom', which is"),
        (messages(reply(tool_calls=[call("[1]")])), "`arguments` of call 1 of message 2 is a list"),
        (messages(reply(tool_calls=[call('{"a": ' + "9" * 5000 + "}")])), "a JSON object: {"),
        (messages(reply(tool_calls=[call('{"a": ')])), "`arguments` of call 1 of message 2 is a"),
        (messages(reply(tool_calls=[call('{"a": 1, "a": 2}')])), "the key `a` stands twice"),
        (messages(reply(tool_calls=[call({"a": json.loads("[" * 99 + "]" * 99)})])),
         "nested more than 64 deep"),
        ({"prompt": {"role": "prompter", "text": "a", "replies": 1}}, "`replies` of message 1"),
        ({"prompt": {"role": "prompter", "text": "a", "replies": ["b"]}}, "message 2 of the tree"),
        (messages(reply(tool_calls=[call({"a": "\0"})])), "U+0000, left where UTF-16"),
        ({"messages": [user("two") | {"tool_calls": [call()]}, reply()]},
         "`tool_calls` of message 1 is not read (tool calls)"),
        ({"messages": [user("two") | {"reasoning": "x"}, reply()]}, "`reasoning` of message 1 is"),
        ({"conversations": [user("two"), {"from": "function_call", "value": "add 1"}]},
         "call 1 of message 2 is a text: 'add 1'"),
        (messages(reply(reasoning="a", thinking="b")), "the thoughts of message 2 stand twice"),
        (messages(reply(weight=-1)), "`weight` of message 2 is -1, expected 0 or 1e-6 to 1e6"),
        (messages(reply(weight="1")), "`weight` of message 2 is '1', expected 0 or"),
        (messages(reply(weight=1e300)), "`weight` of message 2 is 1e+300, expected 0 or"),
        (messages(reply(weight=1e-60)), "`weight` of message 2 is 1e-60, expected 0 or"),
        (messages(reply(tool_calls=[call('{"a": [NaN]}')])), "holds nan, which JSON does not"),
        (messages(reply(), tools='[{"name": "a", "x": -Infinity}]'), "holds -inf, which JSON"),
        (messages(reply(weight=0, train=True)), "`weight` and `train` of message 2 differ"),
        (messages(reply(value="5")), "`content` and `value` of message 2 differ"),
        (messages(reply() | {"from": "human"}), "`role` and `from` of message 2 differ"),
        (messages({"role": "assistant", "content": [{"type": "image"}]}), "of type 'image'"),
        (messages({"role": "assistant", "content": [4]}), "a part of message 2 is a number"),
        ({"messages": TWO, "conversations": TWO[:1]}, "`messages` and `conversations` differ"),
        ({"messages": [system("S"), *TWO], "system": "T"}, "two system messages that differ"),
        ({"messages": TWO, "system": "S", "system_prompt": "T"}, "two system messages that differ"),
        ({"instruction": "two", "output": "four", "text": GUANACO + "!"}, "`output` contr"),
        ({"messages": TWO, "prompt": "three"}, "`prompt` contradicts"),
        ({"instruction": "two", "output": "four", "prompt": "three"}, "`prompt` contradicts"),
        ({"prompt": "two", "completion": "four", "output": "5"}, "`output` contradicts"),
        ({"prompt": [user("a")], "completion": [assistant("b")], "input": "c"}, "`input` contra"),
        ({"prompt": [user("a")], "completion": [assistant("b")], "history": [["c", "d"]]},
         "`history` is not read"),
        ({"messages": [user("\ud800"), assistant("x")]}, "half a surrogate pair"),
        ({"messages": TWO, "answer": "\ud83d"}, "half a surrogate pair"),
        ({"messages": TWO, "language": "\ud83d"}, "half a surrogate pair"),
        ({"messages": [user("\x80"), assistant("x")]}, "U+0080, left where Windows-1252"),
        ({"messages": [user("a\0b"), assistant("x")]}, "U+0000, left where UTF-16"),
    ],
)  # fmt: skip
def test_rows_are_rejected_with_the_reason(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(RejectedRow) as error:
        parse(fields)
    assert reason in str(error.value)


def test_a_form_that_is_insisted_on() -> None:
    row: dict[str, Any] = {"instruction": "two", "output": "four"}
    found = parse(row | {"text": "another thing"}, "alpaca")
    assert (found.messages, found.unknown) == (TWO, ["text"])
    with pytest.raises(RejectedRow, match="`text` is missing"):
        parse(row, "guanaco")
    with pytest.raises(RejectedRow, match="no messages in instruction"):
        parse(row, "messages")


@pytest.mark.parametrize(
    ("fields", "renamed"),
    [
        ({"question": "two", "answer": "four"}, {"instruction": "two", "output": "four"}),
        ({"query": "two", "response": "four", "history": [["a", "b"]]},
         {"instruction": "two", "output": "four", "history": [["a", "b"]]}),
        ({"instruction": "two", "context": "c", "response": "four"},
         {"instruction": "two", "input": "c", "output": "four"}),
        ({"prompt": "two", "response": "four"}, {"prompt": "two", "completion": "four"}),
        ({"input": "two", "output": "four"}, {"instruction": "two", "output": "four"}),
        ({"conversation": TWO}, {"messages": TWO}),
    ],
)  # fmt: skip
def test_advised_names_are_read(fields: dict[str, Any], renamed: dict[str, Any]) -> None:
    with pytest.raises(RejectedRow) as error:
        parse(fields)
    columns: Any = dict(re.findall(r"(\w+): (\w+)", str(error.value)))
    assert parse(fields, columns=columns) == parse(renamed)
    assert parse(renamed).messages[-1] == assistant("four")


def test_language_and_unread_fields_are_told() -> None:
    row = messages(reply(name="bob", id=""), id=7, category=None)
    assert (parse(row).unknown, parse(row).language) == (["id", "messages.name"], "other")
    assert parse(row | {"language": "nl"}).language == "nl"


def test_the_forms_that_the_documentation_shows() -> None:
    page = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
    shown = [parse(json.loads(line)) for line in page.splitlines() if line.startswith("{")]
    exchange = [user("What is 2 + 2?"), assistant("It is 4.")]
    assert [one.messages for one in shown[:7]] == [exchange] * 7
    assert {one.form for one in shown} == set(get_args(Form))
    assert (shown[7].text, shown[7].messages) == ("Two and two is four.", [])
    openai, sharegpt, *thoughts, flagged = shown[8:]
    assert openai.tools == sharegpt.tools == [ADD]
    for one, call_id in ((openai, {"id": "c1"}), (sharegpt, {})):
        _, reply, result, last = one.messages
        assert reply["tool_calls"] == [{"name": "add", "arguments": {"a": 2, "b": 2}, **call_id}]
        assert (result["role"], result["content"], last) == ("tool", "4", assistant("It is 4."))
    for one in thoughts:
        assert one.messages == [exchange[0], exchange[1] | {"reasoning": "Twice 2."}]
    assert [m.get("weight") for m in flagged.messages] == [None, 0, None, None]
    [text] = [line for line in page.splitlines() if line.startswith("### Human: How is")]
    assert len(guanaco.parse(text)) == 3


def turn(*calls: tuple[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
    made = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return {"role": "assistant", "content": "", "tool_calls": made, **more}


ONE, BOTH = ("add", {"a": 1}), (("add", {"a": 1}), ("sub", {"b": None}))
FLAT = [{"name": name, "arguments": arguments} for name, arguments in BOTH]


def sharegpt(*turns: tuple[str, Any], **row: Any) -> dict[str, Any]:
    return {"conversations": [{"from": name, "value": value} for name, value in turns], **row}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (messages(reply(content=None, tool_calls=[call('{"a":1}')])),
         [turn() | {"tool_calls": [{"name": "add", "arguments": {"a": 1}, "id": "c1"}]}]),
        (messages(reply(content="", tool_calls=json.dumps(FLAT))), [turn(*BOTH)]),
        (messages(reply(tool_calls=FLAT)), [turn(*BOTH, content="four")]),
        (messages(reply(content=None, function_call={"name": "add", "arguments": ""})),
         [turn(("add", {}))]),
        (messages(turn(ONE), {"role": "function", "name": "add", "content": "2"}, reply()),
         [turn(ONE), {"role": "tool", "name": "add", "content": "2"}, assistant("four")]),
        (messages(turn(*BOTH), {"role": "tool", "tool_call_id": 1, "content": "2"},
                  {"role": "tool", "content": [{"type": "text", "text": "3"}]}, reply()),
         [turn(*BOTH), {"role": "tool", "tool_call_id": "1", "content": "2"},
          {"role": "tool", "content": "3"}, assistant("four")]),
        (messages(turn(ONE), {"role": "tool", "content": {"a": [1, None]}}, reply()),
         [turn(ONE), {"role": "tool", "content": '{"a": [1, null]}'}, assistant("four")]),
        (messages(turn(ONE), {"role": "tool", "content": [{"a": 1}, {"a": 2}]}, reply()),
         [turn(ONE), {"role": "tool", "content": '[{"a": 1}, {"a": 2}]'}, assistant("four")]),
        (messages(reply(tool_calls=[{"name": "add", "arguments": "null"}])),
         [turn(("add", {}), content="four")]),
        (messages(reply(), {"role": "tool", "content": "2"}), [assistant("four")]),
        (messages(turn(ONE), {"role": "tool", "content": "2"}, {**user("no")}, reply()),
         [turn(ONE), {"role": "tool", "content": "2"}, user("no"), assistant("four")]),
        (sharegpt(("human", "two"), ("function_call", FLAT[0]), ("function_call", FLAT[1]),
                  ("observation", "1"), ("GPT", "four")),
         [turn(*BOTH), {"role": "tool", "content": "1"}, assistant("four")]),
        (sharegpt(("user", "two"), ("chatgpt", "four"), ("tool_call", json.dumps(FLAT))),
         [turn(*BOTH, content="four")]),
        (messages(reply(thinking=" a\n", reasoning="a")), [assistant("four") | {"reasoning": "a"}]),
        (messages(reply(content="\n<think>\na\n</think>\n\nfour")),
         [assistant("four") | {"reasoning": "a"}]),
        (messages(reply(content="<think>\n\n</think>\nfour")),
         [assistant("four") | {"reasoning": ""}]),
        (messages(reply(content="a\n</think>\n\nfour")), [assistant("four") | {"reasoning": "a"}]),
        (messages(reply(content="say </think> four")), [assistant("say </think> four")]),
        (messages(turn(ONE), {"role": "tool", "content": None}, reply()),
         [turn(ONE), {"role": "tool", "content": ""}, assistant("four")]),
        (messages(reply(content="write <think>a</think>")), [assistant("write <think>a</think>")]),
        (messages(reply(weight=0.5)), [assistant("four") | {"weight": 0.5}]),
        (messages(reply(loss_scale=0.0)), [without_weight("four")]),
        (messages(reply(trainable=0, weight=0, train=False)), [without_weight("four")]),
        (messages(reply(weight=1, train=True, loss=True, trainable=1)), [assistant("four")]),
        ({"instruction": "two", "output": "four", "reasoning": "a"},
         [assistant("four") | {"reasoning": "a"}]),
        ({"prompt": "two", "completion": [reply(content=None, tool_calls=FLAT)]}, [turn(*BOTH)]),
    ],
)  # fmt: skip
def test_calls_thoughts_and_weights(fields: dict[str, Any], expected: list[Message]) -> None:
    found = parse(fields)
    assert found.messages == [user("two"), *expected]
    assert found.unknown == []


@pytest.mark.parametrize(
    "row",
    [{"tools": [ADD]}, {"tools": json.dumps([ADD])}, {"functions": [ADD["function"]]},
     {"tools": ADD["function"]}, {"tools": [json.dumps(ADD)], "functions": [ADD["function"]]}],
)  # fmt: skip
def test_tools_of_a_row(row: dict[str, Any]) -> None:
    found = parse({"messages": TWO, **row, "chat_template_kwargs": '{"enable_thinking": false}'})
    assert (found.tools, found.template_kwargs) == ([ADD], {"enable_thinking": False})
    assert parse({"instruction": "two", "output": "four", **row}).tools == [ADD]


def test_columns_by_name() -> None:
    row = {"question": "two", "response": "four", "prompt": "an id", "n": 1}
    columns: Any = {"prompt": "question", "completion": "response"}
    found = parse(row, columns=columns)
    assert (found.messages, found.unknown) == (TWO, ["n", "prompt"])
    with pytest.raises(RejectedRow, match=r"columns names `question`, `response`, but the row"):
        parse({"query": "two"}, columns=columns)
    found = parse({"a": "b", "b": "two"}, columns={"prompt": "b", "completion": "a"})
    assert found.messages == [user("two"), assistant("b")]


def test_ids_tell_fields_and_context_apart() -> None:
    rows: list[dict[str, Any]] = [
        {"messages": TWO},
        {"messages": TWO, "tools": [ADD]},
        {"messages": TWO, "chat_template_kwargs": {"a": 1}},
        {"messages": TWO, "system": "S"},
        messages(reply(reasoning="x")),
        *(messages(reply(weight=weight)) for weight in (0, 0.5, 2)),
        *(messages(reply(tool_calls=[call(arguments)])) for arguments in ("{}", '{"a": 1}')),
    ]
    found = [parse(row) for row in rows]
    ids = [conversation_id(c.messages, tools=c.tools, kwargs=c.template_kwargs) for c in found]
    assert len({*ids}) == len(rows)
    assert conversation_id(parse(messages(reply(weight=1))).messages) == ids[0]
    orders = ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert len({conversation_id(parse(messages(turn(("f", o)))).messages) for o in orders}) == 1


def test_an_answer_that_says_nothing_is_none() -> None:
    values: tuple[Any, ...] = ("4", 4, " 4 ", "", " ", True, [], {"a": 1}, None)
    answers = [parse({"messages": TWO, "answer": value}).answer for value in values]
    assert answers == ["4"] * 3 + [None] * 6
