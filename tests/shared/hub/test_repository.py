"""The hub: its errors in one line, downloads that are verified, bounded and resumed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import snapshot_download

from stages.shared.core.display import visible
from stages.shared.core.errors import UserError
from stages.shared.hub import repository as client
from stages.shared.hub.repository import Repository, download, download_folder, pin
from tests import hub as hubs

CONTENT = bytes(range(256)) * 400
FILES = {"a.safetensors": CONTENT, "sub/b.json": b"{}", "c[1].txt": b"", "other.bin": b"pickle"}
NAME = "a.safetensors"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[hubs.Hub]:
    with hubs.serve_here(monkeypatch, tmp_path) as server:
        server.repositories["me/tiny"] = dict(FILES)
        yield server


def repository() -> Repository:
    return pin("model", "me/tiny", hubs.COMMIT)


def fetch(*names: str) -> dict[str, bytes]:
    """Download some files and read them; the download folder is gone then."""
    pinned = repository()
    with download_folder(pinned) as folder:
        where = download(pinned, names or [NAME], folder)
        return {
            path.relative_to(where).as_posix(): path.read_bytes()
            for path in where.rglob("*")
            if path.is_file() and ".cache" not in path.parts
        }


def refused(line: str, *names: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        fetch(*names)
    assert "\n" not in str(caught.value)


def test_download_brings_the_requested_files_alone(server: hubs.Hub, tmp_path: Path) -> None:
    assert fetch(*list(FILES)[:3]) == {name: FILES[name] for name in list(FILES)[:3]}
    assert [p.name for p in (tmp_path / ".downloads").iterdir()] == [".lock"]


def test_broken_connection_resumes_where_it_broke(server: hubs.Hub) -> None:
    server.cut_after = 1000
    assert fetch() == {NAME: CONTENT}
    assert server.fetched() == [NAME] * 2


def test_whole_files_survive_an_interruption(server: hubs.Hub, tmp_path: Path) -> None:
    server.status, server.only = 503, "sub/b.json"
    refused("answered 503", NAME, "sub/b.json")
    assert (tmp_path / f".downloads/me--tiny@{hubs.COMMIT}" / NAME).read_bytes() == CONTENT
    server.status = 200
    fetch(NAME, "sub/b.json")
    assert server.fetched().count(NAME) == 1


def test_users_cache_comes_first_and_is_verified(server: hubs.Hub, tmp_path: Path) -> None:
    snapshot_download("me/tiny", revision=hubs.COMMIT, endpoint=server.url)
    server.requests.clear()
    pinned = repository()
    assert set(pinned.paths) == set(FILES)
    where = download(pinned, list(FILES), tmp_path / "none")
    assert (where / NAME).read_bytes() == CONTENT
    assert server.requests == []
    (where / NAME).resolve().write_bytes(b"rotten")
    refused(r"in your Hugging Face cache, is damaged\. Delete it", *FILES)


@pytest.mark.parametrize("path", [NAME, "sub/b.json"])
def test_file_with_another_hash_is_refused(path: str, server: hubs.Hub) -> None:
    server.listed = server.listing("me/tiny")
    server.repositories["me/tiny"][path] = b"X" + FILES[path][1:]
    refused(f"{path} arrived with the hash .* the hub states", path)
    server.repositories["me/tiny"][path] = FILES[path]
    assert fetch(path) == {path: FILES[path]}


@pytest.mark.parametrize("path", ["../out.json", "/out.json", "a/../../out.json", "a\\..\\b.json"])
def test_path_that_leaves_the_folder_is_refused(path: str, server: hubs.Hub) -> None:
    server.repositories["me/tiny"] = {path: b"{}"}
    with pytest.raises(UserError, match="would leave its folder"):
        _ = repository().paths


@pytest.mark.parametrize(
    ("status", "code", "line"),
    [
        (401, "RepoNotFound", r"model\.name: .* 401 .*HF_TOKEN"),
        (403, "GatedRepo", r"model\.name: .* 403 .*Accept its terms on"),
        (404, "RepoNotFound", r"model\.name: .* no model me/tiny"),
        (404, "RevisionNotFound", r"model\.revision: me/tiny has no commit 0123"),
        (429, "", r"answered 429 .*later"),
        (500, "", r"answered 500 .*later"),
    ],
)
@pytest.mark.parametrize("only", ["", NAME])
def test_each_status_says_what_to_do(
    only: str, status: int, code: str, line: str, server: hubs.Hub
) -> None:
    server.status, server.headers, server.only = status, {"X-Error-Code": code}, only
    refused(line)


def sized(size: int) -> dict[str, Any]:
    """A listing that states the size of one file, and no hash."""
    return {"listed": {"id": "x", "siblings": [{"rfilename": NAME, "size": size}]}}


@pytest.mark.parametrize(
    ("answers", "line"),
    [
        ({"listed": ["a portal"]}, "does not answer as the hub does"),
        ({"listed": {"siblings": [{"size": 3}]}}, "does not answer as the hub does"),
        ({"listed": "login"}, "does not answer as the hub does"),
        (sized(4), "me/tiny: the hub sends more than the 4 bytes that it lists"),
        (sized(10**18), r"needs 1000000000\.00 GB"),
        ({"drip": 0.05}, r"127\.0\.0\.1: sent \d+ bytes in 0 seconds"),
        ({"status": 201, "headers": {"Content-Encoding": "gzip"}}, "sends compressed data unasked"),
        ({"status": 429, "headers": {"Retry-After": "86400"}}, r"is busy\. .* in 86400 seconds"),
    ],
)
def test_responses_are_bounded(
    answers: dict[str, Any], line: str, server: hubs.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "MINUTE", 0.2)
    for name, value in answers.items():
        setattr(server, name, value)
    refused(line)


def test_hub_out_of_reach_is_told_without_its_password(
    server: hubs.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://me:secret@127.0.0.1:9")
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9: cannot be reached") as caught:
        fetch()
    assert "secret" not in visible(str(caught.value))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(r"model\.name: HF_HUB_OFFLINE is set")


@pytest.mark.parametrize("name", ["../me/tiny", "me/../tiny", "me/tiny/a", "", "me/ti ny", "/me"])
def test_name_must_be_a_repositorys(name: str) -> None:
    with pytest.raises(UserError, match=r"model\.name is .*expected owner/name of a model"):
        pin("model", name, hubs.COMMIT)


@pytest.mark.parametrize("revision", [None, "main", "0123456", hubs.COMMIT.upper()])
def test_revision_must_be_a_full_commit(revision: str | None) -> None:
    with pytest.raises(UserError, match=r"data\.revision.*40 hex digits.*git ls-remote"):
        pin("dataset", "me/set", revision)


def test_token_goes_to_no_other_host(server: hubs.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with hubs.serve() as other:
        other.repositories = server.repositories
        server.elsewhere = other.url.replace("127.0.0.1", "localhost")
        assert fetch() == {NAME: CONTENT}
        assert "Bearer hf_secret" in [token for _, token in server.requests]
        assert {token for _, token in other.requests} == {None}
