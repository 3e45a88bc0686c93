"""The whole stage on small files: what it writes, counts and refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from stages.prepare import preparing
from stages.prepare.settings import Params, Prepare
from stages.prepare.writing import SCHEMA
from stages.shared import params, prepared
from stages.shared.conversation import conversation_id
from stages.shared.errors import UserError
from stages.shared.examples import read_examples
from tests import tiny, workspace

DEFAULTS: dict[str, Any] = {
    "format": "auto",
    "template": "chatml",
    "train_on": "assistant",
    "max_length": 64,
    "max_rows": None,
    "max_rejected": 0.0,
    "eval_fraction": 0.3,
    "seed": 42,
}
OUTS = ("train.parquet", "eval.parquet", "rejected.jsonl", "format.json")


def row(question: str, reply: str = "four", **more: Any) -> dict[str, Any]:
    return {"text": f"### Human: {question}### Assistant: {reply}", **more}


ROWS = [row(f"what is two plus {i}", str(2 + i), answer=str(2 + i)) for i in range(20)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer().save_pretrained(folder)
    return folder


class Stage:
    """Files that `fetch_data` would leave, and the stage run on them."""

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        self.raw, self.out, self.tokenizer = folder / "raw", folder / "prepared", tokenizer

    def prepare(
        self,
        train: list[Any] | str,
        held_out: list[Any] | None = None,
        **changed: Any,
    ) -> dict[str, Any]:
        self.raw.mkdir(exist_ok=True)
        given = {"train": train} | ({} if held_out is None else {"eval": held_out})
        for split, rows in given.items():
            text = rows if isinstance(rows, str) else "".join(json.dumps(r) + "\n" for r in rows)
            (self.raw / f"{split}.jsonl").write_text(text, encoding="utf-8")
        listed = [{"split": split, "name": f"my/{split}.jsonl"} for split in given]
        (self.raw / "source.json").write_text(json.dumps({"files": listed}), encoding="utf-8")
        wanted = Prepare(**(DEFAULTS | changed))
        return preparing.prepare(self.raw, self.tokenizer, self.out, wanted)

    def rows(self, split: str) -> list[dict[str, Any]]:
        return pq.read_table(self.out / f"{split}.parquet").to_pylist()

    def questions(self, split: str) -> set[str]:
        return {r["messages"][0]["content"] for r in self.rows(split)}

    def rejected(self) -> list[dict[str, Any]]:
        lines = (self.out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture
def stage(tmp_path: Path, tokenizer: Path) -> Stage:
    return Stage(tmp_path, tokenizer)


def test_the_data_contract(stage: Stage) -> None:
    figures = stage.prepare(ROWS)
    assert sorted(p.name for p in stage.out.iterdir()) == sorted(OUTS)
    for split in ("train", "eval"):
        table = pq.read_table(stage.out / f"{split}.parquet")
        assert table.schema.equals(SCHEMA)
        for one in table.to_pylist():
            assert one["conversation_id"] == conversation_id(one["messages"])
            assert len(one["input_ids"]) == len(one["loss_mask"])
            assert one["loss_mask"][0] is False
            assert one["answer"] == one["messages"][-1]["content"]
            assert one["text_bytes"] == len(one["answer"])
            assert one["language"] == "en"
        assert figures[split]["conversations"] == table.num_rows
    assert figures["train"]["conversations"] + figures["eval"]["conversations"] == 20
    assert not stage.questions("train") & stage.questions("eval")


def test_figures_are_those_of_the_files(stage: Stage) -> None:
    figures = stage.prepare(ROWS)
    for split in ("train", "eval"):
        examples = read_examples(stage.out / f"{split}.parquet")
        assert figures[split]["tokens"] == sum(len(e) for e in examples)
        assert figures[split]["supervised_tokens"] == sum(e.supervised_tokens for e in examples)
        assert figures[split]["longest_tokens"] == max(len(e) for e in examples)
        assert all(np.all(e.loss_mask.sum() > 0) for e in examples)


def test_the_format_is_what_the_merged_model_needs(stage: Stage) -> None:
    stage.prepare(ROWS)
    form = prepared.read_format(stage.out / "format.json")
    assert (form.template, form.eos_token, form.stop_ids) == ("chatml", "<|im_end|>", [2])
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = form.chat_template
    for one in stage.rows("eval"):
        assert tokenizer.apply_chat_template(one["messages"], tokenize=False) == one["text"]


def test_run_again_it_writes_the_same_bytes(stage: Stage) -> None:
    first = stage.prepare(ROWS)
    before = {name: (stage.out / name).read_bytes() for name in OUTS}
    assert stage.prepare(ROWS) == first
    assert {name: (stage.out / name).read_bytes() for name in OUTS} == before


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_batches_change_nothing(stage: Stage, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.prepare(ROWS, max_rows=5)
    before = {split: stage.rows(split) for split in ("train", "eval")}
    monkeypatch.setattr(preparing, "_BATCH_ROWS", size)
    stage.prepare(ROWS, max_rows=5)
    assert {split: stage.rows(split) for split in ("train", "eval")} == before


def test_duplicates_are_removed(stage: Stage) -> None:
    figures = stage.prepare([*ROWS, *ROWS[:5], row("\twhat is two plus 0\r\n", " 2\r\n")])
    assert figures["duplicates"] == 6
    assert figures["rows_in"] == 26
    assert figures["train"]["conversations"] + figures["eval"]["conversations"] == 20


def test_equal_first_messages_stay_together(stage: Stage) -> None:
    rows = [row(f"question {i % 10}", f"reply {i}") for i in range(100)]
    stage.prepare(rows)
    questions = {f"question {i}" for i in range(10)}
    assert stage.questions("train") | stage.questions("eval") == questions
    assert not stage.questions("train") & stage.questions("eval")


def test_what_is_held_out_is_taken_out_of_train(stage: Stage) -> None:
    figures = stage.prepare([*ROWS, row("what is two plus 3", "five")], ROWS[:4])
    assert figures["leaked"] == 5
    assert figures["eval"]["conversations"] == 4
    assert figures["train"]["conversations"] == 16
    assert not stage.questions("train") & stage.questions("eval")


def test_max_rows_counts_conversations_that_are_accepted(stage: Stage) -> None:
    whole = stage.prepare(ROWS)
    held_out = stage.rows("eval")
    train = stage.rows("train")
    figures = stage.prepare([{"text": "x"}, ROWS[0], *ROWS], max_rows=5, max_rejected=0.1)
    assert stage.rows("train") == train[:5]
    assert stage.rows("eval") == held_out
    assert figures["beyond_max_rows"] + 5 == whole["train"]["conversations"]


def test_max_rows_stops_reading_where_the_source_has_its_own_eval(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "_BATCH_ROWS", 2)
    figures = stage.prepare(ROWS[4:], ROWS[:4], max_rows=3)
    assert figures["rows_in"] == 8
    assert figures["train"]["conversations"] == 3


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


def test_rejected_rows_say_where_and_why(stage: Stage) -> None:
    bad = [{"text": "### Human: two"}, {"instruction": "x"}, row("two plus " * 99 + "two")]
    text = "\n".join(json.dumps(r) for r in [*ROWS, *bad]) + '\n{"text": "cut\n'
    figures = stage.prepare(text, max_rejected=0.2)
    assert figures["rejected"] == 4
    where = [(entry["file"], entry["line"]) for entry in stage.rejected()]
    assert where == [("my/train.jsonl", line) for line in (21, 22, 23, 24)]
    assert {entry["reason"].split(" (")[0] for entry in stage.rejected()} == {
        "no reply",
        "no `text` in it; found instruction",
        "no supervised token within prepare.max_length = 64",
        "not JSON",
    }


def test_a_split_in_another_form_than_the_other(stage: Stage) -> None:
    alpaca = [{"instruction": "two", "output": "four"}]
    figures = stage.prepare(ROWS, alpaca)
    assert figures["eval"]["conversations"] == 1


def test_the_languages_of_the_source_are_counted(stage: Stage) -> None:
    rows = [r | {"language": "nl" if i % 2 else "de"} for i, r in enumerate(ROWS)]
    figures = stage.prepare(rows, [row("twee", "vier", language="nl")])
    assert figures["train"]["languages"] == {"de": 10, "nl": 10}
    assert figures["eval"]["languages"] == {"nl": 1}


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


def test_a_whole_train_split_that_stands_in_eval(stage: Stage) -> None:
    with pytest.raises(UserError, match=r"none is left for the train split .* 4 of train begin"):
        stage.prepare(ROWS[:4], ROWS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "sharegpt"),
        ("template", "vicuna"),
        ("train_on", "user"),
        ("max_length", 1),
        ("max_length", "512"),
        ("max_rows", 0),
        ("max_rejected", 1.5),
        ("eval_fraction", 0.0),
        ("eval_fraction", 1.0),
        ("seed", -1),
    ],
)
def test_a_parameter_out_of_range(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"params.yaml: prepare.{key} is "):
        params.validate(Params, {"prepare": DEFAULTS | {key: value}})


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
