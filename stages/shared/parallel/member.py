"""Member: a process's place in the group, whoever has started it."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

from stages.shared.core.display import one_line
from stages.shared.core.errors import Stopped, UserError
from stages.shared.parallel import hosts
from stages.shared.parallel.group import Group, PeerLost, peers

PATIENCE = timedelta(days=7)  # of a process, for another that evaluates or writes a checkpoint


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

    def tell() -> None:
        with os.fdopen(os.dup(error), "w") as stream:
            print(f"error: {one_line(hosts.GONE)}", file=stream)

    try:
        with member(device.type, launched=False, lost=tell) as place:
            yield place
    except PeerLost:
        raise UserError(hosts.GONE) from None
    finally:
        os.dup2(error, sys.stderr.fileno())


@contextmanager
def member(
    device_type: str, *, launched: bool, lost: Callable[[], None] = lambda: None
) -> Iterator[tuple[Group, torch.device]]:
    """This process's group and device, by the environment that torch's agent gives it.

    Args:
        device_type: cpu or cuda.
        launched: our launcher has started it: the first of these is the first of all.
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
    with peers():
        store, first, size = hosts.open_store(PATIENCE)
        rank = hosts.rank_from_leader(store, first, size, launched)
        if rank > 0:  # one progress bar, one warning
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=PATIENCE
        )
    if hosts.local_size() < size and local == 0:
        hosts.Heartbeat(rank, size, lost).start()
    stopped = None
    try:
        yield Group(rank, size), device
    except Stopped as asked:
        stopped = asked
    # After an error connections stay open until it has been told: the others end once they close.
    hosts.leave_together(store, size)
    distributed.destroy_process_group()
    if stopped:
        raise stopped
