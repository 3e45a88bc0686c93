"""Two hosts that train together, and what is told where one is lost: two network namespaces.

Run:    as root, `python -m benchmarks.hosts`; five trainings of a tiny model, three minutes of CPU
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pandas as pd

from benchmarks.common import ROOT, Workspace, publish
from stages.shared.core import files
from stages.shared.core.command import run
from stages.shared.core.errors import UserError
from tests import tiny

HOSTS = {"leader": "10.77.0.1", "follower": "10.77.0.2"}
ENDPOINT = f"{HOSTS['leader']}:29500"
PAGE = ROOT / "docs/clusters.md"
END, MINUTE = 400, 60  # seconds, on a busy machine
# What happens after the second checkpoint, to whom.
EVENTS = ("nothing", "SIGTERM to the leader", "follower lost", "leader lost", "link cut")


def ip(*arguments: str) -> str:
    """Output of the command `ip`."""
    command = ("ip", *arguments)
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603


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
                ip("netns", "delete", name)


def start(name: str, space: Workspace) -> subprocess.Popen[bytes]:
    """Start the training of a host; its output goes to a file beside its clone."""
    command = [sys.executable, "-m", "stages.train"]
    variables = {"QLORA_NODES": "2", "QLORA_ENDPOINT": ENDPOINT}
    if name == "follower":
        meet = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d")
        torchrun = ("-m", "torch.distributed.run", *meet, "--rdzv-endpoint", ENDPOINT)
        command, variables = [sys.executable, *torchrun, "-m", "stages.train"], {}
    variables |= {"QLORA_DEVICE": "cpu", "QLORA_CHECKPOINT_STEPS": "1", "OMP_NUM_THREADS": "1"}
    with space.root.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(  # noqa: S603
            ["ip", "netns", "exec", name, *command],  # noqa: S607
            cwd=space.root,
            env=os.environ | variables,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def read(clone: Path) -> str:
    """What a host has printed."""
    return clone.with_suffix(".log").read_text(errors="replace")


def lose(name: str) -> None:
    """Kill all that runs on a host."""
    for process in map(int, ip("netns", "pids", name).split()):
        os.kill(process, signal.SIGKILL)


def happen(event: str, running: dict[str, subprocess.Popen[bytes]], leader: Path) -> None:
    """Wait for the second checkpoint, and let the event happen."""
    while not list(leader.glob(".checkpoints/*/step-000002")):
        for name, process in running.items():
            if process.poll() is not None:
                raise UserError(f"{name}: ended early. {read(leader.with_name(name))[-500:]}")
        time.sleep(0.01)
    match event.split():
        case ["SIGTERM", *_]:
            running["leader"].send_signal(signal.SIGTERM)
        case [name, "lost"]:
            lose(name)
        case ["link", "cut"]:
            ip("-n", "follower", "link", "set", "follower", "down")


def row_of(event: str, work: Path) -> tuple[str, ...]:
    """Train until an event and on to the end of both hosts; a row of the table."""
    length = {"epochs": 2 if event == EVENTS[0] else 100, "patience": 10_000}
    params = {f"train.{key}": value for key, value in length.items()}
    clones = {name: Workspace(work / event / name, params) for name in HOSTS}
    for space in clones.values():
        for path in ("data", "models"):
            (space.root / path).mkdir()
        for path in ("prepared", "quantized", "tokenizer", "source.json"):
            space.link(f"{'data' if path == 'prepared' else 'models'}/{path}", work / path)
    with network():
        running = {"leader": start("leader", clones["leader"])}
        while ":29500 " not in ip("netns", "exec", "leader", "ss", "-ltn"):
            time.sleep(0.1)  # torchrun waits a minute for it
        running["follower"] = start("follower", clones["follower"])
        if event != EVENTS[0]:
            happen(event, running, clones["leader"].root)
        happened, row = time.monotonic(), [event]
        for name, process in running.items():
            with suppress(subprocess.TimeoutExpired):  # torchrun waits for a network that is cut
                process.wait(END if event == EVENTS[0] else MINUTE)
            seconds = time.monotonic() - happened
            said = read(clones[name].root).replace("\r", "\n").splitlines()
            lines = [line for line in said if line.startswith(("error:", "stopped:"))]
            row += [f"{process.returncode}", f"{seconds:.0f} s", "; ".join(lines) or "nothing"]
            print(row[-3:], flush=True)
        for name in HOSTS:
            lose(name)
    return tuple(row)


def main() -> None:
    """Publish a row an event."""
    try:
        ip("netns", "add", "qlora-try")
        ip("netns", "delete", "qlora-try")
    except (OSError, subprocess.CalledProcessError):
        print("skipped: `ip netns add` is not permitted here", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tiny.prepared(work / "prepared", conversations=36, held_out=8)
        files.write_json(work / "prepared/format.json", {"chat_template": "", "eos_token": "<end>"})
        tiny.quantize(work / "quantized", "nf4")
        tiny.tokenizer().save_pretrained(work / "tokenizer")
        files.write_json(work / "source.json", {"source": "path"})
        rows = [row_of(event, work) for event in EVENTS]
    columns = ["event", *(f"{name}: {x}" for name in HOSTS for x in ("exit code", "after", "line"))]
    where = "Two network namespaces of one machine, a process of the tiny model each."
    publish("hosts", pd.DataFrame(rows, columns=columns), where, PAGE)


if __name__ == "__main__":
    run(main)
