"""Formats of numbers and texts, which the templates use as filters; what is missing is a dash."""

import json
import re
from functools import partial
from html import escape
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Undefined
from markupsafe import Markup

from stages.shared.core.display import visible

MISSING = "–"
NO_BREAK = "\N{NO-BREAK SPACE}"
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1}


def is_missing(item: Any) -> bool:
    """Whether it is None, NaN or a key that its file lacks."""
    return item is None or isinstance(item, Undefined) or (np.isscalar(item) and pd.isna(item))


def number(item: Any, digits: int = 4, sign: str = "-", unit: str = "") -> str:
    """`1,234.5678`; zero has no sign."""
    if is_missing(item):
        return MISSING
    zero = round(item, digits) == 0
    text = f"{0.0 if zero else item:{'-' if zero else sign},.{digits}f}"
    return text.replace("-", "−") + unit


signed = partial(number, sign="+")  # +0.1234


def percent(fraction: Any, digits: int = 1) -> str:
    """A fraction as `62.5 %`."""
    return MISSING if is_missing(fraction) else number(100 * fraction, digits, unit=f"{NO_BREAK}%")


def points(change: Any) -> str:
    """Change of a fraction in percentage points, `+12.5`."""
    return MISSING if is_missing(change) else signed(100 * change, 1)


def size(count: Any) -> str:
    """Bytes in decimal units, `98.4 MB`."""
    if is_missing(count):
        return MISSING
    unit = next(unit for unit, scale in UNITS.items() if count >= scale or unit == "B")
    return number(count / UNITS[unit], {"GB": 2, "B": 0}.get(unit, 1), unit=NO_BREAK + unit)


def value(item: Any, key: str = "") -> str:
    """A scalar or list by its type; a size if the key ends in `bytes`."""
    if is_missing(item):
        return MISSING
    if isinstance(item, bool):
        return "yes" if item else "no"
    if isinstance(item, int | float) and key.endswith("bytes"):
        return size(item)
    if isinstance(item, float) and 0 < abs(item) < 1e-3:
        return scientific(item)
    if isinstance(item, int | float):
        return f"{item:,}" if isinstance(item, int) else f"{item:,.6g}".replace("-", "−")
    return ", ".join(map(value, item)) if isinstance(item, list) else str(item)


def scientific(item: Any) -> str:
    """`1.2 × 10⁻⁵`; zero is `0`."""
    if is_missing(item) or not item:
        return MISSING if is_missing(item) else "0"
    mantissa, exponent = f"{item:.1e}".split("e")
    raised = str(int(exponent)).translate(RAISED)
    return f"{mantissa.replace('-', '−')}{NO_BREAK}×{NO_BREAK}10{raised}"


def words(key: str) -> str:
    """`RTX_4090_24GiB` as `RTX 4090 24 GiB`."""
    return key.replace("_", " ").replace("GiB", f"{NO_BREAK}GiB")


def yaml_value(item: Any) -> str:
    """A parameter as params.yaml spells it, approximately."""
    if isinstance(item, list):
        return ", ".join(map(yaml_value, item))
    return json.dumps(item) if item is None or isinstance(item, bool) else str(item)


def flat(nested: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key → scalar or list, in the order of the file."""
    if not isinstance(nested, dict):
        return {prefix: nested}
    parts = [flat(item, f"{prefix}.{key}".lstrip(".")) for key, item in nested.items()]
    return {key: item for part in parts for key, item in part.items()}


def markdown(text: Any) -> Markup:
    """One line, escaped for Markdown and HTML."""
    shown = MISSING if is_missing(text) else visible(str(text))
    escaped = re.sub(r"([\\`*_\[\]|~])", r"\\\1", " ".join(shown.split()))
    return Markup(escape(escaped, quote=False))  # noqa: S704
