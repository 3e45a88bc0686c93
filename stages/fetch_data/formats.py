"""Is a data file whole? Each format is checked in a stream, except .json, which is one value.

Only what spoils a file as a whole is found here: wrong encoding, a cut end, nothing in it. A row
in the middle that cannot be used is for `prepare` to reject, with its line.
"""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.shared.core.errors import UserError

_TRUNCATED = "the file looks truncated; fetch or export it again"


def check(path: Path, name: str) -> None:
    """Refuse a data file that is empty, truncated, not UTF-8, or nothing of what its name says.

    Args:
        path: where it lies; the extension of `name` decides what is expected in it.
        name: what the user calls it.

    Raises:
        UserError: with the line, or the byte, where there is one.
    """
    if path.stat().st_size == 0:
        raise _empty(name)
    _CHECKS[Path(name).suffix.lower()](path, name)


def _check_jsonl(path: Path, name: str) -> None:
    some_object, number, last = False, 0, ""
    for current, line in _lines(path, name):
        if line.strip():
            number, last = current, line
            some_object = some_object or isinstance(_parse(line), dict)
    if not last:
        raise _empty(name)
    if _is_cut(last) or (some_object and not last.endswith("\n") and not _parses(last)):
        raise UserError(f"{name}:{number}: the last line is not complete JSON; {_TRUNCATED}")
    if not some_object:
        raise UserError(
            f"{name}:1: no line holds a JSON object, {_start(path)!r} is how it starts; "
            "expected one object a line; export it as JSON lines"
        )


def _check_json(path: Path, name: str) -> None:
    text = "".join(line for _, line in _lines(path, name))
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if not text.strip():
            raise _empty(name) from None
        if _ends_early(error, text):
            raise UserError(f"{name}:{error.lineno}: ends inside a value; {_TRUNCATED}") from None
        raise UserError(
            f"{name}:{error.lineno}: is not JSON ({error.msg}); expected one list of objects; "
            "correct it (one object a line belongs in a .jsonl file)"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: cannot be read as JSON: {error}; correct it") from None
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise UserError(
            f"{name}: holds {_what_is(value)}; expected one list of objects, an object a row; "
            "convert it"
        )
    if not value:
        raise _empty(name)


def _check_csv(path: Path, name: str) -> None:
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader((line for _, line in _lines(path, name)), strict=True)
    width, count, row = 0, 0, list[str]()
    try:
        for row in rows:  # the last one is looked at below
            width, count = width or len(row), count + 1
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            what = f"{name}:{rows.line_num}: ends inside a quoted field; {_TRUNCATED}"
            raise UserError(what) from None
        raise UserError(f"{name}:{rows.line_num}: is not CSV ({error}); correct it") from None
    if count < 2:
        raise UserError(
            f"{name}: has no row below its header; expected a line of column names and a line a "
            "row; check what wrote it"
        )
    if len(row) < width and not _ends_with_newline(path):
        raise UserError(
            f"{name}:{rows.line_num}: the last row has {len(row)} of {width} columns; {_TRUNCATED}"
        )


def _check_parquet(path: Path, name: str) -> None:
    import pyarrow as pa  # noqa: PLC0415  (only where there is Parquet)
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        rows = pq.ParquetFile(path).metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{name}: has no readable Parquet footer ({str(error).splitlines()[0]}); {_TRUNCATED}"
        ) from None
    if not rows:
        raise _empty(name)


_CHECKS = {
    ".jsonl": _check_jsonl,
    ".json": _check_json,
    ".csv": _check_csv,
    ".parquet": _check_parquet,
}
EXTENSIONS = tuple(_CHECKS)
SUPPORTED = ", ".join(EXTENSIONS[:-1]) + f" or {EXTENSIONS[-1]}"


def _lines(path: Path, name: str) -> Iterator[tuple[int, str]]:
    """Number and text of each line; a byte order mark at the start is not part of the text."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                where = f"{name}:{number}: byte {offset + error.start}"
                if error.reason == "unexpected end of data":
                    raise UserError(
                        f"{where} begins a character that does not end; {_TRUNCATED}"
                    ) from None
                raise UserError(
                    f"{where} of the file is 0x{line[error.start]:02x}, which is not UTF-8; "
                    "expected UTF-8; convert it, for example with "
                    "`iconv -f ISO-8859-1 -t UTF-8`"
                ) from None
            offset += len(line)
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _parses(line: str) -> bool:
    return _parse(line) is not None


def _is_cut(line: str) -> bool:
    """Whether a line is the beginning of a JSON value, and no more than that."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return _ends_early(error, line)
    except (ValueError, RecursionError):
        return False
    return False


def _ends_early(error: json.JSONDecodeError, text: str) -> bool:
    return error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip())


def _what_is(value: Any) -> str:
    if isinstance(value, dict):
        keys = ", ".join(list(value)[:3])
        return f"one object with the keys {keys}" if keys else "an empty object"
    if isinstance(value, list):
        row = next(i for i, row in enumerate(value) if not isinstance(row, dict))
        return f"a list whose item {row + 1} is no object"
    return f"{value!r:.40}"


def _start(path: Path) -> str:
    with path.open(encoding="utf-8-sig") as file:
        return file.read(30)


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) in b"\r\n"


def _empty(name: str) -> UserError:
    return UserError(f"{name}: is empty; expected at least one row; check what wrote it")
