"""Launcher: one process a device, which torch's elastic agent starts and watches.

`launch` starts those of this host; those of other hosts are started by torchrun. Where torchrun or
Slurm has started all of them, `group.joined` takes part instead.
"""

import logging
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from types import FrameType
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousTimeoutError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from stages.shared.core.errors import SIGNALS, UserError
from stages.shared.core.machine import machine
from stages.shared.parallel import worker
from stages.shared.parallel.group import GONE, LOST, Group, Member, own_address
from stages.shared.parallel.interruption import Interruption

AGENT_SECONDS = 5  # for the agent to notice that all of its processes have ended
RUN_ID = "none"  # torchrun's, unless --rdzv-id is given


class WorkerLost(UserError):  # noqa: N818  (the message is the whole error)
    """A process was killed, or ended without an error: the same may succeed another time."""

    def __str__(self) -> str:
        return (
            f"{self.args[0]}. If the machine ran out of memory, lower QLORA_MICRO_BATCH_TOKENS or "
            "QLORA_DEVICES; then run it again."
        )


def compute(
    member: Member | None, target: torch.device, shards: int, work: Callable[..., Any], *args: Any
) -> Any:
    """Call `work(group, device, sharded, *args)`; returns what the first process returns.

    `member` as of `group.joined`, `shards` of `placement.shards_for`; `work` is one for `launch`
    that makes the same passes in all processes.
    """
    if member:
        return work(*member, shards > 1, *args)
    return launch(shards, target, work, shards > 1, *args)


def launch(size: int, device: torch.device, work: Callable[..., Any], *args: Any) -> Any:
    """Call `work(group, device, *args)` on each of `size` devices; returns the first's result.

    A single one runs in this process. `work` is a function at the top level of a module that is not
    the command itself, and its result can be pickled; a signal ends it at once, unless it enters an
    `Interruption`.

    Raises:
        UserError: raised by `work` in any process, or another host is gone.
        WorkerLost: a process of this host was ended from outside.
        Stopped: by a signal; raised by `work` too.
    """
    if size == 1:
        return work(Group(), device, *args)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # `_cause` reports
    nodes, endpoint = machine().nodes, machine().endpoint or "localhost:0"
    with TemporaryDirectory() as scratch, Interruption() as stop:
        folder = Path(scratch)
        (folder / "job").write_bytes(pickle.dumps((device.type, work, args)))
        config = LaunchConfig(
            min_nodes=nodes,
            max_nodes=nodes,
            nproc_per_node=size // nodes,
            run_id=RUN_ID,
            rdzv_backend="c10d",
            rdzv_endpoint=endpoint,
            rdzv_configs={"is_host": True},
            local_addr=own_address(endpoint) if nodes > 1 else "localhost",
            logs_specs=DefaultLogsSpecs(log_dir=f"{scratch}/logs"),
            max_restarts=0,
            monitor_interval=0.1,
        )
        agent = _Agent(config, folder)
        try:
            agent.watch(stop)
        finally:
            for process in _running(folder):
                os.kill(process, signal.SIGKILL)
            # The earliest error is the cause of the others.
            errors = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
            results = [*errors, *folder.glob("result")]
            if not results:
                print(file=sys.stderr)  # ends the progress bar of one that was killed
        if not results:
            raise _cause(agent.failure, size, stop)
        result: Any = pickle.loads(results[0].read_bytes())  # noqa: S301  (our own)
    if isinstance(result, Exception):
        raise result
    return result


class _Agent(Thread):
    """torch's elastic agent in a thread of its own.

    Signals are blocked in the thread that starts the processes, and so in each of them until it can
    act on one; the main thread hears them meanwhile, and passes them on.
    """

    failure: Exception | None = None

    def __init__(self, config: LaunchConfig, folder: Path) -> None:
        super().__init__(daemon=True)  # it may wait for another host when this one gives up
        self._config, self._folder = config, folder
        self.start()

    def run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        command = ("-m", worker.__name__, str(self._folder), str(os.getpid()))
        try:
            elastic_launch(self._config, sys.executable)(*command)
        except Exception as failure:  # raised by `launch`
            self.failure = failure

    def watch(self, stop: Interruption) -> None:
        """Pass signals on until all workers have ended, whatever the agent waits for."""
        signalled = set[int]()
        last = time.monotonic()
        signal.signal(signal.SIGTSTP, self._pause)
        while self.is_alive():
            self.join(0.2)
            running = _running(self._folder)
            if stop.heard:
                for process in running - signalled:
                    with suppress(ProcessLookupError):
                        os.kill(process, stop.heard)
                signalled |= running
            if running or not any(self._folder.glob("*.started")):
                last = time.monotonic()
            if time.monotonic() - last > AGENT_SECONDS:
                return

    def _pause(self, number: int, frame: FrameType | None) -> None:
        """Pass on Ctrl-Z and `fg`, which do not reach the workers' own sessions."""
        for process in (*_running(self._folder), os.getpid()):
            os.kill(process, signal.SIGSTOP)
        for process in _running(self._folder):
            os.kill(process, signal.SIGCONT)


def _running(folder: Path) -> set[int]:
    """Workers that have started, and have not ended."""
    running = {int(path.stem) for path in folder.glob("*.started")}
    for process in [*running]:
        with suppress(ChildProcessError):  # the agent has seen its end
            if not os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                continue
        running.remove(process)
    return running


def _cause(failure: Exception | None, size: int, stop: Interruption) -> Exception:
    """The error where no process has left a result or an error of its own."""
    if stop.heard:
        return stop.stopped("the stage", "before its end; `dvc repro` starts it again")
    if isinstance(failure, RendezvousTimeoutError):
        return UserError(
            f"QLORA_NODES: of {machine().nodes} hosts not all came in time. Start the others with "
            f"torchrun --rdzv-endpoint {machine().endpoint}, and look at their output."
        )
    if isinstance(failure, RendezvousConnectionError):
        return UserError(
            f"QLORA_ENDPOINT: {machine().endpoint} cannot be opened here. End what listens on its "
            "port, or set another one on all hosts."
        )
    if failure and not isinstance(failure, ChildFailedError):
        return failure
    failures = failure.failures.values() if isinstance(failure, ChildFailedError) else ()
    # The agent ends the others by SIGTERM, or they end as their peer is lost.
    causes = [f for f in failures if f.exitcode not in (LOST, -signal.SIGTERM)]
    if not causes and machine().nodes > 1:
        return UserError(GONE)
    who, how = f"one of {size} processes", "without a word"
    if causes:
        code = causes[0].exitcode
        who = f"process {causes[0].pid}, one of {size}"
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return WorkerLost(f"{who}, was stopped or ended from outside ({how})")
