"""The stage, with the tiny tokenizer."""

from pathlib import Path

import pytest

from tests import tiny
from tests.prepare.helpers import Stage


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def stage(tmp_path: Path, tokenizer: Path) -> Stage:
    return Stage(tmp_path, tokenizer)
