"""A model of the hub: the same bytes as in a folder, at a full commit."""

import shutil
from pathlib import Path

import pytest

from stages.fetch_model.__main__ import fetch
from stages.shared.core import files
from stages.shared.core.errors import UserError
from tests import hub as hubs
from tests.fetch_model.helpers import fetched, from_hub, from_path


def test_the_hub_and_a_folder_give_the_same_bytes(
    hub: hubs.Hub, saved: Path, tmp_path: Path
) -> None:
    hub.repositories["me/tiny"] |= {"pytorch_model.bin": b"pickle", "README.md": b"", "run.py": b""}
    fetched(from_hub(), tmp_path / "hub")
    fetched(from_path(saved), tmp_path / "path")
    shutil.rmtree(tmp_path / "hub/scratch")
    shutil.rmtree(tmp_path / "path/scratch")
    assert files.folder_sha256(tmp_path / "hub") == files.folder_sha256(tmp_path / "path")
    assert not any(r.endswith(("bin", "md", "py")) for r in hub.requests)


def test_a_branch_is_no_revision() -> None:
    with pytest.raises(UserError, match=r"model\.revision is 'main'; expected a full commit"):
        fetch(from_hub("main"), Path())
