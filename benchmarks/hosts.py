"""Two hosts that train together, and what each prints where one is lost.

The hosts are two network namespaces with a link between them, a process of a tiny model each.

Writes: a table in docs/clusters.md
Run:    as root, python -m benchmarks.hosts      (five trainings, three minutes of CPU)
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.common import CLUSTERS_PAGE, Workspace, publish
from stages.shared.core import files
from stages.shared.core.command import run
from tests import tiny

HOSTS = {"leader": "10.77.0.1", "follower": "10.77.0.2"}
ENDPOINT = f"{HOSTS['leader']}:29500"


def ip(*arguments: str) -> str:
    """Output of the command `ip`."""
    return subprocess.check_output(["ip", *arguments], text=True)  # noqa: S603, S607


@contextmanager
def network() -> Iterator[None]:
    """A namespace for each host, joined by a link."""
    try:
        for name in HOSTS:
            ip("netns", "add", name)
        ip("link", "add", "leader", "type", "veth", "peer", "name", "follower")
        for name, address in HOSTS.items():
            ip("link", "set", name, "netns", name)
            ip("-n", name, "address", "add", f"{address}/24", "dev", name)
            for device in (name, "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield
    finally:
        for name in ip("netns", "list").split():
            if name in HOSTS:
                lose(name)
                ip("netns", "delete", name)


def lose(name: str) -> None:
    """Kill all processes of a host."""
    for process in map(int, ip("netns", "pids", name).split()):
        os.kill(process, signal.SIGKILL)


# What happens after the second checkpoint, to which the leader's process is passed.
EVENTS: dict[str, Callable[[subprocess.Popen[bytes]], object]] = {
    "nothing": lambda _: None,
    "SIGTERM to the leader": lambda leader: leader.send_signal(signal.SIGTERM),
    "follower lost": lambda _: lose("follower"),
    "leader lost": lambda _: lose("leader"),
    "link cut": lambda _: ip("-n", "follower", "link", "set", "follower", "down"),
}


def start(name: str, space: Workspace) -> subprocess.Popen[bytes]:
    """Start the training of a host; its output goes to a file beside its clone."""
    variables = {"QLORA_DEVICE": "cpu", "QLORA_CHECKPOINT_STEPS": "1", "OMP_NUM_THREADS": "1"}
    command = ["ip", "netns", "exec", name, sys.executable, "-m"]
    if name == "leader":
        variables |= {"QLORA_NODES": "2", "QLORA_ENDPOINT": ENDPOINT}
    else:
        command += ["torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={ENDPOINT}", "-m"]
    with space.root.with_suffix(".log").open("wb") as log:
        streams: Any = {"stdout": log, "stderr": log, "env": os.environ | variables}
        command += ["stages.train"]
        return subprocess.Popen(command, cwd=space.root, start_new_session=True, **streams)  # noqa: S603


def row_of(event: str, work: Path) -> list[str]:
    """Train until an event and on to the end of both hosts; a row of the table."""
    epochs, wait = (2, 400) if event == "nothing" else (100, 60)
    params = {"train.epochs": epochs, "train.patience": 10_000}
    clones = {name: Workspace(work / event / name, params) for name in HOSTS}
    for space in clones.values():
        for path in ("data/prepared", "models/quantized", "models/tokenizer", "models/source.json"):
            space.link(path, work / path)
    with network():
        leader = start("leader", clones["leader"])
        while leader.poll() is None and ":29500 " not in ip(
            "netns", "exec", "leader", "ss", "-ltn"
        ):
            time.sleep(0.1)  # torchrun waits a minute for it
        running = {"leader": leader, "follower": start("follower", clones["follower"])}
        checkpoints = clones["leader"].root / ".checkpoints"
        while leader.poll() is None and not list(checkpoints.glob("*/step-000002")):
            time.sleep(0.01)
        EVENTS[event](leader)
        began, row = time.monotonic(), [event]
        for name, process in running.items():
            with suppress(subprocess.TimeoutExpired):  # torchrun waits for a network that is cut
                process.wait(wait)
            seconds = time.monotonic() - began
            printed = clones[name].root.with_suffix(".log").read_text(errors="replace")
            lines = [x for x in printed.splitlines() if x.startswith(("error:", "stopped:"))]
            row += [f"{process.returncode}", f"{seconds:.0f} s", "; ".join(lines) or "nothing"]
    print(row, flush=True)
    return row


def main() -> None:
    """Publish a row an event."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tiny.prepared(work / "data/prepared", conversations=36, held_out=8)
        tiny.quantize(work / "models/quantized", "nf4")
        tiny.tokenizer().save_pretrained(work / "models/tokenizer")
        files.write_json(work / "models/source.json", {"source": "path"})
        rows = [row_of(event, work) for event in EVENTS]
    columns = ["event", *(f"{name}: {x}" for name in HOSTS for x in ("exit code", "after", "line"))]
    where = "Two network namespaces of one machine, a process of the tiny model each."
    publish("hosts", pd.DataFrame(rows, columns=columns), where, CLUSTERS_PAGE)


if __name__ == "__main__":
    run(main)
