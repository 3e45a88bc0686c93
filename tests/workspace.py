"""Temporary repository with the pipeline, in which stages and DVC run as for a user."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
_COPIED = (
    *(".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore"),
    *("dvc.yaml", "matplotlibrc", "params.yaml"),
)


@dataclass(frozen=True)
class Workspace:
    """Git repository with DVC, `stages/`, `dvc.yaml` and `params.yaml`, without data."""

    root: Path

    def set_params(self, params: dict[str, Any]) -> None:
        """Change `params.yaml`: `{"lora.r": 8}`. A key that is not there yet is added."""
        path = self.root / "params.yaml"
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        for dotted, value in params.items():
            *sections, key = dotted.split(".")
            section = values
            for name in sections:
                section = section.setdefault(name, {})
            section[key] = value
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")

    def run(
        self, *command: str | Path, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command at the root, with this Python first on the PATH; output is captured."""
        return subprocess.run(
            command, cwd=self.root, env=self.environment(env),
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    def environment(self, changes: dict[str, str] | None = None) -> dict[str, str]:
        """Environment of a command, without variables of a DVC that runs the tests."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        clean = {k: v for k, v in os.environ.items() if k not in ("DVC_ROOT", "HF_HUB_OFFLINE")}
        return {**clean, "PATH": path, "PYTHONDONTWRITEBYTECODE": "1", **(changes or {})}

    def stage(self, name: str, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a stage by itself: `python -m stages.<name>`."""
        return self.run(sys.executable, "-m", f"stages.{name}", *args, **options)

    def dvc(self, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run `dvc`."""
        return self.run(sys.executable, "-m", "dvc", *args, **options)


def make(root: Path, params: dict[str, Any] | None = None) -> Workspace:
    """Make a workspace in an empty or missing folder, with changes to `params.yaml`.

    `.dvc/config` is the project's own, which is all that `dvc init` would add. Before `dvc repro`
    put a file where `data.path` points.
    """
    for name in _COPIED:
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(ROOT / "stages", root / "stages", symlinks=True, ignore=ignored)
    (root / ".counts").symlink_to(ROOT / ".counts")  # the memory counts of other tests
    (ROOT / ".counts").mkdir(exist_ok=True)
    subprocess.run(["git", "init", "--quiet", root], check=True)
    workspace = Workspace(root)
    workspace.set_params(params or {})
    return workspace
