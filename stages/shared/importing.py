"""Imports of large libraries, which a stage makes when its parameters are known to be right."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quickly() -> Iterator[None]:
    """Look for no garbage while the block imports.

    The hundred thousands of objects that torch and transformers define are there to stay, and would
    be looked at again and again: a sixth of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
