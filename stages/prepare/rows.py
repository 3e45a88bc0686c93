"""Rows: which JSON Lines there are, and the fields of a line."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stages.shared.chat.conversation import RejectedRow
from stages.shared.core import files
from stages.shared.core.errors import UserError

Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")


@dataclass(frozen=True)
class Source:
    """A file of data/raw.

    Attributes:
        split: which split its rows belong to.
        path: where it lies.
        parts: the user's files that it was made of: of each its `name`, its `first_line` here, and
            whether it is `counted_in` lines or rows.
    """

    split: Split
    path: Path
    parts: list[dict[str, Any]]

    def place(self, line: int) -> tuple[str, str, int]:
        """The user's file that a line comes from, "line" or "row", and its number there."""
        part = [part for part in self.parts if part["first_line"] <= line][-1]
        return part["name"], part["counted_in"], line - part["first_line"] + 1


def find_sources(folder: Path) -> dict[Split, Source]:
    """The files that `fetch_data` wrote, by split: `train`, and `eval` where there is one.

    Raises:
        UserError: there is no source.json.
    """
    try:
        listed = files.read_json(folder / "source.json")["files"]
    except FileNotFoundError:
        raise UserError(f"{folder}: has no source.json. Run `dvc repro fetch_data`.") from None
    parts: dict[Split, list[dict[str, Any]]] = {}
    for entry in listed:
        parts.setdefault(entry["split"], []).append(entry)
    return {split: Source(split, folder / f"{split}.jsonl", some) for split, some in parts.items()}


def read_lines(path: str, position: int, line: int, max_bytes: int) -> Iterator[dict[str, Any]]:
    """Lines from byte `position`, where line number `line` begins, to the first past `max_bytes`.

    Yields:
        `line`, its number; `row`, its bytes; `position`, the byte after it.
    """
    end = position + max_bytes
    with Path(path).open("rb") as file:
        file.seek(position)
        for number, row in enumerate(file, start=line):
            position += len(row)
            yield {"line": number, "row": row, "position": position}
            if position >= end:
                return


def parse_line(row: bytes) -> dict[str, Any]:
    """The fields of a line, without those that are null or NaN.

    Raises:
        RejectedRow: it is no JSON object, not UTF-8, or has a key twice.
    """
    try:
        value = _DECODER.decode(row.decode().rstrip().removeprefix("\ufeff"))
    except RejectedRow:
        raise
    except UnicodeDecodeError as error:
        encoding = files.encoding_of(row)
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


def present(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that are neither null nor NaN."""
    return {k: value for k, value in fields.items() if value is not None and not is_nan(value)}


def is_nan(value: Any) -> bool:
    """Whether a value is NaN, pandas' way to say that there is none."""
    return isinstance(value, float) and math.isnan(value)


def kind_of(value: Any) -> str:
    """A JSON value's type, in words."""
    names = {list: "a list", dict: "an object", str: "a text", bool: "a truth value"}
    names |= {type(None): "null", int: "a number", float: "a number"}
    return names[type(value)]
