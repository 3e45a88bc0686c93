"""The whole stage: its files and figures, and what they do not depend on."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from stages.prepare import encoding, output
from stages.prepare.__main__ import COMPARED
from stages.prepare.output import SCHEMA, Tally
from stages.shared.chat.conversation import conversation_id
from stages.shared.chat.templates import read_format
from stages.shared.core import files
from tests import tiny, workspace
from tests.prepare.helpers import DEFAULTS, ROWS, Stage, row

OUTS = ("train.parquet", "eval.parquet", "rejected.jsonl", "format.json")


def test_the_data_contract(stage: Stage) -> None:
    figures = stage.prepare(ROWS)
    assert sorted(path.name for path in stage.out.iterdir()) == sorted(OUTS)
    for split in ("train", "eval"):
        table = pq.read_table(stage.out / f"{split}.parquet")
        assert table.schema.equals(SCHEMA)
        rows = table.to_pylist()
        for one in rows:
            assert one["conversation_id"] == conversation_id(one["messages"])
            assert len(one["input_ids"]) == len(one["loss_mask"])
            assert one["loss_mask"][0] is False
            assert one["answer"] == one["messages"][-1]["content"]
            assert one["text_bytes"] == len(one["answer"])
            assert one["language"] == "en"
        lengths = [len(one["input_ids"]) for one in rows]
        assert figures[split] == {
            "conversations": len(rows),
            "tokens": sum(lengths),
            "supervised_tokens": sum(sum(one["loss_mask"]) for one in rows),
            "longest_tokens": max(lengths),
            "languages": {"en": len(rows)},
        }
    assert figures["train"]["conversations"] + figures["eval"]["conversations"] == 20
    assert not stage.questions("train") & stage.questions("eval")


def test_the_format_is_what_the_merged_model_needs(stage: Stage) -> None:
    stage.prepare(ROWS)
    form = read_format(stage.out / "format.json")
    assert (form.template, form.eos_token, form.stop_ids) == ("chatml", "<|im_end|>", [2])
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = form.chat_template
    for one in stage.rows("eval"):
        assert tokenizer.apply_chat_template(one["messages"], tokenize=False) == one["text"]


def test_the_format_has_all_end_tokens_of_the_model(stage: Stage, tmp_path: Path) -> None:
    stage.model = tmp_path / "config.json"
    ends = {"eos_token_id": [2, 0, 9]}  # 9 is a word
    tiny.model().config.save_pretrained(tmp_path)
    stage.model.write_text(json.dumps(json.loads(stage.model.read_text()) | ends))
    stage.prepare(ROWS)
    assert read_format(stage.out / "format.json").stop_ids == [2, 0]


@pytest.mark.parametrize("max_rows", [None, 5])
def test_processes_and_batches_change_no_byte(
    stage: Stage, max_rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*ROWS, row("plus " * 99 + "two"), *ROWS[:3], {"text": "### Human: two", "id": 1}]
    found = []
    for processes, batch in ((1, 1 << 20), (1, 1), (2, 150), (3, 400)):
        monkeypatch.setattr(encoding, "BATCH_BYTES", batch)
        stage.processes = processes
        figures = stage.prepare(rows, max_rows=max_rows, max_rejected=0.5)
        found.append((figures, {name: (stage.out / name).read_bytes() for name in OUTS}))
    assert all(one == found[0] for one in found)
    assert found[0][0]["rejected"] == 2


def test_row_groups_are_of_bounded_size(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "GROUP_ROWS", 3)
    found = []
    for processes in (1, 2):
        monkeypatch.setattr(encoding, "BATCH_BYTES", 150)
        stage.processes = processes
        stage.prepare(ROWS)
        found.append((stage.out / "train.parquet").read_bytes())
    metadata = pq.ParquetFile(stage.out / "train.parquet").metadata
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert max(groups) <= 3 < sum(groups)
    assert found[0] == found[1]


def test_memory_is_that_of_a_batch(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "BATCH_BYTES", 40_000)
    live, add = list[int](), Tally.add

    def measure(tally: Tally, *rows: Any) -> None:
        add(tally, *rows)
        gc.collect()
        live.append(tracemalloc.get_traced_memory()[0])

    monkeypatch.setattr(Tally, "add", measure)
    good = [row(f"what is two plus {i}" + " plus two" * 20, str(i)) for i in range(1200)]
    rows = [one for pair in ((g, {"text": "### Human: two"}) for g in good) for one in pair]
    tracemalloc.start()
    stage.prepare(rows, max_rejected=0.5, max_length=512)
    tracemalloc.stop()
    size = (stage.raw / "train.jsonl").stat().st_size
    assert len(live) > 7
    assert live[-2] - live[2] < 0.3 * size  # digests


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_all_processes_in_one_line(
    stage: Stage, tmp_path: Path, number: signal.Signals
) -> None:
    stage.write([row(f"what is two plus {i}" + " plus two" * 60) for i in range(5000)])
    script = tmp_path / "command.py"
    script.write_text(
        '"""A stage."""\n'
        "import sys; from pathlib import Path; sys.path.insert(0, '.')\n"
        "from stages.shared.core.command import run\n"
        "def main():\n"
        "    from stages.prepare.dataset import prepare\n"
        "    from stages.prepare.config import Prepare\n"
        f"    paths = [Path(path) for path in {[str(stage.raw), str(stage.tokenizer)]!r}]\n"
        f"    prepare(*paths, None, Path({str(stage.out)!r}), Prepare(**{DEFAULTS!r}), 2)\n"
        "run(main)\n"
    )
    begun = subprocess.Popen(
        [sys.executable, str(script)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    folder = Path(f"/proc/{begun.pid}/task/{begun.pid}/children")
    while begun.poll() is None and len(workers := folder.read_text().split()) < 3:
        time.sleep(0.05)
    if number == signal.SIGKILL:  # of a worker
        os.kill(int(workers[-1]), number)
    else:
        (os.killpg if number == signal.SIGINT else os.kill)(begun.pid, number)
    _, stderr = begun.communicate(timeout=60)
    told = "error: prepare: one of its processes was killed, mostly for want of memory"
    assert begun.returncode == (1 if number == signal.SIGKILL else 128 + number)
    last = stderr.split("\r")[-1].strip().splitlines()[-1]
    assert last.startswith(told if number == signal.SIGKILL else "stopped")
    assert "Traceback" not in stderr
    assert not [*stage.out.glob("*")]


def test_rejected_rows_say_where_and_why(stage: Stage) -> None:
    bad = [{"text": "### Human: two"}, {"instruction": "x"}, row("two plus " * 99 + "two")]
    deep = '{"text": "### Human: two", "x": ' + "[" * 900 + "]" * 900 + "}"
    lines = [*(json.dumps(r) for r in [*ROWS, *bad]), "", '{"text": "cut', deep]
    text = "\n".join(lines) + "\n"
    figures = stage.prepare(text, max_rejected=0.2)
    assert figures["rejected"] == 5
    assert [(entry["file"], entry["line"], entry["reason"][:20]) for entry in stage.rejected()] == [
        ("my/train.jsonl", 21, "no reply"),
        ("my/train.jsonl", 22, "`output` is missing,"),
        ("my/train.jsonl", 23, "no supervised token "),
        ("my/train.jsonl", 25, "not JSON: the line e"),
        ("my/train.jsonl", 26, "nested too deeply"),
    ]


def test_unknown_fields_are_counted_and_told(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [one | {"id": i} | ({"\ud800": "x"} if i < 3 else {}) for i, one in enumerate(ROWS)]
    assert stage.prepare(ROWS)["unknown_fields"] == {}
    assert stage.prepare(rows)["unknown_fields"] == {"id": 20, r"\ud800": 3}
    told = [line for line in capsys.readouterr().err.splitlines() if "not read" in line]
    assert told == [r"prepare: 2 fields are not read: id (20 rows), \ud800 (3 rows)"]


def test_duplicates_are_removed(stage: Stage) -> None:
    system = ROWS[0] | {"system": "S"}  # differs
    rows = [*ROWS, *ROWS[:5], row("\twhat is two plus 0\r\n", " 2\r\n"), system]
    figures = stage.prepare(rows)
    assert (figures["duplicates"], figures["rows_in"]) == (6, 27)
    assert figures["train"]["conversations"] + figures["eval"]["conversations"] == 21


def test_equal_first_messages_stay_together(stage: Stage) -> None:
    stage.prepare([row(f"question {i % 10}", f"reply {i}") for i in range(100)])
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
    held_out, train = stage.rows("eval"), stage.rows("train")
    figures = stage.prepare(
        [{"text": "### Human: x"}, ROWS[0], *ROWS], max_rows=5, max_rejected=0.1
    )
    assert stage.rows("train") == train[:5]
    assert stage.rows("eval") == held_out
    assert figures["beyond_max_rows"] + 5 == whole["train"]["conversations"]


def test_max_rows_stops_reading_where_there_is_an_eval_split(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "BATCH_BYTES", 1)
    figures = stage.prepare(ROWS[4:], ROWS[:4], max_rows=3)
    assert figures["rows_in"] == 7
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
    rows = [*stage.rows("train"), *stage.rows("eval")]
    cut = [r for r in rows if r["messages"][0]["content"] == "two"]
    assert [(len(r["messages"]), r["answer"]) for r in cut] == [(2, None)]


def test_as_a_user_runs_it(stage: Stage, tmp_path: Path) -> None:
    made = workspace.make(tmp_path / "repo", {"prepare.max_rejected": 0.0})
    (made.root / "data").mkdir(exist_ok=True)
    (made.root / "models/base").mkdir(parents=True)
    tiny.model().config.save_pretrained(made.root / "models/base")
    stage.raw = made.root / "data/raw"
    (made.root / "models/tokenizer").symlink_to(stage.tokenizer)
    stage.out = made.root / "data/prepared"
    figures = stage.prepare(ROWS, max_length=512, eval_fraction=0.1, max_rejected=0.01)
    good = made.stage("prepare")
    assert good.returncode == 0, good.stderr
    written: dict[str, Any] = json.loads((made.root / "reports/prepare.json").read_text("utf-8"))
    details = json.loads((made.root / "reports/details/prepare.json").read_text("utf-8"))
    assert (written, details) == files.split(figures, COMPARED)
    (stage.raw / "train.jsonl").write_text('{"text": "### Human: two"}\n', encoding="utf-8")
    bad = made.stage("prepare")
    assert bad.returncode == 1
    last = bad.stderr.strip().splitlines()[-1]
    assert last == (
        "error: data: 1 of 1 rows are rejected: no reply (1, first my/train.jsonl:1). Mend "
        "the file: docs/data.md shows what is read."
    )
    assert "Traceback" not in bad.stderr
