"""Devices that train together: one process each, which torch's elastic launcher starts.

Each holds the whole model, computes its share of a step's micro-batches and of an evaluation, and
takes every optimizer step; losses and gradients are summed over all (all-reduce).
"""

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import resource_tracker
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import distributed
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.multiprocessing import (  # type: ignore[attr-defined]
    _prctl_pr_set_pdeathsig as die_with_parent,
)

from stages.shared.core.errors import Stopped, UserError
from stages.shared.core.watcher import SIGNALS
from stages.train.interruption import SET_UP, Interruption, heard

PATIENCE = timedelta(days=7)  # of a process, for another that evaluates or writes a checkpoint
BUCKET_BYTES = 25 << 20  # as DistributedDataParallel's


class PeerLost(Exception):  # noqa: N818  (the error is another process's)
    """A process of the group is gone; whoever started it knows why."""


@dataclass(frozen=True)
class Group:
    """This process's rank, from 0, among `size` that share a step; `Group()` is alone."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process shows and writes for all."""
        return self.rank == 0

    def all_reduce(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in place.

        In flat buckets: one by one, the adapter's 420 gradients take 0.4 of a step's 1.1 seconds.
        """
        for bucket in _buckets(tensors) if self.size > 1 else ():
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            with _peers():
                distributed.all_reduce(flat)
            totals = flat.split([tensor.numel() for tensor in bucket])
            for tensor, total in zip(bucket, totals, strict=True):
                tensor.copy_(total.view_as(tensor))

    def any(self, here: bool, device: torch.device) -> bool:
        """Whether it is so in any of the processes."""
        if self.size == 1:
            return here
        votes = torch.tensor(float(here), device=device)
        self.all_reduce([votes])
        return votes.item() > 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            with _peers():
                distributed.barrier()


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Runs of tensors of one dtype, of at most `BUCKET_BYTES` or one tensor."""
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        size = sum(other.nbytes for other in bucket) + tensor.nbytes
        if bucket and (size > BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # a connection was closed
        raise PeerLost from error


def launch(size: int, device: torch.device, work: Callable[..., Any], *args: Any) -> Any:
    """Call `work(group, device, *args)` on each of `size` devices; returns what the first returns.

    Args:
        size: one process runs in this one, without any machinery.
        device: cpu, or cuda: then each process has the device of its rank.
        work: a function at the top level of a module; what it returns can be pickled.
        args: more arguments for `work`.

    Raises:
        UserError: raised by `work` in any process, or one was ended from outside.
        Stopped: raised by `work` when a signal came.
    """
    if size == 1:
        return work(Group(), device, *args)
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # a line of ours says it
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with TemporaryDirectory() as scratch, Interruption() as stop:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=size,
            run_id="dvc-qlora",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            logs_specs=DefaultLogsSpecs(log_dir=f"{scratch}/logs"),
            max_restarts=0,
            monitor_interval=0.1,
        )
        errors = _Errors(Path(scratch))
        # Signals are blocked in the thread that starts the processes, and so in each of them until
        # it can act on one; this thread hears them meanwhile, and passes them on.
        with ThreadPoolExecutor(1, initializer=_block_signals) as thread:
            agent = thread.submit(
                elastic_launch(config, _on_device), device.type, errors, work, args
            )
            told = set[int]()
            try:
                while not wait([agent], timeout=0.2).done:
                    children = multiprocessing.active_children()
                    for child in children:
                        if stop.heard and child.pid and child.pid not in told:
                            os.kill(
                                child.pid, stop.heard
                            )  # a second SIGINT would be obeyed at once
                            told.add(child.pid)
                    for child in children if errors.first() else ():
                        child.kill()
            finally:
                for child in multiprocessing.active_children():
                    child.kill()
        try:
            answer = agent.result()[0]
        except ChildFailedError as failed:
            if stop.heard and not errors.first():  # one left its setup, and the others lost it
                raise stop.stopped(SET_UP) from None
            raise (errors.first() or _ended(failed, size)) from None
    if isinstance(answer, Stopped):
        raise answer
    return answer


def _ended(failed: ChildFailedError, size: int) -> UserError:
    _, failure = failed.get_first_failure()
    return UserError(
        f"process {failure.pid}, one of {size} that train together, was stopped or ended from "
        f"outside ({failure.signal_name()}). If the machine ran out of memory, lower "
        "QLORA_MICRO_BATCH_TOKENS or QLORA_DEVICES; then run it again."
    )


def _block_signals() -> None:
    # What a killed process leaves, the tracker would tell after the line that matters.
    sys.warnoptions.append("ignore:resource_tracker")
    resource_tracker.ensure_running()  # to start it later would unblock them
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


class _Errors:
    """Errors of processes, by way of files: pickled, with the traceback of a bug as a note."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def record(self, error: Exception) -> None:
        if not isinstance(error, UserError):
            error.add_note(traceback.format_exc())
        partial = self.folder / f"{os.getpid()}.partial"
        partial.write_bytes(pickle.dumps(error))
        partial.rename(partial.with_suffix(".error"))

    def first(self) -> Exception | None:
        """The earliest: those of the others, who wait in vain, come after it."""
        files = sorted(self.folder.glob("*.error"), key=lambda p: p.stat().st_mtime_ns)
        return pickle.loads(files[0].read_bytes()) if files else None  # noqa: S301  (our own)


def _on_device(
    device_type: str, errors: _Errors, work: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    """The life of each process that the launcher starts."""
    parent = multiprocessing.parent_process()
    die_with_parent(signal.SIGKILL)
    if parent is None or os.getppid() != parent.pid:  # it had gone before
        os._exit(1)
    for number in heard():  # once the training has ended, which may be before its processes do
        signal.signal(number, lambda *_: None)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank > 0:  # one progress bar, one warning
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:  # the processes share the cores
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // size))
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        return work(Group(rank, size), device, *args)
    except Stopped as stopped:
        return stopped
    except PeerLost:
        _wait_to_be_ended()
    except Exception as error:
        errors.record(error)
        sys.exit(1)
    finally:
        distributed.destroy_process_group()


def _wait_to_be_ended() -> None:
    """By the process that started this one: it looks for the one that ended first, the cause."""
    for number in heard():
        signal.signal(number, signal.SIG_DFL)
    time.sleep(PATIENCE.total_seconds())
