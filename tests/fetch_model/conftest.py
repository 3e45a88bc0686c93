"""A tiny model, on disk and on a hub."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import hub as hubs
from tests import tiny


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as a user has it; tests that change it take a copy."""
    return tiny.save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def mine(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "mine"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, saved: Path, tmp_path: Path) -> Iterator[hubs.Hub]:
    with hubs.serve_here(monkeypatch, tmp_path) as hub:
        hub.repositories["me/tiny"] = {p.name: p.read_bytes() for p in saved.iterdir()}
        yield hub
