"""Formats: every value as it was, every row at its number, and damage told in one line."""

import datetime
import decimal
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from stages.shared.core.errors import UserError
from tests.fetch_data.helpers import CSV, JSONL, ROWS, arrow, from_file, parquet, rows

# What readers that infer types are known to change.
AWKWARD: dict[str, Any] = {
    "date": "2024-01-01",
    "zeros": "007",
    "na": "NA",
    "null": "null",
    "big": str(2**70),
    "line": "a\r\nb\u2028c\x85d",
    "empty": "",
    "quote": 'say "é"',
}


def fetched(tmp_path: Path, name: str, content: bytes) -> bytes:
    (tmp_path / name).write_bytes(content)
    from_file(tmp_path / name, tmp_path / "raw")
    return (tmp_path / "raw/train.jsonl").read_bytes()


def refusal(tmp_path: Path, name: str, content: bytes) -> str:
    """The line that a file with this content ends the stage with; nothing is left behind."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        from_file(tmp_path / name, tmp_path / "out/raw")
    assert list((tmp_path / "out").iterdir()) == []
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(str(tmp_path / name))
    return line.removeprefix(f"{tmp_path}/")


@pytest.mark.parametrize(
    "content",
    [
        JSONL,
        JSONL.rstrip(),
        b"\xef\xbb\xbf" + JSONL,
        JSONL.replace(b"\n", b"\r\n"),
        b"\n"
        + JSONL
        + b'not json\n{"text": broken}\n{"a": "\xe9"}\n[1]\n',  # for `prepare` to reject
        b'{"a": 1.0e5, "a": 99999999999999999999, "b": NaN, "c": "\\ud800"}\n',
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "A.JSON"])
def test_json_lines_keep_every_byte(name: str, content: bytes, tmp_path: Path) -> None:
    if name == "A.JSON" and content.count(b"\n") == 1:
        content += content
    assert fetched(tmp_path, name, content) == content


def test_csv_values_stay_texts(tmp_path: Path) -> None:
    quoted = ['"' + value.replace('"', '""') + '"' for value in AWKWARD.values()]
    content = f"{','.join(AWKWARD)}\r\n{','.join(quoted)}\r\n".encode()
    fetched(tmp_path, "a.csv", content)
    assert rows(tmp_path / "raw/train.jsonl") == [AWKWARD]
    assert rows(tmp_path / "raw/train.jsonl")[0]["zeros"] == "007"


def test_json_items_keep_their_spelling(tmp_path: Path) -> None:
    items = [
        '{"date": "2024-01-01", "n": 99999999999999999999999, "f": 1.10, "e": 1E400}',
        '{"a": 1, "a": 2, "u": "\\u00e9\\ud800"}',
        "7",
        '"x"',
    ]
    content = "\ufeff[" + ",\n".join(items).replace(", ", ",\n  ") + "\n]\n"
    written = fetched(tmp_path, "a.json", content.encode()).decode().splitlines()
    assert [line.replace(" ", "") for line in written] == [i.replace(" ", "") for i in items]


def test_json_items_longer_than_a_chunk(tmp_path: Path) -> None:
    items = [{"text": "é" * 3_000_000}, {"text": "b"}, 12345]
    fetched(tmp_path, "a.json", json.dumps(items, ensure_ascii=False).encode())
    assert rows(tmp_path / "raw/train.jsonl") == items


@pytest.mark.parametrize("kind", ["a.parquet", "stream.arrow", "file.arrow"])
def test_tables_keep_values_and_nesting(kind: str, tmp_path: Path) -> None:
    nested = {"messages": [{"role": "user", "content": "é", "tool_calls": None}], "n": 2**62}
    content = [{**AWKWARD, **nested}, {**AWKWARD, **nested}]
    data = parquet(content) if kind == "a.parquet" else arrow(content, kind == "stream.arrow")
    fetched(tmp_path, kind, data)
    assert rows(tmp_path / "raw/train.jsonl") == content


def test_table_values_without_a_json_type_are_spelled(tmp_path: Path) -> None:
    value = {
        "day": datetime.date(2024, 1, 2),
        "time": datetime.datetime(2024, 1, 2, 3, 4, 5),
        "price": decimal.Decimal("1.10"),
        "text": "é".encode(),
        "image": b"\x89PNG",
        "arguments": [("b", 1), ("a", 2)],
    }
    schema = pa.schema(
        {
            "day": pa.date32(),
            "time": pa.timestamp("us"),
            "price": pa.decimal128(5, 2),
            "text": pa.binary(),
            "image": pa.binary(),
            "arguments": pa.map_(pa.string(), pa.int64()),
        }
    )
    fetched(tmp_path, "a.parquet", parquet(pa.Table.from_pylist([value], schema=schema)))
    assert rows(tmp_path / "raw/train.jsonl") == [
        {
            "day": "2024-01-02",
            "time": "2024-01-02 03:04:05",
            "price": "1.10",
            "text": "é",
            "image": "iVBORw==",
            "arguments": {"b": 1, "a": 2},
        }
    ]


def test_bad_rows_do_not_stop_the_rest(tmp_path: Path) -> None:
    fetched(tmp_path, "a.csv", b"text,answer\none,1\n\ntwo,2,3\n\xc3\xa9\xe9,4\nfive,5\n")
    lines = (tmp_path / "raw/train.jsonl").read_bytes().splitlines()
    assert json.loads(lines[1]) == "3 values under 2 columns"
    assert b"\xc3\xa9\xe9" in lines[2]  # rejected by `prepare`: not UTF-8
    assert json.loads(lines[3]) == {"text": "five", "answer": "5"}
    damaged = pa.array([b"a", b"\xff", b"c"]).cast(pa.binary()).view(pa.string())
    fetched(tmp_path, "a.parquet", parquet(pa.table({"text": damaged})))
    first, bad, last = rows(tmp_path / "raw/train.jsonl")
    assert (first, last) == ({"text": "a"}, {"text": "c"})
    assert bad.startswith("cannot be read: ")
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 4, 8))
    content = arrow([{"text": "aaaa"}, {"text": "bbbb"}], stream=False)
    assert content.count(offsets) == 1
    fetched(tmp_path, "a.arrow", content.replace(offsets, offsets[:8] + b"\xff\xff\xff\x7f"))
    assert rows(tmp_path / "raw/train.jsonl")[1].startswith("cannot be read: ")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv_separator_is_the_headers(separator: str, tmp_path: Path) -> None:
    content = f'instruction{separator}output\nq{separator}"a, b; c\td"\n'
    fetched(tmp_path, "a.csv", content.encode())
    assert rows(tmp_path / "raw/train.jsonl") == [{"instruction": "q", "output": "a, b; c\td"}]


def test_compressed_files_are_read(tmp_path: Path) -> None:
    assert (
        fetched(tmp_path, "a.jsonl.gz", gzip.compress(JSONL[:9]) + gzip.compress(JSONL[9:]))
        == JSONL
    )
    zst = pa.Codec("zstd").compress(JSONL, asbytes=True)
    assert fetched(tmp_path, "a.jsonl.zst", zst) == JSONL
    fetched(tmp_path, "a.csv.gz", gzip.compress(CSV))
    assert len(rows(tmp_path / "raw/train.jsonl")) == 2
    assert "is damaged" in refusal(tmp_path, "b.jsonl.gz", gzip.compress(JSONL * 9)[:-20])
    assert "is damaged" in refusal(tmp_path, "b.json.gz", b"no gzip")
    assert "is damaged" in refusal(tmp_path, "b.csv.zst", zst[:-5])


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        *(("a.jsonl", JSONL.rstrip()[:-cut], "a.jsonl:4: .* truncated") for cut in (1, 5, 20, 30)),
        ("a.json", json.dumps(ROWS, indent=1).encode()[:-20], "ends inside item 4. .* truncated"),
        ("a.parquet", parquet(ROWS)[:-20], "truncated"),
        ("a.csv", CSV + b'"fi', "a.csv:5: ends inside a quoted field. .* truncated"),
        ("a.csv", CSV + b"fi", "the last row has 1 of 2 columns. .* truncated"),
        *((f"a.{kind}", b"", "is empty") for kind in ("jsonl", "json", "csv", "json.gz")),
        ("a.jsonl", b"\n \n", "is empty"),
        ("a.json", b" ", "is empty"),
        ("a.json", b"[ ]", "is empty"),
        ("a.parquet", parquet([]), "is empty"),
        ("a.jsonl", b"hello\nworld\n", "a.jsonl:1: no line is a JSON object"),
        ("a.jsonl", b"[\n1,\n2\n]\n", "Name it .json"),
        ("a.jsonl", b'{"a": 1},\n{"a": 2},\n', r"column 9: ','\). Remove the commas"),
        (
            "a.jsonl",
            b'\n{"a": 1}{"a": 2}\n',
            r"a.jsonl:2: no line is a JSON object \(Extra data, column 9",
        ),
        ("a.json", b'{\n"data": []}', "is no list. Make it a list of objects"),
        ("a.json", b'{"data": [{"a": 1}]}\n', "is no list. Make it a list of objects"),
        ("a.json", b'[{"a": 1}] []', "Extra data at .*, item 1"),
        ("a.json", b'[{"a": 1},', "a.json:1: ends inside item 2"),
        ("a.json", b'[{"a": 1}', "a.json:1: ends inside item 1"),
        ("a.json", b'[{"a": 1}\n, {"b": oops}]', "a.json:2: .* at 'oops.*, item 2"),
        ("a.json", b'[{"a": 1}\n {"b": 2}]', "a.json:2: .* comma .*item 1"),
        ("a.json", b"[" * 100_000, "cannot be read .*item 1"),
        ("a.csv", b"text,answer\n", "no row below its header"),
        ("a.csv", b'text\n"a"b\n', "a.csv:2: is not CSV"),
        ("a.csv", b"text,answer,text\n1,2,3\n", "a.csv:1: column 'text' stands there 2 times"),
        ("a.parquet", b"PAR1", "is damaged"),
        ("a.arrow", b"ARROW1", "is damaged"),
        ("a.parquet", parquet(pa.table([[1], [2]], names=["a", "a"])), "column 'a' stands"),
    ],
)
def test_files_that_are_not_what_they_say(
    name: str, content: bytes, reason: str, tmp_path: Path
) -> None:
    assert re.search(reason, refusal(tmp_path, name, content))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json"])
def test_the_encoding_is_named_with_the_command(name: str, tmp_path: Path) -> None:
    text = '{"text": "“Où ça ?” – 5 €"}\n' * 3
    path, target = tmp_path / name, f"a.utf8{Path(name).suffix}"
    for codec, iconv in {
        "cp1252": "WINDOWS-1252",
        "utf-16": "UTF-16",
        "utf-16-le": "UTF-16LE",
    }.items():
        line = refusal(tmp_path, name, text.encode(codec))
        assert line == (
            f"{name}:1: is not UTF-8. It looks like {iconv}. Convert it: "
            f"iconv -f {iconv} -t UTF-8 {path} > {target}"
        )
    packed = refusal(tmp_path, f"{name}.gz", gzip.compress(b"\n" + text.encode("cp1252")))
    assert packed == f"{name}.gz:2: is not UTF-8. Unpack it and save it as UTF-8."
