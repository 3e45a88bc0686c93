"""Files of the hub, downloaded to where they are wanted and checked against the hub's own hashes.

Nothing is kept in a cache: DVC is the cache.
"""

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import quote

from stages.shared.core import files, progress
from stages.shared.core.errors import UserError
from stages.shared.hub import TIMEOUT, RemoteFile, Repository, one_line_errors, require_success

if TYPE_CHECKING:
    from tqdm import tqdm

RETRIES = 2  # connections in a row that bring nothing new


def download(repository: Repository, wanted: Sequence[RemoteFile], folder: Path) -> dict[str, Path]:
    """Download files into `folder`, under a progress bar, and check their hashes.

    A broken connection is taken up where it broke.

    Args:
        repository: what `wanted` was listed from.
        wanted: some of its files.
        folder: exists; a file lies below it at the path that it has in the repository.

    Returns:
        Where each path of the repository lies now.

    Raises:
        UserError: as `hub.list_files`; a path leaves the folder; the disk is too full; a file is
            not what the hub says it is.
    """
    known_bytes = sum(file.size or 0 for file in wanted)
    files.require_space(folder, known_bytes, f"the download of {repository.name}")
    found = {file.path: folder / _inside(file.path, repository) for file in wanted}
    with (
        one_line_errors(repository),
        progress.bar(total=known_bytes or None, desc=repository.name, unit="B") as bar,
    ):
        for file in wanted:
            target = found[file.path]
            target.parent.mkdir(parents=True, exist_ok=True)
            url = f"{repository.url}/resolve/{repository.commit}/{quote(file.path)}"
            _download_file(url, target, repository, bar)
            _require_same(file, target, repository)
    return found


def _download_file(url: str, target: Path, repository: Repository, bar: "tqdm[object]") -> None:
    import httpx2  # noqa: PLC0415

    target.touch()
    in_vain = 0
    while True:
        before = target.stat().st_size
        try:
            return _receive(url, target, repository, bar)
        except httpx2.TransportError:
            in_vain = in_vain + 1 if target.stat().st_size <= before else 0
            if in_vain > RETRIES:
                raise
            time.sleep(1)


def _receive(url: str, target: Path, repository: Repository, bar: "tqdm[object]") -> None:
    """Append to `target` what is not there yet, or write it anew where the hub only gives all."""
    from huggingface_hub.utils import build_hf_headers, get_session  # noqa: PLC0415

    start = target.stat().st_size
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
        require_success(response, repository)
        resumed = response.status_code == 206
        if not resumed:
            bar.update(-start)
        with target.open("ab" if resumed else "wb") as file:
            for chunk in response.iter_bytes():
                file.write(chunk)
                bar.update(len(chunk))


def _inside(path: str, repository: Repository) -> PurePosixPath:
    """The path, if it stays in the folder that it is put into."""
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path or "\0" in path:
        raise UserError(
            f"{repository.url}: names a file {path!r}, which would leave its folder; "
            f"do not use this {repository.kind}"
        )
    return pure


def _require_same(file: RemoteFile, path: Path, repository: Repository) -> None:
    if file.lfs:
        expected, found = file.lfs.sha256, files.sha256(path)
    elif file.git_sha1:
        expected, found = file.git_sha1, git_sha1(path)
    else:
        return
    if found != expected:
        raise UserError(
            f"{repository.url}: {file.path} arrived with the hash {found}; expected {expected} as "
            "the hub states; run `dvc repro` again"
        )


def git_sha1(path: Path) -> str:
    """The name that git gives to a file's content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
