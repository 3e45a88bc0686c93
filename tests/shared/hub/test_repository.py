"""The hub: its errors in one line, downloads that are checked, bounded and resumed."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from stages.shared.core.errors import UserError
from stages.shared.hub import repository as hub_repository
from stages.shared.hub import responses
from stages.shared.hub.repository import Repository, pin
from tests import hub as hubs

CONTENT = bytes(range(256)) * 400
FILES = {"a.safetensors": CONTENT, "sub/b.json": b"{}", "c[1].txt": b"", "other.bin": b"pickle"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[hubs.Hub]:
    with hubs.serve_here(monkeypatch, tmp_path) as server:
        server.repositories["me/tiny"] = dict(FILES)
        yield server


def repository(name: str = "me/tiny", commit: str = hubs.COMMIT) -> Repository:
    return pin("model", name, commit)


def fetch(*names: str) -> dict[str, bytes]:
    """Download some files and read them; the download folder is gone then."""
    pinned = repository()
    with hub_repository.download_folder(pinned) as folder:
        where = hub_repository.download(pinned, names or list(FILES)[:3], folder)
        return {
            path.relative_to(where).as_posix(): path.read_bytes()
            for path in where.rglob("*")
            if path.is_file() and ".cache" not in path.parts
        }


def test_files_arrive_whole_and_alone(server: hubs.Hub, tmp_path: Path) -> None:
    assert fetch() == {name: FILES[name] for name in list(FILES)[:3]}
    assert [p.name for p in (tmp_path / ".downloads").iterdir()] == [".lock"]


def test_a_broken_connection_goes_on_where_it_broke(server: hubs.Hub) -> None:
    server.cut_after = 1000
    assert fetch("a.safetensors") == {"a.safetensors": CONTENT}
    assert server.fetched() == ["a.safetensors"] * 2


def test_whole_files_survive_an_interruption(server: hubs.Hub, tmp_path: Path) -> None:
    server.status, server.only = 503, "sub/b.json"
    with pytest.raises(UserError, match="answered 503"):
        fetch("a.safetensors", "sub/b.json")
    assert (tmp_path / f".downloads/me--tiny@{hubs.COMMIT}/a.safetensors").read_bytes() == CONTENT
    server.status = 200
    fetch("a.safetensors", "sub/b.json")
    assert server.fetched().count("a.safetensors") == 1


def test_the_users_cache_comes_first(server: hubs.Hub, tmp_path: Path) -> None:
    snapshot_download("me/tiny", revision=hubs.COMMIT, endpoint=server.url)
    server.requests.clear()
    pinned = repository()
    assert set(pinned.paths) == set(FILES)
    where = hub_repository.download(pinned, list(FILES), tmp_path / "none")
    assert (where / "a.safetensors").read_bytes() == CONTENT
    assert server.requests == []
    (where / "a.safetensors").resolve().write_bytes(b"rotten")
    with pytest.raises(UserError, match=r"of your Hugging Face cache is damaged\. Delete it"):
        hub_repository.download(pinned, list(FILES), tmp_path / "none")


@pytest.mark.parametrize("path", ["a.safetensors", "sub/b.json"])
def test_a_file_with_another_hash_is_refused(path: str, server: hubs.Hub) -> None:
    server.listed = server.listing("me/tiny")
    server.repositories["me/tiny"][path] = b"X" + FILES[path][1:]
    with pytest.raises(UserError, match=f"{path} arrived with the hash .* the hub states"):
        fetch(path)
    server.repositories["me/tiny"][path] = FILES[path]
    assert fetch(path) == {path: FILES[path]}


@pytest.mark.parametrize("path", ["../out.json", "/out.json", "a/../../out.json", "a\\..\\b.json"])
def test_a_name_that_leaves_the_folder_is_refused(path: str, server: hubs.Hub) -> None:
    server.repositories["me/tiny"] = {path: b"{}"}
    with pytest.raises(UserError, match="would leave its folder"):
        _ = repository().paths


def test_the_hash_of_a_small_file_is_that_of_git(tmp_path: Path) -> None:
    (tmp_path / "hello").write_bytes(b"hello\n")  # `echo hello | git hash-object --stdin`
    assert (
        hub_repository._hash(tmp_path / "hello", 40) == "ce013625030ba8dba906f756967f9e9ca394464a"
    )
    assert hub_repository._hash(tmp_path / "hello", 64) == hashlib.sha256(b"hello\n").hexdigest()


@pytest.mark.parametrize(
    ("status", "code", "line"),
    [
        (401, "RepoNotFound", r"model\.name: .* 401 .*HF_TOKEN"),
        (403, "GatedRepo", r"model\.name: .* 403 .*Accept its terms on"),
        (404, "RepoNotFound", r"model\.name: .* no model me/tiny"),
        (404, "RevisionNotFound", r"model\.revision: me/tiny has no commit 0123"),
        (429, "", r"answered 429 .*later"),
        (500, "", r"answered 500 .*later"),
        (503, "", r"answered 503 .*later"),
    ],
)
@pytest.mark.parametrize("only", ["", "a.safetensors"])
def test_each_status_says_what_to_do(
    only: str, status: int, code: str, line: str, server: hubs.Hub
) -> None:
    server.status, server.headers, server.only = status, {"X-Error-Code": code}, only
    with pytest.raises(UserError, match=line) as caught:
        fetch("a.safetensors")
    assert "\n" not in str(caught.value)


def test_a_wait_of_hours_is_told(server: hubs.Hub) -> None:
    server.status, server.headers = 429, {"Retry-After": "86400"}
    with pytest.raises(UserError, match=r"is busy\. Run `dvc repro` again in 86400 seconds"):
        fetch()


def test_a_missing_repository_and_a_missing_commit(server: hubs.Hub) -> None:
    with pytest.raises(UserError, match=r"model\.name: .* no model me/none"):
        _ = repository("me/none").paths
    with pytest.raises(UserError, match=r"model\.revision: me/tiny has no commit ffff"):
        _ = repository(commit="f" * 40).paths


def test_no_network_is_told(server: hubs.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://me:secret@127.0.0.1:9")
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9: cannot be reached") as caught:
        fetch()
    assert "secret" not in str(caught.value)


def test_offline_mode_is_told(server: hubs.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"model\.name: HF_HUB_OFFLINE is set"):
        fetch()


@pytest.mark.parametrize("listed", [["a portal"], {"siblings": [{"size": 3}]}, "login"])
def test_an_answer_of_something_else_is_told(listed: object, server: hubs.Hub) -> None:
    server.listed = listed
    with pytest.raises(UserError, match="does not answer as the hub does"):
        fetch()


@pytest.mark.parametrize(
    "name", ["../me/tiny", "me/../tiny", "me/tiny/more", "", "me/ti ny", "/me"]
)
def test_only_a_repository_name_is_requested(name: str) -> None:
    with pytest.raises(UserError, match=r"model\.name is .*expected owner/name of a model"):
        repository(name)


def test_a_full_disk_is_told_before_the_download(server: hubs.Hub) -> None:
    server.listed = {"id": "x", "siblings": [{"rfilename": "a.safetensors", "size": 10**18}]}
    with pytest.raises(UserError, match=r"needs 1000000000\.00 GB"):
        fetch("a.safetensors")
    assert server.fetched() == []


def test_a_download_is_bounded_by_its_listed_size(server: hubs.Hub) -> None:
    server.listed = {"id": "x", "siblings": [{"rfilename": "a.safetensors", "size": 4}]}
    with pytest.raises(
        UserError, match="me/tiny: the hub sends more than the 4 bytes that it lists"
    ):
        fetch("a.safetensors")


def test_a_byte_now_and_then_is_no_download(
    server: hubs.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses, "MINUTE", 0.2)
    server.drip = 0.01
    with pytest.raises(UserError, match=r"127\.0\.0\.1: sent \d+ bytes in 0 seconds"):
        fetch("a.safetensors")


def test_packed_answers_are_refused(server: hubs.Hub) -> None:
    server.status, server.headers = 201, {"Content-Encoding": "gzip"}
    with pytest.raises(UserError, match="sends packed data unasked"):
        fetch()


def test_the_token_goes_to_no_other_host(server: hubs.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with hubs.serve() as other:
        other.repositories = server.repositories
        server.elsewhere = other.url.replace("127.0.0.1", "localhost")
        assert fetch("a.safetensors") == {"a.safetensors": CONTENT}
        assert "Bearer hf_secret" in [token for _, token in server.requests]
        assert other.requests
        assert {token for _, token in other.requests} == {None}
