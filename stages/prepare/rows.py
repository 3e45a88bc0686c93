"""Raw rows: the JSON Lines files of data/raw, and the fields of a line."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel

from stages.shared.chat.conversation import RejectedRow
from stages.shared.core import files
from stages.shared.core.errors import UserError, reading
from stages.shared.data.encoding import encoding_of

Line = tuple[int, bytes]  # its number from 1
Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")


# NUL and C1: UTF-16 or Windows-1252 converted as ISO-8859-1.
_CONTROL = re.compile("[\0\x80-\x9f]")
_DEEPEST = 64  # templates and JSON writers recurse


class Part(BaseModel):
    """A file of the user's in source.json; its first line here, and what the user counts there."""

    split: Split
    name: str
    first_line: int
    counted_in: Literal["line", "row"]
    source: str | None = None  # its name, where there are several


@dataclass(frozen=True)
class Source:
    """One split's file in data/raw."""

    path: Path
    parts: list[Part]
    with_eval: frozenset[str | None]  # sources that hold out rows themselves

    @property
    def names(self) -> set[str | None]:
        """Names of the sources; None: there is one."""
        return {part.source for part in self.parts}

    def parts_of(self, lines: np.ndarray) -> np.ndarray:
        """Index of the part of each line, int [lines]."""
        return np.searchsorted([p.first_line for p in self.parts], lines, side="right") - 1

    def place(self, line: int) -> tuple[str, str, int]:
        """Locate a line in the user's file: its name, "line" or "row", the number there."""
        part = [part for part in self.parts if part.first_line <= line][-1]
        return part.name, part.counted_in, line - part.first_line + 1


def find_sources(folder: Path) -> dict[Split, Source]:
    """Find the files that `fetch_data` lists in source.json: `train`, and `eval` if present."""
    if not (path := folder / "source.json").exists():
        raise UserError(f"{folder}: has no source.json. Run `dvc repro fetch_data`.")
    with reading(path):
        parts = [Part.model_validate(entry) for entry in files.read_json(path)["files"]]
        if all(part.split != "train" for part in parts):
            raise ValueError("no file of the train split")
    with_eval = frozenset(part.source for part in parts if part.split == "eval")
    return {
        split: Source(folder / f"{split}.jsonl", [p for p in parts if p.split == split], with_eval)
        for split in {part.split for part in parts}
    }


def read_batches(path: Path, max_bytes: int) -> Iterator[tuple[list[Line], int]]:
    """Read a file's lines, in batches that end with the first past `max_bytes`, and their bytes."""
    lines, size = list[Line](), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            lines.append((number, line))
            size += len(line)
            if size >= max_bytes:
                yield lines, size
                lines, size = [], 0
    if lines:
        yield lines, size


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


def loaded(value: Any) -> Any:
    """Parse a string that is JSON, as lists are written in CSV."""
    try:
        return _DECODER.decode(value.strip()) if isinstance(value, str) else value
    except RejectedRow:  # a key stands twice
        raise
    except (ValueError, RecursionError):  # ValueError: also a number of thousands of digits
        return value


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
    """All strings of a JSON value, names of fields among them; `RejectedRow` for no JSON."""
    if depth > _DEEPEST:
        raise RejectedRow(f"a call, tool or argument is nested more than {_DEEPEST} deep")
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        yield from _texts_of([*value.values()], depth)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts_of(one, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise RejectedRow(f"a call, tool or argument holds {value}, which JSON does not have")
