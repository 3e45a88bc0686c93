"""Bytes that change under their old modification time, in files that DVC tracks."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dvc_data.hashfile.hash
import pytest
import yaml
from dvc.repo import Repo

from stages.shared.core import files
from stages.shared.core.errors import UserError
from stages.shared.core.machine import machine
from tests import workspace

MODEL = Path("models/base/my model.safetensors")
RAW = Path("mine.jsonl")


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repo]:
    """A repository whose first stage copies a file into a folder, which the second reads."""
    space = workspace.make(tmp_path)
    monkeypatch.chdir(space.root)
    copy = f"mkdir -p models/base && cp {RAW} '{MODEL}'"
    stages = {
        "fetch_model": {"cmd": copy, "deps": [str(RAW)], "outs": ["models/base"]},
        "quantize": {"cmd": "echo > out", "deps": ["models/base", str(RAW)], "outs": ["out"]},
    }
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    RAW.write_bytes(b"weights " * 100)
    with Repo() as repo:
        repo.reproduce("fetch_model")
        yield repo


def verify(stage: str) -> None:
    with Repo() as repo:
        files.verify_dependencies(repo, repo.stage.load_one(name=stage))


def flip(path: Path) -> None:
    content = path.read_bytes()
    overwrite(path, bytes([content[0] ^ 1]) + content[1:])


def overwrite(path: Path, content: bytes) -> None:
    """Write in place, and set the old mode and modification time."""
    before = path.stat()
    path.chmod(0o644)
    with path.open("rb+") as file:
        file.write(content)
        file.truncate()
    path.chmod(before.st_mode)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_ino == before.st_ino


@pytest.mark.parametrize("linked", [False, True], ids=["copy", "link"])
@pytest.mark.parametrize("damage", [flip, lambda path: overwrite(path, b"weights ")])
def test_rot_of_an_out_is_named_and_the_advice_mends_it(
    repo: Repo, damage: Callable[[Path], None], linked: bool
) -> None:
    before = MODEL.read_bytes()
    if linked:  # as what is restored from the run cache is
        shutil.rmtree("models/base")
        repo.checkout(["models/base"])
        assert MODEL.stat().st_nlink == 2
    verify("quantize")
    damage(MODEL)
    with pytest.raises(UserError, match=rf"^{MODEL}: changed on the disk under its old time") as e:
        verify("quantize")
    command = str(e.value).partition("write it again: ")[2]
    subprocess.run(command.replace("dvc repro", "true"), shell=True, check=True)
    ran = repo.reproduce("fetch_model")
    assert MODEL.read_bytes() == before
    assert ran
    verify("quantize")


def test_rot_in_the_cache_is_found_once_restored(repo: Repo) -> None:
    shutil.rmtree("models/base")
    copies = Path(".dvc/cache/files/md5").glob("*/*")
    [copy] = [path for path in copies if path.read_bytes() == RAW.read_bytes()]
    flip(copy)
    repo.checkout(["models/base"])
    with pytest.raises(UserError, match=rf"rm -f '{MODEL}' {copy} && dvc repro"):
        verify("quantize")


def test_rot_of_the_users_file_deletes_nothing(repo: Repo) -> None:
    flip(RAW)
    with pytest.raises(UserError, match=rf"^{RAW}: .* Restore it; or, if it is right, `touch` it"):
        verify("quantize")
    RAW.touch()
    verify("quantize")


def test_files_written_since_are_a_warning(repo: Repo, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("models/base")  # a stage run by hand
    MODEL.parent.mkdir()
    MODEL.write_bytes(b"other")
    RAW.write_bytes(b"WEIGHTS " * 100)
    verify("quantize")
    assert "warning: models/base: is not as dvc.lock has it" in capsys.readouterr().err
    verify("fetch_model")
    files.record_outs()
    flip(MODEL)
    with pytest.raises(UserError, match=str(MODEL)):
        verify("quantize")


def test_each_file_is_hashed_once_unless_asked(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = dvc_data.hashfile.hash.file_md5

    def file_md5(path: str, *args: Any, **options: Any) -> str:
        if not path.endswith(".tmp"):  # a folder's list, in memory
            hashed.append(path)
        return real(path, *args, **options)

    monkeypatch.setattr("dvc_data.hashfile.hash.file_md5", file_md5)
    verify("quantize")
    assert {Path(path).name for path in hashed} == {MODEL.name, RAW.name}
    verify("quantize")
    assert len(hashed) == 2
    monkeypatch.setenv("QLORA_VERIFY", "true")
    machine.cache_clear()
    verify("quantize")
    machine.cache_clear()
    assert len(hashed) == 4
