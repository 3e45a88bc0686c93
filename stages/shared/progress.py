"""Progress bars: one look for all stages, quiet where nobody is watching."""

import sys
from typing import Any

from tqdm import tqdm


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
