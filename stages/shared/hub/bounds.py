"""Bounds on what a hub may answer: nothing packed, no byte now and then, no wait for hours."""

import time
from collections.abc import Iterator
from typing import Any

import httpx2
from huggingface_hub.utils import get_session

from stages.shared.core.errors import UserError

SLOWEST = 64 * 1024  # bytes in a minute: with less, a download would go on for ever
MINUTE = 60.0  # seconds


def bound_answers() -> None:
    """Hold every answer that `huggingface_hub` gets in this process to the bounds."""
    hooks = get_session().event_hooks
    if _check not in hooks["response"]:
        hooks["request"].append(_ask_unpacked)
        hooks["response"].append(_check)


def _ask_unpacked(request: httpx2.Request) -> None:
    request.headers["Accept-Encoding"] = "identity"


def _check(response: httpx2.Response) -> None:
    host, wait = response.url.host, response.headers.get("Retry-After", "")
    if wait.isdigit() and int(wait) > MINUTE:
        raise UserError(f"{host}: is busy. Run `dvc repro` again in {wait} seconds.")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise UserError(f"{host}: sends packed data unasked. Check your proxy and HF_ENDPOINT.")
    response.stream = _Bounded(response.stream, host)


class _Bounded(httpx2.SyncByteStream):
    """The body of an answer, as long as it makes progress."""

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
