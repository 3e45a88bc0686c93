"""The shards of a split in one file, in a stream."""

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from stages.fetch_data.part import Part
from stages.shared.core.errors import UserError


def join(parts: list[Part], target: Path) -> None:
    """Copy one file byte for byte, or write several of one format one after the other.

    Raises:
        UserError: the shards do not have the same columns.
    """
    if len(parts) == 1:
        shutil.copyfile(parts[0].path, target)
    else:
        _JOINS[target.suffix](parts, target)


def _join_jsonl(parts: list[Part], target: Path) -> None:
    with target.open("wb") as out:
        for part in parts:
            with part.path.open("rb") as file:
                for line in file:
                    out.write(line if line.endswith(b"\n") else line + b"\n")


def _join_json(parts: list[Part], target: Path) -> None:
    rows = [row for part in parts for row in json.loads(part.path.read_text("utf-8-sig"))]
    with target.open("w", encoding="utf-8") as out:
        json.dump(rows, out, ensure_ascii=False, indent=0)


def _join_csv(parts: list[Part], target: Path) -> None:
    with target.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        header = next(_csv_rows(parts[0]))
        writer.writerow(header)
        for part in parts:
            rows = _csv_rows(part)
            if next(rows) != header:
                raise _different(parts[0], part)
            writer.writerows(rows)


def _csv_rows(part: Part) -> Iterator[list[str]]:
    with part.path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.reader(file)


def _join_parquet(parts: list[Part], target: Path) -> None:
    import pyarrow as pa  # noqa: PLC0415  (only where there is Parquet)
    import pyarrow.parquet as pq  # noqa: PLC0415

    schema = pq.read_schema(parts[0].path).remove_metadata()
    with pq.ParquetWriter(target, schema) as writer:
        for part in parts:
            try:
                for batch in pq.ParquetFile(part.path).iter_batches():
                    writer.write_table(pa.Table.from_batches([batch]).cast(schema))
            except (pa.ArrowException, ValueError) as error:
                raise _different(parts[0], part) from error


_JOINS = {
    ".jsonl": _join_jsonl,
    ".json": _join_json,
    ".csv": _join_csv,
    ".parquet": _join_parquet,
}


def _different(first: Part, other: Part) -> UserError:
    return UserError(
        f"{other.name}: its columns are not those of {first.name}; expected shards of one table; "
        "put the rows into one file yourself and set data.source to file"
    )
