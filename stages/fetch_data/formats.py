"""File formats as JSON Lines, bounded: by extension, compression and encoding.

A `.jsonl` keeps every byte, so line N stays the user's line N. In other formats a row becomes a
line; an unreadable row, or one that is too long, becomes a JSON string with the reason, which
`prepare` rejects. Only a file that is damaged as a whole, or expands without end, ends the stage.
"""

import codecs
import re
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path, PurePath
from tempfile import TemporaryFile
from typing import IO, Literal

from stages.fetch_data import readers
from stages.shared.core.errors import UserError, reading
from stages.shared.data.encoding import encoding_advice

SUPPORTED = ".jsonl .json .csv .parquet .arrow, also as .gz or .zst"
# A file may become so many times its size, and in any case so many bytes.
_EXPANSION, _SMALL = 200, 1 << 28
_ESCAPED = ("utf-8", "surrogateescape")
_HIGH = bytes(range(0x80, 0x100))
_UNDECODED = re.compile("[\udc80-\udcff]")  # a byte that is not UTF-8, by surrogateescape


def is_readable(name: str) -> bool:
    """Whether the extension is one of `SUPPORTED`."""
    return _extension(name)[0] in readers.READERS


def read(
    path: Path, name: str, copy: Path, limit: int
) -> tuple[Literal["line", "row"], Iterator[bytes]]:
    """Lines of JSON, at most `limit` bytes each, and whether they are the file's lines or its rows.

    `name` is for messages and gives the format; `path` is the original of `copy`, for the command
    that converts its encoding. Errors are raised here or while iterating.
    """
    extension, compression = _extension(name)
    reader, advice = readers.READERS[extension], "Fetch or export it again."
    most = max(_SMALL, _EXPANSION * copy.stat().st_size)
    with reading(name, advice):
        file = _unpack(copy, name, compression, most) if compression else copy.open("rb")
        if reader is not readers.read_table:
            _require_utf8(file, name, None if compression else path)
            file.seek(0)
            lines = filter(bytes.strip, readers.bounded_lines(file, limit))
            head = [readers.parse(line) for line in islice(lines, 2)]
            file.seek(0)
            if not head:
                raise readers.empty(name)
            if reader is readers.read_items and len(head) == 2 and isinstance(head[0], dict):
                reader = readers.read_lines  # many .json files on the hub are JSON Lines

    def rows() -> Iterator[bytes]:
        size = 0
        with reading(name, advice), file:
            for row in reader(file, name, limit):
                size += len(row)
                if size > most:
                    raise _expands(name, most)
                yield row if len(row) <= limit else readers.too_long(limit)

    return ("line" if reader is readers.read_lines else "row"), rows()


def _extension(name: str) -> tuple[str, str]:
    suffixes = [suffix.lower() for suffix in PurePath(name).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in (".gz", ".zst") else ""
    return (suffixes[-1] if suffixes else ""), compression


def _unpack(path: Path, name: str, compression: str, most: int) -> IO[bytes]:
    """Unpack into a file without a name, on the project's disk, which goes when it is closed."""
    import pyarrow as pa  # noqa: PLC0415  (takes a second)

    codec = {".gz": "gzip", ".zst": "zstd"}[compression]
    file = TemporaryFile(dir=".")  # noqa: SIM115  (the caller closes it)
    with pa.input_stream(str(path), compression=codec) as packed:
        while block := packed.read(readers.BLOCK):
            if file.tell() + len(block) > most:
                raise _expands(name, most)
            file.write(block)
    file.seek(0)
    return file


def _expands(name: str, most: int) -> UserError:
    advice = "Check where it comes from; if it is right, unpack it or write it as JSON Lines."
    return UserError(f"{name}: expands to more than {most / 1e9:.1f} GB. {advice}")


def _require_utf8(file: IO[bytes], name: str, path: Path | None) -> None:
    """Refuse a file if most of its non-ASCII bytes are not UTF-8; single bad lines pass."""
    wide = b"\0" in file.read(64)  # UTF-16 or UTF-32, whose ASCII is valid UTF-8
    file.seek(0)
    blocks = iter(partial(file.read, readers.BLOCK), b"")
    high, undecoded, line, offset, place = 0, int(wide), 1, 0, (1, 0)
    for text in () if wide else codecs.iterdecode(blocks, *_ESCAPED):
        bad, block = _UNDECODED.findall(text), text.encode(*_ESCAPED)
        if bad and not undecoded:
            valid = text.partition(bad[0])[0]
            place = line + valid.count("\n"), offset + len(valid.encode())
        undecoded += len(bad)
        high += len(block) - len(block.translate(None, _HIGH))
        line += text.count("\n")
        offset += len(block)
    if 2 * undecoded > high:
        advice = encoding_advice(path, place[1]) if path else "Unpack it and save it as UTF-8."
        raise UserError(f"{name}:{place[0]}: is not UTF-8. {advice}")
