"""Processes that train together: one a GPU, or forks of one process that share a CPU's cores.

Each computes its share of a step's micro-batches, then losses and gradients are summed over all
(all-reduce). Devices are started by torch's elastic launcher; each holds the whole model, takes
every optimizer step, and scores its share of an evaluation. CPU workers are forked after the model
is loaded: they share its pages, compute gradients alone, and see each optimizer step of the first
process in memory that all of them map. A core each, they do not wait for one another at each of
the thousands of matmuls of a step, as threads do.
"""

import gc
import logging
import math
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import resource_tracker
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import distributed, nn
from torch._utils import _flatten_dense_tensors, _take_tensors, _unflatten_dense_tensors
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.multiprocessing import (  # type: ignore[attr-defined]
    _prctl_pr_set_pdeathsig as die_with_parent,
)

from stages.shared.core.errors import Stopped, UserError
from stages.shared.model import packing
from stages.shared.model.packing import Example
from stages.shared.weights import heap
from stages.train.interruption import HEARD, Interruption

PATIENCE = timedelta(days=7)  # of a process, for another that evaluates or writes a checkpoint
ALIGNMENT = 64  # bytes, a cache line
BUCKET_BYTES = 25 << 20  # as DistributedDataParallel's


class PeerLost(Exception):  # noqa: N818  (the error is another process's)
    """A process of the group is gone; whoever started it knows why."""


@dataclass(frozen=True)
class Group:
    """This process among those that share a step; `Group()` is alone.

    Attributes:
        rank: from 0, the main process.
        size: how many processes.
        workers: process ids of the forks, where the main process has them.
        shared_bytes: memory that forks share; None on devices, which share none.
    """

    rank: int = 0
    size: int = 1
    workers: tuple[int, ...] = ()
    shared_bytes: int | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process shows and writes for all."""
        return self.rank == 0

    def divide(self, examples: Sequence[Example], max_tokens: int) -> list[list[list[Example]]]:
        """The micro-batches of each process; of too uneven ones on a CPU, for fewer."""
        uneven = math.inf if self.shared_bytes is None else packing.UNEVEN
        return packing.partition(examples, max_tokens, self.size, uneven)

    @contextmanager
    def cores(self, sharing: int) -> Iterator[None]:
        """This process's part of the cores, while `sharing` forks compute."""
        before = torch.get_num_threads()
        if self.shared_bytes is not None:
            torch.set_num_threads(max(1, before // sharing))
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def own_bytes(self, total: int) -> int:
        """The memory of one process, if that of all forks together is `total`."""
        shared = min(self.shared_bytes or 0, total)
        return total if self.shared_bytes is None else shared + (total - shared) // self.size

    def workers_peak_bytes(self) -> int:
        """The most memory that the forks held of their own, together."""
        return sum(map(_own_peak_bytes, self.workers))

    def all_reduce(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in place.

        In flat buckets: one by one, the adapter's 420 gradients take 0.4 of a step's 1.1 seconds.
        """
        if self.size > 1:
            for bucket in _take_tensors(list(tensors), BUCKET_BYTES):
                flat = _flatten_dense_tensors(bucket)
                with _peers():
                    distributed.all_reduce(flat)
                for tensor, total in zip(
                    bucket, _unflatten_dense_tensors(flat, bucket), strict=True
                ):
                    tensor.copy_(total)

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
            try:
                while not wait([agent], timeout=0.2).done:
                    children = multiprocessing.active_children()
                    for child in children if stop.heard else ():
                        child.terminate()
                    for child in children if errors.first() else ():
                        child.kill()
            finally:
                for child in multiprocessing.active_children():
                    child.kill()
        try:
            answer = agent.result()[0]
        except ChildFailedError as failed:
            if stop.heard and not errors.first():  # one left its setup, and the others lost it
                message = f"training was ended by {stop.heard.name} while it was set up; "
                raise Stopped(message + "`dvc repro` begins where it began", stop.heard) from None
            raise (errors.first() or _ended(failed, size)) from None
    if isinstance(answer, Stopped):
        raise answer
    return answer


def _ended(failed: ChildFailedError, size: int) -> UserError:
    _, failure = failed.get_first_failure()
    return UserError(
        f"process {failure.pid}, one of {size} that train together, was ended from outside "
        f"({failure.signal_name()}). If the machine ran out of memory, lower "
        "QLORA_MICRO_BATCH_TOKENS or QLORA_DEVICES; then run it again."
    )


def _block_signals() -> None:
    resource_tracker.ensure_running()  # to start it later would unblock them
    signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)


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
    die_with_parent(signal.SIGKILL)
    for number in HEARD:  # once the training has ended, which may be before its processes do
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


@contextmanager
def forked(
    size: int, trainable: Sequence[nn.Parameter], work: Callable[[Group], None]
) -> Iterator[Group]:
    """Start CPU workers that call `work(group)`, for as long as the block runs.

    They have the model as it stands, and the signals of this process are none of theirs.

    Args:
        size: processes, this one among them; one starts none.
        trainable: moved into memory that all share; from then on changed in place, not replaced.
        work: joins in every all-reduce of the block.

    Raises:
        UserError: raised by `work`, or a worker was ended from outside.
    """
    if size == 1:
        yield Group()
        return
    for parameter, place in zip(trainable, _shared_like(trainable), strict=True):
        parameter.data = place.copy_(parameter.data)
    gc.collect()
    gc.freeze()  # looking for garbage writes to what is looked at: pages would be copied
    heap.trim()
    shared = heap.resident_bytes()
    with TemporaryDirectory() as scratch:
        errors, children = _Errors(Path(scratch)), list[int]()

        def join(rank: int) -> Group:
            distributed.init_process_group(
                "gloo", f"file://{scratch}/store", timeout=PATIENCE, rank=rank, world_size=size
            )
            return Group(rank, size, tuple(children), shared)

        def fork() -> None:
            for rank in range(1, size):
                if child := os.fork():
                    children.append(child)
                    continue
                try:
                    die_with_parent(signal.SIGKILL)  # and its locks with it
                    with suppress(PeerLost):
                        work(join(rank))
                    _wait_to_be_ended()
                except Exception as error:
                    errors.record(error)
                finally:  # what the training does at its end is not its fork's to do
                    os._exit(1)

        # Forked by a thread that has never started threads of OpenMP: a fork of one that has waits
        # for them for ever, as they are not forked with it.
        with ThreadPoolExecutor(1, initializer=_block_signals) as thread:
            try:
                thread.submit(fork).result()
                yield join(0)
            except PeerLost:
                raise (errors.first() or _gone()) from None
            finally:
                for child in children:
                    with suppress(ProcessLookupError, ChildProcessError):
                        os.kill(child, signal.SIGKILL)
                        os.waitpid(child, 0)
                if distributed.is_initialized():
                    distributed.destroy_process_group()
                gc.unfreeze()


def _gone() -> UserError:
    """Of the worker that ended first; the others wait."""
    ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
    return UserError(
        f"process {ended.si_pid if ended else '?'}, a worker of the training, was ended from "
        "outside. If the machine ran out of memory, lower QLORA_MICRO_BATCH_TOKENS or set "
        "QLORA_WORKERS to 1."
    )


def _wait_to_be_ended() -> None:
    """By the process that started this one: it looks for the one that ended first, the cause."""
    for number in HEARD:
        signal.signal(number, signal.SIG_DFL)
    time.sleep(PATIENCE.total_seconds())


def _shared_like(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors of the same shapes and dtypes, all zero, in memory that forks share."""
    sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]
    buffer = torch.frombuffer(mmap.mmap(-1, sum(sizes)), dtype=torch.uint8)
    return [
        part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for part, tensor in zip(buffer.split(sizes), tensors, strict=True)
    ]


def _own_peak_bytes(process: int) -> int:
    """The most memory that a process held of its own, what it shares left out."""
    kibibytes = {
        key: int(value.split()[0])
        for name in ("smaps_rollup", "status")
        for key, _, value in (
            line.partition(":")
            for line in Path(f"/proc/{process}/{name}").read_text().splitlines()
            if line.startswith(("Private", "VmHWM", "VmRSS"))
        )
    }
    own = sum(size for key, size in kibibytes.items() if key.startswith("Private"))
    return 1024 * (own + kibibytes["VmHWM"] - kibibytes["VmRSS"])
