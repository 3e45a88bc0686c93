"""Files: written whole or not at all, hashed, and compared with the hashes that DVC recorded."""

import hashlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.shared.core.errors import REMEDY, UserError, reading, require_regular
from stages.shared.core.machine import machine

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc.stage import Stage

_outs: list[str] = []  # of the stage that this process runs


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Path, `<target>.partial`, that becomes `target` when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    _remove(partial)
    try:
        yield partial
        partial.replace(target)
    finally:
        _remove(partial)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """The same for a folder, whose files get the mode of the umask.

    Libraries write weights with mode 0600. A read-only file may be a link into DVC's cache.
    """
    with whole_file(target) as partial:
        partial.mkdir()
        yield partial
        for path in partial.rglob("*"):
            if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o200:
                path.chmod(partial.stat().st_mode & 0o666)
        _remove(target)


def _remove(path: Path) -> None:
    """Remove whatever lies there; `rmtree` alone waits for ever at a pipe."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write a UTF-8 text, whole or not at all."""
    with whole_file(target) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(target: Path, value: Any) -> None:
    """Write indented JSON; NaN is refused, since JSON has none."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_report(
    metrics: Path, details: Path, values: dict[str, Any], compared: Collection[str]
) -> None:
    """Write what DVC compares (dotted keys, `train.tokens`) to `metrics`, the rest to `details`."""
    chosen, rest = split(values, compared)
    write_json(details, rest)
    write_json(metrics, chosen)


def split(
    values: dict[str, Any], compared: Collection[str], prefix: str = ""
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split nested values: those of the dotted keys, and all others."""
    chosen: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if name in compared:
            chosen[key] = value
        elif any(other.startswith(f"{name}.") for other in compared):
            chosen[key], remainder = split(value, compared, f"{name}.")
            rest |= {key: remainder} if remainder else {}
        else:
            rest[key] = value
    return chosen, rest


def read_json(path: Path, shown: str = "", remedy: str = REMEDY) -> dict[str, Any]:
    """Read a JSON object; anything else is a `UserError` that names the file."""
    with reading(shown or path, remedy):
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"{type(value).__name__} instead of an object")
    return value


def require_json(folder: Path) -> None:
    """Refuse a model's folder in which a JSON file is damaged; libraries do not say which."""
    for path in sorted(folder.glob("*.json")):
        read_json(path)


def sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_sha256(folder: Path) -> str:
    """SHA-256 over the names and contents of all files below `folder`, in order of name."""
    digest = hashlib.sha256()
    for path in _below(folder):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256(path)}\n".encode())
    return digest.hexdigest()


def folder_bytes(folder: Path) -> int:
    """Size of all files below `folder`, in bytes."""
    return sum(path.stat().st_size for path in _below(folder))


def _below(path: Path) -> list[Path]:
    """A file itself, or all files below a folder; a pipe, which has no end, is refused."""
    paths = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [require_regular(file) for file in paths if file.exists() and not file.is_dir()]


def require_space(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Refuse early where the disk of `folder` is too full for `purpose`, "the quantized model"."""
    existing = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        what = f"{free / 1e9:.2f} GB are free; {purpose} needs {needed_bytes / 1e9:.2f} GB"
        raise UserError(f"{folder}: {what}. Free some space and run `dvc repro` again.")


def link_folder(source: Path, target: Path) -> None:
    """Hard-link the files of a flat folder into `target`."""
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        link_or_copy(path, target / path.name)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file; copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def verify_dependencies(repo: "Repo", stage: "Stage") -> None:
    """Raise a UserError for a dependency that changed under its old modification time.

    A file that rots keeps its time, which DVC trusts. DVC's database has hashes by inode, time of
    modification and size; a file that it does not have so was written since, and passes. A hash is
    compared once for each time of change, or each time with `QLORA_VERIFY=true`. Without DVC, a
    dependency that differs from dvc.lock is a warning.
    """
    _outs[:] = [out.fs_path for out in stage.outs]
    dependencies = [Path(dependency.fs_path) for dependency in stage.deps]
    for path in dependencies:
        for file in _below(Path(os.path.relpath(path))):
            _verify(repo, str(file.absolute()))
    for out in repo.index.outs if "DVC_STAGE" not in os.environ else ():
        used = any(path.is_relative_to(out.fs_path) for path in dependencies)
        if used and out.hash_info and out.exists and out.changed_checksum():
            what = "is not as dvc.lock has it; `dvc repro` decides"
            print(f"warning: {out}: {what}", file=sys.stderr)


def record_outs() -> None:
    """Enter the outs of the stage into DVC's database, so that it covers stages run by hand."""
    if not _outs:
        return
    from dvc.repo import Repo  # noqa: PLC0415
    from dvc_data.hashfile.hash import hash_file  # noqa: PLC0415

    with Repo() as repo:
        for out in _outs:
            for file in _below(Path(out)):
                hash_file(str(file), repo.fs, "md5", state=repo.state)


def _verify(repo: "Repo", path: str) -> None:
    from dvc_data.hashfile.hash import hash_file  # noqa: PLC0415

    state, disk = repo.state, repo.fs
    entry, info = state.hashes.get(path), disk.info(path)
    size = json.loads(entry)["size"] if entry else 0
    _, written = state.get(path, disk, info | {"size": size})
    if written is None:
        return
    if info["size"] == size:
        # A compared hash is noted under a name that no file has, by the time of change (ctime).
        note, changed = f"{path}//verified", info | {"mtime": info["created"]}
        if state.get(note, disk, changed)[1] == written and not machine().verify:
            return
        if hash_file(path, disk, written.name)[1] == written:
            state.save(note, disk, written, changed)
            return
    shown, copy = os.path.relpath(path), Path(repo.cache.local.oid_to_path(written.value))
    advice = "Restore it; or, if it is right, `touch` it."
    if any(path == out.fs_path or path.startswith(f"{out.fs_path}/") for out in repo.index.outs):
        linked = copy.exists() and copy.samefile(path)  # then it rotted too
        rotten = shlex.join([shown, os.path.relpath(copy)] if linked else [shown])
        advice = f"Let DVC write it again: rm -f {rotten} && dvc repro"
    raise UserError(f"{shown}: changed on the disk under its old time. {advice}")
