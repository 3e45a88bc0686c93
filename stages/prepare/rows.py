"""Raw rows: the JSON Lines files of data/raw, and the fields of a line."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from stages.shared.chat.conversation import RejectedRow
from stages.shared.core import files
from stages.shared.core.errors import UserError, reading
from stages.shared.data.encoding import encoding_of

# A line's number from 1, and its bytes.
LINES = pa.schema({"line": pa.int64(), "row": pa.binary()})
Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")


# NUL and C1: UTF-16 or Windows-1252 converted as ISO-8859-1.
_CONTROL = re.compile("[\0\x80-\x9f]")
_DEEPEST = 64  # templates and JSON writers recurse


class _Entry(BaseModel):
    """A file of the user's in source.json."""

    split: Split
    name: str
    first_line: int
    counted_in: Literal["line", "row"]
    source: str | None = None


@dataclass(frozen=True)
class Source:
    """One split's file in data/raw."""

    split: Split
    path: Path
    parts: list[dict[str, Any]]  # the user's files: `name`, `first_line` here, `counted_in`
    with_eval: frozenset[str | None] = frozenset()  # sources (None: the only one) that hold out

    @property
    def names(self) -> set[str | None]:
        """Names of the sources; None: there is one."""
        return {part.get("source") for part in self.parts}

    @property
    def all_have_eval(self) -> bool:
        """Whether every source has its own eval split."""
        return self.names <= self.with_eval

    def parts_of(self, lines: np.ndarray) -> np.ndarray:
        """Index of the part of each line, int [lines]."""
        starts = [part["first_line"] for part in self.parts]
        return np.searchsorted(starts, lines, side="right") - 1

    def place(self, line: int) -> tuple[str, str, int]:
        """Locate a line in the user's file: its name, "line" or "row", the number there."""
        part = [part for part in self.parts if part["first_line"] <= line][-1]
        return part["name"], part["counted_in"], line - part["first_line"] + 1


def find_sources(folder: Path) -> dict[Split, Source]:
    """Find the files that `fetch_data` lists in source.json: `train`, and `eval` if present."""
    if not (path := folder / "source.json").exists():
        raise UserError(f"{folder}: has no source.json. Run `dvc repro fetch_data`.")
    parts: dict[Split, list[dict[str, Any]]] = {}
    with reading(path):
        for entry in files.read_json(path)["files"]:
            part = _Entry.model_validate(entry)
            parts.setdefault(part.split, []).append(part.model_dump())
        if "train" not in parts:
            raise ValueError("no file of the train split")
    with_eval = frozenset(part.get("source") for part in parts.get("eval", ()))
    return {
        split: Source(split, folder / f"{split}.jsonl", some, with_eval)
        for split, some in parts.items()
    }


def read_chunks(path: Path, max_bytes: int, max_row_bytes: int) -> Iterator[tuple[pa.Table, int]]:
    """Read a file's `LINES`, in chunks that end with the first past `max_bytes`, and their bytes.

    Of a row that is too long the first bytes are read, one more than `max_row_bytes`.
    """
    number, lines, begin = 0, list[dict[str, Any]](), 0
    with path.open("rb") as file:
        while row := file.readline(max_row_bytes + 1):
            rest, number = row, number + 1
            while len(row) > max_row_bytes and rest and not rest.endswith(b"\n"):
                rest = file.readline(1 << 20)
            lines.append({"line": number, "row": row})
            if (end := file.tell()) - begin >= max_bytes:
                yield pa.Table.from_pylist(lines, LINES), end - begin
                lines, begin = [], end
        if lines:
            yield pa.Table.from_pylist(lines, LINES), file.tell() - begin


def require_length(row: bytes, max_row_bytes: int) -> None:
    """Reject a row of which `read_chunks` read the beginning alone."""
    if len(row) > max_row_bytes:
        raise RejectedRow(f"longer than prepare.max_row_bytes, {max_row_bytes:,}")


def parse_line(row: bytes) -> dict[str, Any]:
    """Parse a line into its fields that are neither null nor NaN, or reject it."""
    try:
        value = _DECODER.decode(row.decode().rstrip().removeprefix("\ufeff"))
    except RejectedRow:
        raise
    except UnicodeDecodeError as error:
        encoding = encoding_of(row)
        like = f", but looks like {encoding}" if encoding else ""
        raise RejectedRow(f"not UTF-8 in byte {error.start + 1}{like}") from None
    except json.JSONDecodeError as error:
        raise RejectedRow(f"not JSON: {_fault(error)}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; deep nesting
        raise RejectedRow(f"not JSON that can be read ({error})") from None
    if not isinstance(value, dict):
        raise RejectedRow(f"not an object but {kind_of(value)}: {value!r:.80}")
    return present(value)


def _fault(error: json.JSONDecodeError) -> str:
    rest = error.doc[error.pos :].lstrip()
    if error.msg.startswith("Unterminated string"):
        return f"the line ends inside the text that begins in column {error.colno}"
    what = "the line ends too early" if not rest else error.msg
    if error.msg == "Extra data":
        extra = {",": "a comma", "{": "a second object"}.get(rest[0], "more text")
        what = f"{extra} after the object"
    return f"{what}, column {error.colno}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RejectedRow(f"the key `{twice}` stands twice in one object")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def parse_json(text: str) -> Any:
    """Parse JSON text; `RejectedRow` for a key that stands twice in one object."""
    return _DECODER.decode(text.strip())


def present(fields: dict[str, Any]) -> dict[str, Any]:
    """Filter fields that are neither null nor NaN."""
    return {k: value for k, value in fields.items() if value is not None and not is_nan(value)}


def is_nan(value: Any) -> bool:
    """Whether a value is NaN, as pandas writes a missing one."""
    return isinstance(value, float) and math.isnan(value)


def kind_of(value: Any) -> str:
    """A JSON value's type, in words."""
    names = {list: "a list", dict: "an object", str: "a text", bool: "a truth value"}
    names |= {type(None): "null", int: "a number", float: "a number"}
    return names[type(value)]


def require_characters(*values: Any) -> None:
    """Refuse lone surrogates, and control characters of a wrong conversion, in JSON values."""
    text = "\n".join(_texts_of(values))
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RejectedRow("a text holds half a surrogate pair, which is no character") from None
    if match := _CONTROL.search(text):
        origin = "UTF-16" if match[0] == "\0" else "Windows-1252"
        raise RejectedRow(
            f"a text holds the control character U+{ord(match[0]):04X}, left where {origin} was "
            "converted as ISO-8859-1"
        )


def _texts_of(value: Any, depth: int = 0) -> Iterator[str]:
    """All strings of a JSON value, names of fields among them; `RejectedRow` for a deep one."""
    if depth > _DEEPEST:
        raise RejectedRow(f"a call, tool or argument is nested more than {_DEEPEST} deep")
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, one in value.items():
            yield name
            if isinstance(one, str):
                yield one
            else:
                yield from _texts_of(one, depth + 1)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts_of(one, depth + 1)
