"""Files of the hub in the user's cache or the download folder, held against the hub's hashes."""

import glob
import hashlib
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stages.shared.core import files, machine, progress
from stages.shared.core.errors import UserError
from stages.shared.hub.repository import Repository, endpoint, one_line_errors


@contextmanager
def download_folder(repository: Repository) -> Iterator[Path]:
    """A folder outside of every out, so that whole files survive an interruption.

    It is removed when the block ends without an error. One process at a time has it.
    """
    from filelock import FileLock, Timeout  # noqa: PLC0415

    downloads = machine.root() / ".downloads"
    downloads.mkdir(exist_ok=True)
    lock = FileLock(downloads / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print("waiting for another download of this project", file=sys.stderr)
        lock.acquire()
    try:
        folder = downloads / f"{repository.name.replace('/', '--')}@{repository.commit}"
        folder.mkdir(exist_ok=True)
        yield folder
        shutil.rmtree(folder)
    finally:
        lock.release()


def download(repository: Repository, names: Sequence[str], folder: Path) -> Path:
    """The folder below which the files lie: of the user's cache where it has all, else `folder`.

    Args:
        repository: what the files belong to.
        names: paths of some of its files.
        folder: what `download_folder` gave; whole files that it has already are kept.

    Raises:
        UserError: as `Repository.files`; the disk is too full; a file is not what the hub states.
    """
    from huggingface_hub import snapshot_download  # noqa: PLC0415  (half a second)
    from huggingface_hub.errors import LocalEntryNotFoundError  # noqa: PLC0415
    from huggingface_hub.utils import logging  # noqa: PLC0415

    logging.set_verbosity_error()  # retries; what fails in the end is told in one line
    options: dict[str, Any] = {
        "repo_id": repository.name,
        "repo_type": repository.kind,
        "revision": repository.commit,
        "allow_patterns": [glob.escape(name) for name in names],
    }
    try:
        cached = Path(snapshot_download(**options, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    else:
        if all((cached / name).is_file() for name in names):
            _require_whole_cache(cached, names)
            return cached
    requested = {name: repository.files[name] for name in names}
    missing = [file for name, file in requested.items() if not (folder / name).is_file()]
    if missing:
        size = sum(file.size or 0 for file in missing)
        files.require_space(folder, size, f"the download of {repository.name}")
        with (
            one_line_errors(repository),
            progress.bar(total=size or None, desc=repository.name, unit="B") as bar,
        ):
            meter = _meter(bar, None if any(file.size is None for file in missing) else size)
            snapshot_download(**options, local_dir=folder, endpoint=endpoint(), tqdm_class=meter)
    for name, file in requested.items():
        path, stated = folder / name, file.lfs.sha256 if file.lfs else file.blob_id
        if stated and (hashed := _hash(path, len(stated))) != stated:
            path.unlink()
            raise UserError(
                f"{repository.url}: {name} arrived with the hash {hashed:.12}…; the hub states "
                f"{stated:.12}…. Run `dvc repro` again."
            )
    return folder


def _require_whole_cache(folder: Path, names: Sequence[str]) -> None:
    """Hold files of the user's cache against the hashes that it names them by."""
    for name in names:
        blob = (folder / name).resolve()
        stated = re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", blob.name)
        if stated and _hash(blob, len(blob.name)) != blob.name:
            raise UserError(f"{blob}: this file of your Hugging Face cache is damaged. Delete it.")


def _hash(path: Path, length: int) -> str:
    """SHA-256 (64 digits), which the hub states of large files, or git's hash (40), of others."""
    if length == 64:
        return files.sha256(path)
    sha1 = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: sha1).hexdigest()


def _meter(bar: "tqdm[Any]", limit: int | None) -> type["tqdm[Any]"]:
    """A silent bar for `snapshot_download`, which makes three, that forwards its bytes to ours."""

    class Meter(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts = str(kwargs.get("desc")).startswith("Reconstructing")
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if self.counts:
                bar.update(n)
                if limit is not None and bar.n > limit:
                    raise UserError(
                        f"{bar.desc}: the hub sends more than the {limit} bytes that it lists. "
                        "Check HF_ENDPOINT and your proxy, and run `dvc repro` again."
                    )

    return Meter
