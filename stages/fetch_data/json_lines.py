"""JSON Lines byte for byte, the items of a JSON list, and lines for what other formats hold."""

import base64
import gzip
import io
import json
import re
from collections.abc import Iterator
from json import JSONDecodeError
from typing import IO, Any

from stages.shared.core.errors import UserError

File = io.BufferedReader | gzip.GzipFile | IO[bytes]
TRUNCATED = "The file looks truncated: fetch or export it again."
BLOCK = 1 << 20  # bytes or characters read at once
# A file may become so many times its size, and in any case so many bytes.
_EXPANSION, _SMALL = 200, 1 << 28
_SPACE = re.compile(r"[ \t\r\n]*")


def dump(value: Any) -> bytes:
    """JSON of a value as a line."""
    return encode(json.dumps(value, ensure_ascii=False, default=_spell))


def encode(line: str) -> bytes:
    """UTF-8 and a line end; bytes that were no UTF-8 stay."""
    return line.encode("utf-8", "surrogateescape") + b"\n"


def _spell(value: Any) -> str:
    """String for a type that JSON lacks: bytes as UTF-8 or base64, dates, decimals."""
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode()
    except UnicodeDecodeError:
        return base64.b64encode(value).decode()


def most_bytes(size: int) -> int:
    """Bytes of JSON Lines that a file of `size` bytes may become."""
    return max(_SMALL, _EXPANSION * size)


def expands(name: str, most: int) -> UserError:
    """Error for a file that becomes more than `most` bytes."""
    return UserError(
        f"{name}: expands to more than {most / 1e9:.1f} GB. Check where it comes from; if it is "
        "right, unpack it or write it as JSON Lines."
    )


def empty(name: str) -> UserError:
    """Error for a file without rows."""
    return UserError(f"{name}: is empty. Check what wrote it.")


def bounded_lines(file: File, limit: int) -> Iterator[bytes]:
    """Lines; a line of more than `limit` bytes is passed over for `_too_long`."""
    while line := file.readline(limit + 1):
        is_long = len(line) > limit
        while is_long and line and not line.endswith(b"\n"):
            line = file.readline(BLOCK)
        yield too_long(limit) if is_long else line


def too_long(limit: int) -> bytes:
    """Line in the place of a row of more than `limit` bytes."""
    return dump(f"longer than prepare.max_row_bytes, {limit:,}")


def read_lines(file: File, name: str, limit: int) -> Iterator[bytes]:
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


def parse(line: bytes) -> Any:
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


def read_items(file: File, name: str, limit: int) -> Iterator[bytes]:
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
                raise empty(name)
            yield encode(re.sub(r"[ \t]*[\r\n][ \t\r\n]*", " ", next_item()))
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
            what = f"ends inside item {number}. {TRUNCATED}"
        raise UserError(f"{name}:{line + text.count(chr(10), 0, at)}: {what}") from None
