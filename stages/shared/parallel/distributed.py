"""Devices that train together: one process each, which torch's elastic launcher starts.

Each holds the whole model, computes its share of a step's micro-batches and of an evaluation, and
takes every optimizer step; losses and gradients are summed over all (all-reduce).

`launch` starts the processes of this host. Where torchrun or Slurm has started them, `joined` takes
part. On several hosts the leader's are started by `launch`, and the others' by torchrun.
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
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import resource_tracker
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousTimeoutError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.multiprocessing import (  # type: ignore[attr-defined]
    _prctl_pr_set_pdeathsig as die_with_parent,
)

from stages.shared.core.display import one_line
from stages.shared.core.errors import Stopped, UserError
from stages.shared.core.machine import machine
from stages.shared.core.watcher import SIGNALS
from stages.shared.parallel import hosts
from stages.shared.parallel.interruption import SET_UP, Interruption, heard

PATIENCE = timedelta(days=7)  # of a process, for another that evaluates or writes a checkpoint
BUCKET_BYTES = 25 << 20  # as DistributedDataParallel's
GRACE_SECONDS = 10  # between an error of a process and the end of those that do not notice
LOCAL_SECONDS = 30  # in which the launcher ends a process whose peer on this host is gone
ALONE_SECONDS = 45  # for which the agent waits for other hosts once this one's processes are gone
RUN_ID = "none"  # torchrun's, unless --rdzv-id is given

T = TypeVar("T")


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

    def broadcast(self, value: T) -> T:
        """The first process's value, in each."""
        values = [value]
        if self.size > 1:
            with _peers():
                distributed.broadcast_object_list(values, 0)
        return values[0]

    def require_same(self, identity: dict[str, Any]) -> None:
        """Refuse in every process what is not the first one's in any, before the first step.

        Args:
            identity: what shapes the training, by the name that a user knows it by.
        """
        if self.size == 1:
            return
        every: list[dict[str, Any]] = [{}] * self.size
        with _peers():
            distributed.all_gather_object(every, identity)
        for rank in (self.rank, *range(self.size)):  # of all that differ, oneself first
            for name in sorted(every[0].keys() | every[rank].keys()):
                if every[0].get(name) != every[rank].get(name):
                    raise UserError(
                        f"{name}: process {rank} of {self.size} has another than the first, on "
                        "the leader. Bring its clone to the same commit, parameters and inputs."
                    )


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
        size: devices of all hosts; one process runs in this one, without any machinery.
        device: cpu, or cuda: then each process has the device of its rank on its host.
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
    nodes, endpoint = machine().nodes, machine().endpoint or "localhost:0"
    address = hosts.own_address(endpoint) if nodes > 1 else "localhost"
    with TemporaryDirectory() as scratch, Interruption() as stop:
        config = LaunchConfig(
            min_nodes=nodes,
            max_nodes=nodes,
            nproc_per_node=size // nodes,
            run_id=RUN_ID,
            rdzv_backend="c10d",
            rdzv_endpoint=endpoint,
            rdzv_configs={"is_host": True},
            local_addr=address,
            logs_specs=DefaultLogsSpecs(log_dir=f"{scratch}/logs"),
            max_restarts=0,
            monitor_interval=0.1,
        )
        errors = _Errors(Path(scratch))
        agent = _Agent(config, device.type, errors, work, args)
        try:
            agent.watch(stop, errors)
        finally:
            for child in multiprocessing.active_children():
                child.kill()
        answer = errors.first() or errors.answer()
        if answer is None and stop.heard:  # one left its setup, and the others lost it
            answer = stop.stopped(SET_UP)
        if answer is None or isinstance(agent.failure, ChildFailedError):
            answer = answer or _ended(agent.failure, size)
        if isinstance(answer, Exception):
            raise answer
    return answer


class _Agent(Thread):
    """torch's elastic agent in a thread of its own.

    Signals are blocked in the thread that starts the processes, and so in each of them until it can
    act on one; the main thread hears them meanwhile, and passes them on.
    """

    failure: Exception | None = None

    def __init__(self, config: LaunchConfig, *args: Any) -> None:
        super().__init__(daemon=True)  # it may wait for another host when this one gives up
        self._config, self._args = config, args
        self.start()

    def run(self) -> None:
        # What a killed process leaves, the tracker would tell after the line that matters.
        sys.warnoptions.append("ignore:resource_tracker")
        resource_tracker.ensure_running()  # to start it later would unblock them
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            elastic_launch(self._config, _on_device)(*self._args)
        except Exception as failure:  # told by `launch`
            self.failure = failure

    def watch(self, stop: Interruption, errors: "_Errors") -> None:
        """Pass signals on, until the processes have ended, or those of another host are lost."""
        told = set[int]()
        there, closed = time.monotonic(), 0.0
        while self.is_alive():
            self.join(0.2)
            now, children = time.monotonic(), multiprocessing.active_children()
            if stop.heard:
                errors.close()
            for child in children if stop.heard else ():
                if stop.heard and child.pid and child.pid not in told:
                    os.kill(child.pid, stop.heard)
                    told.add(child.pid)
            closed = closed or (now if errors.first() else 0.0)
            for child in children if closed and now - closed > GRACE_SECONDS else ():
                child.kill()
            if children or not (errors.is_closed() or errors.starts()):
                there = now
            patience = 0 if errors.is_closed() else ALONE_SECONDS
            if self._config.max_nodes > 1 and now - there > patience:
                return  # the agent waits for the other hosts


def _ended(failed: Exception | None, size: int) -> Exception:
    if isinstance(failed, RendezvousTimeoutError):
        return UserError(
            f"QLORA_NODES: of {machine().nodes} hosts not all came in time. Start the others with "
            f"torchrun --rdzv-endpoint {machine().endpoint}, and look at their output."
        )
    if failed is not None and not isinstance(failed, ChildFailedError):
        return failed
    failure = failed.get_first_failure()[1] if failed else None
    if failure is None or failure.exitcode == hosts.LOST:
        return UserError(hosts.GONE)
    return UserError(
        f"process {failure.pid}, one of {size} that train together, was stopped or ended from "
        f"outside ({failure.signal_name()}). If the machine ran out of memory, lower "
        "QLORA_MICRO_BATCH_TOKENS or QLORA_DEVICES; then run it again."
    )


class _Errors:
    """Errors of this host's processes, and the answer, as files: pickled.

    The traceback of a bug is a note.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def record(self, error: Exception) -> None:
        if not isinstance(error, UserError):
            error.add_note(traceback.format_exc())
        self._write(error, f"{os.getpid()}.error")

    def _write(self, value: Any, name: str) -> None:
        partial = self.folder / f"{os.getpid()}.partial"
        partial.write_bytes(pickle.dumps(value))
        partial.rename(self.folder / name)

    def record_answer(self, answer: Any) -> None:
        self._write(answer, "answer")

    def answer(self) -> Any:
        """The first process's, or why all stopped; None without one."""
        file = self.folder / "answer"
        return pickle.loads(file.read_bytes()) if file.exists() else None  # noqa: S301

    def close(self) -> None:
        """Let processes that wait to be ended end."""
        (self.folder / "closed").touch()

    def is_closed(self) -> bool:
        return (self.folder / "closed").exists() or self.first() is not None

    def count_start(self) -> None:
        (self.folder / f"{os.getpid()}.started").touch()

    def starts(self) -> int:
        """Processes that were started so far."""
        return len(list(self.folder.glob("*.started")))

    def first(self) -> Exception | None:
        """The earliest: those of the others, who wait in vain, come after it."""
        files = sorted(self.folder.glob("*.error"), key=lambda p: p.stat().st_mtime_ns)
        return pickle.loads(files[0].read_bytes()) if files else None  # noqa: S301  (our own)


def _on_device(
    device_type: str, errors: _Errors, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """The life of each process that the launcher starts."""
    parent = multiprocessing.parent_process()
    die_with_parent(signal.SIGKILL)
    if parent is None or os.getppid() != parent.pid:  # it had gone before
        os._exit(1)
    for number in heard():  # once the training has ended, which may be before its processes do
        signal.signal(number, lambda *_: None)
    errors.count_start()
    try:
        with _member(device_type, leads=True, lost=errors.record) as (group, device):
            answer = work(group, device, *args)
            if group.is_main:
                errors.record_answer(answer)
    except Stopped as stopped:
        errors.record_answer(stopped)
    except PeerLost:
        _wait_to_be_ended(errors)
    except Exception as error:  # not raised: the launcher would print a page of its own
        errors.record(error)


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[Group, torch.device] | None]:
    """Take part in a group that torchrun or Slurm has started; None where nobody has.

    Raises:
        UserError: another process is gone.
    """
    if not hosts.is_started():
        yield None
        return
    error = os.dup(sys.stderr.fileno())

    def tell(problem: Exception) -> None:
        with os.fdopen(os.dup(error), "w") as stream:
            print(f"error: {one_line(str(problem))}", file=stream)

    try:
        with _member(device.type, leads=False, lost=tell) as member:
            yield member
    except PeerLost:
        raise UserError(hosts.GONE) from None
    finally:
        os.dup2(error, sys.stderr.fileno())


@contextmanager
def _member(
    device_type: str, leads: bool, lost: Callable[[Exception], None]
) -> Iterator[tuple[Group, torch.device]]:
    """This process's place in the group, and its device.

    Args:
        device_type: cpu or cuda.
        leads: `launch` has started it: the first of these is the first of all.
        lost: called when another host is gone, before this process ends.
    """
    hosts.set_interface()
    device, local = torch.device("cpu"), int(os.environ["LOCAL_RANK"])
    if device_type == "cuda":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:  # the processes share the cores
        share = len(os.sched_getaffinity(0)) // hosts.local_size()
        torch.set_num_threads(max(1, share))
    with _peers():
        store, first, size = next(distributed.rendezvous("env://", timeout=PATIENCE))
        rank = hosts.rank_from_leader(store, first, size, leads)
        if rank > 0:  # one progress bar, one warning
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=PATIENCE
        )
    if hosts.local_size() < size and local == 0:
        hosts.Heartbeat(rank, size, lost).start()
    try:
        yield Group(rank, size), device
        hosts.leave_together(store, size)
    except Stopped:
        hosts.leave_together(store, size)
        raise
    finally:
        distributed.destroy_process_group()


def _wait_to_be_ended(errors: _Errors) -> None:
    """By an error of another process, or by the launcher, which knows who ended first.

    If that is on another host, or a connection failed while the group formed, nobody does.
    """
    for number in heard():
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    until = time.monotonic() + LOCAL_SECONDS
    while not errors.is_closed():
        time.sleep(0.1)
        if time.monotonic() > until:
            sys.exit(hosts.LOST)
