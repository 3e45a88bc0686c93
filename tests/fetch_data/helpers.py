"""Small files of every format, and the stage into a folder of the test's own."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.fetch_data.__main__ import Data
from stages.fetch_data.sources import fetch
from stages.shared.core import files
from tests import hub as hubs

ROWS = [{"text": f"### Human: {n}?### Assistant: é {n}"} for n in range(4)]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
CSV = b'text,answer\n"one, ""two""\nthree",3\nfour,4\n'


def parquet(rows: list[dict[str, Any]] | pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def arrow(rows: list[dict[str, Any]], stream: bool) -> bytes:
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def from_file(path: Path, raw: Path, max_row_bytes: int = 10**7, **changes: Any) -> dict[str, Any]:
    """Run the stage; its source.json."""
    values = {"source": "file", "path": str(path), "repo": "me/set", "revision": hubs.COMMIT}
    with files.whole_folder(raw) as partial:
        fetch(Data(**{**values, "config": None, **changes}), partial, max_row_bytes)
    return json.loads((raw / "source.json").read_text())


def from_hub(raw: Path, **changes: Any) -> dict[str, Any]:
    return from_file(Path(), raw, **{"source": "hub", **changes})


def rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]
