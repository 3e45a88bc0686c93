"""Hugging Face hub repositories, pinned to a commit: list, download and verify files."""

import glob
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import httpx2
from filelock import FileLock, Timeout
from huggingface_hub import HfApi, constants, errors, get_cached_repo_tree, snapshot_download
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import get_session, logging
from huggingface_hub.utils.sha import git_hash
from tqdm import tqdm

from stages.shared.core import display, files, machine
from stages.shared.core.errors import UserError, causes

constants.HF_HUB_DISABLE_TELEMETRY = True
logging.set_verbosity_error()  # no lines about retries
SLOWEST = 64 * 1024  # bytes a minute; a slower download would never end
MINUTE = 60.0  # seconds
PROXY = "Check HF_ENDPOINT and your proxy, and run `dvc repro`"


@dataclass(frozen=True)
class Repository:
    """A hub repository at a commit."""

    kind: Literal["dataset", "model"]
    name: str
    commit: str

    @property
    def endpoint(self) -> str:
        """Address of the hub, without a trailing slash."""
        return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")

    @property
    def url(self) -> str:
        """Address of its page."""
        return f"{self.endpoint}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"

    @property
    def keys(self) -> tuple[str, str]:
        """Keys of its name and commit in params.yaml."""
        name = {"dataset": "data.repo", "model": "model.name"}[self.kind]
        return name, f"{name.partition('.')[0]}.revision"

    @cached_property
    def paths(self) -> list[str]:
        """Paths of all files, from the user's cache or the hub."""
        try:
            tree = get_cached_repo_tree(self.name, repo_type=self.kind, revision=self.commit)
            paths = [file.path for file in tree]
        except errors.CachedRepoTreeNotFoundError:
            paths = list(self.files)
        for path in paths:
            require_inside(path, self.url)
        return paths

    @cached_property
    def files(self) -> dict[str, RepoSibling]:
        """Path → size and hash, as the hub states them."""
        hub = HfApi(self.endpoint)
        read = hub.model_info if self.kind == "model" else hub.dataset_info
        with one_line_errors(self):
            info = read(self.name, revision=self.commit, files_metadata=True, timeout=10)
            return {file.rfilename: file for file in info.siblings or ()}


def pin(kind: Literal["dataset", "model"], name: str, revision: str | None) -> Repository:
    """Require an `owner/name` and a full commit: a branch moves, and the result with it."""
    repository = Repository(kind, name, revision or "")
    name_key, revision_key = repository.keys
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII) or ".." in name:
        raise UserError(f"params.yaml: {name_key} is {name!r}; expected owner/name of a {kind}.")
    if not re.fullmatch(r"[0-9a-f]{40}", repository.commit):
        what = f"{revision!r}; expected a commit of 40 hex digits"
        advice = f"Take it from `git ls-remote {repository.url} HEAD`."
        raise UserError(f"params.yaml: {revision_key} is {what}. {advice}")
    return repository


def require_inside(path: str, where: str) -> None:
    """Refuse an absolute path or one with `..` from a listing, an index or an archive."""
    if path.startswith("/") or ".." in path.split("/") or "\\" in path or "\0" in path:
        raise UserError(f"{where}: names {path!r}, which would leave its folder. Do not use it.")


@contextmanager
def download_folder(repository: Repository) -> Iterator[Path]:
    """Resumable download folder, locked and outside every DVC out; removed on success."""
    downloads = machine.root() / ".downloads"
    downloads.mkdir(exist_ok=True)
    lock = FileLock(downloads / ".lock")
    try:
        lock.acquire(timeout=0).lock.release()
    except Timeout:
        print("waiting for another download of this project", file=sys.stderr)
    with lock:
        folder = downloads / f"{repository.name.replace('/', '--')}@{repository.commit}"
        folder.mkdir(exist_ok=True)
        yield folder
        shutil.rmtree(folder)


def download(repository: Repository, names: Sequence[str], folder: Path) -> Path:
    """Download the named files, unless the user's cache has all; the folder that holds them.

    Every file has its stated hash. Complete files stay in `folder` if the download fails.
    """
    only = [glob.escape(name) for name in names]
    pinned = {"repo_type": repository.kind, "revision": repository.commit, "allow_patterns": only}
    snapshot = partial(snapshot_download, repository.name, **pinned)
    with suppress(errors.LocalEntryNotFoundError):
        cached = Path(snapshot(local_files_only=True))
        blobs = [(cached / name).resolve() for name in names]
        if all(blob.is_file() for blob in blobs):
            for blob in blobs:  # named by their hash
                is_hash = re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", blob.name)
                if is_hash and _hash(blob, len(blob.name)) != blob.name:
                    raise UserError(f"{blob}: in your Hugging Face cache, is damaged. Delete it.")
            return cached
    requested = {name: repository.files[name] for name in names}
    missing = [file for name, file in requested.items() if not (folder / name).is_file()]
    sizes = [file.size for file in missing if file.size is not None]
    limit = sum(sizes) if len(sizes) == len(missing) else None
    files.require_space(folder, sum(sizes), f"the download of {repository.name}")
    if missing:
        bar = display.bar(total=limit, desc=repository.name, unit="B")
        with one_line_errors(repository), bar:
            snapshot(local_dir=folder, endpoint=repository.endpoint, tqdm_class=_meter(bar))
    for name, file in requested.items():
        path, stated = folder / name, file.lfs.sha256 if file.lfs else file.blob_id
        if stated and (hashed := _hash(path, len(stated))) != stated:
            path.unlink()
            what = f"arrived with the hash {hashed:.12}…; the hub states {stated:.12}…"
            raise UserError(f"{repository.url}: {name} {what}. Run `dvc repro` again.")
    return folder


def _hash(path: Path, length: int) -> str:
    """SHA-256 (64 digits; the hub's of LFS files) or git's blob hash (40; of all others, small)."""
    return files.sha256(path) if length == 64 else git_hash(path.read_bytes())


def _meter(bar: "tqdm[Any]") -> type["tqdm[Any]"]:
    """Silent tqdm class for `snapshot_download`, whose byte count advances our bar."""

    class Meter(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts = str(kwargs.get("desc")).startswith("Reconstructing")
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if self.counts:
                bar.update(n)
            if bar.total is not None and bar.n > bar.total:
                what = f"the hub sends more than the {bar.total} bytes that it lists"
                raise UserError(f"{bar.desc}: {what}. {PROXY} again.")

    return Meter


@contextmanager
def one_line_errors(repository: Repository) -> Iterator[None]:
    """Network and hub errors as `UserError`; disk errors pass."""
    session = get_session()
    session.headers["Accept-Encoding"] = "identity"  # uncompressed, so sizes are as stated
    if _check_response not in session.event_hooks["response"]:
        session.event_hooks["response"].append(_check_response)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        for cause in causes(error):  # snapshot_download wraps it
            if message := _message(cause, repository):
                raise UserError(message) from None
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())
        what = f"does not answer as the hub does ({reason:.90}). {PROXY} again."
        raise UserError(f"{repository.endpoint}: {what}") from None


def _message(error: BaseException, repository: Repository) -> str | None:
    """Message of a network or hub error; None for any other."""
    name, commit, hub = repository.name, repository.commit, repository.endpoint
    name_key, revision_key = repository.keys
    if isinstance(error, errors.OfflineModeIsEnabled):
        lacks = f"your cache lacks files of {name} at {commit:.7}"
        return f"{name_key}: HF_HUB_OFFLINE is set, and {lacks}. Unset it, or use a local source."
    if isinstance(error, httpx2.InvalidURL | httpx2.RequestError):
        advice = "Check the network, your proxy and HF_ENDPOINT, or use a local source."
        return f"{hub}: cannot be reached for {name} ({error or type(error)}). {advice}"
    if not isinstance(error, errors.HfHubHTTPError):
        return None
    status, code = error.response.status_code, error.response.headers.get("X-Error-Code")
    if status in (401, 403):
        key, what = name_key, f"{hub} answered {status} for {name}: private, gated or misspelt"
        advice = f"Accept its terms on {repository.url}, and set HF_TOKEN or run `hf auth login`."
    elif code == "RevisionNotFound":
        key, what = revision_key, f"{name} has no commit {commit}"
        advice = f"See {repository.url}/commits."
    elif status == 404:
        key, what = name_key, f"{hub} has no {repository.kind} {name}, or no file at {commit:.7}"
        advice = f"Correct {name_key} or {revision_key}."
    else:
        key, what = hub, f"answered {status} {error.response.reason_phrase} for {name}"
        advice = "Try again later."
    return f"{key}: {what}. {advice}"


def _check_response(response: httpx2.Response) -> None:
    host, wait = response.url.host, response.headers.get("Retry-After", "")
    if wait.isdigit() and int(wait) > MINUTE:
        raise UserError(f"{host}: is busy. Run `dvc repro` again in {wait} seconds.")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise UserError(f"{host}: sends compressed data unasked. Check your proxy and HF_ENDPOINT.")
    response.stream = _MinimumRate(response.stream, host)


class _MinimumRate(httpx2.SyncByteStream):
    """Response body that fails once a minute brings fewer than `SLOWEST` bytes."""

    def __init__(self, stream: Any, host: str) -> None:
        self._stream, self._host = stream, host

    def __iter__(self) -> Iterator[bytes]:
        begin, received = time.monotonic(), 0
        for chunk in self._stream:
            received += len(chunk)
            if time.monotonic() - begin > MINUTE:
                if received < SLOWEST:
                    what = f"sent {received} bytes in {MINUTE:.0f} seconds"
                    raise UserError(f"{self._host}: {what}. Run `dvc repro` again to go on.")
                begin, received = time.monotonic(), 0
            yield chunk

    def close(self) -> None:
        self._stream.close()
