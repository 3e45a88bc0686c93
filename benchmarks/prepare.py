"""`prepare` beside `datasets.map`, in turn, and its memory as the rows become more.

Both read the same JSON lines, use the same tokenizer and write parquet; timed is the work, without
the imports before it. The peer runs in one process and in two; its CPU time is that of all, its
memory that of the first. Every column of every row is compared: a difference ends the benchmark.
Each run is a process of its own. Beside the peer only, `datasets` is needed, which the project is
not:

Run:    python -m benchmarks.prepare --peer-python PYTHON_WITH_DATASETS
        python -m benchmarks.prepare --memory 100000 1000000
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks import conversations, prepare_rows

ROOT = Path(__file__).parents[1]
OURS, PEER = "benchmarks.prepare_ours", "benchmarks.prepare_peer"


@dataclass(frozen=True)
class Run:
    """What one process told of its work."""

    rows: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    tokens: int = 0


def run(module: str, python: str, raw: Path, tokenizer: Path, folder: Path, *more: str) -> Run:
    """Run a module in a process of its own.

    Raises:
        SystemExit: it failed.
    """
    folder.mkdir()
    command = [python, "-m", module, *map(str, (raw, tokenizer, folder)), *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        sys.exit(f"{done.stderr}\nerror: {python} -m {module} failed")
    return Run(**json.loads(done.stdout.splitlines()[-1]))


def show(name: str, one: Run) -> None:
    """A line of the table."""
    rate = one.rows / one.seconds
    tokens = f"{one.tokens / one.seconds:12,.0f}" if one.tokens else " " * 12
    print(
        f"{name:<16}{one.rows:>10,}{one.seconds:>9.2f}{one.cpu_seconds:>9.2f}{rate:>10,.0f}{tokens}"
        f"{one.peak_bytes / 1e6:>9,.0f}",
        flush=True,
    )


def compare(rows: int, rounds: int, peer_python: str, tokenizer: Path, folder: Path) -> None:
    """Ours and the peer in turn, and the ratio of each round to the faster of the peer's ways.

    Raises:
        SystemExit: a column of a conversation is not the same.
    """
    raw = folder / "raw"
    conversations.write(raw, rows)
    ratios = []
    for number in range(rounds):
        ours = run(OURS, sys.executable, raw, tokenizer, folder / f"ours{number}")
        show("prepare", ours)
        peers = []
        for processes in (1, 2):
            out = folder / f"peer{number}{processes}"
            peers.append(run(PEER, peer_python, raw, tokenizer, out, str(processes)))
            show(f"datasets.map, {processes}", peers[-1])
            if not number:
                require_equal(folder / "ours0", out)
            shutil.rmtree(out)  # its caches take ten times what it writes
        better = min(peers, key=lambda one: one.seconds)
        ratios.append((better.seconds / ours.seconds, better.cpu_seconds / ours.cpu_seconds))
    for name, found in zip(("time", "CPU time"), zip(*ratios, strict=True), strict=True):
        print(
            f"datasets.map takes {statistics.median(found):.2f} times the {name} "
            f"({min(found):.2f} to {max(found):.2f})"
        )


def require_equal(ours: Path, peer: Path) -> None:
    """End the benchmark where the two wrote something else."""
    written = [ours / "train.parquet", ours / "eval.parquet"]
    if (found := prepare_rows.difference(written, [peer / "train.parquet"])) is not None:
        sys.exit(f"error: the two made something else of the same rows: {found}")


def grow(sizes: list[int], tokenizer: Path, folder: Path) -> None:
    """Ours over more and more rows, and the ratio of the last peak to the first."""
    peaks = []
    for rows in sizes:
        raw = folder / f"raw{rows}"
        conversations.write(raw, rows)
        one = run(OURS, sys.executable, raw, tokenizer, folder / f"grown{rows}")
        show("prepare", one)
        peaks.append(one.peak_bytes)
    print(f"peak memory at {sizes[-1]:,} rows is {peaks[-1] / peaks[0]:.3f} times the first")


def main() -> None:
    """Make the rows, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000, help="of the comparison")
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison")
    parser.add_argument("--peer-python", help="a Python that has `datasets` too")
    parser.add_argument("--memory", type=int, nargs="+", default=[], help="sizes to grow through")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "models/tokenizer")
    given = parser.parse_args()
    header = ("rows", 10), ("s", 9), ("CPU s", 9), ("rows/s", 10), ("tokens/s", 12), ("peak MB", 9)
    print(" " * 16 + "".join(f"{name:>{width}}" for name, width in header))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = given.tokenizer.absolute()
        if given.peer_python:
            compare(given.rows, given.rounds, given.peer_python, tokenizer, Path(folder))
        if given.memory:
            grow(given.memory, tokenizer, Path(folder))


if __name__ == "__main__":
    main()
