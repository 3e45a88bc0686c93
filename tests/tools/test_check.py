"""What DVC would say in words of its own, or wait for, is settled before it runs."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.shared.core.errors import UserError
from stages.tools import check
from tests import workspace


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> workspace.Workspace:
    made = workspace.make(tmp_path, {"data.path": "mine.jsonl"})
    (tmp_path / "mine.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.chdir(made.root)
    return made


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (None, "data.path is None; expected a valid string"),
        ("missing.jsonl", "data.path is 'missing.jsonl', which is no file or folder"),
        ("", "which is no file or folder"),
        ("pipe", "which is no file or folder"),
        ("~/mine.jsonl", "no shell expands it. Write '/"),
        ("https://a.b/c.jsonl", "a URL. Download it, or set data.source to hub"),
        ("data", "where stages write"),
        ("folder", "folder/pipe.jsonl: is a pipe"),
        ("data/raw/train.jsonl", "which is no file or folder"),
    ],
)
@pytest.mark.parametrize("source", ["file", "hub"])
def test_data_path_is_checked_before_dvc_does(
    space: workspace.Workspace, path: Any, told: str, source: str
) -> None:
    os.mkfifo("pipe")
    Path("folder").mkdir()
    os.mkfifo("folder/pipe.jsonl")
    Path("data").mkdir()
    space.set_params({"data.path": path, "data.source": source})
    with pytest.raises(UserError, match=told) as error:
        check.main()
    assert "\n" not in str(error.value)


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", "import time; time.sleep(100)", "repro", "train"]
    with subprocess.Popen(command) as running:
        yield running
        running.kill()


@pytest.mark.parametrize(
    ("cmd", "age", "held"),
    [("dvc repro train", 0, True), ("dvc repro", 0, False), ("dvc repro train", 60, False)],
    ids=["its own", "another command", "before it began"],
)
def test_locks_of_processes_that_are_gone_are_removed(
    space: workspace.Workspace, process: subprocess.Popen[bytes], cmd: str, age: int, held: bool
) -> None:
    """The process number lives: DVC alone would refuse to work."""
    lock = Path(".dvc/tmp/rwlock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    info = {"pid": process.pid, "cmd": cmd}
    path = str(Path("mine.jsonl").resolve())
    lock.write_text(json.dumps({"write": {path: info}, "read": {path: [info]}}))
    os.utime(lock, (lock.stat().st_atime, lock.stat().st_mtime - age))
    check.main()
    assert bool(json.loads(lock.read_text())["write"]) == held
    assert bool(json.loads(lock.read_text())["read"]) == held
    done = space.dvc("repro", "fetch_data")
    assert (done.returncode != 0 and "is busy, it is being blocked by" in done.stderr) == held
