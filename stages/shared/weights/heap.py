"""Freed pages of the C library's heap, given back to the system.

A matrix that has been quantized leaves its temporaries, many times its size, as holes between the
results that stay: a process of 1.2 GB of weights grew to 1.7 GB. The steps of a training, each of
another length, grew one that holds 0.5 GB of tensors to 4.3 GB.
"""

import ctypes
import resource
from functools import cache
from pathlib import Path
from typing import Any

GROWTH_BYTES = 32_000_000  # more often is not worth it: pages given back are cleared anew


class Trimmer:
    """Trims the heap after each piece of a long work, if the process has grown by 32 MB."""

    def __init__(self) -> None:
        self._before = resident_bytes()

    def __call__(self) -> None:
        """Trim, unless little was added since the last trim."""
        if resident_bytes() > self._before + GROWTH_BYTES:
            trim()
            self._before = resident_bytes()


def trim_above(limit: int) -> None:
    """Give freed pages back where the process holds more than `limit` bytes."""
    if resident_bytes() > limit:
        trim()


def trim() -> None:
    """Give freed pages back to the system; nothing where the C library is not glibc."""
    if (malloc_trim := _malloc_trim()) is not None:
        malloc_trim(0)


def resident_bytes() -> int:
    """Resident memory of this process, the pages of mapped files included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
