"""Guanaco's markers: which begin a turn, and which somebody wrote about."""

import json
from pathlib import Path

import pytest

from stages.prepare import guanaco
from stages.shared.chat.conversation import Message, RejectedRow, drop_unanswered, problem_with
from tests.conversations import assistant, system, user

REAL = Path("../shared/data/conversations")


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (
            "### Human: two?### Assistant: four.### Human: is it### Assistant: yes",
            [user("two?"), assistant("four."), user("is it"), assistant("yes")],
        ),
        ("### Human: a### Assistant: b### Human: c", [user("a"), assistant("b"), user("c")]),
        ("### Human: a\n### Assistant: b\n", [user("a"), assistant("b")]),
        (" ### Human: a### Assistant: b", [user("a"), assistant("b")]),
        ("Be kind.\n### Human: a### Assistant: b", [system("Be kind."), user("a"), assistant("b")]),
        ("### Human: a### Assistant:", [user("a"), assistant("")]),
        ("### Human: a\r\n\r\nb### Assistant: c ", [user("a\n\nb"), assistant("c")]),
        ("no marker at all", [system("no marker at all")]),
        ("", []),
    ],
)
def test_turns(text: str, messages: list[Message]) -> None:
    assert guanaco.parse(text) == messages


@pytest.mark.parametrize(
    "reply",
    [
        "Put ### Human: before the question.",
        "Put `### Human:` before the question.",
        "Write `### Human: two` first.",
        'Write "### Human: two" first.',
        "Write ('### Human: two') first.",
        "Use the marker (### Human: or another).",
        'In Python, f"### Human: {text}" makes it.',
        'In JSON, {"text":"### Human: two"} does.',
        "```### Human: two```",
        "„Das ist “### Human: two” da.",
        "Three parts:\n#### Human: the first\nand more.",
        "### Human:two has no space.",
        "### Steps\n1. add\n### Result\n4",
        "###Human: two",
        "### human: two",
    ],
)
def test_a_marker_inside_a_reply_is_text(reply: str) -> None:
    text = f"### Human: How do I mark a turn?### Assistant: {reply}"
    assert guanaco.parse(text) == [user("How do I mark a turn?"), assistant(reply)]


@pytest.mark.parametrize(
    "end",
    ["?", "。", "ดี", "`ls`", "```\nx = 1\n```", 'the word "rain"', ")", "]", "}", ":(", "C#", "^^",
     "5'10\"", "„Park?“", "x =", "a/", 'He said "so" and "no"', "C", "😀"],
)  # fmt: skip
def test_a_turn_may_end_in_anything(end: str) -> None:
    found = guanaco.parse(f"### Human: What is {end}### Assistant: four")
    assert found == [user(f"What is {end}"), assistant("four")]


@pytest.mark.parametrize(
    "text",
    [
        "### Human: a### Human: b### Assistant: c",
        "### Human: a### Assistant: b### Assistant: c",
        "### Human: a\n### Human: b",
    ],
)
def test_two_turns_of_one_role_are_nobodys_guess(text: str) -> None:
    with pytest.raises(RejectedRow, match="in a row"):
        guanaco.parse(text)


@pytest.mark.parametrize(
    ("name", "rows", "unanswered"), [("eval.jsonl", 259, 64), ("train.jsonl", 5886, 0)]
)
def test_every_real_row_is_a_conversation(name: str, rows: int, unanswered: int) -> None:
    if not (REAL / name).exists():
        pytest.skip(f"{REAL / name} is not there")
    lines = (REAL / name).read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    parsed = [guanaco.parse(text) for text in texts]
    kept = [drop_unanswered(messages) for messages in parsed]
    assert len(parsed) == rows
    assert [problem_with(messages) for messages in kept] == [None] * rows
    assert sum(len(a) < len(b) for a, b in zip(kept, parsed, strict=True)) == unanswered
    # In these files each marker begins a turn, whatever stands before it.
    assert [len(messages) for messages in parsed] == [
        text.count("### Human:") + text.count("### Assistant:") for text in texts
    ]
