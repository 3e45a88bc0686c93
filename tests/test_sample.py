"""The embedded conversations are frozen, of the described form, and right."""

import hashlib
import json
import re
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from stages.evaluate.generate import is_correct

SAMPLE = Path(__file__).parents[1] / "data/sample"
MARKER = re.compile(r"### (Human|Assistant): ")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    lines = (SAMPLE / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def replies(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The last reply of every usable row, and its answer."""
    usable = []
    for row in rows:
        roles, texts = [MARKER.split(row.get("text") or "")[start::2] for start in (1, 2)]
        answered = len(roles) // 2 * 2
        if answered and roles == (["Human", "Assistant"] * len(roles))[: len(roles)]:
            usable.append((texts[answered - 1], row["answer"]))
    return usable


def test_sample_is_the_file_that_its_page_names():
    digest = hashlib.sha256((SAMPLE / "conversations.jsonl").read_bytes()).hexdigest()
    assert digest in (SAMPLE / "README.md").read_text(encoding="utf-8")


def test_sample_has_the_described_rows(rows, replies):
    texts = [row.get("text") or "" for row in rows]
    languages = Counter(row["language"] for row in rows)
    assert (len(rows), len(languages), len(rows) - len(replies)) == (1623, 10, 8)
    assert 0.5 < languages["en"] / len(rows) < 0.7
    repeated = {text: count for text, count in Counter(texts).items() if text and count > 1}
    assert sum(repeated.values()) - len(repeated) == 15
    openings = Counter(text.split("### Assistant: ")[0] for text in set(texts) if text)
    assert max(openings.values()) == 1
    unanswered = [t for t in texts if t.rfind("### Human: ") > t.rfind("### Assistant: ")]
    assert 0.2 < len(unanswered) / len(rows) < 0.3


def test_sample_replies_are_working_and_an_answer(replies):
    for reply, answer in replies:
        *working, _ = reply.split("\n")
        assert is_correct(reply, answer)
        assert working
        assert all(line.startswith(("→ ", "### ")) for line in working)


def test_sample_equations_are_true(replies):
    text = "\n".join(reply for reply, _ in replies)
    equations = re.findall(r"^→ (\d+) ([-+*/]) (\d+) = (\d+)$", text, re.M)
    assert len(equations) > 300
    for a, sign, b, result in equations:
        left, right = int(a), int(b)
        values = {"+": left + right, "-": left - right, "*": left * right, "/": left / right}
        assert values[sign] == int(result), (a, sign, b, result)


TOOLS = SAMPLE.with_name("sample_tools")


def test_tool_sample_is_what_its_generator_writes(tmp_path):
    digest = hashlib.sha256((TOOLS / "conversations.jsonl").read_bytes()).hexdigest()
    assert digest in (TOOLS / "README.md").read_text(encoding="utf-8")
    script = tmp_path / "generate.py"
    script.write_text((TOOLS / "generate.py").read_text(encoding="utf-8"), encoding="utf-8")
    runpy.run_path(str(script), run_name="__main__")
    assert (tmp_path / "conversations.jsonl").read_bytes() == (
        TOOLS / "conversations.jsonl"
    ).read_bytes()


def test_tool_sample_calls_a_tool_that_it_offers():
    lines = (TOOLS / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    requests = set()
    for row in map(json.loads, lines):
        request, reply, *rest = row["messages"]
        requests.add(request["content"])
        [call] = reply["tool_calls"]
        offered = {tool["function"]["name"]: tool["function"] for tool in row["tools"]}
        required = offered[call["function"]["name"]]["parameters"]["required"]
        arguments = json.loads(call["function"]["arguments"])
        assert [*arguments] == required
        said = request["content"].lower()
        assert all(str(value).lower() in said for value in arguments.values())
        assert [message["role"] for message in rest] in ([], ["tool", "assistant"])
    assert len(requests) == len(lines) == 300
