"""A hub on this machine."""

from collections.abc import Iterator

import pytest

from tests import hub as hubs


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[hubs.Hub]:
    with hubs.serve_here(monkeypatch) as hub:
        yield hub
