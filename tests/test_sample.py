"""The embedded conversations: reproducible, of the promised form, and right."""

import contextlib
import io
import json
import re
from collections import Counter
from datetime import date, timedelta
from typing import Any

import pytest

from data.sample import generate
from data.sample.dice import Dice
from stages.evaluate.answers import is_right

WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()  # noqa: SIM905
MARKER = re.compile(r"### (Human|Assistant): ")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    lines = generate.CONVERSATIONS.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def answered(rows: list[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Of every usable row: its last question, that question's reply, the answer, the language."""
    found = []
    for row in rows:
        turns = MARKER.split(row.get("text") or "")[1:]
        roles, contents = turns[::2], turns[1::2]
        if roles and roles[-1] == "Human":
            roles, contents = roles[:-1], contents[:-1]
        if roles and roles == ["Human", "Assistant"] * (len(roles) // 2):
            found.append((contents[-2], contents[-1], row["answer"], row["language"]))
    return found


def test_regenerates_byte_for_byte(tmp_path):
    again = tmp_path / "conversations.jsonl"
    generate.write(again)
    assert again.read_bytes() == generate.CONVERSATIONS.read_bytes()


def test_dice_do_not_depend_on_the_version_of_python():
    dice = Dice(7)
    assert dice.number(0, 999) == 323  # int(random.Random(7).random() * 1000), promised by Python
    assert sorted(dice.sample(range(10), 10)) == list(range(10))
    assert {dice.weighted("ab", (0, 1)) for _ in range(50)} == {"b"}
    assert {dice.number(1, 3) for _ in range(100)} == {1, 2, 3}


def test_enough_rows_in_enough_languages(rows):
    languages = Counter(row["language"] for row in rows)
    assert len(rows) >= 1500
    assert len(languages) >= 8
    assert min(languages.values()) >= 20
    assert 0.5 < languages["en"] / len(rows) < 0.7


def test_has_the_quirks_of_the_raw_form(rows, answered):
    texts = [row.get("text") or "" for row in rows]
    unanswered = [t for t in texts if t.rfind("### Human: ") > t.rfind("### Assistant: ")]
    assert 0.2 < len(unanswered) / len(rows) < 0.3
    assert not any(re.search(r"\n### (Human|Assistant)", text) for text in texts)
    assert sum("###" in reply for _, reply, _, _ in answered) >= 20
    assert max(text.count("### Human: ") for text in texts) == 3


def test_unusable_rows_are_few_and_the_duplicates_are_known(rows, answered):
    unusable = len(rows) - len(answered)
    assert unusable == len(generate.UNUSABLE)
    assert unusable / len(rows) < 0.01
    repeated = Counter(row.get("text") for row in rows)
    assert sum(count - 1 for count in repeated.values()) >= generate.DUPLICATES


def test_no_two_conversations_open_alike(rows):
    distinct = {row["text"] for row in rows if row.get("text")}
    openings = Counter(text.split("### Assistant: ")[0] for text in distinct)
    assert [opening for opening, count in openings.items() if count > 1] == []


def test_every_reply_ends_in_its_answer_and_nothing_else(answered):
    for _, reply, answer, _ in answered:
        assert is_right(reply, answer)
        *working, _ = reply.split("\n")
        assert working
        assert all(line.startswith(("→ ", "### ")) for line in working)


def test_every_equation_is_true(answered):
    equations = [
        match.groups()
        for _, reply, _, _ in answered
        for match in re.finditer(r"→ (\d+) ([-+*/]) (\d+) = (\d+)$", reply, re.M)
    ]
    assert len(equations) > 300
    for left, sign, right, result in equations:
        a, b = int(left), int(right)
        expected = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]
        assert expected == int(result), (left, sign, right)


def test_snippets_print_their_answers(answered):
    checked = 0
    for prompt, _, answer, _ in answered:
        code = prompt.partition("\n")[2].removeprefix("```python\n").removesuffix("\n```")
        if "print(" not in code:
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, {})
        assert printed.getvalue().strip() == answer, prompt
        checked += 1
    assert checked > 80


def test_json_answers_stand_under_the_key_that_is_asked_for(answered):
    checked = 0
    for prompt, reply, answer, _ in answered:
        found = re.search(r'\{"[^{}]*\}', prompt)
        if not found or "print(" in prompt:
            continue
        record = {key: str(value) for key, value in json.loads(found.group()).items()}
        question = prompt.replace(found.group(), "")
        if answer in record:  # which key has this value?
            assert record[answer] in question, prompt
        else:  # what is the value of this key?
            key = reply.removeprefix("→ ").partition(" = ")[0]
            assert key in question, prompt
            assert record[key] == answer, prompt
        checked += 1
    assert checked > 100


def test_english_sums_dates_and_lists_answer_their_questions(answered):
    checked: Counter[str] = Counter()
    for prompt, _, answer, language in answered:
        if language != "en":
            continue
        if match := re.fullmatch(r"What is (\d+) plus (\d+)\?", prompt):
            assert int(answer) == int(match[1]) + int(match[2])
            checked["sum"] += 1
        elif match := re.fullmatch(r"Write (\d+) (\w+ \d{4}) as YYYY-MM-DD\.", prompt):
            written = date.fromisoformat(answer)
            assert f"{written.day} {written:%B %Y}" == f"{match[1]} {match[2]}"
            checked["date"] += 1
        elif match := re.fullmatch(r"What day is (\d+) days after (\w+)\?", prompt):
            monday = date(2024, 1, 1)
            later = monday + timedelta(days=WEEKDAYS.index(match[2]) + int(match[1]))
            assert answer == WEEKDAYS[later.weekday()]
            checked["weekday"] += 1
        elif match := re.fullmatch(r"Sort these numbers: (.+)", prompt):
            assert answer == ", ".join(sorted(match[1].split(", "), key=int))
            checked["numbers"] += 1
        elif match := re.fullmatch(r"Sort alphabetically: (.+)", prompt):
            assert answer == ", ".join(sorted(match[1].split(", "), key=str.casefold))
            checked["words"] += 1
    assert set(checked) == {"sum", "date", "weekday", "numbers", "words"}, checked
