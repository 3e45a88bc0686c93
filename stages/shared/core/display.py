"""Display: progress bars, and foreign text (names, messages, model output) made harmless."""

import os
import re
import sys
from collections.abc import Iterable
from io import TextIOWrapper
from typing import Any

from tqdm import tqdm

# C0 and C1 controls but tab and newline, line separators, bidirectional controls, surrogates.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
# In a URL, also where pathlib made one slash of two.
_PASSWORD = re.compile(r"(?<=[a-z]:)(/{1,2})[^/\s'\"<>]*@", re.IGNORECASE)
LONGEST = 600  # characters of a line


def visible(text: str) -> str:
    r"""Spell out control characters, as `\x1b`, and leave out the password of an address."""
    text = _PASSWORD.sub(r"\1***@", text)
    return _CONTROL.sub(lambda m: m[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """Visible text in one line; a long one loses its middle, as its end says what to do."""
    line = visible(" ".join(text.split()))
    cut = len(line) - LONGEST
    return line if cut <= 0 else f"{line[: LONGEST * 2 // 3]} […] {line[LONGEST * 2 // 3 + cut :]}"


class _Visible:
    """Stream of visible text; a carriage return may begin what is written, as of a progress bar."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        begin = text[:1] if text[:1] == "\r" else ""
        self._stream.write(begin + visible(text[len(begin) :].replace("\r\n", "\n")))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)


def guard() -> None:
    """Make all that this process prints visible, of a progress bar, a warning or a library too."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # a closed stream; the next file that is opened would get what is printed
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or os.fdopen(os.dup(descriptor), "w")
        if isinstance(stream, TextIOWrapper):  # a terminal that is not UTF-8 ends no stage
            stream.reconfigure(errors="replace")
        setattr(sys, name, _Visible(stream))


def bar(*, total: int | None, desc: str, unit: str, initial: int = 0) -> "tqdm[Any]":
    """Make a progress bar to advance by hand; a log file gets a line every ten seconds."""
    watched = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        desc=desc,
        unit=unit,
        unit_scale=unit in ("B", "token"),
        mininterval=0.1 if watched else 10.0,
        dynamic_ncols=watched,
    )
