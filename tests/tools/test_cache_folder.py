"""DVC's cache of hashes, which it unpickles: nobody else's, and nobody else can write it."""

import os
import stat
import sys
from pathlib import Path

import pytest

from stages.shared.core.errors import UserError
from stages.tools.cache_folder import require_own
from tests import workspace


def made(root: Path) -> Path:
    """As DVC makes it."""
    folder = root / "dvc/repo/0123"
    (folder / "links").mkdir(parents=True)
    (folder / "links/cache.db").write_bytes(b"")
    for parent in folder.parents[:2]:
        parent.chmod(0o777)
    return folder


def test_own_folder_passes_and_gets_sticky_parents(tmp_path: Path) -> None:
    require_own(folder := made(tmp_path))
    assert all(parent.stat().st_mode & stat.S_ISVTX for parent in folder.parents[:2])


@pytest.mark.parametrize("name", [".", "links", "links/cache.db"])
def test_folder_that_others_can_write_is_refused(name: str, tmp_path: Path) -> None:
    folder = made(tmp_path)
    (folder / name).chmod(0o777)
    with pytest.raises(UserError, match="other users can write what DVC unpickles"):
        require_own(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("name", [".", "..", "links/cache.db"])
def test_folder_of_another_user_is_refused(name: str, tmp_path: Path) -> None:
    folder = made(tmp_path)
    os.chown(folder / name, 12345, -1)
    with pytest.raises(UserError, match=r"other users can (write|replace) what DVC unpickles"):
        require_own(folder)


def test_command_checks_the_folder_that_dvc_uses(tmp_path: Path) -> None:
    space = workspace.make(tmp_path / "space")
    env = {"DVC_SITE_CACHE_DIR": str(tmp_path / "site")}
    command = (sys.executable, "-m", "stages.tools.cache_folder")
    assert space.run(*command, env=env).returncode == 0
    [folder] = (tmp_path / "site/repo").iterdir()
    folder.chmod(0o777)
    done = space.run(*command, env=env)
    assert (done.returncode, done.stderr.startswith(f"error: {folder}: other")) == (1, True)
