"""What two programs wrote of the same conversations, row by row and column by column."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq


def difference(ours: Iterable[Path], peer: Iterable[Path]) -> str | None:
    """What differs first, or None.

    The order of rows may differ, and a conversation that is met again counts once.
    """
    here, there = _rows(ours), _rows(peer)
    if missing := here.keys() ^ there.keys():
        return f"{len(missing)} conversations are not in both, the first {min(missing)}"
    for name in next(iter(here.values())).keys() | next(iter(there.values())).keys():
        for identifier, row in here.items():
            if row.get(name) != there[identifier].get(name):
                return f"{name} of {identifier} is not the same"
    return None


def _rows(paths: Iterable[Path]) -> dict[str, dict[str, bytes]]:
    """Of each conversation a digest of every column, by its identifier."""
    found: dict[str, dict[str, bytes]] = {}
    for path in paths:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    found.setdefault(row["conversation_id"], _digests(row))
    return found


def _digests(row: dict[str, Any]) -> dict[str, bytes]:
    row["loss_mask"] = [int(learnt) for learnt in row["loss_mask"]]
    return {
        name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()[:16]
        for name, value in row.items()
    }
