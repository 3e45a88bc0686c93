"""A hub on this machine: an HTTP server that answers as the Hugging Face hub does."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import sleep  # bound here, as `serve_here` replaces that of the module
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """State of the server; a test may change it while the server runs."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)  # "datasets/me/set"
    status: int = 200  # any other is answered to paths that contain `only`, with `headers`
    only: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None  # bytes after which the connection of the next download breaks
    drip: float = 0.0  # seconds after each byte
    listed: Any = None  # instead of the listing that is made from `repositories`
    elsewhere: str = ""  # the address of another host that files are sent from
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # and their tokens

    @property
    def env(self) -> dict[str, str]:
        """Environment in which a stage uses this hub."""
        return {"HF_ENDPOINT": self.url}

    def fetched(self) -> list[str]:
        """The paths of the files whose content was sent."""
        gets = [path for path, _ in self.requests if path.startswith("GET ") and "resolve" in path]
        return [path.partition(f"/resolve/{COMMIT}/")[2] for path in gets]

    def listing(self, repository: str) -> Any:
        """Reply to a request for a repository's files."""
        name, contents = repository.removeprefix("datasets/"), self.repositories[repository]
        siblings = [
            {"rfilename": path, "size": len(content), **_hashes(path, content)}
            for path, content in contents.items()
        ]
        return self.listed or {"id": name, "sha": COMMIT, "siblings": siblings}

    def tree(self, repository: str) -> Any:
        """Reply to the same request by `huggingface_hub.snapshot_download`."""
        return [
            {"type": "file", "path": path, "size": len(content), "oid": _git_sha1(content)}
            for path, content in self.repositories[repository].items()
        ]


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _hashes(path: str, content: bytes) -> dict[str, Any]:
    if not path.endswith((".safetensors", ".parquet")):
        return {"blobId": _git_sha1(content)}
    lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return {"blobId": "0" * 40, "lfs": lfs}


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a hub while the block lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client has gone
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def serve_here(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[Hub]:
    """Run a hub for this very process, with an empty cache below `home`.

    Another test may have loaded a model before, which switches the hub off. Retries do not wait.
    """
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "cache"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setenv("DVC_ROOT", str(home))
    with serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            hub.requests.append((f"{self.command} {path}", self.headers.get("Authorization")))
            if hub.status != 200 and hub.only in path:
                return self.answer(hub.status, b"", hub.headers)
            if path.startswith("api/"):
                return self.describe(path.removeprefix("api/").removeprefix("models/"))
            repository, _, rest = path.partition("/resolve/")
            commit, _, name = rest.partition("/")
            content = hub.repositories.get(repository, {}).get(name)
            if content is None or commit not in (COMMIT, "main"):
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return self.send(name, content)

        def do_HEAD(self) -> None:
            self.do_GET()

        def describe(self, path: str) -> None:
            kind = "tree" if "/tree/" in path else "revision"
            repository, _, commit = path.partition(f"/{kind}/")
            if repository not in hub.repositories:
                return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            if commit != COMMIT:
                return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            answer = hub.tree(repository) if kind == "tree" else hub.listing(repository)
            return self.answer(200, json.dumps(answer).encode(), {})

        def send(self, name: str, content: bytes) -> None:
            hashes = _hashes(name, content)
            etag = f'"{hashes["lfs"]["sha256"] if "lfs" in hashes else hashes["blobId"]}"'
            headers = {"X-Repo-Commit": COMMIT, "ETag": etag}
            if hub.elsewhere:
                headers |= {"Location": f"{hub.elsewhere}{self.path}", "X-Linked-Etag": etag}
                return self.answer(302, b"", {**headers, "X-Linked-Size": str(len(content))})
            start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") :].split("-")[0])
            body, cut = content[start:], None
            if self.command == "GET":
                cut, hub.cut_after = hub.cut_after, None
            headers["Content-Length"] = str(len(body))
            return self.answer(206 if start else 200, body[:cut], headers)

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            size = 1 if hub.drip else 2**30
            for start in range(0, len(body) if self.command == "GET" else 0, size):
                self.wfile.write(body[start : start + size])
                sleep(hub.drip)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
