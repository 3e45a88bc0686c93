"""Sources: the splits of a file, of a folder and of a data set on the hub."""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.fetch_data.sources import choose
from stages.shared.core import files
from stages.shared.core.errors import UserError
from tests import hub as hubs
from tests.fetch_data.helpers import CSV, JSONL, ROWS, from_file, from_hub, parquet, rows

CARD = b"""---
configs:
- {config_name: a, data_files: [{split: train, path: a/*.json}, {split: test, path: t/*}]}
- {config_name: b, data_files: b.json}
---
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[hubs.Hub]:
    with hubs.serve_here(monkeypatch, tmp_path) as hub:
        yield hub


def taken(tmp_path: Path, contents: dict[str, bytes], config: str | None = None) -> list[Any]:
    """The entries of source.json for a folder with these files."""
    (tmp_path / "mine").mkdir(exist_ok=True)
    for name, content in contents.items():
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return from_file(tmp_path / "mine", tmp_path / "raw", config=config)["files"]


def listed(tmp_path: Path, contents: dict[str, bytes]) -> list[tuple[str, str, int, str]]:
    """The split, name, first line and unit of each file that is taken from a folder."""
    root = f"{tmp_path}/mine/"
    return [
        (f["split"], f["name"].removeprefix(root), f["first_line"], f["counted_in"])
        for f in taken(tmp_path, contents)
    ]


def test_file_is_copied_and_described(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(JSONL)
    source = from_file(path, tmp_path / "raw")
    copy = tmp_path / "raw/train.jsonl"
    assert copy.read_bytes() == JSONL
    assert copy.stat().st_ino != path.stat().st_ino
    described: dict[str, Any] = {"split": "train", "name": str(path), "sha256": files.sha256(path)}
    described |= {"bytes": len(JSONL), "first_line": 1, "counted_in": "line"}
    assert source == {"source": "file", "files": [described]}


@pytest.mark.parametrize("name", ["val", "valid", "dev", "validation", "eval", "test"])
def test_held_out_rows_go_by_many_names(name: str, tmp_path: Path) -> None:
    """A file that was passed over in silence would be replaced by a part of the training split."""
    contents = {"train.csv": CSV, f"{name}.jsonl.gz": gzip.compress(JSONL), "README.md": b"mine"}
    expected = [("train", "train.csv", 1, "row"), ("eval", f"{name}.jsonl.gz", 1, "line")]
    assert listed(tmp_path, contents) == expected


def test_shards_are_joined_in_order(tmp_path: Path) -> None:
    names = ["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001-0a1b"]
    names = [f"data/{name}.parquet" for name in names]
    contents = dict(zip(names, map(parquet, (ROWS[:1], ROWS[1:], ROWS)), strict=True))
    lines = [("train", names[0], 1, "row"), ("train", names[1], 2, "row")]
    assert listed(tmp_path, contents) == [*lines, ("eval", names[2], 1, "row")]
    assert rows(tmp_path / "raw/train.jsonl") == ROWS == rows(tmp_path / "raw/eval.jsonl")


def test_shards_of_lines_are_joined_at_a_newline(tmp_path: Path) -> None:
    taken = listed(tmp_path, {f"train-{n}.jsonl": JSONL.rstrip() for n in (0, 1)})
    assert [first for _, _, first, _ in taken] == [1, 5]
    assert (tmp_path / "raw/train.jsonl").read_bytes() == JSONL + JSONL.rstrip()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["oasst.jsonl", "code.csv", "README.md", ".git/a"], ["code", "oasst"]),
        (["b-0.jsonl", "b-1.jsonl", "a/x.json", "a/LICENSE.json"], ["a", "a", "b", "b"]),
        (["a/data/train-00000-of-00001.jsonl", "a/README.md", "b/train.json", "b/eval.json"],
         ["a", "b", "b"]),
        (["b/train.json", "b/test.json", "a1.json", "c.json"], ["a", "c", "b", "b"]),
        (["data/train-00000-of-00001.jsonl", "README.md"], [None]),
        (["oasst_train.jsonl", "oasst_test.jsonl"], [None, None]),
        (["part-0001.jsonl", "part-0002.jsonl"], [None, None]),
        (["a/x.json", "t/x.json", "b.json", "README.md"], [None, None]),
        (["data-00000-of-00001.json", "dataset_info.json", "state.json"], [None]),
    ],
)  # fmt: skip
def test_a_folder_of_sources(names: list[str], expected: list[str | None], tmp_path: Path) -> None:
    """Each entry is one by its name, unless the folder is laid out as one data set."""
    contents = {n: CSV if n.endswith("csv") else JSONL for n in names}
    contents |= {"README.md": CARD} if "t/x.json" in names else {}
    config = "a" if "t/x.json" in names else None
    assert [f.get("source") for f in taken(tmp_path, contents, config)] == expected


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["a.jsonl", "b.jsonl", "notes.txt"], r"cannot read .*notes\.txt"),
        (["a/x.jsonl", "a.jsonl", "b.jsonl"], "has two sources a"),
        (["train.jsonl", "train.csv"], "mine: .*could be one"),
        (["eval.jsonl"], "mine: has no"),
        ([], "mine: (has no|splits not)"),
    ],
)
def test_folder_that_is_unclear_is_refused(names: list[str], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        taken(tmp_path, dict.fromkeys(names, JSONL))


def test_folder_in_which_dvc_sees_no_change_is_refused(tmp_path: Path) -> None:
    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_bytes(JSONL)
    (tmp_path / "mine/b").symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match="b: is a link to a folder"):
        from_file(tmp_path / "mine", tmp_path / "raw")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("none.jsonl", "is no file or folder"), ("a.txt", r"cannot read .*\.jsonl \.json \.csv")],
)
def test_path_without_data_is_refused(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=rf"data\.path: .*{reason}"):
        from_file(tmp_path / name, tmp_path / "raw")


def test_hub_gives_its_splits(
    hub: hubs.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["openassistant_best_replies_train.jsonl", "openassistant_best_replies_eval.jsonl"]
    hub.repositories["datasets/me/set"] = {
        **dict.fromkeys(names, JSONL),
        "README.md": b"a set",
        "image.png": b"",
    }
    (tmp_path / "me/set").mkdir(parents=True)  # does not stand in for the hub
    (tmp_path / "me/set/train.jsonl").write_bytes(b'{"text": "local"}\n')
    monkeypatch.chdir(tmp_path)
    source = from_hub(tmp_path / "raw")
    assert (tmp_path / "raw/train.jsonl").read_bytes() == JSONL
    assert (source["repo"], source["revision"]) == ("me/set", hubs.COMMIT)
    assert [f["name"] for f in source["files"]] == names
    assert "image.png" not in hub.fetched()


def test_configuration_is_chosen_by_name(hub: hubs.Hub, tmp_path: Path) -> None:
    names = ["a/x.json", "t/x.json", "b.json"]
    hub.repositories["datasets/me/set"] = {"README.md": CARD, **dict.fromkeys(names, JSONL)}
    for config in (None, "c"):
        with pytest.raises(UserError, match=rf"data\.config: is {config!r}; .* has a, b\. Choose"):
            from_hub(tmp_path / "raw", config=config)
    for config, expected in {"a": names[:2], "b": names[2:]}.items():
        source = from_hub(tmp_path / "raw", config=config)
        assert [f["name"] for f in source["files"]] == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["alpaca.json", "dataset_infos.json", "README.md"], {"train": ["alpaca.json"]}),
        (["data/train.csv", "dev.csv"], {"train": ["data/train.csv"], "eval": ["dev.csv"]}),
        (["train/a.jsonl", "test/a.jsonl"], {"train": ["train/a.jsonl"], "eval": ["test/a.jsonl"]}),
        (["restrained.json"], {"train": ["restrained.json"]}),
        (["train-train.json"], {"train": ["train-train.json"]}),
        (["a-1-of-2.csv", "a-0-of-2.csv"], {"train": ["a-0-of-2.csv", "a-1-of-2.csv"]}),
    ],
)
def test_splits_are_made_out_by_name(names: list[str], expected: dict[str, list[str]]) -> None:
    assert choose(names, Path("none"), None, "here") == {"eval": [], **expected}


@pytest.mark.parametrize(
    ("name", "card", "reason"),
    [
        ("README.md", "", "splits not found"),
        ("a.txt", "", "cannot read a.txt"),
        ("test.json", "", "no one split train, but test"),
        ("train-00000-of-00002.csv", "", "has 1 shards of train of 00002"),
        ("train_test.json", "", "by name in train and test"),
        ("a.json", "---\nx: [\n---\n", "splits not found"),
        ("a.json", "---\nconfigs: [{config_name: a, data_files: OUT}]\n---\n", "would leave its"),
    ],
)
def test_unclear_data_sets_are_refused(name: str, card: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "out.json").touch()
    (tmp_path / "README.md").write_text(card.replace("OUT", str(tmp_path / "out.json")))
    with pytest.raises(UserError, match=reason) as caught:
        choose([name], tmp_path / "README.md", None, "here")
    assert "\n" not in str(caught.value)
