"""Sources: the splits of a file, of a folder and of a data set on the hub."""

import gzip
from pathlib import Path

import pytest

from stages.fetch_data.sources import choose
from stages.shared.core import files
from stages.shared.core.errors import UserError
from tests import hub as hubs
from tests.fetch_data.helpers import CSV, JSONL, ROWS, from_file, from_hub, parquet, rows

REAL = Path("../shared/data/conversations")
CARD = """---
configs:
- {config_name: a, data_files: [{split: train, path: a/*.json}, {split: test, path: t/*}]}
- {config_name: b, data_files: b.json}
---
"""


def folder(tmp_path: Path, **contents: bytes) -> Path:
    made = tmp_path / "mine"
    for name, content in contents.items():
        path = made / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    made.mkdir(exist_ok=True)
    return made


def test_a_file_is_copied_and_described(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(JSONL)
    source = from_file(path, tmp_path / "raw")
    copy = tmp_path / "raw/train.jsonl"
    assert copy.read_bytes() == JSONL
    assert copy.stat().st_ino != path.stat().st_ino
    assert source == {
        "source": "file",
        "files": [
            {
                "split": "train",
                "name": str(path),
                "sha256": files.sha256(path),
                "bytes": len(JSONL),
                "first_line": 1,
                "counted_in": "line",
            }
        ],
    }


def test_a_folder_has_a_train_and_may_have_an_eval_file(tmp_path: Path) -> None:
    mine = folder(tmp_path, train_jsonl=JSONL, README_md=b"mine")
    assert [f["split"] for f in from_file(mine, tmp_path / "raw")["files"]] == ["train"]
    (mine / "test.csv").write_bytes(CSV)
    (mine / "validation.jsonl.gz").write_bytes(gzip.compress(JSONL))
    listed = from_file(mine, tmp_path / "raw")["files"]
    assert [Path(f["name"]).name for f in listed] == ["train.jsonl", "validation.jsonl.gz"]
    written = {p.name for p in (tmp_path / "raw").iterdir()}
    assert written == {"train.jsonl", "eval.jsonl", "source.json"}


@pytest.mark.parametrize("name", ["val", "valid", "dev", "validation", "eval", "test"])
def test_held_out_rows_go_by_many_names(name: str, tmp_path: Path) -> None:
    """A file that was passed over in silence would be replaced by a part of the training split."""
    mine = folder(tmp_path, train_jsonl=JSONL, **{f"{name}_jsonl": JSONL})
    assert [f["split"] for f in from_file(mine, tmp_path / "raw")["files"]] == ["train", "eval"]


def test_a_folder_laid_out_as_on_the_hub_is_read(tmp_path: Path) -> None:
    names = ["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001-0a1b"]
    parts = dict(zip(names, (ROWS[:1], ROWS[1:], ROWS), strict=True))
    mine = folder(tmp_path, **{f"data__{n}_parquet": parquet(r) for n, r in parts.items()})
    listed = from_file(mine, tmp_path / "raw")["files"]
    assert [(f["split"], f["first_line"], f["counted_in"]) for f in listed] == [
        ("train", 1, "row"),
        ("train", 2, "row"),
        ("eval", 1, "row"),
    ]
    assert rows(tmp_path / "raw/train.jsonl") == ROWS == rows(tmp_path / "raw/eval.jsonl")


def test_line_numbers_of_shards_begin_anew(tmp_path: Path) -> None:
    mine = folder(tmp_path, **{"train-0_jsonl": JSONL.rstrip(), "train-1_jsonl": JSONL.rstrip()})
    listed = from_file(mine, tmp_path / "raw")["files"]
    assert [f["first_line"] for f in listed] == [1, 5]
    assert (tmp_path / "raw/train.jsonl").read_bytes() == JSONL + JSONL.rstrip()


@pytest.mark.parametrize("names", [["train_jsonl", "train_csv"], ["eval_jsonl"], []])
def test_a_folder_without_one_train_split_is_refused(names: list[str], tmp_path: Path) -> None:
    mine = folder(tmp_path, **dict.fromkeys(names, JSONL))
    with pytest.raises(UserError, match=r"mine: (train.* could be one|has no|its splits)"):
        from_file(mine, tmp_path / "raw")


def test_a_path_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.path: .*is no file or folder"):
        from_file(tmp_path / "none.jsonl", tmp_path / "raw")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"data\.path: cannot read .*\.jsonl \.json \.csv"):
        from_file(tmp_path / "a.txt", tmp_path / "raw")


def test_the_hub_gives_its_splits(hub: hubs.Hub, tmp_path: Path) -> None:
    hub.repositories["datasets/me/set"] = {
        "README.md": b"a set",
        "openassistant_best_replies_train.jsonl": JSONL,
        "openassistant_best_replies_eval.jsonl": JSONL,
        "image.png": b"",
    }
    source = from_hub(tmp_path / "raw")
    assert (tmp_path / "raw/train.jsonl").read_bytes() == JSONL
    assert (source["repo"], source["revision"]) == ("me/set", hubs.COMMIT)
    assert [f["name"] for f in source["files"]] == [
        "openassistant_best_replies_train.jsonl",
        "openassistant_best_replies_eval.jsonl",
    ]
    assert "image.png" not in hub.fetched()


def test_a_configuration_is_chosen_by_name(hub: hubs.Hub, tmp_path: Path) -> None:
    one, other = JSONL[: len(JSONL) // 2], JSONL
    hub.repositories["datasets/me/set"] = {
        "README.md": CARD.encode(),
        "a/x.json": one,
        "t/x.json": one,
        "b.json": other,
    }
    with pytest.raises(UserError, match=r"data\.config: is None; .*me/set has a, b\. Choose"):
        from_hub(tmp_path / "raw")
    with pytest.raises(UserError, match=r"data\.config: is 'c'; .*me/set has a, b\. Choose"):
        from_hub(tmp_path / "raw", config="c")
    listed = from_hub(tmp_path / "raw", config="a")["files"]
    assert [(f["split"], f["name"]) for f in listed] == [
        ("train", "a/x.json"),
        ("eval", "t/x.json"),
    ]
    from_hub(tmp_path / "raw", config="b")
    assert (tmp_path / "raw/train.jsonl").read_bytes() == other


def test_a_local_folder_does_not_stand_in_for_the_hub(
    hub: hubs.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["datasets/me/set"] = {"train.jsonl": JSONL}
    (tmp_path / "me/set").mkdir(parents=True)
    (tmp_path / "me/set/train.jsonl").write_bytes(b'{"text": "local"}\n')
    monkeypatch.chdir(tmp_path)
    from_hub(tmp_path / "raw")
    assert (tmp_path / "raw/train.jsonl").read_bytes() == JSONL


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["alpaca.json", "dataset_infos.json", "README.md"], {"train": ["alpaca.json"]}),
        (["data/train.csv", "dev.csv"], {"train": ["data/train.csv"], "eval": ["dev.csv"]}),
        (["train/a.jsonl", "test/a.jsonl"], {"train": ["train/a.jsonl"], "eval": ["test/a.jsonl"]}),
        (["restrained.json"], {"train": ["restrained.json"]}),
        (["train-train.json"], {"train": ["train-train.json"]}),
        (["a-00001-of-00002.csv", "a-00000-of-00002.csv"], None),
    ],
)
def test_splits_are_made_out_by_name(
    names: list[str], expected: dict[str, list[str]] | None
) -> None:
    assert choose(names, Path("none"), None, "here") == (expected or {"train": sorted(names)})


@pytest.mark.parametrize(
    ("names", "card", "reason"),
    [
        (["README.md"], "", "its splits cannot be made out"),
        (["a.txt"], "", "cannot read a.txt"),
        (["test.json"], "", "no one split train, but test"),
        (["train-00000-of-00002.csv"], "", "has 1 shards of train of 00002"),
        (["train_test.json"], "", "by name in train and test"),
        (["a.json"], "---\nx: [\n---\n", "its splits cannot be made out"),
        (
            ["a.json"],
            "---\nconfigs: [{config_name: a, data_files: OUT}]\n---\n",
            "would leave its folder",
        ),
    ],
)
def test_unclear_data_sets_are_refused(
    names: list[str], card: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "out.json").touch()
    (tmp_path / "README.md").write_text(card.replace("OUT", str(tmp_path / "out.json")))
    with pytest.raises(UserError, match=reason) as caught:
        choose(names, tmp_path / "README.md", None, "here")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("revision", [None, "main", "0123456", hubs.COMMIT.upper()])
def test_only_a_full_commit_is_a_revision(revision: str | None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.revision.*40 hex digits.*git ls-remote"):
        from_hub(tmp_path / "raw", revision)


def test_the_real_conversations(tmp_path: Path) -> None:
    if not REAL.is_dir():
        pytest.skip(f"{REAL} is not there: real conversations are not part of the project")
    source = from_file(REAL, tmp_path / "raw")
    assert [(f["split"], f["bytes"]) for f in source["files"]] == [
        ("train", 7160609),
        ("eval", 530546),
    ]
