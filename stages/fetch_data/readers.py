"""Readers of JSON Lines, JSON, CSV, Parquet and Arrow, as lines of JSON without type inference."""

import base64
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from json import JSONDecodeError
from typing import IO, TYPE_CHECKING, Any

from stages.shared.core import bounds
from stages.shared.core.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

TRUNCATED = "The file looks truncated: fetch or export it again."
BLOCK = 1 << 20  # bytes or characters read at once
_BATCH_ROWS, _BATCH_BYTES = 256, 64 << 20  # of a table, at most
_SECONDS = 600.0  # of CPU, for such a batch
_SPACE = re.compile(r"[ \t\r\n]*")
# Objects whose fields differ from row to row.
_SCHEMALESS = {"tool_calls", "function_call", "tools", "functions", "chat_template_kwargs"}


def dump(value: Any) -> bytes:
    """JSON of a value as a line; bytes as UTF-8 or base64, dates and decimals as strings."""
    return _encode(json.dumps(value, ensure_ascii=False, default=_to_string))


def _encode(line: str) -> bytes:
    return line.encode("utf-8", "surrogateescape") + b"\n"


def _to_string(value: Any) -> str:
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode()
    except UnicodeDecodeError:
        return base64.b64encode(value).decode()


def parse(line: bytes) -> Any:
    """Value of a line of JSON, or its error."""
    try:
        return json.loads(line.decode("utf-8-sig", "replace"))
    except (ValueError, RecursionError) as error:
        return error


def empty(name: str) -> UserError:
    """Error for a file without rows."""
    return UserError(f"{name}: is empty. Check what wrote it.")


def too_long(limit: int) -> bytes:
    """Line in the place of a row of more than `limit` bytes."""
    return dump(f"longer than prepare.max_row_bytes, {limit:,}")


def bounded_lines(file: IO[bytes], limit: int) -> Iterator[bytes]:
    """Lines, with `too_long` in the place of those of more than `limit` bytes."""
    while line := file.readline(limit + 1):
        is_long = len(line) > limit
        while is_long and line and not line.endswith(b"\n"):
            line = file.readline(BLOCK)
        yield too_long(limit) if is_long else line


def read_lines(file: IO[bytes], name: str, limit: int) -> Iterator[bytes]:
    """Lines of a .jsonl, byte for byte; what is wrong in one, `prepare` says."""
    some_object, first, last = False, (0, b""), (0, b"")
    for number, line in enumerate(bounded_lines(file, limit), 1):
        if line.strip():
            last = number, line
            first = first if first[0] else last
            some_object = some_object or isinstance(parse(line), dict)
        yield line
    fault = parse(last[1])
    if isinstance(fault, Exception) and (
        _ends_early(fault) or (some_object and not last[1].endswith(b"\n"))
    ):
        raise UserError(f"{name}:{last[0]}: the last line is not complete JSON. {TRUNCATED}")
    if not some_object and first[1].lstrip().startswith(b"["):
        what = "no line is a JSON object. Name it .json if it is one list."
        raise UserError(f"{name}:{first[0]}: {what}")


def _ends_early(fault: Exception) -> bool:
    """Whether JSON is valid up to a missing end."""
    return isinstance(fault, JSONDecodeError) and (
        not fault.doc[fault.pos :].strip() or fault.msg.startswith("Unterminated string")
    )


def read_items(file: IO[bytes], name: str, limit: int) -> Iterator[bytes]:
    """Items of one JSON list, as spelled there: numbers, escapes, duplicate keys."""
    stream = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    text, at, number, line = "", 0, 0, 1  # `text` begins in `line`; what is before `at` was read

    def read_on() -> bool:
        nonlocal text, at, line
        if not (more := stream.read(max(BLOCK, len(text) - at))):
            return False
        line += text.count("\n", 0, at)
        text, at = text[at:] + more, 0
        return True

    def place() -> str:
        return f"{name}:{line + text.count(chr(10), 0, at)}"

    def next_character() -> str:
        nonlocal at
        while (at := _SPACE.match(text, at).end()) == len(text) and read_on():  # type: ignore[union-attr]
            pass
        return text[at : at + 1]

    def next_item() -> str:
        nonlocal at
        while len(text) - at <= limit and read_on():
            pass
        try:
            _, end = json.JSONDecoder().raw_decode(text, at)
        except JSONDecodeError as error:
            if len(text) - at > limit and _ends_early(error):
                what = f"item {number} is longer than prepare.max_row_bytes, {limit:,}"
                raise UserError(f"{place()}: {what}. Raise it.") from None
            raise
        begin, at = at, end
        return text[begin:end]

    if next_character() != "[":
        raise UserError(f"{name}: is no list. Make it a list of objects, or write one a line.")
    try:
        while number == 0 or next_character() == ",":
            at, number = at + 1, number + 1
            if next_character() == "]" and number == 1:
                raise empty(name)
            yield _encode(re.sub(r"[ \t]*[\r\n][ \t\r\n]*", " ", next_item()))
        if text[at : at + 1] != "]":
            raise JSONDecodeError("Expecting a comma or ]", text, at)
        at += 1
        if next_character():
            raise JSONDecodeError("Extra data", text, at)
    except (ValueError, RecursionError) as error:  # ValueError: also an int of over 4,300 digits
        at = getattr(error, "pos", at)
        reason = f"{getattr(error, 'msg', error)} at {text[at : at + 20]!r}, item {number}"
        what = f"cannot be read ({reason}). Correct it."
        if _ends_early(error):
            what = f"ends inside item {number}. {TRUNCATED}"
        raise UserError(f"{place()}: {what}") from None


def read_csv(file: IO[bytes], name: str, limit: int) -> Iterator[bytes]:
    """CSV records as objects of strings; the separator is the one that splits the header most."""
    csv.field_size_limit(limit)
    text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    read_line = partial(text.readline, limit + 1)
    first, latest, size, last = read_line(), "", 0, list[str]()
    separator = max(",;\t|", key=lambda s: len(next(csv.reader([first], delimiter=s), [])))
    long_row = f"a row is longer than prepare.max_row_bytes, {limit:,}"

    def lines() -> Iterator[str]:
        nonlocal latest, size
        for latest in chain([first], iter(read_line, "")):
            size += len(latest)  # of a record, which quotes may spread over lines
            if size > limit:
                advice = "Correct the quotes there, or raise it."
                raise UserError(f"{name}:{rows.line_num + 1}: {long_row}. {advice}")
            yield latest

    rows = csv.reader(lines(), delimiter=separator, strict=True)
    try:
        header = next(rows, [])
        size = 0
        _require_distinct(header, f"{name}:1")
        for row in rows:
            size, last = 0, row or last
            if not row:
                continue
            if len(row) == len(header):
                yield dump(dict(zip(header, row, strict=True)))
            else:
                yield dump(f"{len(row)} values under {len(header)} columns")
    except csv.Error as error:
        what = f"is not CSV ({error}). Correct the quotes there."
        if "field limit" in str(error):
            what = f"{long_row}. Correct the quotes there, or raise it."
        elif "unexpected end of data" in str(error):
            what = f"ends inside a quoted field. {TRUNCATED}"
        raise UserError(f"{name}:{rows.line_num}: {what}") from None
    if not last:
        raise UserError(f"{name}: has no row below its header. Check what wrote it.")
    if len(last) < len(header) and not latest.endswith(("\r", "\n")):
        what = f"the last row has {len(last)} of {len(header)} columns. {TRUNCATED}"
        raise UserError(f"{name}:{rows.line_num}: {what}")


def _require_distinct(names: Iterable[str], where: str) -> None:
    """Refuse duplicate column names, of which readers keep one."""
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(f"{where}: column {name!r} stands there {count} times. Rename one.")


def read_table(file: IO[bytes], name: str, limit: int) -> Iterator[bytes]:
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


def _table_batches(file: IO[bytes], name: str) -> Iterator[list[bytes]]:
    import pyarrow as pa  # noqa: PLC0415  (takes a second)
    import pyarrow.parquet as pq  # noqa: PLC0415

    is_parquet = file.read(4) == b"PAR1"
    file.seek(0)
    if is_parquet:
        table = pq.ParquetFile(file)
        groups = (table.metadata.row_group(i) for i in range(table.num_row_groups))
        size = sum(group.total_byte_size for group in groups)
        schema, rows = table.schema_arrow, _rows_at_once(table.metadata.num_rows, size)
        batches = table.iter_batches(rows, use_threads=False)
    else:
        try:
            reader = pa.ipc.open_file(file)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        except pa.ArrowInvalid:
            file.seek(0)
            reader = batches = pa.ipc.open_stream(file)
        schema = reader.schema
    _require_distinct(schema.names, name)
    for batch in batches:
        rows = _rows_at_once(batch.num_rows, batch.nbytes)
        for start in range(0, batch.num_rows, rows):
            yield [*_batch_rows(batch.slice(start, rows))]


def _rows_at_once(rows: int, size: int) -> int:
    """Rows of a batch, of which all have `size` bytes."""
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * rows // max(1, size)))


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


READERS = {".jsonl": read_lines, ".ndjson": read_lines, ".json": read_items}
READERS |= {".csv": read_csv, ".tsv": read_csv, ".parquet": read_table, ".arrow": read_table}
