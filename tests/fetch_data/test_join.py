"""Shards: one file of all of them, if they are of one table."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from stages.shared.core.errors import UserError
from tests import hub as hubs
from tests.fetch_data.helpers import ROWS, from_hub, parquet


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
