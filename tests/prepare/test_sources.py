"""Files of each kind, read row by row with the line that a row begins on."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.prepare import json_rows, sources
from stages.prepare.rows import Row
from stages.prepare.sources import Source
from stages.shared.core.errors import UserError

TEXTS = [{"text": "one"}, {"text": "two\nlines", "answer": "2"}, {"text": "three"}]


def read(path: Path) -> list[Row]:
    return list(Source("train", path, path.name).rows())


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_jsonl(tmp_path: Path) -> None:
    lines = [json.dumps(TEXTS[0]), "", json.dumps(TEXTS[1]), json.dumps(TEXTS[2])]
    rows = read(write(tmp_path, "a.jsonl", "\ufeff" + "\n".join(lines)))
    assert [row.fields for row in rows] == TEXTS
    assert [row.line for row in rows] == [1, 3, 4]
    assert rows[-1].position == (tmp_path / "a.jsonl").stat().st_size


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "cut', "not JSON (Unterminated string starting at: column 10)"),
        (b'["text"]', "not an object but a list: ['text']"),
        (b"4", "not an object but a number: 4"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not JSON that can be read"),
    ],
)
def test_a_line_that_is_no_row_has_a_problem(tmp_path: Path, line: bytes, problem: str) -> None:
    content = b'{"text": "one"}\n' + line + b'\n{"text": "two", "answer": null}\n'
    before, bad, after = read(write(tmp_path, "a.jsonl", content))
    assert before.problem is None
    assert bad.line == 2
    assert problem in str(bad.problem)
    assert after.fields == {"text": "two"}


@pytest.mark.parametrize("indent", [None, 2])
def test_json(tmp_path: Path, indent: int | None) -> None:
    text = json.dumps(TEXTS, indent=indent)
    rows = read(write(tmp_path, "a.json", text))
    assert [row.fields for row in rows] == TEXTS
    assert [row.line for row in rows] == ([1, 1, 1] if indent is None else [2, 5, 9])


def test_json_longer_than_its_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "_CHUNK", 7)
    rows = read(write(tmp_path, "a.json", " \n" * 20 + json.dumps(TEXTS, indent=1) + "\n" * 20))
    assert [row.fields for row in rows] == TEXTS
    assert [row.line for row in rows] == [22, 25, 29]


def test_an_empty_list_has_no_rows(tmp_path: Path) -> None:
    assert read(write(tmp_path, "a.json", " [ ]\n")) == []


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ('{"data": []}', "line 1: '{' where a list begins"),
        ("", "line 1: the end of the file where a list begins"),
        ('[{"text": "a"}\n{"text": "b"}]', "line 2: '{' after a row"),
        ('[{"text": "a"},\n{"text": "b', "line 2: not JSON"),
        ('[{"text": "a"},\n', "line 2: not JSON"),
        ('[{"text": "a"}', "line 1: the end of the file after a row"),
    ],
)
def test_json_that_is_no_list(tmp_path: Path, content: str, found: str) -> None:
    with pytest.raises(UserError) as error:
        read(write(tmp_path, "a.json", content))
    assert f"a.json, {found}" in str(error.value)
    assert "expected a list of objects" in str(error.value)


def test_a_row_of_json_that_is_no_object(tmp_path: Path) -> None:
    good, bad = read(write(tmp_path, "a.json", '[{"text": "a"},\n"b"]'))
    assert good.problem is None
    assert (bad.line, bad.problem) == (2, "not an object but a text: 'b'")


def test_csv(tmp_path: Path) -> None:
    content = 'text,answer\none,\n\n"two\nlines",2\n"three",\n'
    rows = read(write(tmp_path, "a.csv", content))
    assert [row.fields for row in rows] == TEXTS
    assert [row.line for row in rows] == [2, 4, 6]


def test_csv_rows_of_another_width(tmp_path: Path) -> None:
    rows = read(write(tmp_path, "a.csv", "text,answer\none\ntwo,2,3\n"))
    assert [row.problem for row in rows] == [
        "1 values under 2 columns",
        "3 values under 2 columns",
    ]


def test_csv_with_a_quote_that_nothing_closes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.csv, line 3: not CSV"):
        read(write(tmp_path, "a.csv", 'text,answer\none,1\n"two,2\n'))


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["one", None], "other": [1, 2]}), tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet")
    assert [(row.line, row.fields) for row in rows] == [(1, {"text": "one"}), (2, {})]


def test_messages_in_parquet(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "two"}, {"role": "assistant", "content": "four"}]
    pq.write_table(pa.table({"messages": [messages]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[0].fields == {"messages": messages}


def test_damage_behind_an_intact_footer(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"one {n}" * 50 for n in range(500)]}), path)
    content = bytearray(path.read_bytes())
    content[200:1200] = bytes(1000)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet: not parquet"):
        read(path)


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.parquet: not parquet"):
        read(write(tmp_path, "a.parquet", "PAR1 but not really"))


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_columns_of_no_use(tmp_path: Path, name: str) -> None:
    table: dict[str, Any] = {"question": ["two"], "reply": ["four"]}
    if name == "a.csv":
        write(tmp_path, name, "question,reply\ntwo,four\n")
    else:
        pq.write_table(pa.table(table), tmp_path / name)
    with pytest.raises(UserError, match="its columns are question, reply; expected one of text"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"), [("a.csv", "text\n\xff\n"), ("a.json", '[{"text": "\xff"}]')]
)
def test_another_encoding(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(UserError, match=f"{name}: not UTF-8"):
        read(write(tmp_path, name, content.encode("latin-1")))


def test_the_users_name_of_a_file_is_kept(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", "{}\n")
    write(tmp_path, "eval.jsonl", "{}\n")
    listed = [
        {"split": "train", "name": "train-1.jsonl"},
        {"split": "train", "name": "train-2.jsonl"},
        {"split": "eval", "name": "my/test.jsonl"},
    ]
    write(tmp_path, "source.json", json.dumps({"source": "file", "files": listed}))
    found = sources.find(tmp_path)
    assert found["eval"].name == "my/test.jsonl"
    assert found["train"].name == str(tmp_path / "train.jsonl")  # two shards in one file


def test_a_folder_that_fetch_data_did_not_write(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `dvc repro fetch_data`"):
        sources.find(tmp_path)
