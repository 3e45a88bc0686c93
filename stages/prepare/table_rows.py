"""Rows of .csv and .parquet files."""

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stages.prepare.rows import Row, fault, row_of
from stages.shared.core.errors import UserError

FORM_FIELDS = ("text", "messages", "conversations", "instruction")  # one of them makes a form
FIELDS = (*FORM_FIELDS, "input", "output", "answer", "language")


def read_csv(path: Path, name: str) -> Iterator[Row]:
    """A header, then a row a record, which may span lines.

    Raises:
        UserError: its quotes do not pair, or no column is of use.
    """
    csv.field_size_limit(2**31 - 1)
    advice = "expected comma-separated values with a header and quotes in pairs; mend the file"
    with path.open("rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            _require_form(name, header)
            line = reader.line_num + 1
            for values in reader:
                if values:
                    yield _csv_row(line, header, values, raw.tell())
                line = reader.line_num + 1
        except csv.Error as error:
            raise fault(name, reader.line_num, f"not CSV ({error})", advice) from None


def _csv_row(line: int, header: list[str], values: list[str], position: int) -> Row:
    if len(values) != len(header):
        problem = f"{len(values)} values under {len(header)} columns"
        return Row(line, {}, problem, position)
    # CSV has no null: an empty value says nothing.
    fields = {k: v for k, v in zip(header, values, strict=True) if v}
    return Row(line, fields, None, position)


def read_parquet(path: Path, name: str) -> Iterator[Row]:
    """Rows in batches; only the columns of use are read.

    Raises:
        UserError: it is not parquet, or no column is of use.
    """
    size = path.stat().st_size
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            _require_form(name, columns)
            known = [name for name in columns if name in FIELDS]
            rows, number = max(file.metadata.num_rows, 1), 0
            for batch in file.iter_batches(batch_size=256, columns=known):
                for value in batch.to_pylist():
                    number += 1
                    yield row_of(number, value, size * number // rows)
    except (pa.ArrowException, ValueError, OverflowError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # of the disk, and not of what is on it
            raise
        reason = str(error).partition("\n")[0]
        raise UserError(f"{name}: not parquet ({reason}); write the file again") from None


def _require_form(name: str, columns: Iterable[str]) -> None:
    if not set(FORM_FIELDS) & set(columns):
        raise UserError(
            f"{name}: its columns are {', '.join(columns) or 'none'}; expected one of "
            f"{', '.join(FORM_FIELDS)}; rename a column (docs/formats.md)"
        )
