"""Shared by the benchmarks: a workspace for real stages, measured processes, one table format."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from stages.shared.core import files

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/benchmarks.md"
LINKED = ("stages", "benchmarks", "dvc.yaml", "matplotlibrc")
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "trl", "unsloth")


@dataclass(frozen=True)
class Usage:
    """One finished process; its memory is that of the largest of its processes."""

    seconds: float
    cpu_seconds: float  # of its children too
    peak_bytes: int  # resident
    output: str


class Workspace:
    """A throw-away repository in which stages run on given inputs and parameters."""

    def __init__(self, root: Path, params: Mapping[str, Any]) -> None:
        """Link the code, write params.yaml.

        Args:
            root: an empty or missing folder.
            params: changes for `set_params`.
        """
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        for name in LINKED:
            (root / name).symlink_to(ROOT / name)
        shutil.copytree(ROOT / ".dvc", root / ".dvc", ignore=lambda *_: ["tmp", "cache"])
        subprocess.run(["git", "init", "--quiet", root], check=True)  # noqa: S603, S607
        self.params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        self.set_params(params)

    def set_params(self, changes: Mapping[str, Any]) -> None:
        """Change params.yaml by dotted key, `{"train.max_steps": 8}`."""
        for dotted, value in changes.items():
            section, key = dotted.split(".")
            self.params[section][key] = value
        text = yaml.safe_dump(self.params)
        (self.root / "params.yaml").write_text(text, encoding="utf-8")

    def link(self, name: str, target: Path) -> None:
        """Put a file or folder where a stage reads it."""
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).symlink_to(target.absolute())

    def run(
        self, *arguments: str, env: Mapping[str, str] | None = None, python: str = sys.executable
    ) -> Usage:
        """Run `python -m` with these arguments, as `run("stages.train")`.

        Raises:
            SystemExit: it failed; the end of what it wrote to stderr says why.
        """
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PATH": path}
        command = [python, "-m", *arguments]
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            started = time.perf_counter()
            process = subprocess.Popen(  # noqa: S603
                command,
                cwd=self.root,
                stdout=out,
                stderr=err,
                env={**os.environ, **offline, **(env or {})},
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            seconds = time.perf_counter() - started
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
        if process.returncode:
            sys.exit(
                f"{texts[1][-3000:]}\nerror: {' '.join(command)} ended with {process.returncode}"
            )
        return Usage(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, texts[0])

    def run_peer(self, name: str, python: str = sys.executable, **job: Any) -> tuple[dict, Usage]:
        """Run a job of `benchmarks.peers`; its figures, and what the process used."""
        usage = self.run("benchmarks.peers", name, json.dumps(job), python=python)
        return json.loads(usage.output.splitlines()[-1]), usage

    def read_json(self, name: str) -> dict[str, Any]:
        """A metrics file that a stage wrote."""
        content: dict[str, Any] = files.read_json(self.root / name)
        return content


@contextmanager
def workspace(params: Mapping[str, Any]) -> Iterator[Workspace]:
    """A `Workspace` that is removed at the end."""
    with tempfile.TemporaryDirectory() as folder:
        yield Workspace(Path(folder), params)


def machine(device: str = "") -> str:
    """The line above a table: device, cores, versions."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    found = re.search(r"model name\s*: (.*)", info)
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16") if flag in info]
    processor = (
        f"{found[1] if found else platform.machine()}, {os.cpu_count()} cores ({', '.join(flags)})"
    )
    versions = []
    for name in LIBRARIES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"{device or processor}; Python {platform.python_version()}, {', '.join(versions)}."


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table: texts to the left, numbers to the right, as `formatted` made them."""
    numeric = [bool(re.match(r"[-+]?\d", str(table[name].iloc[0]))) for name in table]
    lines = [list(table), ["--:" if right else "---" for right in numeric], *table.values.tolist()]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def publish(name: str, table: pd.DataFrame, where: str, page: Path = PAGE) -> None:
    """Print a table, and put it between the marks `<!-- name -->` and `<!-- end of name -->`.

    Raises:
        ValueError: the page does not have the two marks.
    """
    text = f"{where}\n\n{markdown(table)}"
    print(text)
    marks = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end of {name} -->)", re.DOTALL)
    new, count = marks.subn(lambda m: m[1] + text + m[2], page.read_text(encoding="utf-8"))
    if count != 1:
        raise ValueError(f"{page}: no pair of marks <!-- {name} --> and <!-- end of {name} -->")
    files.write_text(page, new)
