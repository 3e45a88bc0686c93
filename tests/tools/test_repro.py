"""What `make repro` says of each stage before it runs it."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from stages.tools.repro import reasons, shorten
from tests import workspace


def test_reason_names_the_keys_and_files_that_changed() -> None:
    status: dict[str, list[Any]] = {
        "train": [
            {"changed deps": {"stages/train": "modified", "params.yaml": {"lora": "modified"}}}
        ],
        "report": [{"changed deps": {"params.yaml": "new"}}],
        "report whole": [{"changed deps": {"params.yaml": "modified"}}],
        "merge": ["changed command", {"changed outs": {"models/merged": "deleted"}}],
        "plan": [{"changed deps": {"params.yaml": {"new.key": "new"}, **dict.fromkeys("abcde")}}],
    }
    locked: dict[str, Any] = {"merge": {}, "plan": {}, "report whole": {}}
    locked |= {"train": {"params": {"params.yaml": {"lora": {"r": 16, "alpha": 32}}}}}
    assert reasons(status, locked, {"lora": {"r": 8, "alpha": 32}}) == {
        "train": "params lora.r; deps stages/train",
        "merge": "changed command; outs models/merged",
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


def test_repro_says_at_once_what_runs_and_ends_as_dvc_does(tmp_path: Path) -> None:
    space = workspace.make(tmp_path)
    (tmp_path / "dvc.yaml").write_text("stages:\n  slow:\n    cmd: sleep 60\n")
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
        os.killpg(running.pid, signal.SIGINT)
        running.communicate(timeout=30)
    assert running.returncode > 0


def test_damaged_dvc_lock_is_one_line(tmp_path: Path) -> None:
    space = workspace.make(tmp_path)
    (tmp_path / "dvc.lock").write_text("a: [")
    done = space.stage("tools.repro")
    [line] = done.stderr.splitlines()
    assert (done.returncode, line[:30]) == (1, "error: dvc.yaml or dvc.lock: c")
