"""The Hugging Face hub: the files of a repository at one commit, and its errors in one line.

Built on the session of `huggingface_hub`, which knows the user's token, proxy and offline switch;
`HF_ENDPOINT` names another hub. `stages/shared/download.py` brings the files.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field, ValidationError

from stages.shared.core.errors import UserError

if TYPE_CHECKING:
    import httpx2

# Usage statistics would be one more request before each download, to a hub that may be down.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

TIMEOUT = 10.0  # seconds without an answer, or without a byte


@dataclass(frozen=True)
class Repository:
    """A repository at a commit, and the parameters that name the two."""

    kind: Literal["dataset", "model"]
    name: str
    commit: str
    name_parameter: str
    revision_parameter: str

    @property
    def url(self) -> str:
        """The page of the repository."""
        return f"{endpoint()}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"


class _Lfs(BaseModel):
    sha256: str


class RemoteFile(BaseModel):
    """A file of a repository: its path there, bytes and hashes where the hub states them."""

    path: str = Field(alias="rfilename")
    size: int | None = None
    lfs: _Lfs | None = None  # of a large file
    git_sha1: str | None = Field(default=None, alias="blobId")  # of any other: git's own hash


class _Listing(BaseModel):
    siblings: list[RemoteFile]


def endpoint() -> str:
    """The hub's address, without a slash at its end."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def repository(
    kind: Literal["dataset", "model"],
    name: str,
    revision: str | None,
    *,
    name_parameter: str,
    revision_parameter: str,
) -> Repository:
    """A repository of the hub, pinned.

    Raises:
        UserError: the name is none, or the revision is no full commit: a branch moves, and a
            result could not be made again.
    """
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII) or ".." in name:
        raise UserError(
            f"params.yaml: {name_parameter} is {name!r}; expected the name of a {kind} on the "
            "hub, owner/name; correct it"
        )
    found = Repository(kind, name, revision or "", name_parameter, revision_parameter)
    if not re.fullmatch(r"[0-9a-f]{40}", found.commit):
        raise UserError(
            f"params.yaml: {revision_parameter} is {revision!r}; expected a full commit of 40 hex "
            "digits, because a branch moves; take the first word that "
            f"`git ls-remote {found.url} HEAD` prints"
        )
    return found


def list_files(repository: Repository) -> list[RemoteFile]:
    """All files of the repository at its commit.

    Raises:
        UserError: no network, no such repository or commit, no access, or a hub in trouble.
    """
    from huggingface_hub.utils import build_hf_headers, get_session  # noqa: PLC0415

    url = (
        f"{endpoint()}/api/{repository.kind}s/{repository.name}/revision/{repository.commit}"
        "?blobs=true"
    )
    with one_line_errors(repository):
        response = get_session().get(url, headers=build_hf_headers(), timeout=TIMEOUT)
        require_success(response, repository)
    try:
        return _Listing.model_validate_json(response.content).siblings
    except ValidationError:
        raise UserError(
            f"{endpoint()}: answers, but not as the hub does; check HF_ENDPOINT and what stands "
            "between you and the hub"
        ) from None


def require_success(response: "httpx2.Response", repository: Repository) -> None:
    """Say what an HTTP status means here.

    Raises:
        UserError: it is 400 or above.
    """
    status, code = response.status_code, response.headers.get("X-Error-Code", "")
    if status < 400:
        return
    name = f"{repository.name_parameter} is {repository.name!r}"
    if status in (401, 403):
        raise UserError(
            f"params.yaml: {name}; {endpoint()} answered {status}: it is private, gated, or not "
            f"there; check the name, accept the terms on {repository.url}, and set HF_TOKEN or "
            "run `hf auth login`"
        )
    if code == "RevisionNotFound":
        raise UserError(
            f"params.yaml: {repository.revision_parameter} is {repository.commit!r}; {endpoint()} "
            f"knows no such commit of {repository.name}; take one from {repository.url}/commits"
        )
    if status == 404:
        raise UserError(
            f"params.yaml: {name}; {endpoint()} answered 404: it has no such {repository.kind}, "
            f"or not at {repository.revision_parameter} {repository.commit}; correct one of them"
        )
    raise UserError(
        f"{endpoint()}: answered {status} {response.reason_phrase} to a request for "
        f"{repository.name}; expected its files; the hub is in trouble or too busy, "
        "run `dvc repro` again later"
    )


@contextmanager
def one_line_errors(repository: Repository) -> Iterator[None]:
    """Turn the errors of a connection inside the block into a `UserError`."""
    import httpx2  # noqa: PLC0415
    from huggingface_hub.errors import OfflineModeIsEnabled  # noqa: PLC0415

    try:
        yield
    except OfflineModeIsEnabled:
        raise UserError(
            f"{repository.name_parameter} is on the hub, and HF_HUB_OFFLINE is set; unset it, or "
            "use a local source"
        ) from None
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise UserError(
            f"{endpoint()}: cannot be reached for {repository.name} ({error or type(error)}); "
            "check the network, your proxy and HF_ENDPOINT, or use a local source"
        ) from None
