"""Rows of .jsonl and .json files."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from stages.prepare.rows import Row, fault, row_of

_CHUNK = 1 << 20  # characters
_BLANK = re.compile(r"\s*")
_DECODER = json.JSONDecoder()


def read_jsonl(path: Path, name: str) -> Iterator[Row]:
    """One object a line; a line that is none is a row with a problem."""
    position = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            position += len(line)
            if line.strip():
                yield _json_row(number, line, position)


def _json_row(number: int, line: bytes, position: int) -> Row:
    try:
        value = _DECODER.decode(line.rstrip().decode().removeprefix("\ufeff"))
    except UnicodeDecodeError:
        return Row(number, {}, "not UTF-8", position)
    except json.JSONDecodeError as error:
        return Row(number, {}, f"not JSON ({error.msg}: column {error.colno})", position)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; deep nesting
        return Row(number, {}, f"not JSON that can be read ({error})", position)
    return row_of(number, value, position)


def read_json(path: Path, name: str) -> Iterator[Row]:
    """A list of objects.

    Raises:
        UserError: it is no list, or breaks off.
    """
    advice = "expected a list of objects; mend it, or write an object a line and name it .jsonl"
    with path.open("rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as file:
        window = _Window(file)
        if window.peek() != "[":
            raise fault(name, window.line, f"{_show(window.peek())} where a list begins", advice)
        window.advance(1)
        while window.peek() != "]":
            line = window.line
            try:
                value = window.decode()
            except (ValueError, RecursionError) as error:
                raise fault(name, line, f"not JSON ({error})", advice) from None
            yield row_of(line, value, raw.tell())
            if window.peek() == ",":
                window.advance(1)
            elif window.peek() != "]":
                raise fault(name, window.line, f"{_show(window.peek())} after a row", advice)


def _show(character: str) -> str:
    return repr(character) if character else "the end of the file"


class _Window:
    """A stretch of JSON text that moves over a file, so that no file is in memory whole."""

    def __init__(self, file: TextIO) -> None:
        self.line = 1
        self._file, self._text, self._at = file, "", 0

    def peek(self) -> str:
        """Skip white space; the character that follows, or nothing at the file's end."""
        while True:
            blank = _BLANK.match(self._text, self._at)
            self.advance(len(blank[0]) if blank else 0)
            if self._at < len(self._text) or not self._extend(_CHUNK):
                return self._text[self._at : self._at + 1]

    def advance(self, count: int) -> None:
        """Leave characters behind."""
        self.line += self._text.count("\n", self._at, self._at + count)
        self._at += count

    def decode(self) -> Any:
        """Take the value that begins here."""
        chunk = _CHUNK
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except (ValueError, RecursionError):
                # The window may end within it. Doubled each time, a long row costs linear time.
                if not self._extend(chunk):
                    raise
                chunk *= 2
            else:
                self.advance(end - self._at)
                return value

    def _extend(self, count: int) -> bool:
        more = self._file.read(count)
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)
