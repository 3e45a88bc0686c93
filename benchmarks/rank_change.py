"""What a change of rank costs beside the training, merging and evaluating that it needs.

Reads:  a repository in which `dvc repro` has nothing to do
Run:    python -m benchmarks.rank_change [--rank 8]

About eight minutes on two cores. `dvc exp run --temp -S lora.r=8` runs as a user would have it,
with the command of each stage timed on its way; then what the stages import before they begin is
imported alone. The experiment is removed again.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# What a change of rank needs, and what each imports before it begins.
NEEDED = {
    "stages.train": "stages.train.training",
    "stages.merge": "stages.merge.proven",
    "stages.evaluate": "stages.evaluate.evaluation",
}
NAME = "rank-change-benchmark"
IMPORTS = 3
# In the place of `python`: runs it, and notes its stage, its start and its end.
TIMED = """#!/bin/sh
started=$(date +%s.%N)
"{python}" "$@"
ended=$?
echo "$2 $started $(date +%s.%N)" >> "{log}"
exit $ended
"""
IMPORTING = """
from stages.shared.core import progress
with progress.quick_imports():
    import stages.shared.models
    import {}
"""
Command = tuple[str, float]  # a stage and its seconds


def experiment(rank: int, work: Path) -> tuple[float, list[Command]]:
    """Seconds of `dvc exp run`, and the commands that it ran, in their order."""
    log, shim = work / "log", work / "python"
    log.touch()
    shim.write_text(TIMED.format(python=sys.executable, log=log), encoding="utf-8")
    shim.chmod(0o755)
    environment = os.environ | {"PATH": f"{work}{os.pathsep}{os.environ['PATH']}"}
    dvc = shutil.which("dvc", path=str(Path(sys.executable).parent)) or "dvc"
    began = time.perf_counter()
    try:
        run([dvc, "exp", "run", "--temp", "--name", NAME, "-S", f"lora.r={rank}"], environment)
        seconds = time.perf_counter() - began
    finally:
        run([dvc, "exp", "remove", NAME], environment)
    lines = [line.split() for line in log.read_text(encoding="utf-8").splitlines()]
    return seconds, [(stage, float(end) - float(start)) for stage, start, end in lines]


def run(command: list[str], environment: dict[str, str] | None = None) -> float:
    """Seconds that a command took."""
    began = time.perf_counter()
    subprocess.run(command, check=True, env=environment)  # noqa: S603
    return time.perf_counter() - began


def starting(stage: str) -> float:
    """Seconds of starting Python and importing as a stage does, the median of a few."""
    script = IMPORTING.format(NEEDED[stage])
    return statistics.median(run([sys.executable, "-c", script]) for _ in range(IMPORTS))


def table(seconds: float, commands: list[Command], start: dict[str, float]) -> str:
    """What was found, in Markdown.

    Args:
        seconds: of the experiment.
        commands: that it ran.
        start: seconds that each stage of `NEEDED` takes to start.
    """
    needed = sum(took - start[stage] for stage, took in commands if stage in start)
    rows = [
        f"| `{stage}` | {took:.1f} | {f'{start[stage]:.1f}' if stage in start else ''} |"
        for stage, took in commands
    ]
    share = seconds / needed - 1
    return "\n".join(
        [
            "| | s | of them starting |",
            "|---|--:|--:|",
            *rows,
            f"| `dvc exp run` | {seconds:.1f} | |",
            "",
            f"Training, merging and evaluating took {needed:.1f} s once they had started; "
            f"everything else is {share:.1%} more.",
        ]
    )


def main() -> None:
    """Run the experiment, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rank_change")
    parser.add_argument("--rank", type=int, default=8)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        seconds, commands = experiment(asked.rank, Path(work))
    print(table(seconds, commands, {stage: starting(stage) for stage in NEEDED}))


if __name__ == "__main__":
    main()
