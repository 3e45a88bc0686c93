"""Readers of each file format as JSON Lines, without type inference.

A `.jsonl` keeps every byte, so line N stays the user's line N. In other formats a row becomes a
line; an unreadable row, or one that is too long, becomes a JSON string with the reason, which
`prepare` rejects. Only a file that is damaged as a whole, or expands without end, ends the stage.
"""

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path, PurePath
from tempfile import TemporaryFile
from typing import IO, Literal

from stages.fetch_data import json_lines
from stages.fetch_data.tables import read_csv, read_table
from stages.shared.core.errors import UserError
from stages.shared.data.encoding import encoding_advice

SUPPORTED = ".jsonl .json .csv .parquet .arrow, also as .gz or .zst"
_ESCAPED = ("utf-8", "surrogateescape")
_HIGH = bytes(range(0x80, 0x100))
_UNDECODED = re.compile("[\udc80-\udcff]")  # a byte that is not UTF-8, by surrogateescape


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
    most = json_lines.most_bytes(copy.stat().st_size)
    extension, compression = _extension(name)
    reader = _READERS[extension]
    if reader is not read_table:
        with _damage_as_one_line(name), _open(copy, compression) as file:
            _require_utf8(file, name, None if compression else path, most)
        with _open(copy, compression) as file:
            head = list(islice(filter(bytes.strip, json_lines.bounded_lines(file, limit)), 2))
        if not head:
            raise json_lines.empty(name)
        if (
            reader is json_lines.read_items
            and len(head) == 2
            and isinstance(json_lines.parse(head[0]), dict)
        ):
            reader = json_lines.read_lines  # many .json files on the hub are JSON Lines

    def rows() -> Iterator[bytes]:
        size, packed_table = 0, compression and reader is read_table
        with _damage_as_one_line(name), _open(copy, compression) as packed:
            file = _unpack(packed, name, most) if packed_table else packed
            for row in reader(file, name, limit):
                size += len(row)
                if size > most:
                    raise json_lines.expands(name, most)
                yield row if len(row) <= limit else json_lines.too_long(limit)

    return ("line" if reader is json_lines.read_lines else "row"), rows()


def _extension(name: str) -> tuple[str, str]:
    suffixes = [suffix.lower() for suffix in PurePath(name).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in (".gz", ".zst") else ""
    return (suffixes[-1] if suffixes else ""), compression


def _open(path: Path, compression: str) -> json_lines.File:
    if compression == ".gz":
        return gzip.open(path, "rb")
    if compression == ".zst":
        import pyarrow as pa  # noqa: PLC0415  (takes a second)

        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _unpack(packed: json_lines.File, name: str, most: int) -> IO[bytes]:
    """Unpack a table, which is read by offset, into a file that goes when it is closed."""
    file = TemporaryFile()  # noqa: SIM115  (closed with the last reference)
    while block := packed.read(json_lines.BLOCK):
        if file.tell() + len(block) > most:
            raise json_lines.expands(name, most)
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
        raise UserError(f"{name}: is damaged ({reason:.80}). Fetch or export it again.") from None


def _require_utf8(file: json_lines.File, name: str, path: Path | None, most: int) -> None:
    """Refuse a file if most of its non-ASCII bytes are not UTF-8; single bad lines pass."""
    high = undecoded = offset = 0
    line, decoder = 1, codecs.getincrementaldecoder("utf-8")("surrogateescape")
    for block in chain(iter(partial(file.read, json_lines.BLOCK), b""), [b""]):
        wide = not offset and b"\0" in block[:64]  # UTF-16 or UTF-32, whose ASCII is valid UTF-8
        text = decoder.decode(block, final=not block)
        bad = ["\0"] if wide else _UNDECODED.findall(text)
        if bad and not undecoded:
            valid = text.partition(bad[0])[0]
            where, first = line + valid.count("\n"), offset + len(valid.encode(*_ESCAPED))
        undecoded += len(bad)
        if wide:
            break
        high += len(block) - len(block.translate(None, _HIGH))
        line += text.count("\n")
        offset += len(text.encode(*_ESCAPED))
        if offset > most:
            raise json_lines.expands(name, most)
    if 2 * undecoded > high:
        advice = encoding_advice(path, first) if path else "Unpack it and save it as UTF-8."
        raise UserError(f"{name}:{where}: is not UTF-8. {advice}")


_READERS = {
    ".jsonl": json_lines.read_lines,
    ".ndjson": json_lines.read_lines,
    ".json": json_lines.read_items,
}
_READERS |= {".csv": read_csv, ".tsv": read_csv, ".parquet": read_table, ".arrow": read_table}
