"""A row of the user's file, and how a file that has none is told."""

from typing import Any, NamedTuple

from stages.shared.core.errors import UserError


class Row(NamedTuple):
    """One row of a file.

    Attributes:
        line: where it begins, from 1; of a parquet file, which has no lines, the row.
        fields: what it says; null values are left out.
        problem: why it is no row, or None.
        position: how far the file is read, in bytes.
    """

    line: int
    fields: dict[str, Any]
    problem: str | None
    position: int


def row_of(line: int, value: Any, position: int) -> Row:
    """The row that a value of JSON or parquet is."""
    if not isinstance(value, dict):
        return Row(line, {}, f"not an object but {kind_of(value)}: {value!r:.60}", position)
    return Row(line, {k: v for k, v in value.items() if v is not None}, None, position)


def fault(name: str, line: int, found: str, advice: str) -> UserError:
    """What is wrong with a file as a whole, in one line."""
    return UserError(f"{name}, line {line}: {found}; {advice}")


def kind_of(value: Any) -> str:
    """A JSON value's type, in words."""
    names = {list: "a list", dict: "an object", str: "a text", bool: "a truth value"}
    names |= {type(None): "null", int: "a number", float: "a number"}
    return names.get(type(value), f"of type {type(value).__name__}")
