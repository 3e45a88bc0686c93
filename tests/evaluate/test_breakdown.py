"""Calls, thoughts, roles and sources in an evaluation."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.evaluate import breakdown
from stages.evaluate.evaluate import evaluate
from stages.evaluate.generate import Reply
from stages.evaluate.inputs import Evaluate
from stages.shared.chat.conversation import Conversation
from stages.shared.model import loading, packing, scoring
from stages.shared.model.packing import read_examples
from tests import tiny
from tests.prepare.helpers import Stage

CALL = {"name": "f", "arguments": {"x": 1, "y": "two"}}
ARGUMENTS = '{"x": 1, "y": "two"}'
HERMES = '<tool_call>\n{"name": "f", "arguments": {"x": 1, "y": "two"}}\n</tool_call>'
MISTRAL = f'[TOOL_CALLS][{{"name": "f", "arguments": {ARGUMENTS}}}]'
DEEPSEEK = f"<begin>f\n```json\n{ARGUMENTS}\n```<end>"
XML = "<tool_call>f\n<key>x</key><value>1</value></tool_call>"


@pytest.mark.parametrize(
    ("reference", "raw", "named", "exact"),
    [
        (HERMES, HERMES, True, True),
        (HERMES, HERMES.replace(" ", "").replace("two", "two"), True, True),
        (HERMES, f"So. {HERMES}", True, True),
        (HERMES, HERMES.replace('"x": 1, "y": "two"', '"y": "two", "x": 1'), True, True),
        (HERMES, HERMES.replace("1", "2"), True, False),
        (HERMES, HERMES.replace('"f"', '"g"'), False, False),
        (HERMES, f"{HERMES}\n{HERMES}", False, False),
        (HERMES, '<tool_call>\n{"name": "f", "arg', False, False),
        (HERMES, "four", False, False),
        (HERMES, "", False, False),
        (MISTRAL, MISTRAL.replace(": ", ":"), True, True),
        (MISTRAL, MISTRAL.replace("two", "2"), True, False),
        (DEEPSEEK, DEEPSEEK.replace(", ", ",\n  "), True, True),
        (DEEPSEEK, DEEPSEEK.replace("two", "2"), True, False),
        (DEEPSEEK, DEEPSEEK.replace(">f", ">g"), False, False),
        (XML, XML, True, True),
        (XML, XML.replace("1", "2"), False, False),
    ],
)
def test_calls_are_compared_as_json(reference: str, raw: str, named: bool, exact: bool) -> None:
    message: Any = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    row = Conversation([message])
    found = breakdown.calls(row, reference, Reply("", True, raw))
    assert found == {"call_named": named, "call_exact": exact}


def test_calls_come_after_thoughts_and_content() -> None:
    message: Any = {"role": "assistant", "content": "so", "reasoning": "f?", "tool_calls": [CALL]}
    for content in ("so", ""):
        reference = f"<think>\nf?\n</think>\n\n{content}\n{HERMES}"
        varied: Any = {**message, "content": content}
        row = Conversation([varied])
        for raw, exact in ((reference, True), (HERMES, True), ("<think>\nf?", False)):
            found = breakdown.calls(row, reference, Reply("", True, raw))
            assert found["call_exact"] is exact
    assert breakdown.thoughts(row, reference, Reply("", True, "<think>\nno\n</think>")) == {
        "thought_ended": True,
        "thought_characters": 11,
    }
    ended = breakdown.thoughts(row, reference, Reply("", False, "<think>\nno"))
    assert ended == {"thought_ended": False, "thought_characters": 10}


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def rows(start: int) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    return [
        {
            "messages": [
                {"role": "user", "content": f"two {i}"},
                {"role": "assistant", "reasoning_content": "is it", "tool_calls": [call]},
                {"role": "tool", "content": "4"},
                {"role": "assistant", "content": "four"},
            ][: 4 if i % 2 else 2],
            "tools": [TOOL],
        }
        for i in range(start, start + 4)
    ]


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_evaluation_breaks_down_tools_and_thoughts(tmp_path: Path, train_on: str) -> None:
    base = tiny.save(tmp_path / "base")
    stage = Stage(tmp_path, base)
    stage.prepare(rows(0), rows(10), train_on=train_on, max_length=1024)
    settings = Evaluate(generate_rows=4, max_new_tokens=4, prompts=4, seed=0)
    metrics, replies = evaluate("base", base, base, base, stage.out, settings)
    assert metrics["tool_calls"] == {"rows": 2, "name_match": 0.0, "exact_match": 0.0}
    assert metrics["thinking_generated"]["rows"] == 2
    assert ("by_role" in metrics) == (train_on == "all")
    parts = [metrics["thinking"], metrics["answers"]]
    if train_on == "all":
        assert {*metrics["by_role"]} == {"assistant", "template", "tool", "user"}
        parts = [metrics["thinking"], *metrics["by_role"].values()]
    assert sum(part["tokens"] for part in parts) == metrics["tokens"]
    nats = sum(part["tokens"] * part["loss"] for part in parts)
    assert nats / metrics["tokens"] == pytest.approx(metrics["loss"], rel=1e-6)
    assert any('"name": "f"' in answer["reference"] for answer in replies["answers"])
    json.dumps([metrics, replies])


def request(index: int, name: str) -> dict[str, Any]:
    word = {"plus": "is it plus", "times": "what is two"}[name]
    call = {"type": "function", "function": {"name": name, "arguments": '{"x": 4}'}}
    user = {"role": "user", "content": f"{word} {index}"}
    tool = {"type": "function", "function": {"name": name}}
    return {"messages": [user, {"role": "assistant", "tool_calls": [call]}], "tools": [tool]}


def test_training_raises_the_exact_match_of_calls(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base")
    stage = Stage(tmp_path, base)
    each = [request(i, name) for i in range(30) for name in ("plus", "times")]
    stage.prepare(each[:48], each[48:], max_length=1024)
    settings = Evaluate(generate_rows=12, max_new_tokens=60, prompts=0, seed=0)

    def exact_match() -> float:
        metrics, _ = evaluate("base", base, base, base, stage.out, settings)
        return float(metrics["tool_calls"]["exact_match"])

    before = exact_match()
    torch.manual_seed(0)
    model = loading.load_model(base, torch.device("cpu"), torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    examples = read_examples(stage.out / "train.parquet")
    for step in range(60):
        batch = packing.pack(examples[step % 6 :: 6], torch.device("cpu"))
        scoring.negative_log_likelihoods(model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(base)
    assert before == 0
    assert exact_match() >= 0.5
