"""How often Python looks for garbage while rows pass by, which else takes a sixth of the time."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_OBJECTS = 100_000  # that are made before it looks again: those of a few batches


@contextmanager
def collected_rarely() -> Iterator[None]:
    """Look once in a few batches, and not among what was there before: libraries, for the most.

    Rows leave no cycles behind; what they leave is freed as soon as nothing refers to it.
    """
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(_OBJECTS, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
