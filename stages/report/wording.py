"""Numbers as people read them, and texts that mean nothing to Markdown."""

import re
from collections.abc import Iterable
from html import escape
from typing import Any

from jinja2 import Undefined

MISSING = "–"
MINUS = "−"
NO_BREAK = "\N{NO-BREAK SPACE}"
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def is_missing(value: Any) -> bool:
    """Whether a source has no such value."""
    return value is None or isinstance(value, Undefined)


def number(value: Any, digits: int = 4) -> str:
    """`1,234.5678`; a dash where it is missing."""
    if is_missing(value):
        return MISSING
    text = f"{value:,.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.removeprefix("-")
    return text.replace("-", MINUS)


def signed(value: Any, digits: int = 4) -> str:
    """`+0.1234`, `−0.1234`, and a zero without a sign."""
    text = number(value, digits)
    visible = text != MISSING and text.strip("0.,") and not text.startswith(MINUS)
    return f"+{text}" if visible else text


def percent(fraction: Any, digits: int = 1) -> str:
    """`62.5 %` of a fraction."""
    text = MISSING if is_missing(fraction) else number(100 * fraction, digits)
    return text if text == MISSING else f"{text}{NO_BREAK}%"


def points(change: Any) -> str:
    """The change of a fraction in percentage points, `+12.5`."""
    return MISSING if is_missing(change) else signed(100 * change, 1)


def size(count: Any) -> str:
    """Bytes in powers of ten: `98.4 MB`."""
    if is_missing(count):
        return MISSING
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:,.{2 if unit == 'GB' else 1}f}{NO_BREAK}{unit}"
    return f"{count}{NO_BREAK}B"


UNITS = {"MB": 1e6, "GB": 1e9}


def common_unit(counts: Iterable[int]) -> str:
    """The unit that a column of bytes is told in: GB from 10 GB on."""
    return "GB" if max(counts, default=0) >= 1e10 else "MB"


def in_unit(count: Any, unit: str) -> str:
    """Bytes as a number of MB or GB, `538.1`."""
    return MISSING if is_missing(count) else number(count / UNITS[unit], 1)


def value(item: Any, key: str = "") -> str:
    """Any scalar or list, by its type; by its key where that has a unit."""
    if is_missing(item):
        return MISSING
    if isinstance(item, bool):
        return "yes" if item else "no"
    if isinstance(item, int | float):
        return size(item) if re.search(r"(^|[._])bytes$", key) else _plain(item)
    return ", ".join(map(value, item)) if isinstance(item, list) else str(item)


def _plain(item: float) -> str:
    if isinstance(item, int):
        return number(item, 0)
    return scientific(item) if 0 < abs(item) < 1e-3 else f"{item:,.6g}".replace("-", MINUS)


def scientific(item: Any) -> str:
    """`1.2 × 10⁻⁵`; a dash where it is missing, and a plain zero."""
    if is_missing(item):
        return MISSING
    if not item:
        return "0"
    mantissa, exponent = f"{item:.1e}".split("e")
    raised = str(int(exponent)).translate(RAISED)
    return f"{mantissa.replace('-', MINUS)}{NO_BREAK}×{NO_BREAK}10{raised}"


def yaml_value(item: Any) -> str:
    """A parameter as params.yaml spells it, near enough."""
    if item is None:
        return "null"
    if isinstance(item, bool):
        return "true" if item else "false"
    if isinstance(item, list):
        return ", ".join(yaml_value(part) for part in item)
    return str(item)


def flat(nested: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted keys and their scalars, in the order of the file."""
    if not isinstance(nested, dict):
        return [(prefix, nested)]
    return [
        pair
        for key, item in nested.items()
        for pair in flat(item, f"{prefix}.{key}" if prefix else str(key))
    ]


def label(key: str) -> str:
    """`train.peak_memory_bytes` as words, its unit left to the value: `train peak memory`."""
    words = re.split(r"[._]", key)
    return " ".join(words[:-1] if len(words) > 1 and words[-1] == "bytes" else words)


def markdown(text: Any) -> str:
    """A text on one line that Markdown and the HTML in it leave alone."""
    if is_missing(text):
        return MISSING
    one_line = " ".join(str(text).split())
    return escape(re.sub(r"([\\`*_\[\]|~])", r"\\\1", one_line), quote=False)
