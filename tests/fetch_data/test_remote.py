"""A data set of the hub: its splits by their names, at a full commit."""

from pathlib import Path

import pytest

from stages.fetch_data.remote import choose
from stages.shared.core.errors import UserError
from tests import hub as hubs
from tests.fetch_data.helpers import JSONL, from_hub


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
