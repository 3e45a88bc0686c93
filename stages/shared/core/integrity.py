"""Integrity of the stages' files: one that rots keeps its time, and DVC trusts the time.

DVC's own database has the hash of each file by inode, modification time and size. What a stage
reads is held against it; what a stage has written is entered, so that it covers stages run by hand.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from stages.shared.core import progress
from stages.shared.core.errors import UserError
from stages.shared.core.machine import machine

if TYPE_CHECKING:
    from dvc.repo import Repo

_outs: list[str] = []  # of the stage that this process runs


def verify(stage: str) -> None:
    """Raise a UserError for a dependency that changed under its old modification time.

    Sizes are compared always; hashes once for each inode, size, and time of modification and of
    change, or each time with `QLORA_VERIFY=true`. A file with another inode or time than DVC knows
    was written since, and is not judged; by hand, without DVC, one that dvc.lock does not have so
    is told of.
    """
    from dvc.repo import Repo  # noqa: PLC0415  (imported by `params.load` by then)

    with Repo() as repo:
        loaded = repo.stage.load_one(name=stage)
        _outs[:] = [out.fs_path for out in loaded.outs]
        for path in _files(dep.fs_path for dep in loaded.deps):
            _verify_file(repo, path)
        if "DVC_STAGE" not in os.environ:  # DVC has looked itself
            _warn_of_changes(repo, [Path(dep.fs_path) for dep in loaded.deps])


def record() -> None:
    """Enter the outs of the stage that `verify` was called for; DVC need not hash them again."""
    if not _outs:
        return
    with progress.quick_imports():
        from dvc.repo import Repo  # noqa: PLC0415
        from dvc_data.hashfile.hash import hash_file  # noqa: PLC0415
        from dvc_objects.fs import localfs  # noqa: PLC0415

    with Repo() as repo:
        for path in _files(_outs):
            hash_file(path, localfs, "md5", state=repo.state)


def _warn_of_changes(repo: "Repo", read: list[Path]) -> None:
    for out in repo.index.outs:
        path = Path(out.fs_path)
        used = any(path == one or path in one.parents for one in read)
        if used and out.hash_info and out.exists and out.changed_checksum():
            what = "is not as dvc.lock has it; `dvc repro` decides"
            print(f"warning: {out}: {what}", file=sys.stderr)


def _files(paths: Iterable[str]) -> Iterator[str]:
    for path in map(Path, paths):
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in found:  # a pipe would be waited for
            if file.exists() and not (file.is_file() or file.is_dir()):
                raise UserError(f"{os.path.relpath(file)}: is no file. Remove it; run `dvc repro`.")
        yield from (str(file) for file in found if file.is_file())


def _verify_file(repo: "Repo", path: str) -> None:
    from dvc_data.hashfile.hash import hash_file  # noqa: PLC0415
    from dvc_objects.fs import localfs  # noqa: PLC0415

    entry, info = repo.state.hashes.get(path), localfs.info(path)
    size = json.loads(entry)["size"] if entry else 0
    _, written = repo.state.get(path, localfs, info | {"size": size})
    if written is None:
        return
    if info["size"] == size:
        # A hash that was compared is noted under a name that no file has, by the time of change:
        # bytes written under an old modification time are compared again.
        note, changed = f"{path}//verified", info | {"mtime": info["created"]}
        if repo.state.get(note, localfs, changed)[1] == written and not machine().verify:
            return
        if hash_file(path, localfs, written.name)[1] == written:
            repo.state.save(note, localfs, written, changed)
            return
    shown, copy = os.path.relpath(path), Path(repo.cache.local.oid_to_path(written.value))
    advice = "Restore it; or, if it is right, `touch` it."
    if any(path == out.fs_path or path.startswith(f"{out.fs_path}/") for out in repo.index.outs):
        linked = copy.exists() and copy.samefile(path)  # then it rotted too
        also = f" {os.path.relpath(copy)}" if linked else ""
        advice = f"Let DVC write it again: rm -f {shown}{also} && dvc repro"
    raise UserError(f"{shown}: changed on the disk under its old time. {advice}")
