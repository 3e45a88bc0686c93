"""Workspaces, measured processes and published tables of the benchmarks."""

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
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from stages.shared.core import files

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/benchmarks.md"
MEMORY_PAGE = ROOT / "docs/memory.md"
CLUSTERS_PAGE = ROOT / "docs/clusters.md"
BASE = ROOT / "models/base"


@dataclass(frozen=True)
class Usage:
    """Resources of a finished process; its children's CPU seconds are included."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int  # resident, of the largest single process


class Workspace:
    """Temporary repository in which stages run on given inputs and parameters."""

    def __init__(self, root: Path, params: Mapping[str, Any]) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        for name in ("stages", "benchmarks", "dvc.yaml", "matplotlibrc"):
            self.link(name, ROOT / name)
        shutil.copytree(ROOT / ".dvc", root / ".dvc", ignore=lambda *_: ["tmp", "cache"])
        subprocess.run(["git", "init", "--quiet", root], check=True)  # noqa: S603, S607
        self.params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        self.set_params(params)

    def set_params(self, changes: Mapping[str, Any]) -> None:
        """Change params.yaml by dotted key, `{"train.max_steps": 8}`."""
        for dotted, value in changes.items():
            section, key = dotted.split(".")
            self.params[section][key] = value
        (self.root / "params.yaml").write_text(yaml.safe_dump(self.params), encoding="utf-8")

    def link(self, name: str, target: Path) -> None:
        """Link `name` in the workspace to `target`."""
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).symlink_to(target.absolute())

    def run(self, *arguments: str, **variables: object) -> Usage:
        """Run `python -m <arguments>`; on failure, SystemExit with the end of its output."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PATH": path}
        command = [sys.executable, "-m", *arguments]
        env = os.environ | offline | {name: str(value) for name, value in variables.items()}
        with tempfile.TemporaryFile() as log:
            started = time.perf_counter()
            process = subprocess.Popen(command, cwd=self.root, env=env, stdout=log, stderr=log)  # noqa: S603
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - started
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                log.seek(0)
                end = log.read().decode(errors="replace")[-3000:]
                sys.exit(f"{end}\nerror: {' '.join(command)}: exit code {process.returncode}")
        return Usage(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)

    def train(self, **variables: object) -> dict[str, Any]:
        """Metrics of `stages.train`."""
        self.run("stages.train", **variables)
        names = ("reports/details/train.json", "reports/train.json")
        details, metrics = (files.read_json(self.root / name) for name in names)
        return details | metrics

    def run_peer(self, name: str, **job: Any) -> tuple[dict[str, Any], Usage]:
        """Metrics of a job of `benchmarks.peers`, and its resources."""
        usage = self.run("benchmarks.peers", name, json.dumps(job | {"params": self.params}))
        return files.read_json(self.root / "peer.json"), usage


@contextmanager
def workspace(params: Mapping[str, Any]) -> Iterator[Workspace]:
    """Create a `Workspace` and remove it at the end."""
    with tempfile.TemporaryDirectory() as folder:
        yield Workspace(Path(folder), params)


def machine(device: str = "") -> str:
    """Line above a table: device, cores, versions."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = re.search(r"model name\s*: (.*)", info)
    flags = ", ".join(flag for flag in ("avx2", "avx512f", "avx512_bf16") if flag in info)
    processor = f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores ({flags})"
    names = filter(find_spec, ("torch", "transformers", "peft", "bitsandbytes", "datasets", "trl"))
    versions = [f"{name} {version(name)}" for name in names]
    return f"{device or processor}; Python {platform.python_version()}, {', '.join(versions)}."


def publish(name: str, table: pd.DataFrame, where: str, page: Path = PAGE) -> None:
    """Print a table and write it as Markdown between `<!-- name -->` and `<!-- end of name -->`."""
    numeric = [bool(re.match(r"[-+]?\d", str(table[column].iloc[0]))) for column in table]
    lines = [list(table), ["--:" if right else "---" for right in numeric], *table.values.tolist()]
    text = "\n".join([where, "", *(f"| {' | '.join(map(str, line))} |" for line in lines)])
    print(text)
    marks = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end of {name} -->)", re.DOTALL)
    new, count = marks.subn(lambda m: m[1] + text + m[2], page.read_text(encoding="utf-8"))
    if count != 1:
        raise ValueError(f"{page}: no pair of marks <!-- {name} --> and <!-- end of {name} -->")
    files.write_text(page, new)
