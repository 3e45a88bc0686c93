"""The hub: its errors in one line, downloads that are checked and taken up where they broke."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.shared import download, hub
from stages.shared.core.errors import UserError
from tests import hub as hubs

CONTENT = bytes(range(256)) * 400


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[hubs.Hub]:
    with hubs.serve_here(monkeypatch) as server:
        server.repositories["me/tiny"] = {"a.safetensors": CONTENT, "sub/b.json": b"{}"}
        yield server


def repository(name: str = "me/tiny", commit: str = hubs.COMMIT) -> hub.Repository:
    return hub.repository(
        "model", name, commit, name_parameter="model.name", revision_parameter="model.revision"
    )


def fetch(folder: Path) -> dict[str, Path]:
    pinned = repository()
    return download.download(pinned, hub.list_files(pinned), folder)


def test_files_arrive_where_they_are_wanted(server: hubs.Hub, tmp_path: Path) -> None:
    found = fetch(tmp_path)
    assert found["a.safetensors"].read_bytes() == CONTENT
    assert found["sub/b.json"] == tmp_path / "sub/b.json"
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == 2


def test_a_broken_download_goes_on_where_it_broke(server: hubs.Hub, tmp_path: Path) -> None:
    server.cut_after = 1000
    assert fetch(tmp_path)["a.safetensors"].read_bytes() == CONTENT
    assert sum(request.endswith("a.safetensors") for request in server.requests) == 2


@pytest.mark.parametrize("path", ["a.safetensors", "sub/b.json"])
def test_a_file_with_another_hash_is_refused(path: str, server: hubs.Hub, tmp_path: Path) -> None:
    stated = server.listing("me/tiny")
    server.listed = stated
    content = server.repositories["me/tiny"][path]
    server.repositories["me/tiny"][path] = b"X" + content[1:]
    with pytest.raises(UserError, match=f"{path} arrived with the hash .* expected"):
        fetch(tmp_path)


@pytest.mark.parametrize("path", ["../out.json", "/out.json", "a/../../out.json", "a\\..\\b.json"])
def test_a_name_that_leaves_the_folder_is_refused(
    path: str, server: hubs.Hub, tmp_path: Path
) -> None:
    server.repositories["me/tiny"] = {path: b"{}"}
    with pytest.raises(UserError, match="would leave its folder"):
        fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_hash_of_a_small_file_is_that_of_git(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "hello").write_bytes(b"hello\n")  # `echo hello | git hash-object --stdin`
    assert download.git_sha1(tmp_path / "empty") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert download.git_sha1(tmp_path / "hello") == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert hashlib.sha1(b"blob 0\0").hexdigest() == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"


@pytest.mark.parametrize(
    ("status", "code", "line"),
    [
        (401, "RepoNotFound", r"model\.name is 'me/tiny'.* 401: .*HF_TOKEN"),
        (403, "GatedRepo", r"model\.name is 'me/tiny'.* 403: .*accept the terms on"),
        (404, "RepoNotFound", r"model\.name is 'me/tiny'.* no such model"),
        (404, "RevisionNotFound", r"model\.revision is '0123.*no such commit"),
        (429, "", r"answered 429 .*later"),
        (500, "", r"answered 500 .*later"),
        (503, "", r"answered 503 .*later"),
    ],
)
def test_each_status_says_what_to_do(status: int, code: str, line: str, server: hubs.Hub) -> None:
    server.status, server.error_code = status, code
    with pytest.raises(UserError, match=line) as caught:
        hub.list_files(repository())
    assert "\n" not in str(caught.value)


def test_a_hub_that_fails_in_the_middle_is_told(server: hubs.Hub, tmp_path: Path) -> None:
    pinned = repository()
    listed = hub.list_files(pinned)
    server.status = 502
    with pytest.raises(UserError, match="answered 502"):
        download.download(pinned, listed, tmp_path)


def test_a_missing_repository_and_a_missing_commit(server: hubs.Hub) -> None:
    with pytest.raises(UserError, match=r"model\.name is 'me/none'"):
        hub.list_files(repository("me/none"))
    with pytest.raises(UserError, match=r"model\.revision is 'ffff"):
        hub.list_files(repository(commit="f" * 40))


def test_no_network_is_told(server: hubs.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9: cannot be reached for me/tiny"):
        hub.list_files(repository())


def test_offline_mode_is_told(server: hubs.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        hub.list_files(repository())


def test_an_answer_of_something_else_is_told(server: hubs.Hub) -> None:
    server.listed = ["a portal", "that wants a login"]
    with pytest.raises(UserError, match="not as the hub does"):
        hub.list_files(repository())


@pytest.mark.parametrize(
    "name", ["../me/tiny", "me/../tiny", "me/tiny/more", "", "me/ti ny", "/me"]
)
def test_only_a_repository_name_is_asked_for(name: str) -> None:
    with pytest.raises(UserError, match=r"model\.name is .*expected the name of a model"):
        repository(name)


def test_a_full_disk_is_told_before_the_download(server: hubs.Hub, tmp_path: Path) -> None:
    server.listed = {"siblings": [{"rfilename": "a.safetensors", "size": 10**18}]}
    with pytest.raises(UserError, match=r"needs 1000000000\.00 GB"):
        fetch(tmp_path)
    assert len(server.requests) == 1
