"""fetch_data: what is copied as it is, and what is refused before anything else runs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.fetch_data.__main__ import Data, fetch
from stages.fetch_data.remote import choose
from stages.shared import files
from stages.shared.errors import UserError
from tests import hub as hubs
from tests import workspace

REAL = Path("../shared/data/conversations")
ROWS = [{"text": f"### Human: {n}?### Assistant: é {n}"} for n in range(4)]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
CSV = b'text,answer\n"one, ""two""\nthree",3\nfour,4\n'


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[hubs.Hub]:
    with hubs.serve_here(monkeypatch) as hub:
        yield hub


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def from_file(path: Path, raw: Path) -> dict[str, Any]:
    return fetch_into(raw, Data(source="file", path=str(path), repo="a/b", revision=None))


def from_hub(raw: Path, revision: str | None = hubs.COMMIT, repo: str = "me/set") -> dict[str, Any]:
    return fetch_into(raw, Data(source="hub", path="", repo=repo, revision=revision))


def fetch_into(raw: Path, data: Data) -> dict[str, Any]:
    with files.whole_folder(raw) as partial:
        fetch(data, partial)
    return json.loads((raw / "source.json").read_text())


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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", JSONL),
        ("a.jsonl", JSONL.rstrip()),
        ("a.jsonl", b"\xef\xbb\xbf" + JSONL),
        ("a.jsonl", JSONL + b"not json\n" + b'{"text": broken}\n'),  # rows, for `prepare` to reject
        ("a.json", json.dumps(ROWS, indent=1).encode()),
        ("a.csv", CSV),
        ("a.csv", CSV.rstrip()),
        ("A.PARQUET", parquet(ROWS)),
    ],
)
def test_a_file_is_copied_byte_for_byte(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    source = from_file(path, tmp_path / "raw")
    copy = tmp_path / f"raw/train{path.suffix.lower()}"
    assert copy.read_bytes() == content
    assert copy.stat().st_ino != path.stat().st_ino
    assert source == {
        "source": "file",
        "files": [
            {
                "split": "train",
                "name": str(path),
                "sha256": files.sha256(path),
                "bytes": len(content),
            }
        ],
    }


def test_a_folder_has_a_train_and_may_have_an_eval_split(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(JSONL)
    (folder / "README.md").write_text("mine")
    assert [f["split"] for f in from_file(folder, tmp_path / "raw")["files"]] == ["train"]
    (folder / "test.csv").write_bytes(CSV)
    (folder / "validation.jsonl").write_bytes(JSONL)
    source = from_file(folder, tmp_path / "raw")
    assert [f["name"] for f in source["files"]] == [
        str(folder / "train.jsonl"),
        str(folder / "validation.jsonl"),
    ]
    assert {p.name for p in (tmp_path / "raw").iterdir()} == {
        "train.jsonl",
        "eval.jsonl",
        "source.json",
    }


@pytest.mark.parametrize("names", [["train.jsonl", "train.csv"], ["eval.jsonl"], []])
def test_a_folder_with_no_single_train_file_is_refused(names: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(JSONL)
    with pytest.raises(UserError, match=r"mine: has .*train.*expected"):
        from_file(folder, tmp_path / "raw")


def test_a_path_that_is_no_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.path is .*where nothing is"):
        from_file(tmp_path / "none.jsonl", tmp_path / "raw")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"\.jsonl, \.json, \.csv or \.parquet"):
        from_file(tmp_path / "a.txt", tmp_path / "raw")


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


def test_the_hub_gives_both_splits_as_they_are(hub: hubs.Hub, tmp_path: Path) -> None:
    hub.repositories["datasets/me/set"] = {
        "README.md": b"a set",
        "openassistant_best_replies_train.jsonl": JSONL,
        "openassistant_best_replies_eval.jsonl": JSONL,
    }
    source = from_hub(tmp_path / "raw")
    assert (tmp_path / "raw/train.jsonl").read_bytes() == JSONL
    assert (source["repo"], source["revision"]) == ("me/set", hubs.COMMIT)
    assert [f["name"] for f in source["files"]] == [
        "openassistant_best_replies_train.jsonl",
        "openassistant_best_replies_eval.jsonl",
    ]
    assert not any(request.endswith("README.md") for request in hub.requests)


@pytest.mark.parametrize("extension", ["parquet", "jsonl", "json", "csv"])
def test_all_shards_become_one_file(extension: str, hub: hubs.Hub, tmp_path: Path) -> None:
    def shard(rows: list[dict[str, Any]]) -> bytes:
        if extension == "parquet":
            return parquet(rows)
        if extension == "json":
            return json.dumps(rows).encode()
        lines = [json.dumps(r) for r in rows] if extension == "jsonl" else [r["text"] for r in rows]
        return "\n".join(["text", *lines] if extension == "csv" else lines).encode()

    hub.repositories["datasets/me/set"] = {
        f"data/train-00000-of-00002.{extension}": shard(ROWS[:3]),
        f"data/train-00001-of-00002.{extension}": shard(ROWS[3:]),
        f"data/test-00000-of-00001-0a1b2c.{extension}": shard(ROWS[:1]),
    }
    source = from_hub(tmp_path / "raw")
    assert [f["split"] for f in source["files"]] == ["train", "train", "eval"]
    joined = tmp_path / f"raw/train.{extension}"
    if extension == "parquet":
        assert pq.read_table(joined).to_pylist() == ROWS
    elif extension == "json":
        assert json.loads(joined.read_text()) == ROWS
    elif extension == "jsonl":
        assert [json.loads(line) for line in joined.read_text().splitlines()] == ROWS
    else:
        assert joined.read_text().splitlines() == ["text", *(row["text"] for row in ROWS)]
    first = joined.read_bytes()
    from_hub(tmp_path / "raw")
    assert joined.read_bytes() == first


def test_shards_of_different_tables_are_refused(hub: hubs.Hub, tmp_path: Path) -> None:
    hub.repositories["datasets/me/set"] = {
        "train-00000-of-00002.parquet": parquet([{"text": "a"}]),
        "train-00001-of-00002.parquet": parquet([{"other": "a"}]),
    }
    with pytest.raises(UserError, match="its columns are not those of"):
        from_hub(tmp_path / "raw")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["alpaca.json", "dataset_infos.json", "README.md"], {"train": ["alpaca.json"]}),
        (
            ["data/train.csv", "data/dev.csv"],
            {"train": ["data/train.csv"], "eval": ["data/dev.csv"]},
        ),
        (["train.csv", "train_extra.csv"], {"train": ["train.csv"]}),
        (["train/a.jsonl", "test/a.jsonl"], {"train": ["train/a.jsonl"], "eval": ["test/a.jsonl"]}),
        (["restrained.json"], {"train": ["restrained.json"]}),
    ],
)
def test_the_splits_are_made_out_by_name(names: list[str], expected: dict[str, list[str]]) -> None:
    assert choose(names, "here") == expected


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["README.md", "a.txt"], "no file that can be read"),
        (["a/train.csv", "b/train.csv"], "several tables"),
        (["a.json", "b.json"], "several tables"),
        (["test.json"], "no file that is named train"),
        (["train-00000-of-00002.csv"], "1 of the 2 shards"),
    ],
)
def test_an_ambiguous_data_set_is_refused(names: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        choose(names, "here")


@pytest.mark.parametrize("revision", [None, "main", "0123456", hubs.COMMIT.upper()])
def test_only_a_full_commit_is_a_revision(revision: str | None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.revision is .*40 hex digits.*git ls-remote"):
        from_hub(tmp_path / "raw", revision)


def test_the_stage_ends_in_one_line_and_leaves_the_last_data_alone(tmp_path: Path) -> None:
    space = workspace.make(tmp_path / "space", {"data.path": "mine.jsonl"})
    (space.root / "mine.jsonl").write_bytes(JSONL)
    assert space.stage("fetch_data").returncode == 0
    space.set_params({"data.source": "hub", "data.revision": hubs.COMMIT})
    with hubs.serve() as hub:
        hub.status = 500
        failed = space.stage("fetch_data", env=hub.env)
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"error: {hub.url}: answered 500 Internal Server Error")
    assert failed.stderr.count("\n") == 1
    assert (space.root / "data/raw/train.jsonl").read_bytes() == JSONL
    assert [p.name for p in (space.root / "data").iterdir()] == ["raw"]


def test_the_real_conversations(tmp_path: Path) -> None:
    if not REAL.is_dir():
        pytest.skip(f"{REAL} is not there: real conversations are not part of the project")
    source = from_file(REAL, tmp_path / "raw")
    assert [(f["split"], f["bytes"]) for f in source["files"]] == [
        ("train", 7160609),
        ("eval", 530546),
    ]
