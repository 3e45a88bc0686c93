"""Process group: how a process joins it, its collectives, and a watch on other hosts.

torchrun and Slurm tell a process its rank by environment variables. torch orders hosts by name;
here rank 0 is the leader's first process, which alone writes.
"""

import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import islice
from threading import Thread
from typing import Any, TypeVar

import psutil  # DVC's
import torch
from torch import distributed
from torch._utils import _flatten_dense_tensors, _take_tensors, _unflatten_dense_tensors
from torch.distributed.elastic.utils.store import barrier, synchronize

from stages.shared.core.command import dismiss
from stages.shared.core.errors import Stopped, UserError

LOST = 75  # exit status of a process whose peer is gone: the cause lies elsewhere
GONE = (
    "process group: a process on another host is gone, and its own host says why. Start all again: "
    "`dvc repro` goes on from the last checkpoint."
)
BUCKET_BYTES = 25 << 20  # as DistributedDataParallel's
BEAT_SECONDS, SILENT_SECONDS = 3, 30
LEAVE_SECONDS = 5
PATIENCE = timedelta(days=7)  # of a process, for another that evaluates or writes a checkpoint

T = TypeVar("T")


class PeerLost(Exception):  # noqa: N818  (the error is another process's)
    """Another process of the group is gone; its launcher reports the cause."""


@contextmanager
def peers() -> Iterator[None]:
    """Context of a collective: a closed connection raises `PeerLost`."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost from error


@dataclass(frozen=True)
class Group:
    """This process's rank, from 0, among `size` that share the work; `Group()` is one alone.

    A collective raises `PeerLost` where another process is gone; alone it does nothing.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress for all."""
        return self.rank == 0

    def all_reduce(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in place.

        In flat buckets: one by one, the adapter's 420 gradients take 0.4 of a step's 1.1 seconds.
        """
        for bucket in _take_tensors(tensors, BUCKET_BYTES) if self.size > 1 else ():
            flat = _flatten_dense_tensors(bucket)
            with peers():
                distributed.all_reduce(flat)
            for tensor, total in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
                tensor.copy_(total)

    def wait(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            with peers():
                distributed.barrier()

    def broadcast(self, value: T) -> T:
        """The value of rank 0, in every process."""
        values = [value]
        if self.size > 1:
            with peers():
                distributed.broadcast_object_list(values, 0)
        return values[0]

    def stream(self, values: Iterable[T]) -> Iterator[T]:
        """The values of rank 0, one after the other, in every process."""
        source = iter(values)
        while item := self.broadcast([*islice(source, 1)] if self.is_main else []):
            yield item[0]

    def gather(self, value: T) -> list[T]:
        """The values of all processes by rank, in every process."""
        values = [value] * self.size
        if self.size > 1:
            with peers():
                distributed.all_gather_object(values, value)
        return values

    def require_same(self, identity: dict[str, Any]) -> None:
        """Raise in every process a UserError that names what differs in any of them."""
        every = self.gather(identity)
        for rank in (self.rank, *range(self.size)):  # one that differs reports itself
            for name in sorted(every[0].keys() | every[rank].keys()):
                if every[0].get(name) != every[rank].get(name):
                    raise UserError(
                        f"{name}: process {rank} of {self.size} has another than the first, on "
                        "the leader. Bring its clone to the same commit, parameters and inputs."
                    )


Member = tuple[Group, torch.device]


@contextmanager
def joined(device: torch.device) -> Iterator[Member | None]:
    """Take part in a group that torchrun or Slurm has started; None where neither has."""
    if not is_started():
        yield None
        return
    error = os.fdopen(os.dup(sys.stderr.fileno()), "w")
    try:
        tell = partial(print, f"error: {GONE}", file=error, flush=True)
        with member(device.type, launched=False, lost=tell) as place:
            yield place
    except PeerLost:
        raise UserError(GONE) from None
    finally:
        os.dup2(error.fileno(), sys.stderr.fileno())


@contextmanager
def member(
    device_type: str, *, launched: bool, lost: Callable[[], object] = lambda: None
) -> Iterator[Member]:
    """This process's group and device, by the environment that torch's agent gives it.

    Rank 0 is the first that our launcher has `launched`; `lost` is called when another host is
    gone, before this process ends.
    """
    _set_interface()
    device, local = torch.device("cpu"), int(os.environ["LOCAL_RANK"])
    if device_type == "cuda":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:  # the processes share the cores
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size()))
    with peers():
        store, rank, size = _open_store(PATIENCE)
        own, seconds = str(launched).encode(), PATIENCE.total_seconds()
        leading = synchronize(store, own, rank, size, "qlora/launched/", seconds)
        rank = (rank - (leading.index(b"True") if b"True" in leading else 0)) % size
        if rank > 0:  # one progress bar, one warning
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=PATIENCE
        )
    if local_size() < size and local == 0:
        Thread(target=_watch_hosts, args=(rank, size, lost), daemon=True).start()
    stopped = None
    try:
        yield Group(rank, size), device
    except Stopped as signalled:
        stopped = signalled
    # Not after an error: once connections close the others end, and it is to be reported first.
    with suppress(RuntimeError):  # closed at once, a connection may lose the last sum on its way
        barrier(store, size, "qlora/done", LEAVE_SECONDS)
    distributed.destroy_process_group()
    if stopped:
        raise stopped


def is_started() -> bool:
    """Whether torchrun or Slurm has started this process as one of several."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")  # of srun, not of a batch script
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if not by_torchrun and (tasks == "1" or "SLURM_PROCID" not in os.environ):
        return False
    try:
        if not by_torchrun:
            _read_slurm()
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
            int(os.environ[name])
    except (KeyError, ValueError) as error:
        raise UserError(
            f"environment: of the variables of {'torchrun' if by_torchrun else 'srun'} one is "
            f"missing or wrong ({error}). Start by it, or unset TORCHELASTIC_RUN_ID and SLURM_*."
        ) from None
    return True


def _read_slurm() -> None:
    """Set torchrun's variables by those of srun."""
    names = {"RANK": "PROCID", "LOCAL_RANK": "LOCALID", "WORLD_SIZE": "STEP_NUM_TASKS"}
    os.environ |= {name: os.environ[f"SLURM_{theirs}"] for name, theirs in names.items()}
    counts = os.environ["SLURM_STEP_TASKS_PER_NODE"]  # 2(x3),1
    os.environ["LOCAL_WORLD_SIZE"] = re.split(r"\D", counts)[0]
    os.environ["MASTER_ADDR"] = first_host(os.environ["SLURM_STEP_NODELIST"])
    os.environ["MASTER_PORT"] = str(20_000 + int(os.environ["SLURM_JOB_ID"]) % 20_000)


def first_host(names: str) -> str:
    """The first of a list as Slurm writes it, `gpu[07-09,12],cpu1`."""
    return re.sub(r"^([^,\[]*)(?:\[(\d+)[^\]]*\])?.*", r"\1\2", names)


def local_size() -> int:
    """Processes on this host."""
    return int(os.environ["LOCAL_WORLD_SIZE"])


def own_address(endpoint: str) -> str:
    """This host's address on the network that an endpoint, host:port, is reached by."""
    host, _, port = endpoint.rpartition(":")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, int(port)))  # sends nothing
            return str(probe.getsockname()[0])
    except (OSError, OverflowError) as error:
        raise UserError(
            f"QLORA_ENDPOINT: {endpoint} cannot be reached ({error}). Set it to a name or "
            "address of the leader, which the other hosts know too."
        ) from None


def _set_interface() -> None:
    """Let gloo use the network of the leader's address: a host's name may be that of loopback."""
    address = own_address(f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}")
    for name, addresses in psutil.net_if_addrs().items():
        if address in [one.address for one in addresses]:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _open_store(timeout: timedelta) -> tuple[distributed.Store, int, int]:
    """The group's own keys in torch's store; this process's rank there, and how many there are.

    A group that torchrun restarts finds its predecessor's addresses in the store, and would wait
    for them (`TORCH_DISABLE_SHARE_RDZV_TCP_STORE` unset, torch 2.13).
    """
    store, rank, size = next(distributed.rendezvous("env://", timeout=timeout))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return distributed.PrefixStore(f"attempt {attempt}", store), rank, size


def _watch_hosts(rank: int, size: int, lost: Callable[[], object]) -> None:
    """End this process when another host is gone.

    A host that loses its power or its network closes no connection: collectives would wait for it
    for ever. Each first process of a host counts up in torch's store, and the leader's reads.
    """
    answered = time.monotonic()

    def beat() -> None:
        """Count up while all others do; a call waits without end where the network is cut."""
        nonlocal answered
        heard: dict[int, tuple[int, float]] = {}
        with suppress(RuntimeError):  # the leader's store cannot be reached
            store, *_ = _open_store(timedelta(seconds=SILENT_SECONDS))
            while all(answered - at < SILENT_SECONDS for _, at in heard.values()):
                store.add(f"qlora/beats/{rank}", 1)
                answered = time.monotonic()
                for other in range(size) if rank == 0 else ():
                    beats = store.add(f"qlora/beats/{other}", 0)
                    if heard.get(other, (0, 0.0))[0] != beats:
                        heard[other] = beats, answered
                time.sleep(BEAT_SECONDS)
        answered = -SILENT_SECONDS

    Thread(target=beat, daemon=True).start()
    while time.monotonic() - answered < SILENT_SECONDS:
        time.sleep(1)
    lost()
    dismiss()
    os._exit(LOST)
