"""Member: a process's place in the group, whoever has started it, and a watch on other hosts.

torchrun and Slurm tell a process its place by environment variables. torch orders hosts by name;
here the first process is the leader's, which alone writes.
"""

import fcntl
import os
import re
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Thread

import torch
from torch import distributed

from stages.shared.core.command import dismiss
from stages.shared.core.display import one_line
from stages.shared.core.errors import Stopped, UserError
from stages.shared.parallel.group import Group, PeerLost, peers

LOST = 75  # exit status of a process whose peer is gone: the cause lies elsewhere
GONE = (
    "process group: a process on another host is gone, and its own host says why. Start all again: "
    "`dvc repro` goes on from the last checkpoint."
)
BEAT_SECONDS, SILENT_SECONDS = 3, 30
LEAVE_SECONDS = 5
SIOCGIFADDR = 0x8915  # from linux/sockios.h: the address of an interface
PATIENCE = timedelta(days=7)  # of a process, for another that evaluates or writes a checkpoint


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[Group, torch.device] | None]:
    """Take part in a group that torchrun or Slurm has started; None where nobody has.

    Raises:
        UserError: another process is gone.
    """
    if not is_started():
        yield None
        return
    error = os.dup(sys.stderr.fileno())

    def tell() -> None:
        with os.fdopen(os.dup(error), "w") as stream:
            print(f"error: {one_line(GONE)}", file=stream)

    try:
        with member(device.type, launched=False, lost=tell) as place:
            yield place
    except PeerLost:
        raise UserError(GONE) from None
    finally:
        os.dup2(error, sys.stderr.fileno())


@contextmanager
def member(
    device_type: str, *, launched: bool, lost: Callable[[], None] = lambda: None
) -> Iterator[tuple[Group, torch.device]]:
    """This process's group and device, by the environment that torch's agent gives it.

    Of those that our launcher has `launched` the first is the first of all; `lost` is called when
    another host is gone, before this process ends.
    """
    set_interface()
    device, local = torch.device("cpu"), int(os.environ["LOCAL_RANK"])
    if device_type == "cuda":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:  # the processes share the cores
        share = len(os.sched_getaffinity(0)) // local_size()
        torch.set_num_threads(max(1, share))
    with peers():
        store, first, size = open_store(PATIENCE)
        rank = rank_from_leader(store, first, size, launched)
        if rank > 0:  # one progress bar, one warning
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=PATIENCE
        )
    if local_size() < size and local == 0:
        Heartbeat(rank, size, lost).start()
    stopped = None
    try:
        yield Group(rank, size), device
    except Stopped as asked:
        stopped = asked
    # After an error connections stay open until it has been told: the others end once they close.
    leave_together(store, size)
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


def open_store(timeout: timedelta) -> tuple[distributed.Store, int, int]:
    """The group's own keys in torch's store; this process's rank, and how many there are.

    A group that torchrun restarts finds its predecessor's addresses in the store, and would wait
    for them (`TORCH_DISABLE_SHARE_RDZV_TCP_STORE` unset, torch 2.13).
    """
    store, rank, size = next(distributed.rendezvous("env://", timeout=timeout))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return distributed.PrefixStore(f"attempt {attempt}", store), rank, size


def rank_from_leader(store: distributed.Store, rank: int, size: int, launched: bool) -> int:
    """The rank of a process, counted from the first that was `launched`, or else from 0."""
    store.set(f"qlora/launched/{rank}", str(int(launched)))
    leading = [store.get(f"qlora/launched/{other}") == b"1" for other in range(size)]
    return (rank - (leading.index(True) if any(leading) else 0)) % size


def leave_together(store: distributed.Store, size: int) -> None:
    """Wait a while for the others: a connection that is closed may lose the last sum on its way."""
    until = time.monotonic() + LEAVE_SECONDS
    with suppress(RuntimeError):  # the store is gone
        store.add("qlora/done", 1)
        while store.add("qlora/done", 0) < size and time.monotonic() < until:
            time.sleep(0.05)


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


def set_interface() -> None:
    """Let gloo use the network of the leader's address: a host's name may be that of loopback."""
    address = own_address(f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                found = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[20:24]
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(found) == address:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


class Heartbeat(Thread):
    """A sign of life for the other hosts, and a watch on theirs.

    A host that loses its power or its network closes no connection: collectives would wait for it
    for ever. Each first process of a host counts up in torch's store, and the leader's reads.
    """

    def __init__(self, rank: int, size: int, lost: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._rank, self._size, self._lost = rank, size, lost
        self._answered = time.monotonic()

    def run(self) -> None:
        """Until the process ends, or another host is gone: then end it."""
        Thread(target=self._beat, daemon=True).start()
        while time.monotonic() - self._answered < SILENT_SECONDS:
            time.sleep(1)
        self._lost()
        dismiss()
        os._exit(LOST)

    def _beat(self) -> None:
        """Count up while all others do; a call waits without end where the network is cut."""
        heard: dict[int, tuple[int, float]] = {}
        with suppress(RuntimeError):  # the leader's store cannot be reached
            store, *_ = open_store(timedelta(seconds=SILENT_SECONDS))
            while True:
                store.add(f"qlora/beats/{self._rank}", 1)
                now = self._answered = time.monotonic()
                for other in range(self._size) if self._rank == 0 else ():
                    beats = store.add(f"qlora/beats/{other}", 0)
                    if heard.get(other, (0, 0.0))[0] != beats:
                        heard[other] = beats, now
                silent = [other for other, (_, at) in heard.items() if now - at > SILENT_SECONDS]
                if silent:
                    break
                time.sleep(BEAT_SECONDS)
        self._answered = -SILENT_SECONDS
