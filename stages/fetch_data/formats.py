"""JSON Lines from a file of any format, without a value retyped.

A `.jsonl` keeps every byte, so that line N stays the user's line N. A row of any other format
becomes one line; one that cannot be read becomes a JSON text with the reason, which `prepare`
rejects as it rejects any line that holds no object. Only what spoils a file as a whole ends here.
"""

import base64
import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal, TextIO

from stages.fetch_data.encoding import CHUNK, File, require_utf8
from stages.shared.core.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

_LINES = (".jsonl", ".ndjson")
_TEXT = (*_LINES, ".json", ".csv", ".tsv")
_TABLES = (".parquet", ".arrow")
_COMPRESSED = (".gz", ".zst")
SUPPORTED = ".jsonl .json .csv .parquet .arrow (.gz and .zst of the text formats)"

_Reader = Callable[[File, str], Iterator[bytes]]
_TRUNCATED = "The file looks truncated: fetch or export it again."


def is_readable(name: str) -> bool:
    """Whether a file of this name can be read."""
    text, packed = _extension(name)
    return text in _TEXT or (text in _TABLES and not packed)


def read(path: Path, name: str) -> tuple[Literal["line", "row"], Iterator[bytes]]:
    """Lines of JSON, and whether a line's number is that of the file's line or row.

    Args:
        path: where the file lies.
        name: how the user knows it; its extension says the format.

    Raises:
        UserError: here or while iterating: the file is empty, damaged, cut off, not UTF-8, or not
            of its format.
    """
    extension, packed = _extension(name)
    if extension in _TABLES:
        return "row", _checked(_table_rows, path, "", name)
    with _damage_told(name), _open(path, packed) as file:
        require_utf8(file, name)
    with _open(path, packed) as file:
        head = file.read(CHUNK).lstrip(b"\xef\xbb\xbf \t\r\n")
    if not head:
        raise _empty(name)
    if extension in (".csv", ".tsv"):
        return "row", _checked(_csv_rows, path, packed, name)
    if extension == ".json" and not _is_object(head.partition(b"\n")[0]):
        return "row", _checked(_json_items, path, packed, name)
    # Of the hub's .json files, many hold one object a line.
    return "line", _checked(_lines, path, packed, name)


def _extension(name: str) -> tuple[str, str]:
    suffixes = [suffix.lower() for suffix in PurePath(name).suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in _COMPRESSED else ""
    return (suffixes[-1] if suffixes else ""), packed


def _open(path: Path, packed: str) -> File:
    if packed == ".gz":
        return gzip.open(path, "rb")
    if packed == ".zst":
        import pyarrow as pa  # noqa: PLC0415  (a second that most files need not pay)

        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _checked(rows: _Reader, path: Path, packed: str, name: str) -> Iterator[bytes]:
    with _damage_told(name), _open(path, packed) as file:
        yield from rows(file, name)


@contextmanager
def _damage_told(name: str) -> Iterator[None]:
    """Damage that a library meets in a file ends in one line."""
    try:
        yield
    except (EOFError, zlib.error, ValueError, KeyError, NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk, and not of the file
        reason = str(error).partition("\n")[0]
        raise UserError(f"{name}: is damaged ({reason:.80}). {_TRUNCATED}") from None


def _lines(file: File, name: str) -> Iterator[bytes]:
    """The lines of a .jsonl, each with the newline that it has."""
    some_object, first, last = False, (0, b""), (0, b"")
    for number, line in enumerate(file, 1):
        if line.strip(b"\xef\xbb\xbf \t\r\n"):
            last = number, line
            first = first if first[0] else last
            some_object = some_object or _is_object(line)
        yield line
    if not last[0]:
        raise _empty(name)
    fault, at_end = _fault(last[1])
    unfinished = some_object and not last[1].endswith(b"\n")
    if fault and (at_end or unfinished):
        raise UserError(f"{name}:{last[0]}: the last line is not complete JSON. {_TRUNCATED}")
    if some_object:
        return
    fault, _ = _fault(first[1])
    advice = "Write one object a line."
    if first[1].startswith((b"[", b"\xef\xbb\xbf[")):
        advice = "Name it .json if it is one list."
    elif fault.endswith("','"):
        advice = "Remove the commas between the lines."
    raise UserError(
        f"{name}:{first[0]}: no line is a JSON object; this one {fault or 'is another value'}. "
        f"{advice}"
    )


def _fault(line: bytes) -> tuple[str, bool]:
    """What makes a line no JSON, and whether it only ends too early."""
    text = _text(line)
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        rest = text[error.pos :].strip()
        early = not rest or error.msg.startswith("Unterminated string")
        return f"is not JSON ({error.msg}, column {error.colno}): {rest[:20]!r}", early
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; deep nesting
        return f"cannot be read ({error})", False
    return "", False


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(_text(line)), dict)
    except (ValueError, RecursionError):
        return False


def _text(line: bytes) -> str:
    return line.decode("utf-8", "surrogateescape").removeprefix("\ufeff")


def _json_items(file: File, name: str) -> Iterator[bytes]:
    """The items of one list, spelled as they are there: numbers, escapes, doubled keys."""
    window = _Window(io.TextIOWrapper(file, "utf-8-sig", "surrogateescape"))
    what = "Expected one list of objects, or a .jsonl with one object a line."
    if window.peek() != "[":
        raise UserError(f"{name}:{window.line}: begins with {window.peek()!r}. {what}")
    window.advance(1)
    count = 0
    while window.peek() != "]" or not count:
        if count and window.peek() == ",":
            window.advance(1)
        elif count and window.peek():
            raise UserError(f"{name}:{window.line}: {window.peek()!r} follows item {count}. {what}")
        if window.peek() == "]" and not count:
            raise _empty(name)
        begin = window.line
        try:
            item = window.take()
        except json.JSONDecodeError as error:
            where, rest = f"{name}:{begin + error.lineno - 1}", window.rest(error.pos)
            if not rest or error.msg.startswith("Unterminated string"):
                raise UserError(f"{where}: ends inside item {count + 1}. {_TRUNCATED}") from None
            raise UserError(
                f"{where}: item {count + 1} is not JSON ({error.msg}) at {rest[:20]!r}. Correct it."
            ) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}:{begin}: item {count + 1} cannot be read: {error}.") from None
        yield _encode(re.sub(r"[ \t]*[\r\n]\s*", " ", item))
        count += 1


class _Window:
    """A stretch of JSON text that moves over a file, so that no file is in memory whole."""

    def __init__(self, file: TextIO) -> None:
        self.line = 1
        self._file, self._text, self._at = file, "", 0

    def peek(self) -> str:
        """Skip white space; the character that follows, or nothing at the file's end."""
        while True:
            blank = re.compile(r"\s*").match(self._text, self._at)
            self.advance(len(blank[0]) if blank else 0)
            if self._at < len(self._text) or not self._extend(CHUNK):
                return self._text[self._at : self._at + 1]

    def rest(self, start: int) -> str:
        """The text from `start` on, counted from the next value."""
        return self._text[self._at + start :].strip()

    def advance(self, count: int) -> None:
        """Leave characters behind."""
        self.line += self._text.count("\n", self._at, self._at + count)
        self._at += count

    def take(self) -> str:
        """The text of the value that begins here."""
        chunk = CHUNK
        while True:
            self._text, self._at = self._text[self._at :], 0
            try:
                _, end = json.JSONDecoder().raw_decode(self._text)
            except (ValueError, RecursionError):
                # The window may end within it. Doubled each time, a long row costs linear time.
                if not self._extend(chunk):
                    raise
                chunk *= 2
            else:
                if end == len(self._text) and self._extend(chunk):
                    continue  # a number may go on
                item = self._text[:end]
                self.advance(end)
                return item

    def _extend(self, count: int) -> bool:
        more = self._file.read(count)
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)


def _csv_rows(file: File, name: str) -> Iterator[bytes]:
    """A record as an object of texts; separated by what divides the header most."""
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    first, latest = text.readline(), [""]
    separator = max(",;\t", key=lambda s: len(next(csv.reader([first], delimiter=s), [])))

    def lines() -> Iterator[str]:
        for latest[0] in chain([first], text):
            yield latest[0]

    rows = csv.reader(lines(), delimiter=separator, strict=True)
    count, row = 0, list[str]()
    try:
        header = next(rows, [])
        _require_distinct(header, f"{name}:1")
        for row in rows:
            if row:
                count += 1
                yield _csv_row(header, row)
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            raise UserError(
                f"{name}:{rows.line_num}: ends inside a quoted field. {_TRUNCATED}"
            ) from None
        raise UserError(
            f"{name}:{rows.line_num}: is not CSV ({error}). Correct the quotes there."
        ) from None
    if not count:
        raise UserError(f"{name}: has no row below its header. Check what wrote it.")
    if len(row) < len(header) and not latest[0].endswith(("\r", "\n")):
        raise UserError(
            f"{name}:{rows.line_num}: the last row has {len(row)} of {len(header)} columns. "
            f"{_TRUNCATED}"
        )


def _csv_row(header: list[str], row: list[str]) -> bytes:
    if len(row) != len(header):
        return _dump(f"{len(row)} values under {len(header)} columns")
    return _dump(dict(zip(header, row, strict=True)))


def _require_distinct(names: Iterable[str], where: str) -> None:
    """Refuse two columns of one name, of which a reader would take one."""
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(f"{where}: column {name!r} stands there {count} times. Rename one.")


def _table_rows(file: File, name: str) -> Iterator[bytes]:
    import pyarrow as pa  # noqa: PLC0415  (a second that most files need not pay)
    import pyarrow.parquet as pq  # noqa: PLC0415

    count = 0
    if _extension(name)[0] == ".parquet":
        table = pq.ParquetFile(file)
        schema, batches = table.schema_arrow, table.iter_batches(batch_size=256)
    else:  # Feather, or what `save_to_disk` of datasets writes
        try:
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(n) for n in range(reader.num_record_batches))
        except pa.ArrowInvalid:
            file.seek(0)
            reader = batches = pa.ipc.open_stream(file)
        schema = reader.schema
    _require_distinct(_field_names(schema), name)
    for batch in batches:
        for row in _batch_rows(batch):
            count += 1
            yield row
    if not count:
        raise _empty(name)


def _field_names(fields: Iterable["pa.Field"], parent: str = "") -> Iterator[str]:
    """The paths of all fields, nested ones included."""
    for field in fields:
        path = f"{parent}{field.name}"
        yield path
        kind = field.type
        yield from _field_names(
            [kind.field(i) for i in range(kind.num_fields)], f"{path}." if kind.num_fields else ""
        )


def _batch_rows(batch: "pa.RecordBatch") -> Iterator[bytes]:
    try:
        yield from map(_dump, batch.to_pylist(maps_as_pydicts="strict"))
    except (ValueError, KeyError, OverflowError):  # not UTF-8; a doubled key; a date beyond 9999
        for number in range(batch.num_rows):
            try:
                [row] = batch.slice(number, 1).to_pylist(maps_as_pydicts="strict")
            except (ValueError, KeyError, OverflowError) as error:
                row = f"cannot be read: {error}"
            yield _dump(row)


def _dump(value: Any) -> bytes:
    return _encode(json.dumps(value, ensure_ascii=False, default=_spell))


def _encode(line: str) -> bytes:
    return line.encode("utf-8", "surrogateescape") + b"\n"


def _spell(value: Any) -> str:
    """What JSON has no type for: bytes as the text they are, or base64; dates and decimals."""
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode()
    except UnicodeDecodeError:
        return base64.b64encode(value).decode()


def _empty(name: str) -> UserError:
    return UserError(f"{name}: is empty. Check what wrote it.")
