"""Lines of JSON, and where the user's own file has them."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.prepare import rows
from stages.shared.chat.conversation import RejectedRow
from stages.shared.core.errors import UserError


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        (b'{"text": "one"}\n', {"text": "one"}),
        (b'\xef\xbb\xbf {"text": "one"} \r\n', {"text": "one"}),
        (b'{"text": "one", "input": null, "answer": NaN, "n": 0}', {"text": "one", "n": 0}),
    ],
)
def test_a_line_is_an_object(line: bytes, fields: dict[str, Any]) -> None:
    assert rows.parse_line(line) == fields


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "the line ends inside the text that begins in column 10"),
        (b'{"text":', "the line ends too early, column 9"),
        (b'{"a": 1},\n', "a comma after the object, column 9"),
        (b'{"a": 1} {"b": 2}\n', "a second object after the object, column 10"),
        (b'{"a": 1} x', "more text after the object, column 10"),
        (b"{'a': 1}", "Expecting property name enclosed in double quotes, column 2"),
        (b'["text"]', "not an object but a list: ['text']"),
        (b"4", "not an object but a number"),
        ('{"text": "Prix 0 €"}'.encode("cp1252"), "in byte 18, but looks like WINDOWS-1252"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not JSON that can be read"),
        (b'{"a": 1, "a": 2}', "the key `a` stands twice"),
        (b'{"m": [{"content": "a", "content": "b"}]}', "the key `content` stands twice"),
    ],
)
def test_a_line_is_rejected_with_its_fault(line: bytes, reason: str) -> None:
    with pytest.raises(RejectedRow) as error:
        rows.parse_line(line)
    assert reason in str(error.value)


@pytest.mark.parametrize(("max_bytes", "lengths"), [(1000, [4]), (5, [2, 1, 1]), (1, [1] * 4)])
def test_batches_hold_all_lines_with_their_numbers(
    tmp_path: Path, max_bytes: int, lengths: list[int]
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"one\n\nthree\nfour")
    batches = [*rows.read_batches(path, max_bytes)]
    assert [len(lines) for lines, _ in batches] == lengths
    assert sum(size for _, size in batches) == path.stat().st_size
    read = [line for lines, _ in batches for line in lines]
    assert read == [(1, b"one\n"), (2, b"\n"), (3, b"three\n"), (4, b"four")]


def test_the_place_of_a_row_is_that_of_the_users_file(tmp_path: Path) -> None:
    parts = [
        {"split": "train", "name": "a.jsonl", "first_line": 1, "counted_in": "line"},
        {"split": "train", "name": "b.csv", "first_line": 4, "counted_in": "row"},
    ]
    (tmp_path / "source.json").write_text(json.dumps({"files": parts}), encoding="utf-8")
    source = rows.find_sources(tmp_path)["train"]
    places = [source.place(line) for line in (1, 3, 4, 9)]
    assert places == [
        *(("a.jsonl", "line", 1), ("a.jsonl", "line", 3), ("b.csv", "row", 1), ("b.csv", "row", 6))
    ]


def test_a_folder_that_fetch_data_did_not_write(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Run `dvc repro fetch_data`"):
        rows.find_sources(tmp_path)
