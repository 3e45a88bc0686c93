"""A hub on this machine."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import hub as hubs


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[hubs.Hub]:
    with hubs.serve_here(monkeypatch, tmp_path) as hub:
        yield hub
