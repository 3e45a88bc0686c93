"""Time of each stage of the default against its budget, from an empty clone of HEAD.

Runs `dvc repro --single-item` of every stage in turn, installation left out, downloads included.

Writes: a table in docs/benchmarks.md
Run:    python -m benchmarks.budget              (seven minutes on two idle cores with bf16)
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from benchmarks.common import ROOT, machine, publish
from stages.shared.core.command import run
from stages.shared.core.errors import UserError

VARIANTS = ("base", "quantized", "adapter", "merged")
# Seconds on two idle cores with bf16, and the stages that share them, in the order of their run.
BUDGET = {
    "fetch": (20, ("fetch_data", "fetch_model")),
    "prepare": (5, ("prepare",)),
    "quantize": (20, ("quantize",)),
    "train": (200, ("train",)),
    "merge": (35, ("merge",)),
    "evaluate": (4 * 16, tuple(f"evaluate@{variant}" for variant in VARIANTS)),
    "plan": (15, ("plan",)),
    "export": (10, ("export",)),
    "report": (5, ("report",)),
}


def seconds(root: Path, stages: Sequence[str]) -> float:
    """Wall time of these stages in a clone; UserError where one fails."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", *stages]
    started = time.perf_counter()
    result = subprocess.run(command, cwd=root, env=os.environ | {"PATH": path}, check=False)  # noqa: S603
    if result.returncode:
        raise UserError(f"{', '.join(stages)}: failed, see above. Mend it and run this again.")
    return time.perf_counter() - started


def main() -> None:
    """Measure and publish."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "clone")
        subprocess.run(["git", "clone", "--quiet", ROOT, root], check=True)  # noqa: S603, S607
        measured = {name: seconds(root, stages) for name, (_, stages) in BUDGET.items()}
    rows = [(name, BUDGET[name][0], round(taken)) for name, taken in measured.items()]
    rows.append(("all", sum(row[1] for row in rows), round(sum(measured.values()))))
    table = pd.DataFrame(rows, columns=["stage", "budget, s", "measured, s"])
    publish("budget", table, machine())


if __name__ == "__main__":
    run(main)
