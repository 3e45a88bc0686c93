"""Imports of large libraries, which a stage makes when its parameters are known to be right."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quickly() -> Iterator[None]:
    """Look for no garbage among what the block imports, neither meanwhile nor later.

    The hundred thousands of objects that torch and transformers define are there to stay. Looked at
    again and again, and once more at the end, they take 1.2 seconds of 4.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
