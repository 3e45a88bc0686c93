"""A file or a folder of the user's own: copied as it is, or refused by its name."""

import json
from pathlib import Path

import pytest

from stages.shared.core import files
from stages.shared.core.errors import UserError
from tests.fetch_data.helpers import CSV, JSONL, ROWS, from_file, parquet

REAL = Path("../shared/data/conversations")


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


def test_the_real_conversations(tmp_path: Path) -> None:
    if not REAL.is_dir():
        pytest.skip(f"{REAL} is not there: real conversations are not part of the project")
    source = from_file(REAL, tmp_path / "raw")
    assert [(f["split"], f["bytes"]) for f in source["files"]] == [
        ("train", 7160609),
        ("eval", 530546),
    ]


@pytest.mark.parametrize("name", ["val", "valid", "dev", "validation", "eval", "test"])
def test_what_is_held_out_goes_by_many_names(name: str, tmp_path: Path) -> None:
    """A file that was passed over in silence would be replaced by a part of the training split."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(JSONL)
    (folder / f"{name}.jsonl").write_bytes(JSONL)
    found = from_file(folder, tmp_path / "raw")["files"]
    assert [one["split"] for one in found] == ["train", "eval"]
