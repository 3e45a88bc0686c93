"""What tests of fetch_data share: small files, and the stage into a folder of theirs."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.fetch_data.__main__ import Data, fetch
from stages.shared.core import files
from tests import hub as hubs

ROWS = [{"text": f"### Human: {n}?### Assistant: é {n}"} for n in range(4)]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
CSV = b'text,answer\n"one, ""two""\nthree",3\nfour,4\n'


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
