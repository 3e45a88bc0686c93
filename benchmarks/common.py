"""Common parts of the benchmarks: workspaces, measured processes, published tables."""

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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from stages.shared.core import files

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/benchmarks.md"
MEMORY_PAGE = ROOT / "docs/memory.md"
BASE = ROOT / "models/base"
LINKED = ("stages", "benchmarks", "dvc.yaml", "matplotlibrc")
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "trl")


@dataclass(frozen=True)
class Usage:
    """Resource usage of a finished process."""

    seconds: float
    cpu_seconds: float  # children included
    peak_bytes: int  # resident; the largest single process
    output: str


class Workspace:
    """Temporary repository in which stages run on given inputs and parameters."""

    def __init__(self, root: Path, params: Mapping[str, Any]) -> None:
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
        (self.root / "params.yaml").write_text(yaml.safe_dump(self.params), encoding="utf-8")

    def link(self, name: str, target: Path) -> None:
        """Link `name` in the workspace to `target`."""
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).symlink_to(target.absolute())

    def run(self, *arguments: str, env: Mapping[str, str] | None = None) -> Usage:
        """Run `python -m <arguments>`; on failure, SystemExit with the end of its stderr."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PATH": path}
        command = [sys.executable, "-m", *arguments]
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            started = time.perf_counter()
            variables = {**os.environ, **offline, **(env or {})}
            streams: Any = {"stdout": out, "stderr": err, "env": variables}
            process = subprocess.Popen(command, cwd=self.root, **streams)  # noqa: S603
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

    def run_peer(self, name: str, **job: Any) -> tuple[dict, Usage]:
        """Run a job of `benchmarks.peers`: its metrics and resource usage."""
        usage = self.run("benchmarks.peers", name, json.dumps(job))
        return json.loads(usage.output.splitlines()[-1]), usage

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a metrics file of a stage."""
        content: dict[str, Any] = files.read_json(self.root / name)
        return content

    def train(self, device: str, **variables: object) -> dict[str, Any]:
        """Metrics of `stages.train` on one device, with `QLORA_<name>` from `variables`."""
        env = {"QLORA_DEVICE": device}
        env |= {f"QLORA_{name.upper()}": str(value) for name, value in variables.items()}
        # For the tokenizer beside the adapter, where no stage has written them.
        made = {"chat_template": "", "eos_token": "<end>"}
        for name, content in {
            "models/source.json": {"source": "path"},
            "data/prepared/format.json": made,
        }.items():
            if not (self.root / name).exists():
                (self.root / name).write_text(json.dumps(content))
        self.run("stages.train", env=env)
        return self.read_json("reports/details/train.json") | self.read_json("reports/train.json")

    def train_peer(self, name: str, **job: Any) -> dict[str, Any]:
        """Metrics of the same training by a peer."""
        paths = {"data": "data/prepared/train.parquet", "model": "models/quantized"}
        job |= {key: str(self.root / path) for key, path in paths.items()}
        job |= {"tokenizer": str(self.root / "models/tokenizer")}
        job |= {"lora": self.params["lora"], "train": self.params["train"]}
        metrics, _ = self.run_peer(name, **job)
        return metrics | {"tokens_per_second": metrics["tokens"] / metrics["seconds"]}


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
    versions = [f"Python {platform.python_version()}"]
    for name in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    return f"{device or processor}; {', '.join(versions)}."


def markdown(table: pd.DataFrame) -> str:
    """Markdown table with text left-aligned and numbers right-aligned."""
    numeric = [bool(re.match(r"[-+]?\d", str(table[name].iloc[0]))) for name in table]
    lines = [list(table), ["--:" if right else "---" for right in numeric], *table.values.tolist()]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def publish(name: str, table: pd.DataFrame, where: str, page: Path = PAGE) -> None:
    """Print a table and write it between `<!-- name -->` and `<!-- end of name -->`."""
    text = f"{where}\n\n{markdown(table)}"
    print(text)
    marks = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end of {name} -->)", re.DOTALL)
    new, count = marks.subn(lambda m: m[1] + text + m[2], page.read_text(encoding="utf-8"))
    if count != 1:
        raise ValueError(f"{page}: no pair of marks <!-- {name} --> and <!-- end of {name} -->")
    files.write_text(page, new)
