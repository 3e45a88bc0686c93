"""One dry run for all tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.shared.step.memory.predict import StepCounter


@pytest.fixture(autouse=True, scope="session")
def dry_run() -> Iterator[None]:
    """Its process is started with the first count that is not kept, and ended with the last."""
    with StepCounter(Path()):
        yield
