"""The whole stage: what becomes of a row, and when too little is left."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.prepare import batches
from stages.shared.chat.templates import read_format
from stages.shared.core.errors import UserError
from tests import tiny, workspace
from tests.prepare.helpers import ROWS, Stage, row


def test_the_format_is_what_the_merged_model_needs(stage: Stage) -> None:
    stage.prepare(ROWS)
    form = read_format(stage.out / "format.json")
    assert (form.template, form.eos_token, form.stop_ids) == ("chatml", "<|im_end|>", [2])
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = form.chat_template
    for one in stage.rows("eval"):
        assert tokenizer.apply_chat_template(one["messages"], tokenize=False) == one["text"]


@pytest.mark.parametrize("max_rows", [None, 5])
def test_batches_change_nothing(
    stage: Stage, max_rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a byte: also not which rows are told as unusable once the split is full."""
    rows = [*ROWS, row("plus " * 99 + "two"), *ROWS[:3], {"text": "### Human: two"}]
    found = []
    for size in (1, 3, 1000):
        monkeypatch.setattr(batches, "ROWS", size)
        figures = stage.prepare(rows, max_rows=max_rows, max_rejected=0.5)
        outs = {path.name: path.read_bytes() for path in stage.out.iterdir()}
        found.append((figures, outs))
    assert found[0] == found[1] == found[2]
    assert found[0][0]["rejected"] == (2 if max_rows is None else 1)


def test_a_turn_without_a_reply_is_dropped(stage: Stage) -> None:
    last = {"text": ROWS[0]["text"] + "### Human: why", "answer": "2"}
    figures = stage.prepare([last, *ROWS[1:]])
    assert (figures["dropped_turns"], figures["rejected"]) == (1, 0)
    found = next(r for s in ("train", "eval") for r in stage.rows(s) if r["answer"] == "2")
    assert [m["role"] for m in found["messages"]] == ["user", "assistant"]


def test_an_answer_goes_with_its_reply(stage: Stage) -> None:
    long = row("two", "four### Human: is it### Assistant: " + "yes " * 40, answer="yes")
    figures = stage.prepare([*ROWS, long])
    assert figures["truncated"] == 1
    cut = [
        r for s in ("train", "eval") for r in stage.rows(s) if len(r["messages"][0]["content"]) == 3
    ]
    assert [(len(r["messages"]), r["answer"]) for r in cut] == [(2, None)]


def test_a_split_in_another_form_than_the_other(stage: Stage) -> None:
    alpaca = [{"instruction": "two", "output": "four"}]
    figures = stage.prepare(ROWS, alpaca)
    assert figures["eval"]["conversations"] == 1


@pytest.mark.parametrize(
    ("train", "changed", "message"),
    [
        (
            [*ROWS, {"text": "x"}],
            {},
            "params.yaml: prepare.max_rejected is 0.0; 1 of 21 rows (4.76%) cannot be used; first "
            "my/train.jsonl, line 21: no reply; most often: no reply (1)",
        ),
        (ROWS, {"format": "alpaca"}, "line 1: `instruction` is missing"),
        (ROWS, {"max_length": 4}, "no supervised token within prepare.max_length = 4 (20)"),
        ([{"prompt": "two"}], {}, "my/train.jsonl: no row of a known form"),
        (ROWS[:1], {}, "none is left for the"),
        ([row("same", str(i)) for i in range(9)], {}, "none is left for the"),
        (ROWS, {"template": "tokenizer"}, "has no chat template"),
    ],
)
def test_too_little_that_can_be_used(
    stage: Stage, train: list[Any], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        stage.prepare(train, **changed)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not any(stage.out.iterdir()) if stage.out.exists() else True


def test_as_a_user_runs_it(stage: Stage, tmp_path: Path) -> None:
    made = workspace.make(tmp_path / "repo", {"prepare.max_rejected": 0.0})
    (made.root / "data").mkdir(exist_ok=True)
    stage.raw = made.root / "data/raw"
    (made.root / "models").mkdir()
    (made.root / "models/tokenizer").symlink_to(stage.tokenizer)
    stage.out = made.root / "data/prepared"
    figures = stage.prepare(ROWS, max_length=512, eval_fraction=0.1, max_rejected=0.01)
    good = made.stage("prepare")
    assert good.returncode == 0, good.stderr
    written = json.loads((made.root / "reports/prepare.json").read_text(encoding="utf-8"))
    assert written == figures
    (stage.raw / "train.jsonl").write_text('{"text": "### Human: two"}\n', encoding="utf-8")
    bad = made.stage("prepare")
    assert bad.returncode == 1
    last = bad.stderr.strip().splitlines()[-1]
    assert last.startswith("error: params.yaml: prepare.max_rejected is 0.0; 1 of 1 rows")
    assert "my/train.jsonl, line 1: no reply" in last
    assert "Traceback" not in bad.stderr
