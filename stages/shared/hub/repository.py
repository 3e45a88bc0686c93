"""A repository of the Hugging Face hub at a full commit: its files, and its errors in one line.

`huggingface_hub` knows the user's token, proxy, cache and offline switch (`HF_HUB_OFFLINE`);
`HF_ENDPOINT` names another hub.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from stages.shared.core.errors import UserError

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub.hf_api import RepoSibling

# Usage statistics would be one more request before each download, to a hub that may be down.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def endpoint() -> str:
    """The hub's address, without a slash at its end."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


@dataclass(frozen=True)
class Repository:
    """A repository at a commit."""

    kind: Literal["dataset", "model"]
    name: str
    commit: str

    @property
    def host(self) -> str:
        """The hub's address, without the password that it may hold."""
        return re.sub(r"//[^/@]*@", "//", endpoint())

    @property
    def url(self) -> str:
        """Its page."""
        return f"{self.host}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"

    @property
    def keys(self) -> tuple[str, str]:
        """The parameters that name it and its commit."""
        data, model = ("data.repo", "data.revision"), ("model.name", "model.revision")
        return data if self.kind == "dataset" else model

    @cached_property
    def paths(self) -> list[str]:
        """The paths of all its files, from the user's cache or from the hub; errors as `files`."""
        from huggingface_hub import get_cached_repo_tree  # noqa: PLC0415  (half a second)
        from huggingface_hub.errors import CachedRepoTreeNotFoundError  # noqa: PLC0415

        try:
            tree = get_cached_repo_tree(self.name, repo_type=self.kind, revision=self.commit)
        except CachedRepoTreeNotFoundError:
            return list(self.files)
        return [file.path for file in tree]

    @cached_property
    def files(self) -> "dict[str, RepoSibling]":
        """Size and hash of each file by its path, as the hub states them.

        Raises:
            UserError: no network, no such repository or commit, no access, or a hub in trouble.
        """
        from huggingface_hub import HfApi  # noqa: PLC0415

        with one_line_errors(self):
            hub = HfApi(endpoint=endpoint())
            ask = hub.model_info if self.kind == "model" else hub.dataset_info
            info = ask(self.name, revision=self.commit, files_metadata=True, timeout=10)
            files = {file.rfilename: file for file in info.siblings or ()}
        for path in files:
            if path.startswith("/") or ".." in path.split("/") or "\\" in path or "\0" in path:
                raise UserError(
                    f"{self.url}: names a file {path!r}, which would leave its folder. Do not use "
                    f"this {self.kind}."
                )
        return files


def pin(kind: Literal["dataset", "model"], name: str, revision: str | None) -> Repository:
    """A repository of the hub at a full commit: a branch moves, and so would the result.

    Raises:
        UserError: the name is none, or the revision is no full commit.
    """
    repository = Repository(kind, name, revision or "")
    name_key, revision_key = repository.keys
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII) or ".." in name:
        raise UserError(
            f"params.yaml: {name_key} is {name!r}; expected owner/name of a {kind}. Correct it."
        )
    if not re.fullmatch(r"[0-9a-f]{40}", repository.commit):
        raise UserError(
            f"params.yaml: {revision_key} is {revision!r}; expected a commit of 40 hex digits. "
            f"Take it from `git ls-remote {repository.url} HEAD`."
        )
    return repository


@contextmanager
def one_line_errors(repository: Repository) -> Iterator[None]:
    """Turn what goes wrong between us and the hub into a `UserError`; faults of the disk stay."""
    import httpx2  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled  # noqa: PLC0415

    from stages.shared.hub.bounds import bound_answers  # noqa: PLC0415

    name, host = repository.name, repository.host
    try:
        bound_answers()
        yield
    except UserError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:  # datasets and snapshot_download wrap what happened
            if isinstance(cause, HfHubHTTPError):
                raise _status_error(repository, cause.response) from None
            if isinstance(cause, OfflineModeIsEnabled):
                raise UserError(
                    f"{repository.keys[0]}: HF_HUB_OFFLINE is set, and your cache lacks files of "
                    f"{name} at {repository.commit:.7}. Unset it, or use a local source."
                ) from None
            if isinstance(cause, httpx2.HTTPError | httpx2.InvalidURL):
                raise UserError(
                    f"{host}: cannot be reached for {name} ({cause or type(cause)}). "
                    "Check the network, your proxy and HF_ENDPOINT, or use a local source."
                ) from None
            cause = cause.__cause__ or cause.__context__
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"{host}: does not answer as the hub does ({reason:.90}). Check HF_ENDPOINT and your "
            "proxy, and run `dvc repro` again."
        ) from None


def _status_error(repository: Repository, response: "httpx2.Response") -> UserError:
    """What an HTTP status of 400 or more means here."""
    name, host, status = repository.name, repository.host, response.status_code
    name_key, revision_key = repository.keys
    if status in (401, 403):
        return UserError(
            f"{name_key}: {host} answered {status} for {name}: private, gated or misspelt. Accept "
            f"its terms on {repository.url}, and set HF_TOKEN or run `hf auth login`."
        )
    if response.headers.get("X-Error-Code") == "RevisionNotFound":
        return UserError(
            f"{revision_key}: {name} has no commit {repository.commit}. Take one from "
            f"{repository.url}/commits."
        )
    if status == 404:
        return UserError(
            f"{name_key}: {host} has no {repository.kind} {name}, or no such file at "
            f"{repository.commit:.7} (404). Correct {name_key} or {revision_key}."
        )
    return UserError(
        f"{host}: answered {status} {response.reason_phrase} for {name}. It is in trouble or too "
        "busy: run `dvc repro` again later."
    )
