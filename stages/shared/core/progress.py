"""Progress bars, quiet in a log; and quick imports of large libraries."""

import gc
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from stages.shared.core.errors import SIGNALS


def bar(*, total: int | None, desc: str, unit: str, initial: int = 0) -> "tqdm[Any]":
    """Make a bar to advance by hand from `initial`, in a `with` block.

    A terminal is redrawn ten times a second; a log file gets a line every ten seconds.
    """
    watched = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        desc=desc,
        unit=unit,
        unit_scale=unit in ("B", "token"),
        mininterval=0.1 if watched else 10.0,
        dynamic_ncols=watched,
        leave=True,
    )


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import large libraries: without garbage collection, and without a signal in the middle.

    The hundred thousands of objects that torch and transformers define are there to stay; looking
    for garbage among them takes 1.2 of 4 seconds. Half imported, a library reports a signal as a
    module that it lacks: one that comes meanwhile is delivered after the block.
    """
    enabled = gc.isenabled()
    gc.disable()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
