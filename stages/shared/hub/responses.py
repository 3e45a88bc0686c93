"""Hub responses: a minimum rate, no long waits, and every error in one line."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx2
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session

from stages.shared.core.errors import UserError

if TYPE_CHECKING:
    from stages.shared.hub.repository import Repository

SLOWEST = 64 * 1024  # bytes a minute; a slower download would never end
MINUTE = 60.0  # seconds


@contextmanager
def one_line_errors(repository: "Repository") -> Iterator[None]:
    """Network and hub errors as `UserError`; disk errors pass through."""
    session = get_session()
    session.headers["Accept-Encoding"] = "identity"  # uncompressed, so sizes are as stated
    if _check_response not in session.event_hooks["response"]:
        session.event_hooks["response"].append(_check_response)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        chain: BaseException | None = error
        while chain is not None:  # snapshot_download wraps the cause
            if message := _message(chain, repository):
                raise UserError(message) from None
            chain = chain.__cause__ or chain.__context__
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"{repository.host}: does not answer as the hub does ({reason:.90}). Check HF_ENDPOINT "
            "and your proxy, and run `dvc repro` again."
        ) from None


def _message(error: BaseException, repository: "Repository") -> str | None:
    """Message of a network or hub error; None for any other."""
    name, host, url = repository.name, repository.host, repository.url
    name_key, revision_key = repository.keys
    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"{name_key}: HF_HUB_OFFLINE is set, and your cache lacks files of {name} at "
            f"{repository.commit:.7}. Unset it, or use a local source."
        )
    if isinstance(error, httpx2.InvalidURL | httpx2.RequestError):
        return (
            f"{host}: cannot be reached for {name} ({error or type(error)}). Check the network, "
            "your proxy and HF_ENDPOINT, or use a local source."
        )
    if not isinstance(error, HfHubHTTPError):
        return None
    status, code = error.response.status_code, error.response.headers.get("X-Error-Code")
    phrase = f"{status} {error.response.reason_phrase}"
    message = f"{host}: answered {phrase} for {name}. Try again later."
    if status in (401, 403):
        message = (
            f"{name_key}: {host} answered {status} for {name}: private, gated or misspelt. Accept "
            f"its terms on {url}, and set HF_TOKEN or run `hf auth login`."
        )
    elif code == "RevisionNotFound":
        message = f"{revision_key}: {name} has no commit {repository.commit}. See {url}/commits."
    elif status == 404:
        message = (
            f"{name_key}: {host} has no {repository.kind} {name}, or no such file at "
            f"{repository.commit:.7} (404). Correct {name_key} or {revision_key}."
        )
    return message


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
                    raise UserError(
                        f"{self._host}: sent {received} bytes in {MINUTE:.0f} seconds. Run "
                        "`dvc repro` again: whole files are kept."
                    )
                begin, received = time.monotonic(), 0
            yield chunk

    def close(self) -> None:
        self._stream.close()
