"""Readers of each file format as JSON Lines, without type inference.

A `.jsonl` keeps every byte, so line N stays the user's line N. In other formats a row becomes a
line; an unreadable row, or one that is too long, becomes a JSON string with the reason, which
`prepare` rejects. Only a file that is damaged as a whole, or expands without end, ends the stage.
"""

import base64
import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from json import JSONDecodeError
from pathlib import Path, PurePath
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any, Literal

from stages.shared.core import bounds
from stages.shared.core.errors import UserError
from stages.shared.data.encoding import encoding_advice

if TYPE_CHECKING:
    import pyarrow as pa

File = io.BufferedReader | gzip.GzipFile | IO[bytes]
SUPPORTED = ".jsonl .json .csv .parquet .arrow, also as .gz or .zst"
_HIGH = bytes(range(0x80, 0x100))
_SPACE = re.compile(r"[ \t\r\n]*")
_UNDECODED = re.compile("[\udc80-\udcff]")  # a byte that is not UTF-8, by surrogateescape
_BLOCK = 1 << 20  # bytes or characters read at once
_BATCH_ROWS, _BATCH_BYTES = 256, 64 << 20  # of a table, at most
_SECONDS = 600.0  # of CPU, for such a batch
# A file may become so many times its size, and in any case so many bytes.
_EXPANSION, _SMALL = 200, 1 << 28
# Objects whose fields differ from row to row.
_SCHEMALESS = {"tool_calls", "function_call", "tools", "functions", "chat_template_kwargs"}
_TRUNCATED = "The file looks truncated: fetch or export it again."


def is_readable(name: str) -> bool:
    """Whether the extension is one of `SUPPORTED`."""
    return _extension(name)[0] in _READERS


def read(
    path: Path, name: str, copy: Path, limit: int
) -> tuple[Literal["line", "row"], Iterator[bytes]]:
    """Lines of JSON, at most `limit` bytes each, and whether they are the file's lines or its rows.

    `name` is for messages and gives the format; `path` is the original of `copy`, for the command
    that converts its encoding. Errors are raised here or while iterating.
    """
    most = max(_SMALL, _EXPANSION * copy.stat().st_size)
    extension, compression = _extension(name)
    reader = _READERS[extension]
    if reader is not _table_rows:
        with _damage_as_one_line(name), _open(copy, compression) as file:
            _require_utf8(file, name, None if compression else path, most)
        with _open(copy, compression) as file:
            head = list(islice(filter(bytes.strip, _bounded_lines(file, limit)), 2))
        if not head:
            raise _empty(name)
        if reader is _json_items and len(head) == 2 and isinstance(_parse(head[0]), dict):
            reader = _lines  # many .json files on the hub are JSON Lines

    def rows() -> Iterator[bytes]:
        size, packed_table = 0, compression and reader is _table_rows
        with _damage_as_one_line(name), _open(copy, compression) as packed:
            file = _unpack(packed, name, most) if packed_table else packed
            for row in reader(file, name, limit):
                size += len(row)
                if size > most:
                    raise _expands(name, most)
                yield row if len(row) <= limit else _too_long(limit)

    return ("line" if reader is _lines else "row"), rows()


def _extension(name: str) -> tuple[str, str]:
    suffixes = [suffix.lower() for suffix in PurePath(name).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in (".gz", ".zst") else ""
    return (suffixes[-1] if suffixes else ""), compression


def _open(path: Path, compression: str) -> File:
    if compression == ".gz":
        return gzip.open(path, "rb")
    if compression == ".zst":
        import pyarrow as pa  # noqa: PLC0415  (takes a second)

        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _unpack(packed: File, name: str, most: int) -> IO[bytes]:
    """Unpack a table, which is read by offset, into a file that goes when it is closed."""
    file = TemporaryFile()  # noqa: SIM115  (closed with the last reference)
    while block := packed.read(_BLOCK):
        if file.tell() + len(block) > most:
            raise _expands(name, most)
        file.write(block)
    file.seek(0)
    return file


@contextmanager
def _damage_as_one_line(name: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, ValueError, KeyError, NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # a fault of the disk
        reason = str(error).partition("\n")[0]
        raise UserError(f"{name}: is damaged ({reason:.80}). {_TRUNCATED}") from None


def _bounded_lines(file: File, limit: int) -> Iterator[bytes]:
    """Lines; a line of more than `limit` bytes is passed over for `_too_long`."""
    while line := file.readline(limit + 1):
        is_long = len(line) > limit
        while is_long and line and not line.endswith(b"\n"):
            line = file.readline(_BLOCK)
        yield _too_long(limit) if is_long else line


def _too_long(limit: int) -> bytes:
    return _dump(f"longer than prepare.max_row_bytes, {limit:,}")


def _expands(name: str, most: int) -> UserError:
    return UserError(
        f"{name}: expands to more than {most / 1e9:.1f} GB. Check where it comes from; if it is "
        "right, unpack it or write it as JSON Lines."
    )


def _require_utf8(file: File, name: str, path: Path | None, most: int) -> None:
    """Refuse a file if most of its non-ASCII bytes are not UTF-8; single bad lines pass."""
    high = undecoded = offset = 0
    number, decoder = 1, codecs.getincrementaldecoder("utf-8")("surrogateescape")
    for line in chain(iter(partial(file.readline, _BLOCK), b""), [b""]):
        wide = offset < 64 and b"\0" in line[:64]  # UTF-16 or UTF-32, whose ASCII is valid UTF-8
        offset -= len(decoder.getstate()[0])  # an incomplete character before this piece
        text = decoder.decode(line, final=not line)
        bad = ["\0"] if wide else _UNDECODED.findall(text)
        if bad and not undecoded:
            valid = text.partition(bad[0])[0].encode("utf-8", "surrogateescape")
            where, first = number, offset + len(valid)
        undecoded += len(bad)
        if wide:
            break
        high += len(line) - len(line.translate(None, _HIGH))
        offset += len(text.encode("utf-8", "surrogateescape")) + len(decoder.getstate()[0])
        number += line.endswith(b"\n")
        if offset > most:
            raise _expands(name, most)
    if 2 * undecoded > high:
        advice = encoding_advice(path, first) if path else "Unpack it and save it as UTF-8."
        raise UserError(f"{name}:{where}: is not UTF-8. {advice}")


def _lines(file: File, name: str, limit: int) -> Iterator[bytes]:
    """Lines of a .jsonl, byte for byte; at least one must hold an object."""
    some_object, first, last = False, (0, b""), (0, b"")
    for number, line in enumerate(_bounded_lines(file, limit), 1):
        if line.strip():
            last = number, line
            first = first if first[0] else last
            some_object = some_object or isinstance(_parse(line), dict)
        yield line
    fault = _parse(last[1])
    if isinstance(fault, Exception) and (
        _ends_early(fault) or (some_object and not last[1].endswith(b"\n"))
    ):
        raise UserError(f"{name}:{last[0]}: the last line is not complete JSON. {_TRUNCATED}")
    if some_object:
        return
    reason, advice, fault = "it is another value", "Write one object a line.", _parse(first[1])
    if isinstance(fault, JSONDecodeError):
        rest = fault.doc[fault.pos :].strip()
        reason = f"{fault.msg}, column {fault.colno}: {rest[:20]!r}"
        advice = "Remove the commas between the lines." if rest == "," else advice
    if first[1] == _too_long(limit):
        reason, advice = str(fault), "Raise it, or write one object a line."
    if first[1].strip().startswith(b"["):
        advice = "Name it .json if it is one list."
    raise UserError(f"{name}:{first[0]}: no line is a JSON object ({reason}). {advice}")


def _parse(line: bytes) -> Any:
    """Value of a line of JSON, or its error."""
    try:
        return json.loads(line.decode("utf-8-sig", "replace"))
    except (ValueError, RecursionError) as error:  # ValueError: also an int of over 4,300 digits
        return error


def _ends_early(fault: Exception) -> bool:
    """Whether JSON is valid up to a missing end."""
    return isinstance(fault, JSONDecodeError) and (
        not fault.doc[fault.pos :].strip() or fault.msg.startswith("Unterminated string")
    )


def _json_items(file: File, name: str, limit: int) -> Iterator[bytes]:
    """Items of one JSON list, as spelled there: numbers, escapes, duplicate keys."""
    stream = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    text, at, number, line = "", 0, 0, 1  # `text` begins in `line`; what is before `at` was read

    def read_on() -> bool:
        nonlocal text, at, line
        if not (more := stream.read(max(_BLOCK, len(text) - at))):
            return False
        line += text.count("\n", 0, at)
        text, at = text[at:] + more, 0
        return True

    def next_character() -> str:
        nonlocal at
        while (at := _SPACE.match(text, at).end()) == len(text) and read_on():  # type: ignore[union-attr]
            pass
        return text[at : at + 1]

    def next_item() -> str:
        nonlocal at
        while True:
            fault: Exception | None = None
            try:
                _, end = json.JSONDecoder().raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                fault, end = error, len(text)
            if end < len(text) and not fault:
                break
            if end - at > limit and (fault is None or _ends_early(fault)):
                what = f"item {number} is longer than prepare.max_row_bytes, {limit:,}"
                raise UserError(f"{name}:{line + text.count(chr(10), 0, at)}: {what}. Raise it.")
            if end - at > limit or not read_on():
                if fault:
                    raise fault
                break
        begin, at = at, end
        return text[begin:end]

    if next_character() != "[":
        raise UserError(f"{name}: is no list. Make it a list of objects, or write one a line.")
    try:
        while number == 0 or next_character() == ",":
            at, number = at + 1, number + 1
            if next_character() == "]" and number == 1:
                raise _empty(name)
            yield _encode(re.sub(r"[ \t]*[\r\n][ \t\r\n]*", " ", next_item()))
        if text[at : at + 1] != "]":
            raise JSONDecodeError("Expecting a comma or ]", text, at)
        at += 1
        if next_character():
            raise JSONDecodeError("Extra data", text, at)
    except (ValueError, RecursionError) as error:
        at = getattr(error, "pos", at)
        reason = f"{getattr(error, 'msg', error)} at {text[at : at + 20]!r}, item {number}"
        what = f"cannot be read ({reason}). Correct it."
        if _ends_early(error):
            what = f"ends inside item {number}. {_TRUNCATED}"
        raise UserError(f"{name}:{line + text.count(chr(10), 0, at)}: {what}") from None


def _csv_rows(file: File, name: str, limit: int) -> Iterator[bytes]:
    """CSV records as objects of strings; the separator is the one that splits the header most."""
    csv.field_size_limit(limit)
    text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    read_line, size = partial(text.readline, limit + 1), 0
    first, latest, row = read_line(), [""], list[str]()
    separator = max(",;\t", key=lambda s: len(next(csv.reader([first], delimiter=s), [])))

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
                yield _dump(dict(zip(header, row, strict=True)))
            else:
                yield _dump(f"{len(row)} values under {len(header)} columns")
    except csv.Error as error:
        what = f"is not CSV ({error}). Correct the quotes there."
        if "unexpected end of data" in str(error):
            what = f"ends inside a quoted field. {_TRUNCATED}"
        raise UserError(f"{name}:{rows.line_num}: {what}") from None
    if not row:
        raise UserError(f"{name}: has no row below its header. Check what wrote it.")
    if len(row) < len(header) and not latest[0].endswith(("\r", "\n")):
        what = f"the last row has {len(row)} of {len(header)} columns. {_TRUNCATED}"
        raise UserError(f"{name}:{rows.line_num}: {what}")


def _require_distinct(names: Iterable[str], where: str) -> None:
    """Refuse duplicate column names, of which readers keep one."""
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(f"{where}: column {name!r} stands there {count} times. Rename one.")


def _table_rows(file: File, name: str, limit: int) -> Iterator[bytes]:
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
        raise _empty(name)


def _table_batches(file: File, name: str) -> Iterator[list[bytes]]:
    import pyarrow as pa  # noqa: PLC0415  (takes a second)
    import pyarrow.parquet as pq  # noqa: PLC0415

    if _extension(name)[0] == ".parquet":
        table = pq.ParquetFile(file)
        groups = (table.metadata.row_group(i) for i in range(table.num_row_groups))
        size = sum(group.total_byte_size for group in groups)
        rows = _rows_at_once(table.metadata.num_rows, size)
        schema, batches = table.schema_arrow, table.iter_batches(batch_size=rows)
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
        rows = _rows_at_once(batch.num_rows, batch.nbytes)
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
        yield from map(_dump, map(_without_nulls, rows))
    except (ValueError, KeyError, OverflowError) as error:  # encoding; duplicate key; date range
        if batch.num_rows == 1:
            yield _dump(f"cannot be read: {error}")
            return
        for number in range(batch.num_rows):
            yield from _batch_rows(batch.slice(number, 1))


def _without_nulls(value: Any, inside: bool = False) -> Any:
    """Calls and schemas without null fields: a column gives each of them the fields of all."""
    if isinstance(value, dict):
        pairs = ((k, _without_nulls(v, inside or k in _SCHEMALESS)) for k, v in value.items())
        return {k: v for k, v in pairs if not (inside and v is None)}
    return [_without_nulls(one, inside) for one in value] if isinstance(value, list) else value


def _dump(value: Any) -> bytes:
    return _encode(json.dumps(value, ensure_ascii=False, default=_spell))


def _encode(line: str) -> bytes:
    return line.encode("utf-8", "surrogateescape") + b"\n"


def _spell(value: Any) -> str:
    """String for a type that JSON lacks: bytes as UTF-8 or base64, dates, decimals."""
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode()
    except UnicodeDecodeError:
        return base64.b64encode(value).decode()


def _empty(name: str) -> UserError:
    return UserError(f"{name}: is empty. Check what wrote it.")


_READERS = {".jsonl": _lines, ".ndjson": _lines, ".json": _json_items}
_READERS |= {".csv": _csv_rows, ".tsv": _csv_rows, ".parquet": _table_rows, ".arrow": _table_rows}
