"""Files that are empty, cut or of another format: refused before anything else runs."""

import json
from pathlib import Path

import pytest

from stages.shared.core.errors import UserError
from tests.fetch_data.helpers import CSV, JSONL, ROWS, from_file, parquet


def refusal(path: Path, content: bytes, tmp_path: Path) -> str:
    """The line that a file with this content ends the stage with; nothing is left behind."""
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        from_file(path, tmp_path / "out/raw")
    assert list((tmp_path / "out").iterdir()) == []
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(str(path))
    return line


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_an_empty_file_is_refused(name: str, tmp_path: Path) -> None:
    assert "is empty" in refusal(tmp_path / name, b"", tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b"\n \n"),
        ("a.json", b" "),
        ("a.json", b"[]"),
        ("a.parquet", parquet([])),
    ],
)
def test_a_file_without_rows_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    assert "is empty" in refusal(tmp_path / name, content, tmp_path)


@pytest.mark.parametrize("cut", [1, 5, 20, 30])
def test_a_truncated_jsonl_is_refused_at_its_line(cut: int, tmp_path: Path) -> None:
    content = JSONL.rstrip()[:-cut]
    path = tmp_path / "a.jsonl"
    line = refusal(path, content, tmp_path)
    assert line.startswith(f"{path}:4: ")
    assert "truncated" in line


def test_truncated_files_of_the_other_formats_are_refused(tmp_path: Path) -> None:
    cut = json.dumps(ROWS, indent=1).encode()[:-20]
    assert "truncated" in refusal(tmp_path / "a.json", cut, tmp_path)
    assert "truncated" in refusal(tmp_path / "a.parquet", parquet(ROWS)[:-20], tmp_path)
    assert "a.csv:5: ends inside a quoted" in refusal(tmp_path / "a.csv", CSV + b'"fi', tmp_path)
    assert "1 of 2 columns" in refusal(tmp_path / "a.csv", CSV + b"fi", tmp_path)


def test_what_is_not_utf8_is_refused_at_its_byte(tmp_path: Path) -> None:
    content = JSONL + '{"text": "é"}\n'.encode("latin-1")
    line = refusal(tmp_path / "a.jsonl", content, tmp_path)
    assert f":5: byte {content.index(0xE9)} of the file is 0xe9" in line
    assert "iconv" in line
    assert "UTF-8" in refusal(tmp_path / "b.csv", "text\né\n".encode("utf-16"), tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b"hello\nworld\n", "no line holds a JSON object"),
        ("a.jsonl", b"[\n1,\n2\n]\n", "no line holds a JSON object"),
        ("a.json", b'{"data": []}', "one object with the keys data"),
        ("a.json", b'[{"a": 1}, 2]', "item 2 is no object"),
        ("a.json", JSONL, "belongs in a .jsonl file"),
        ("a.json", b"[" * 100_000, "is not|cannot be read|ends inside"),
        ("a.csv", b"text,answer\n", "no row below its header"),
        ("a.csv", b'text\n"a"b\n', "a.csv:2: is not CSV"),
    ],
)
def test_a_file_that_is_not_what_its_name_says(
    name: str, content: bytes, reason: str, tmp_path: Path
) -> None:
    line = refusal(tmp_path / name, content, tmp_path)
    assert any(part in line for part in reason.split("|")), line
