"""Check that nobody else can write where DVC unpickles: its cache of hashes, in /var/tmp/dvc.

Run:    python -m stages.tools.cache_folder      (`make repro` does, before `dvc repro`)

On a shared machine whoever writes there runs code as the user of DVC.
"""

import os
import stat
from pathlib import Path

from stages.shared.core.command import quick_imports, run
from stages.shared.core.errors import UserError

ADVICE = "Remove it, or export DVC_SITE_CACHE_DIR=$HOME/.cache/dvc-hashes."


def require_own(folder: Path) -> None:
    """Raise a UserError where another user owns, can write or can replace what `folder` holds.

    DVC lets all users write to the two folders above it; of one's own the sticky bit is set, with
    which they can add but not replace.
    """
    for parent in folder.parents[:2]:
        mode, owner = parent.stat().st_mode, parent.stat().st_uid
        replaceable = mode & stat.S_IWOTH and not mode & stat.S_ISVTX
        if replaceable and owner == os.getuid():
            parent.chmod(stat.S_IMODE(mode) | stat.S_ISVTX)
        elif replaceable or owner not in (0, os.getuid()):
            raise UserError(f"{parent}: other users can replace what DVC unpickles. {ADVICE}")
    for path in (folder, *folder.rglob("*")):
        info = path.lstat()
        group = info.st_mode & stat.S_IWGRP and info.st_gid != os.getgid()
        if info.st_uid not in (0, os.getuid()) or info.st_mode & stat.S_IWOTH or group:
            raise UserError(f"{path}: other users can write what DVC unpickles. {ADVICE}")


def main() -> None:
    """Check this repository's."""
    with quick_imports():
        from dvc.repo import Repo  # noqa: PLC0415

    with Repo() as repo:  # opens its databases, and unpickles nothing yet
        require_own(Path(repo.site_cache_dir))


if __name__ == "__main__":
    run(main)
