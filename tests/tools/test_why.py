"""What `make repro` says of each stage before it runs it."""

import subprocess
from pathlib import Path
from typing import Any

from stages.tools.why import reasons
from tests import workspace

ROOT = Path(__file__).parents[2]


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


def test_make_repro_says_why_a_stage_runs(tmp_path: Path) -> None:
    space = workspace.make(tmp_path)
    done = space.run("python", "-m", "stages.tools.why")
    assert done.returncode == 0, done.stderr
    assert "train\tnot run before\n" in done.stdout
    makefile = (ROOT / "Makefile").read_text()
    awk = makefile.partition("define PROGRESS\n")[2].partition("endef")[0].replace("$$", "$")
    shown = subprocess.run(
        ["awk", "-F", "'", "-v", "of=2", awk],
        input="Running stage 'train':\n> python -m stages.train\nRunning stage 'merge':\n",
        env={"WHY": "train\tparams lora.r\nplan\tx"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == "[1/2] train (params lora.r)\n[2/2] merge\n"


def test_damaged_dvc_lock_is_one_line(tmp_path: Path) -> None:
    space = workspace.make(tmp_path)
    (tmp_path / "dvc.lock").write_text("a: [")
    done = space.stage("tools.why")
    [line] = done.stderr.splitlines()
    assert (done.returncode, line[:30]) == (1, "error: dvc.yaml or dvc.lock: c")
