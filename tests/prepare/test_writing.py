"""The whole stage: the files that it writes, and their figures."""

import json

import numpy as np
import pyarrow.parquet as pq

from stages.prepare.writing import SCHEMA
from stages.shared.chat.conversation import conversation_id
from stages.shared.model.packing import read_examples
from tests.prepare.helpers import ROWS, Stage, row

OUTS = ("train.parquet", "eval.parquet", "rejected.jsonl", "format.json")


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


def test_run_again_it_writes_the_same_bytes(stage: Stage) -> None:
    first = stage.prepare(ROWS)
    before = {name: (stage.out / name).read_bytes() for name in OUTS}
    assert stage.prepare(ROWS) == first
    assert {name: (stage.out / name).read_bytes() for name in OUTS} == before


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


def test_the_languages_of_the_source_are_counted(stage: Stage) -> None:
    rows = [r | {"language": "nl" if i % 2 else "de"} for i, r in enumerate(ROWS)]
    figures = stage.prepare(rows, [row("twee", "vier", language="nl")])
    assert figures["train"]["languages"] == {"de": 10, "nl": 10}
    assert figures["eval"]["languages"] == {"nl": 1}
