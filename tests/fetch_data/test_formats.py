"""Formats: every value as it was, every row at its number, and damage told in one line."""

import datetime
import decimal
import gzip
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from stages.fetch_data import formats, readers
from stages.shared.core.errors import UserError
from tests.fetch_data.helpers import CSV, JSONL, ROWS, arrow, from_file, parquet, rows

# What readers that infer types are known to change.
AWKWARD: dict[str, Any] = {
    "date": "2024-01-01",
    "zeros": "007",
    "na": "NA",
    "big": str(2**70),
    "line": "a\r\nb\u2028c\x85d",
    "empty": "",
    "quote": 'say "é"',
}
NESTED = AWKWARD | {"messages": [{"role": "user", "content": "é", "tool_calls": None}], "n": 2**62}
TYPED = {
    "day": (pa.date32(), datetime.date(2024, 1, 2), "2024-01-02"),
    "time": (pa.timestamp("us"), datetime.datetime(2024, 1, 2, 3, 4, 5), "2024-01-02 03:04:05"),
    "price": (pa.decimal128(5, 2), decimal.Decimal("1.10"), "1.10"),
    "text": (pa.binary(), "é".encode(), "é"),
    "image": (pa.binary(), b"\x89PNG", "iVBORw=="),
    "arguments": (pa.map_(pa.string(), pa.int64()), [("b", 1), ("a", 2)], {"b": 1, "a": 2}),
}


def fetched(tmp_path: Path, name: str, content: bytes) -> bytes:
    (tmp_path / name).write_bytes(content)
    from_file(tmp_path / name, tmp_path / "raw")
    return (tmp_path / "raw/train.jsonl").read_bytes()


def refusal(tmp_path: Path, name: str, content: bytes, **limits: int) -> str:
    """The line that a file with this content ends the stage with; nothing is left behind."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        from_file(tmp_path / name, tmp_path / "out/raw", **limits)
    assert list((tmp_path / "out").iterdir()) == []
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{tmp_path}/")


def pack(name: str, content: bytes) -> bytes:
    if name.endswith(".zst"):
        return pa.Codec("zstd").compress(content, asbytes=True)
    # Of two members, as `cat` makes of two files.
    both = gzip.compress(content[:9], mtime=0) + gzip.compress(content[9:], mtime=0)
    return both if name.endswith(".gz") else content


@pytest.mark.parametrize(
    "content",
    [
        JSONL,
        JSONL.rstrip(),
        b"\xef\xbb\xbf" + JSONL,
        JSONL.replace(b"\n", b"\r\n"),
        b"\n" + JSONL + b'not json\n{"text": broken}\n{"a": "\xe9"}\n[1]\n',  # `prepare` rejects it
        b'{"a": 1.0e5, "a": 99999999999999999999, "b": NaN, "c": "\\ud800"}\n' * 2,
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "A.JSON", "a.jsonl.gz", "a.jsonl.zst"])
def test_json_lines_keep_every_byte(name: str, content: bytes, tmp_path: Path) -> None:
    assert fetched(tmp_path, name, pack(name, content)) == content


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_csv_values_stay_texts(name: str, separator: str, tmp_path: Path) -> None:
    values = {**AWKWARD, "separators": "a, b; c\td|e"}
    quoted = ['"' + value.replace('"', '""') + '"' for value in values.values()]
    content = f"{separator.join(values)}\r\n{separator.join(quoted)}\r\n".encode()
    fetched(tmp_path, name, pack(name, content))
    assert rows(tmp_path / "raw/train.jsonl") == [values]


def test_json_items_keep_their_spelling(tmp_path: Path) -> None:
    items = [
        '{"date": "2024-01-01", "n": 99999999999999999999999, "f": 1.10, "e": 1E400}',
        '{"a": 1, "a": 2, "u": "\\u00e9\\ud800"}',
        json.dumps("é" * 3_000_000, ensure_ascii=False),
        "7",
    ]
    content = "\ufeff[" + ",\n".join(items).replace(", ", ",\n  ") + "\n]\n"
    assert fetched(tmp_path, "a.json", content.encode()).decode().splitlines() == items


DAMAGED = "cannot be read|is damaged"
TABLES = [f"{name}{packed}" for name in ("a.parquet", "a.arrow", "b.arrow")
          for packed in ("", ".gz", ".zst")]  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_tables_keep_values_and_nesting(name: str, tmp_path: Path) -> None:
    content = [NESTED, NESTED]
    data = parquet(content) if "parquet" in name else arrow(content, stream=name.startswith("b"))
    fetched(tmp_path, name, pack(name, data))
    assert rows(tmp_path / "raw/train.jsonl") == content
    assert re.search(DAMAGED, refusal(tmp_path, "x" + name, pack(name, data)[:-9]))


def test_calls_have_no_fields_of_other_rows(tmp_path: Path) -> None:
    """A column of objects gives each the fields of all; an argument that is null stays in text."""
    given: list[dict[str, Any]] = [{"a": 1}, {"b": [{"c": 2}, {"d": "x"}]}, {}]
    content = [{"messages": [{"tool_calls": [{"arguments": one}], "name": None}]} for one in given]
    fetched(tmp_path, "a.parquet", parquet(content))
    assert rows(tmp_path / "raw/train.jsonl") == content
    fetched(tmp_path, "b.parquet", parquet([{"tools": '[{"default": null}]'}]))
    assert rows(tmp_path / "raw/train.jsonl") == [{"tools": '[{"default": null}]'}]


def test_table_values_without_a_json_type_are_spelled(tmp_path: Path) -> None:
    schema = pa.schema({name: kind for name, (kind, _, _) in TYPED.items()})
    row = {name: value for name, (_, value, _) in TYPED.items()}
    fetched(tmp_path, "a.parquet", parquet(pa.Table.from_pylist([row], schema=schema)))
    assert rows(tmp_path / "raw/train.jsonl") == [{n: text for n, (_, _, text) in TYPED.items()}]


def bad_rows() -> dict[str, bytes]:
    """Files of three rows, the second of which cannot be read."""
    text = pa.array([b"a", b"\xff", b"c"]).cast(pa.binary()).view(pa.string())
    table = arrow([{"text": word} for word in ("aaaa", "bbbb", "cccc")], stream=False)
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 4, 8, 12))
    assert table.count(offsets) == 1
    return {
        "a.csv": b"text,answer\none,1\n\ntwo,2,3\nfive,5\n",
        "a.parquet": parquet(pa.table({"text": text})),
        "a.arrow": table.replace(offsets, offsets[:8] + b"\xff\xff\xff\x7f" + offsets[12:]),
    }


@pytest.mark.parametrize("name", bad_rows())
def test_bad_rows_do_not_stop_the_rest(name: str, tmp_path: Path) -> None:
    fetched(tmp_path, name, bad_rows()[name])
    first, bad, *_ = rows(tmp_path / "raw/train.jsonl")
    assert isinstance(first, dict)
    assert re.match("cannot be read: |3 values under 2 columns", bad)


def test_csv_bytes_that_are_not_utf8_are_left_to_prepare(tmp_path: Path) -> None:
    assert b"\xc3\xa9\xe9" in fetched(tmp_path, "a.csv", b"text\n\xc3\xa9\xe9\n")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        *(("a.jsonl", JSONL.rstrip()[:-cut], "a.jsonl:4: .* truncated") for cut in (1, 5, 20, 30)),
        ("a.json", json.dumps(ROWS, indent=1).encode()[:-20], "ends inside item 4. .* truncated"),
        ("a.parquet", parquet(ROWS)[:-20], "cannot be read"),
        ("a.csv", CSV + b'"fi', "a.csv:5: ends inside a quoted field. .* truncated"),
        ("a.csv", CSV + b"fi", "the last row has 1 of 2 columns. .* truncated"),
        ("a.jsonl.gz", gzip.compress(JSONL * 9, mtime=0)[:-20], "cannot be read"),
        ("a.json.gz", b"no gzip", "cannot be read"),
        ("a.csv.zst", pa.Codec("zstd").compress(JSONL, asbytes=True)[:-5], "cannot be read"),
        ("a.parquet", b"PAR1", "cannot be read"),
        ("a.arrow", b"ARROW1", DAMAGED),
        *((f"a.{kind}", b"", "is empty") for kind in ("jsonl", "json", "csv", "json.gz")),
        ("a.jsonl", b"\n \n", "is empty"),
        ("a.json", b"[ ]", "is empty"),
        ("a.parquet", parquet([]), "is empty"),
        ("a.jsonl", b"[\n1,\n2\n]\n", "Name it .json"),
        ("a.json", b'{\n"data": []}', "is no list. Make it a list of objects"),
        ("a.json", b'{"data": [{"a": 1}]}\n', "is no list"),
        ("a.json", b'[{"a": 1}] []', "Extra data at .*, item 1"),
        ("a.json", b'[{"a": 1},', "a.json:1: ends inside item 2"),
        ("a.json", b'[{"a": 1}', "a.json:1: ends inside item 1"),
        ("a.json", b'[{"a": 1}\n, {"b": oops}]', "a.json:2: .* at 'oops.*, item 2"),
        ("a.json", b'[{"a": 1}\n {"b": 2}]', "a.json:2: .* comma .*item 1"),
        ("a.json", b"[" * 100_000, "cannot be read .*item 1"),
        ("a.csv", b"text,answer\n", "no row below its header"),
        ("a.csv", b'text\n"a"b\n', "a.csv:2: is not CSV"),
        ("a.csv", b"text,answer,text\n1,2,3\n", "a.csv:1: column 'text' stands there 2 times"),
        ("a.parquet", parquet(pa.table([[1], [2]], names=["a", "a"])), "column 'a' stands"),
    ],
)
def test_faulty_files_are_told(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    assert re.search(reason, refusal(tmp_path, name, content))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "my ä.json"])
@pytest.mark.parametrize("iconv", ["WINDOWS-1252", "UTF-16", "UTF-16LE"])
def test_encoding_is_named_with_the_command(iconv: str, name: str, tmp_path: Path) -> None:
    content = ('{"text": "“Où ça ?” – 5 €"}\n' * 3).encode(iconv)
    told = refusal(tmp_path, name, content)
    assert told.startswith(f"{name}:1: is not UTF-8. It looks like {iconv}. Convert it: iconv ")
    command = told.partition("Convert it: ")[2]
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    converted = tmp_path / f"{Path(name).stem}.utf8{Path(name).suffix}"
    assert converted.read_text().removeprefix("\ufeff") == content.decode(iconv)
    packed = refusal(tmp_path, f"{name}.gz", gzip.compress(content))
    assert packed == f"{name}.gz:1: is not UTF-8. Unpack it and save it as UTF-8."


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "a.arrow"])
def test_long_row_becomes_its_reason(name: str, tmp_path: Path) -> None:
    made = [ROWS[0], {"text": "a" * 5000}, ROWS[1]]
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in made)
    tables = {".parquet": parquet(made), ".arrow": arrow(made, stream=True)}
    data = {**tables, ".json": json.dumps(made).encode()}.get(Path(name).suffix, lines)
    (tmp_path / name).write_bytes(pack(name, data))
    from_file(tmp_path / name, tmp_path / "raw", max_row_bytes=4000 if name != "a.json" else 5000)
    first, reason, last = rows(tmp_path / "raw/train.jsonl")
    assert [first, last] == ROWS[:2]
    assert reason.startswith("longer than prepare.max_row_bytes, ")


X = b"x" * 9000


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b'[{"a": 1},\n{"a": "' + X + b'"}]', "a.json:2: item 2 is longer than"),
        ("a.csv", b"a\n" + X, "a.csv:2: a row is longer than prepare.max_row_bytes"),
        (
            "a.csv",
            b'a\n1\n"' + b"x\n" * 9000,
            "a.csv:150[23]: a row is longer than prepare.max_row",
        ),
        (
            "a.csv",
            b"a,b\n1,2\n" + b'"x\n",' * 9000,
            "a.csv:.*: a row is longer than prepare.max_row",
        ),
    ],
)
def test_row_that_cannot_be_passed_over_ends_in_one_line(
    name: str, content: bytes, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "BLOCK", 1000)
    assert re.search(reason, refusal(tmp_path, name, content, max_row_bytes=3000))


def bomb(rows_of_texts: bool) -> bytes:
    """A few kB of references to one text: rows of 60 GB in all, or one row of 4 GB."""
    words = pa.DictionaryArray.from_arrays(
        pa.array([0] * (60_000 if rows_of_texts else 4000), pa.int32()), pa.array(["x" * 1_000_000])
    )
    column = words if rows_of_texts else pa.ListArray.from_arrays([0, 4000], words)
    return parquet(pa.table({"text": column}))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.parquet", lambda: bomb(False), "row 1 or one after it takes more than 1.1 GB of mem"),
        ("a.parquet", lambda: bomb(True), "expands to more than 0.0 GB"),
        ("a.jsonl.gz", lambda: gzip.compress(JSONL * 200_000), "expands to more than 0.0 GB"),
    ],
)
def test_file_that_expands_without_end_is_refused(
    name: str, content: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "_SMALL", 10**6)
    monkeypatch.setattr(formats, "_EXPANSION", 1)
    packed = content()
    assert len(packed) < 2 * 10**6
    assert re.search(reason, refusal(tmp_path, name, packed))
