"""`make repro`: what it checks before DVC runs, and what it says of each stage."""

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.shared.core.errors import UserError
from stages.tools.repro import check, reasons, require_own, shorten
from tests import workspace


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> workspace.Workspace:
    made = workspace.make(tmp_path, {"data.path": "mine.jsonl"})
    (tmp_path / "mine.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.chdir(made.root)
    return made


def test_reason_names_the_keys_and_files_that_changed() -> None:
    status: dict[str, list[Any]] = {
        "train": [
            {"changed deps": {"stages/train": "modified", "params.yaml": {"lora": "modified"}}}
        ],
        "report": [{"changed deps": {"params.yaml": "new"}}],
        "report whole": [{"changed deps": {"params.yaml": "modified"}}],
        "merge": ["changed command", {"changed outs": {"models/merged": "deleted"}}],
        "fresh": [
            {"changed deps": {"data/raw": "deleted", "a": "modified"}},
            {"changed outs": {"b": "deleted"}},
        ],
        "plan": [{"changed deps": {"params.yaml": {"new.key": "new"}, **dict.fromkeys("abcde")}}],
    }
    locked: dict[str, Any] = {"merge": {}, "fresh": {}, "plan": {}, "report whole": {}}
    locked |= {"train": {"params": {"params.yaml": {"lora": {"r": 16, "alpha": 32}}}}}
    assert reasons(status, locked, {"lora": {"r": 8, "alpha": 32}}) == {
        "train": "params lora.r; deps stages/train",
        "merge": "changed command; missing models/merged",
        "fresh": "deps a; missing b",
        "plan": "params new.key; deps a, b, c and 2 more",
        "report": "not run before",
        "report whole": "deps params.yaml",
    }


def test_each_stage_has_a_line() -> None:
    lines = [
        "Running stage 'train':",
        "> python -m stages.train",
        "",
        "error: of the stage",
        "Running stage 'merge':",
        "Stage 'plan' didn't change, skipping",
        "Stage 'report' is cached - skipping run, checking out outputs",
        "Use `dvc push` to send your updates to remote storage.",
    ]
    assert [*shorten(lines, 4, {"train": "params lora.r", "plan": "x"})] == [
        "[1/4] train (params lora.r)",
        "error: of the stage",
        "[2/4] merge",
        "[3/4] plan: unchanged",
        "[4/4] report: restored from the run cache",
    ]


def test_repro_says_at_once_what_runs_and_ends_as_dvc_does(space: workspace.Workspace) -> None:
    Path("dvc.yaml").write_text("stages:\n  slow:\n    cmd: echo begun && sleep 60\n")
    with subprocess.Popen(
        [sys.executable, "-m", "stages.tools.repro"],
        cwd=space.root,
        env=space.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "[1/1] slow (not run before)\n"
        while running.stdout.readline() != "begun\n":
            assert running.poll() is None  # amid its fork the command would not hear it
        os.killpg(running.pid, signal.SIGINT)
        running.communicate(timeout=30)
    assert running.returncode > 0


def test_damaged_dvc_lock_is_one_line(space: workspace.Workspace) -> None:
    Path("dvc.lock").write_text("a: [")
    done = space.stage("tools.repro")
    [line] = done.stderr.splitlines()
    assert (done.returncode, line[:30]) == (1, "error: dvc.yaml or dvc.lock: c")


@pytest.mark.parametrize(
    ("path", "message"),
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
    space: workspace.Workspace, path: Any, message: str, source: str
) -> None:
    os.mkfifo("pipe")
    Path("folder").mkdir()
    os.mkfifo("folder/pipe.jsonl")
    Path("data").mkdir()
    space.set_params({"data.path": path, "data.source": source})
    with pytest.raises(UserError, match=message) as error:
        check()
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
    check()
    assert bool(json.loads(lock.read_text())["write"]) == held
    assert bool(json.loads(lock.read_text())["read"]) == held
    done = space.dvc("repro", "fetch_data")
    assert (done.returncode != 0 and "is busy, it is being blocked by" in done.stderr) == held


def made(root: Path) -> Path:
    """As DVC makes it."""
    folder = root / "dvc/repo/0123"
    (folder / "links").mkdir(parents=True)
    (folder / "links/cache.db").write_bytes(b"")
    for parent in folder.parents[:2]:
        parent.chmod(0o777)
    return folder


def test_own_folder_passes_and_gets_sticky_parents(tmp_path: Path) -> None:
    require_own(folder := made(tmp_path))
    assert all(parent.stat().st_mode & stat.S_ISVTX for parent in folder.parents[:2])


@pytest.mark.parametrize("name", [".", "links", "links/cache.db"])
def test_folder_that_others_can_write_is_refused(name: str, tmp_path: Path) -> None:
    folder = made(tmp_path)
    (folder / name).chmod(0o777)
    with pytest.raises(UserError, match="other users can write what DVC unpickles"):
        require_own(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("name", [".", "..", "links/cache.db"])
def test_folder_of_another_user_is_refused(name: str, tmp_path: Path) -> None:
    folder = made(tmp_path)
    os.chown(folder / name, 12345, -1)
    with pytest.raises(UserError, match=r"other users can (write|replace) what DVC unpickles"):
        require_own(folder)


def test_command_checks_the_folder_that_dvc_uses(
    space: workspace.Workspace, tmp_path: Path
) -> None:
    env = {"DVC_SITE_CACHE_DIR": str(tmp_path / "site")}
    Path("dvc.yaml").write_text("stages: {quick: {cmd: 'true'}}\n")
    assert space.stage("tools.repro", env=env).returncode == 0
    [folder] = (tmp_path / "site/repo").iterdir()
    folder.chmod(0o777)
    done = space.stage("tools.repro", env=env)
    assert (done.returncode, done.stderr.startswith(f"error: {folder}: other")) == (1, True)
