"""Rows of each form become conversations, and the others say why not."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.prepare import guanaco
from stages.prepare.parsing import Form, form_of, parse
from stages.prepare.rows import Row
from stages.shared.chat.conversation import Message, RejectedRow, language_of
from tests.conversations import assistant, system, user

TWO = [user("two"), assistant("four")]


def row(**fields: Any) -> Row:
    return Row(1, fields, None, 0)


@pytest.mark.parametrize(
    ("form", "fields", "messages"),
    [
        ("guanaco", {"text": "### Human: two### Assistant: four"}, TWO),
        ("guanaco", {"text": "### Human: two### Assistant: four### Human: why"}, TWO),
        ("messages", {"messages": TWO}, TWO),
        ("messages", {"messages": [*TWO, user("why")]}, TWO),
        ("messages", {"messages": [system(""), *TWO]}, TWO),
        ("messages", {"messages": [system(" S "), *TWO]}, [system("S"), *TWO]),
        ("messages", {"messages": json.dumps(TWO)}, TWO),
        ("messages", {"messages": [m | {"from": None, "value": None} for m in TWO]}, TWO),
        (
            "messages",
            {
                "conversations": [
                    {"from": "system", "value": "S"},
                    {"from": "human", "value": "two"},
                    {"from": "gpt", "value": "four"},
                ]
            },
            [system("S"), *TWO],
        ),
        ("alpaca", {"instruction": "two", "output": "four"}, TWO),
        ("alpaca", {"instruction": "two", "input": "", "output": "four"}, TWO),
        (
            "alpaca",
            {"instruction": "add", "input": "2, 2", "output": "4"},
            [user("add\n\n2, 2"), assistant("4")],
        ),
    ],
)
def test_each_form(form: Form, fields: dict[str, Any], messages: list[Message]) -> None:
    assert form_of(fields) == form
    assert parse(row(**fields), form).messages == messages


def test_the_forms_that_the_documentation_shows() -> None:
    page = (Path(__file__).parents[2] / "docs/formats.md").read_text(encoding="utf-8")
    shown = [json.loads(line) for line in page.splitlines() if line.startswith("{")]
    forms = [form_of(fields) for fields in shown]
    assert forms == ["guanaco", "messages", "messages", "alpaca"]
    exchange = [user("What is 2 + 2?"), assistant("It is 4.")]
    found = [parse(row(**fields), form).messages for fields, form in zip(shown, forms, strict=True)]
    assert found == [exchange] * 3 + [[user("Add the numbers.\n\n2, 2"), assistant("4")]]


def test_the_turns_that_the_documentation_counts() -> None:
    page = (Path(__file__).parents[2] / "docs/formats.md").read_text(encoding="utf-8")
    [text] = [line for line in page.splitlines() if line.startswith("### Human: How is")]
    assert len(guanaco.parse(text)) == 3


@pytest.mark.parametrize(
    ("form", "fields", "reason"),
    [
        (None, {"prompt": "two", "reply": "four"}, "no known form in prompt, reply"),
        (None, {}, "no known form in an empty row"),
        ("guanaco", {"instruction": "x"}, "no `text` in it; found instruction"),
        ("guanaco", {"text": 4}, "`text` is a number"),
        ("guanaco", {"text": ""}, "no reply"),
        ("guanaco", {"text": "### Human: two"}, "no reply"),
        ("guanaco", {"text": "### Human: ### Assistant: four"}, "turn 1 of the user is empty"),
        ("guanaco", {"text": "### Human: two ### Assistant: four"}, "after a space"),
        ("guanaco", {"text": "### Assistant: four"}, "turn 1 is of role assistant"),
        ("guanaco", {"text": "### Human: \ud800### Assistant: x"}, "half a surrogate pair"),
        ("messages", {"messages": []}, "no reply"),
        ("messages", {"messages": "not json"}, "not JSON"),
        ("messages", {"messages": {"role": "user"}}, "expected a list"),
        ("messages", {"messages": ["two"]}, "message 1 is a text, expected an object"),
        ("messages", {"messages": [{"role": "tool", "content": "x"}]}, "of role 'tool'"),
        ("messages", {"messages": [{"role": "user", "content": None}]}, "holds null"),
        ("messages", {"messages": [*TWO, *TWO, system("S")]}, "turn 5 is of role system"),
        ("messages", {"messages": [*TWO, user("a"), user("b")]}, "no reply after the last turn"),
        (
            "messages",
            {"messages": [user("a"), user("b"), assistant("c")]},
            "turn 2 is of role user",
        ),
        ("alpaca", {"instruction": "two"}, "`output` is missing"),
        ("alpaca", {"instruction": ["two"], "output": "four"}, "`instruction` is a list"),
        ("alpaca", {"instruction": "", "output": "four"}, "turn 1 of the user is empty"),
    ],
)
def test_why_a_row_is_rejected(form: Form | None, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(RejectedRow) as error:
        parse(row(**fields), form)
    assert reason in str(error.value)


def test_the_answer_and_the_language_are_the_sources_own() -> None:
    found = parse(row(messages=TWO, answer="4", language="nl"), "messages")
    assert (found.answer, found.language) == ("4", "nl")
    assert parse(row(messages=TWO, answer=4), "messages").answer == "4"
    assert parse(row(messages=TWO), "messages").answer is None


@pytest.mark.parametrize(
    ("question", "reply", "language"),
    [
        ("What is the capital of France?", "The capital of France is Paris.", "en"),
        ("¿Cuál es la capital de Francia?", "La capital de Francia es París.", "other"),
        ("Wie heißt die Hauptstadt?", "Sie heißt Paris.", "other"),
        ("What is the Russian for yes?", "да, да, да, да, да", "other"),
        ("2 + 2", "4", "other"),
        ("Is the sky blue? 😀", "It is — on most days.", "en"),
    ],
)
def test_the_language_where_the_source_says_none(question: str, reply: str, language: str) -> None:
    assert language_of([system("You are the best."), user(question), assistant(reply)]) == language
    assert parse(row(messages=[user(question), assistant(reply)]), "messages").language == language


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        *(("4", "4"), (4, "4"), (" 4 ", "4"), ("", None), (" ", None), (float("nan"), None)),
        *((True, None), ([], None), ({"a": 1}, None), (None, None)),
    ],
)
def test_an_answer_that_says_nothing_is_none(given: Any, answer: str | None) -> None:
    assert parse(row(messages=TWO, answer=given), "messages").answer == answer


@pytest.mark.parametrize("name", ["answer", "language"])
def test_half_a_surrogate_pair_beside_the_messages_is_told(name: str) -> None:
    with pytest.raises(RejectedRow, match="half a surrogate pair"):
        parse(row(messages=TWO, **{name: "\ud83d"}), "messages")


def test_an_object_is_called_one() -> None:
    with pytest.raises(RejectedRow, match="an object, expected a list"):
        parse(row(messages={"role": ["user"], "content": ["two"]}), "messages")
