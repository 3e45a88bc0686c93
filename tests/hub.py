"""A hub on this machine: an HTTP server that answers as the Hugging Face hub does."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server knows; a test may change it while the server runs.

    Attributes:
        url: what `HF_ENDPOINT` is set to.
        repositories: `{"datasets/owner/name": {path: content}}`, all at `COMMIT`.
        status: answered to everything, unless it is 200.
        error_code: the hub's own name for an error, sent with `status`.
        cut_after: bytes after which the connection of the next download breaks.
        listed: replaces the listing that is made from `repositories`.
        requests: the paths that were asked for.
    """

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    status: int = 200
    error_code: str = ""
    cut_after: int | None = None
    listed: Any = None
    requests: list[str] = field(default_factory=list)

    @property
    def env(self) -> dict[str, str]:
        """The environment that sends a stage here."""
        return {"HF_ENDPOINT": self.url}

    def listing(self, repository: str) -> Any:
        """The answer to a question for a repository's files."""
        return self.listed or {
            "sha": COMMIT,
            "siblings": [
                {"rfilename": path, "size": len(content), **_hashes(path, content)}
                for path, content in self.repositories[repository].items()
            ],
        }


def _hashes(path: str, content: bytes) -> dict[str, Any]:
    if path.endswith((".safetensors", ".parquet")):
        sha256 = hashlib.sha256(content).hexdigest()
        return {"lfs": {"sha256": sha256, "size": len(content), "pointerSize": 130}}
    return {"blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a hub while the block lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def serve_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Run a hub that this very process talks to.

    Another test may have loaded a model before, and loading one switches the hub off.
    """
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
    with serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            hub.requests.append(path)
            if hub.status != 200:
                return self.answer(hub.status, b"", {"X-Error-Code": hub.error_code})
            if path.startswith("api/"):
                repository, _, commit = path.removeprefix("api/").partition("/revision/")
                return self.list_repository(repository.removeprefix("models/"), commit)
            repository, _, rest = path.partition("/resolve/")
            commit, _, name = rest.partition("/")
            content = hub.repositories.get(repository, {}).get(name)
            if content is None or commit != COMMIT:
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return self.send(content)

        def list_repository(self, repository: str, commit: str) -> None:
            if repository not in hub.repositories:
                return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            if commit != COMMIT:
                return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return self.answer(200, json.dumps(hub.listing(repository)).encode(), {})

        def send(self, content: bytes) -> None:
            start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
            body, status = content[start:], 206 if start else 200
            cut, hub.cut_after = hub.cut_after, None
            self.answer(status, body[:cut], {"Content-Length": str(len(body))})

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
