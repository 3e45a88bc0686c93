"""Launcher: one process a device, which torch's elastic agent starts and watches.

`launch` starts those of this host. Where torchrun or Slurm has started them, `member.joined` takes
part. On several hosts the leader's are started by `launch`, and the others' by torchrun.
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
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousTimeoutError,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from stages.shared.core.errors import SIGNALS, UserError
from stages.shared.core.machine import machine
from stages.shared.parallel import member, worker
from stages.shared.parallel.group import Group
from stages.shared.parallel.interruption import Interruption

AGENT_SECONDS = 5  # for the agent to notice that all of its processes have ended
RUN_ID = "none"  # torchrun's, unless --rdzv-id is given


class WorkerLost(UserError):  # noqa: N818  (what is told, not raised here)
    """A process was killed, or ended without a word: the same may succeed another time."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}. If the machine ran out of memory, lower QLORA_MICRO_BATCH_TOKENS or "
            "QLORA_DEVICES; then run it again."
        )
        self.what = what


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
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we say it
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
            local_addr=member.own_address(endpoint) if nodes > 1 else "localhost",
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
            # The earliest error: those of the others, who wait in vain, come after it.
            errors = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
            left = [*errors, *folder.glob("answer")]
            if not left:
                print(file=sys.stderr)  # ends the progress bar of one that was killed
        answer: Any = _ended(agent.failure, size, stop)
        if left:
            answer = pickle.loads(left[0].read_bytes())  # noqa: S301  (our own)
    if isinstance(answer, Exception):
        raise answer
    return answer


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
        except Exception as failure:  # told by `launch`
            self.failure = failure

    def watch(self, stop: Interruption) -> None:
        """Pass signals on until all workers have ended, whatever the agent waits for."""
        told = set[int]()
        last = time.monotonic()
        signal.signal(signal.SIGTSTP, self._pause)
        while self.is_alive():
            self.join(0.2)
            running = _running(self._folder)
            for process in running - told:
                if stop.heard:
                    with suppress(ProcessLookupError):
                        os.kill(process, stop.heard)
                    told.add(process)
            if running or not any(self._folder.glob("*.started")):
                last = time.monotonic()
            if time.monotonic() - last > AGENT_SECONDS:
                return

    def _pause(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-Z and `fg`, which workers do not hear: their sessions are their own."""
        for process in (*_running(self._folder), os.getpid()):
            os.kill(process, signal.SIGSTOP)
        for process in _running(self._folder):
            os.kill(process, signal.SIGCONT)


def _running(folder: Path) -> set[int]:
    """Workers that have started, and have not ended."""

    def ended(process: int) -> bool:
        try:
            return bool(os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT))
        except ChildProcessError:  # the agent has seen its end
            return True

    started = (int(path.stem) for path in folder.glob("*.started"))
    return {process for process in started if not ended(process)}


def _ended(failure: Exception | None, size: int, stop: Interruption) -> Exception:
    """Why no process has left an answer or an error."""
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
    # Those that the agent ended itself, or that lost another one, are not the cause.
    consequences = (member.LOST, -signal.SIGTERM)
    failures = failure.failures if isinstance(failure, ChildFailedError) else {}
    causes = [f for f in failures.values() if f.exitcode not in consequences]
    if not causes and machine().nodes > 1:
        return UserError(member.GONE)
    who, how = f"one of {size} processes", "without a word"
    if causes:
        code = causes[0].exitcode
        who = f"process {causes[0].pid}, one of {size}"
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return WorkerLost(f"{who}, was stopped or ended from outside ({how})")
