"""Rows of CSV, Parquet and Arrow as lines of JSON, without type inference."""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from stages.fetch_data.json_lines import TRUNCATED, File, dump, empty, expands, most_bytes
from stages.shared.core import bounds
from stages.shared.core.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_ROWS, _BATCH_BYTES = 256, 64 << 20  # of a table, at most
_SECONDS = 600.0  # of CPU, for such a batch
# Objects whose fields differ from row to row.
_SCHEMALESS = {"tool_calls", "function_call", "tools", "functions", "chat_template_kwargs"}


def read_csv(file: File, name: str, limit: int) -> Iterator[bytes]:
    """CSV records as objects of strings; the separator is the one that splits the header most."""
    csv.field_size_limit(limit)
    text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    read_line, size = partial(text.readline, limit + 1), 0
    first, latest, row = read_line(), [""], list[str]()
    separator = max(",;\t|", key=lambda s: len(next(csv.reader([first], delimiter=s), [])))

    def lines() -> Iterator[str]:
        nonlocal size
        for latest[0] in chain([first], iter(read_line, "")):
            size += len(latest[0])
            if size > limit:
                what = f"a row is longer than prepare.max_row_bytes, {limit:,}"
                advice = "Correct the quotes there, or raise it."
                raise UserError(f"{name}:{rows.line_num + 1}: {what}. {advice}")
            yield latest[0]

    rows = csv.reader(lines(), delimiter=separator, strict=True)
    try:
        header = next(rows, [])
        _require_distinct(header, f"{name}:1")
        for row in filter(None, rows):
            size = 0
            if len(row) == len(header):
                yield dump(dict(zip(header, row, strict=True)))
            else:
                yield dump(f"{len(row)} values under {len(header)} columns")
    except csv.Error as error:
        what = f"is not CSV ({error}). Correct the quotes there."
        if "unexpected end of data" in str(error):
            what = f"ends inside a quoted field. {TRUNCATED}"
        raise UserError(f"{name}:{rows.line_num}: {what}") from None
    if not row:
        raise UserError(f"{name}: has no row below its header. Check what wrote it.")
    if len(row) < len(header) and not latest[0].endswith(("\r", "\n")):
        what = f"the last row has {len(row)} of {len(header)} columns. {TRUNCATED}"
        raise UserError(f"{name}:{rows.line_num}: {what}")


def _require_distinct(names: Iterable[str], where: str) -> None:
    """Refuse duplicate column names, of which readers keep one."""
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(f"{where}: column {name!r} stands there {count} times. Rename one.")


def read_table(file: File, name: str, limit: int) -> Iterator[bytes]:
    """Rows of Parquet, Feather or the Arrow stream of `Dataset.save_to_disk`."""
    batches, count = _table_batches(file, name), 0
    while True:
        try:
            with bounds.limited(_SECONDS):
                rows = next(batches, None)
        except bounds.Exceeded as exceeded:
            what = f"is damaged, or row {count + 1} or one after it {exceeded}"
            raise UserError(f"{name}: {what}. Remove it, or write JSON Lines.") from None
        if rows is None:
            break
        count += len(rows)
        yield from rows
    if not count:
        raise empty(name)


def _table_batches(file: File, name: str) -> Iterator[list[bytes]]:
    import pyarrow as pa  # noqa: PLC0415  (takes a second)
    import pyarrow.parquet as pq  # noqa: PLC0415

    def bounded(rows: int, schema: pa.Schema) -> int:  # a billion nulls take no room in a table
        if rows * len(dump(dict.fromkeys(schema.names, 0))) > most:
            raise expands(name, most)
        return rows

    most = most_bytes(file.seek(0, io.SEEK_END))
    file.seek(0)
    is_parquet = file.read(4) == b"PAR1"
    file.seek(0)
    if is_parquet:
        table = pq.ParquetFile(file)
        groups = (table.metadata.row_group(i) for i in range(table.num_row_groups))
        size = sum(group.total_byte_size for group in groups)
        schema = table.schema_arrow
        rows = _rows_at_once(bounded(table.metadata.num_rows, schema), size)
        batches = table.iter_batches(rows, use_threads=False)
    else:
        try:
            reader = pa.ipc.open_file(file)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        except pa.ArrowInvalid:
            file.seek(0)
            reader = batches = pa.ipc.open_stream(file)
        schema = reader.schema
    _require_distinct(_field_names(schema), name)
    for batch in batches:
        rows = _rows_at_once(bounded(batch.num_rows, schema), batch.nbytes)
        for start in range(0, batch.num_rows, rows):
            yield [*_batch_rows(batch.slice(start, rows))]


def _rows_at_once(rows: int, size: int) -> int:
    """Rows of a batch, of which all have `size` bytes."""
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * rows // max(1, size)))


def _field_names(fields: Iterable["pa.Field"], parent: str = "") -> Iterator[str]:
    """Dotted names of all fields, nested ones included."""
    for field in fields:
        yield parent + field.name
        nested = [field.type.field(i) for i in range(field.type.num_fields)]
        yield from _field_names(nested, f"{parent}{field.name}.")


def _batch_rows(batch: "pa.RecordBatch") -> Iterator[bytes]:
    try:
        batch.validate(full=True)  # a damaged offset would be a segmentation fault
        rows = batch.to_pylist(maps_as_pydicts="strict")
        yield from map(dump, map(_without_nulls, rows))
    except (ValueError, KeyError, OverflowError) as error:  # encoding; duplicate key; date range
        if batch.num_rows == 1:
            yield dump(f"cannot be read: {error}")
            return
        for number in range(batch.num_rows):
            yield from _batch_rows(batch.slice(number, 1))


def _without_nulls(value: Any, inside: bool = False) -> Any:
    """Calls and schemas without null fields: a column gives each of them the fields of all."""
    if isinstance(value, dict):
        pairs = ((k, _without_nulls(v, inside or k in _SCHEMALESS)) for k, v in value.items())
        return {k: v for k, v in pairs if not (inside and v is None)}
    return [_without_nulls(one, inside) for one in value] if isinstance(value, list) else value
